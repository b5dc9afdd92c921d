"""Writing files so that a crash, a full disk or a Ctrl-C never leaves half of one.

Owns: atomic writes and content hashes. Must not import anything of the package but its errors.
A writer works on a temporary name in the same folder and renames at the end; POSIX makes that
rename atomic, so a reader sees the old content or the new, never a mixture.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from groot_int8_ros.errors import OutputError

_HASH_BLOCK_BYTES = 4 << 20
_TEMPORARY_PREFIX = ".partial-"


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of a file's content as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _explain(error: OSError, target: Path) -> OutputError:
    # NumPy reports a write that was cut short without an errno.
    reason = error.strerror or f"the disk may be full ({error})"
    where = f" ({error.filename})" if error.filename else ""
    return OutputError(
        f"cannot write {target}: {reason}{where}. Nothing was left behind; free space or choose a "
        "folder that is writable, then run the command again."
    )


def refuse_occupied(target: Path) -> None:
    """Refuse to write where something is already.

    Raises:
        OutputError: `target` is a file, or a folder that is not empty.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise OutputError(
            f"{target} exists and is not empty, so nothing was written to it: name a new folder, "
            "or remove this one first"
        )


@contextlib.contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Give a temporary path to write to, renamed to `target` when the block ends well.

    Args:
        target: The final path. Its folder is made if it is missing.

    Yields:
        A path in the same folder. The file there is removed if the block raises.

    Raises:
        OutputError: The folder cannot be made or written, or the disk is full.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(
            prefix=_TEMPORARY_PREFIX, suffix=target.suffix, dir=target.parent
        )
        os.close(handle)
    except OSError as error:
        raise _explain(error, target) from error
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o666 & ~_current_umask())
        os.replace(temporary, target)
    except OSError as error:
        raise _explain(error, target) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Give a temporary folder to fill, renamed to `target` when the block ends well.

    An existing `target` is replaced only then; until that moment it stays whole.

    Args:
        target: The final folder.

    Yields:
        A folder beside it, removed if the block raises.

    Raises:
        OutputError: The folder cannot be made or written, or the disk is full.
    """
    target = target.absolute()
    working: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        working = Path(
            tempfile.mkdtemp(prefix=f"{_TEMPORARY_PREFIX}{target.name}-", dir=target.parent)
        )
        temporary, retired = working / "new", working / "old"
        temporary.mkdir()
        yield temporary
        try:
            if target.exists():
                os.replace(target, retired)
            os.replace(temporary, target)
        except BaseException:
            # Also for an interrupt between the two renames: the old content is still whole.
            if retired.exists() and not target.exists():
                os.replace(retired, target)
            raise
    except OSError as error:
        raise _explain(error, target) from error
    finally:
        if working is not None:
            shutil.rmtree(working, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that a killed `atomic_file` left in a folder of one writer."""
    for path in folder.glob(f"{_TEMPORARY_PREFIX}*"):
        if path.is_file():
            path.unlink(missing_ok=True)


def _current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
