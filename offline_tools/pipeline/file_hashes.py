"""Hashes of large files that are not read again while nothing speaks for a change.

Owns: `FileHashes`. Must not import any step. A dataset's videos take longer to read than most
steps take to run, so their hashes are kept with size and modification time. Who writes the same
number of bytes and sets the old time back is not noticed.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path

from groot_int8_ros.errors import OutputError
from groot_int8_ros.policy.files import atomic_file, read_json, sha256_of_file

FILE_NAME = "videos.json"

# Size in bytes, modification time in nanoseconds, SHA-256.
_Entry = tuple[int, int, str]


class FileHashes:
    """SHA-256 of files, kept in a folder from run to run.

    Args:
        folder: Where `videos.json` lies. Nothing is kept while there is no such folder; what lies
            there and cannot be used counts as nothing.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / FILE_NAME
        self._known = _read(self._file)

    def of(self, files: Sequence[Path]) -> list[str]:
        """Return the SHA-256 of each file, and keep those of these files alone.

        Args:
            files: They are read where path, size or modification time is new.

        Raises:
            OSError: A file cannot be read.
        """
        # Before the first is read: what changes meanwhile has another time at the next call.
        states = {path.resolve(): path.stat() for path in files}
        found: dict[str, _Entry] = {}
        unread = []
        for path, state in states.items():
            entry = self._known.get(str(path))
            if entry is not None and entry[:2] == (state.st_size, state.st_mtime_ns):
                found[str(path)] = entry
            else:
                unread.append(path)
        if unread:
            size_gb = sum(states[path].st_size for path in unread) / 1e9
            print(f"reading {len(unread)} new or changed videos, {size_gb:.1f} GB", flush=True)
        for path in unread:
            state = states[path]
            found[str(path)] = state.st_size, state.st_mtime_ns, sha256_of_file(path)
        if found != self._known:
            self._known = found
            self._write()
        return [found[str(path.resolve())][2] for path in files]

    def _write(self) -> None:
        # A plan may be asked for where nothing can be written.
        with contextlib.suppress(OutputError):
            if self._file.parent.is_dir():
                with atomic_file(self._file) as temporary:
                    text = json.dumps(self._known, indent=2) + "\n"
                    temporary.write_text(text, encoding="utf-8")


def _read(file: Path) -> dict[str, _Entry]:
    try:
        content = read_json(file)
        return {
            str(path): (int(size), int(mtime_ns), str(sha256))
            for path, (size, mtime_ns, sha256) in content.items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
