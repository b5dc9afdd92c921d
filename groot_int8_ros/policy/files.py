"""Writing files so that a crash, a full disk or a Ctrl-C never leaves half of one.

Owns: atomic writes, their repair after a kill, content hashes, and reading JSON and YAML that may
be damaged. Must not import anything of the package but its errors. A writer works on a temporary
name in the same folder and renames at the end; POSIX makes that rename atomic, so a reader sees
the old content or the new, never a mixture.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from groot_int8_ros.errors import OutputError

RUN_AGAIN = (
    "Nothing was left behind; free space or choose a folder that is writable, then run the "
    "command again."
)
_HASH_BLOCK_BYTES = 4 << 20
_TEMPORARY_PREFIX = ".partial-"
# Far above any manifest or index; JSON takes about ten times its size in memory.
_LARGEST_JSON_BYTES = 64 << 20
_LARGEST_YAML_BYTES = 4 << 20
_DEEPEST_YAML = 64
# `renameat2` of Linux, which Python does not wrap: swap two paths in one step.
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
# What a kernel or a filesystem answers that knows no exchange.
_NO_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP}
# Only a write fails with these.
_WRITE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}

_LOG = logging.getLogger(__name__)


def sha256_of_file(path: Path, progress: Callable[[int], None] = lambda size_bytes: None) -> str:
    """Return the SHA-256 of a file's content as 64 hexadecimal digits.

    Args:
        path: The file.
        progress: Called with the size of each block that was read. What it raises ends the work.
    """
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_HASH_BLOCK_BYTES):
            digest.update(block)
            progress(len(block))
    return digest.hexdigest()


def read_json(path: Path) -> Any:
    """Return what a JSON file holds; every text in it can be printed, numbers may be NaN.

    Args:
        path: The file.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no JSON in UTF-8, too large to be what it is said to be, or nested too
            deeply.
    """
    with path.open("rb") as stream:
        data = stream.read(_LARGEST_JSON_BYTES + 1)
    if len(data) > _LARGEST_JSON_BYTES:
        raise ValueError(f"it is larger than {_LARGEST_JSON_BYTES >> 20} MiB")
    try:
        content = json.loads(data.decode("utf-8"))
        # Half a surrogate pair is valid JSON, and no message, log or file name can hold it.
        json.dumps(content, ensure_ascii=False).encode("utf-8")
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return content


def check_types(
    record: object, types: Mapping[str, type | tuple[type, ...]], where: str = ""
) -> None:
    """Refuse a record that JSON gave values of other types, which Python would take.

    Args:
        record: With an attribute for each name.
        types: Attribute to what it has to be. Truth values are no whole numbers here.
        where: Follows the attribute's name in the error.

    Raises:
        ValueError: An attribute is of another type.
    """
    for name, kind in types.items():
        value = getattr(record, name)
        if isinstance(value, bool) or not isinstance(value, kind):
            raise ValueError(f"{name}{where} is of another type")


def read_yaml(path: Path) -> Any:
    """Return what a YAML file holds: plain values, as `yaml.safe_load` gives them.

    Aliases are refused: a few lines of them stand for gigabytes, and ROS does not read them in
    parameter files either.

    Args:
        path: The file.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no YAML in UTF-8, too large, nested too deeply, or has an alias.
    """
    with path.open("rb") as stream:
        data = stream.read(_LARGEST_YAML_BYTES + 1)
    if len(data) > _LARGEST_YAML_BYTES:
        raise ValueError(f"it is larger than {_LARGEST_YAML_BYTES >> 20} MiB")
    try:
        return yaml.load(data.decode("utf-8"), _PlainLoader)
    # Of a date such as 2026-13-01 PyYAML's constructor raises ValueError itself.
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


class _PlainLoader(yaml.SafeLoader):
    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise ValueError("it has an alias (*name): write out what it stands for")
        # PyYAML's time goes with the square of the depth: 20 kB would take minutes.
        if self._depth > _DEEPEST_YAML:
            raise ValueError("it is nested too deeply")
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


def leads_outside(name: str) -> bool:
    """Whether a name that came from a file would lead out of the folder it belongs to."""
    path = Path(name)
    return path.is_absolute() or ".." in path.parts


def refuse_occupied(
    target: Path, *, marker: str | None = None, what: str = "", replace: bool = False
) -> None:
    """Refuse to write where something is already.

    Args:
        target: The file or folder to be written. What a killed `atomic_directory` moved aside is
            put back first.
        marker: File in a folder of the kind that may be replaced; None: nothing may be.
        what: That kind with its article, such as `a bundle`.
        replace: Whether the user asked for the replacement.

    Raises:
        OutputError: `target` is a file, or a folder that is not empty, and is not of that kind or
            is not to be replaced.
    """
    _repair(target.absolute())
    if not os.path.lexists(target) or (target.is_dir() and not any(target.iterdir())):
        return
    if marker is None:
        raise OutputError(
            f"{target} exists and is not empty, so nothing was written to it: name a new folder, "
            "or remove this one first"
        )
    if not (target / marker).is_file():
        raise OutputError(
            f"{target} exists and is not {what}, so nothing was written to it: name a new folder"
        )
    if not replace:
        raise OutputError(
            f"{target} already holds {what}: add --force to replace it and all that is in it, or "
            "name a new folder"
        )


@contextlib.contextmanager
def atomic_file(target: Path, *, advice: str = RUN_AGAIN) -> Iterator[Path]:
    """Give a temporary path to write to, renamed to `target` when the block ends well.

    Args:
        target: The final path. Its folder is made if it is missing.
        advice: What else is there and what to do, where `target` cannot be written.

    Yields:
        A path in the same folder. If the block raises, the file there is removed, and so are the
        folders that were made for it.

    Raises:
        OutputError: The folder cannot be made or written, or the disk is full. Errors of the block
            that are not about its output pass as they are.
    """
    target = target.absolute()
    with _made_parents(target, advice):
        with _explained(target, advice):
            handle, name = tempfile.mkstemp(
                prefix=_TEMPORARY_PREFIX, suffix=target.suffix, dir=target.parent
            )
            os.close(handle)
        temporary = Path(name)
        try:
            with _explained_if_about(temporary, target, advice):
                yield temporary
            with _explained(target, advice):
                os.chmod(temporary, 0o666 & ~_current_umask())
                # A robot loses its power: without this the name can be on disk before the data.
                _sync(temporary)
                os.replace(temporary, target)
                _sync(target.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Give a temporary folder to fill, renamed to `target` when the block ends well.

    An existing `target` is replaced only then; until that moment it stays whole. What an earlier
    writer of the same target left when it was killed is put back or removed first.

    Args:
        target: The final folder.

    Yields:
        A folder beside it. If the block raises, it is removed, and so are the folders that were
        made for it.

    Raises:
        OutputError: The folder cannot be made or written, or the disk is full. Errors of the block
            that are not about its output pass as they are.
    """
    target = target.absolute()
    _repair(target)
    prefix = f"{_TEMPORARY_PREFIX}{target.name}-"
    working = lock = None
    with _made_parents(target):
        try:
            with _explained(target):
                working = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
                lock = os.open(working, os.O_RDONLY)
                _try_lock(lock)
                # Only from here on can another writer take this folder for one that was left.
                (temporary := working / "new").mkdir()
            with _explained_if_about(working, target):
                yield temporary
            with _explained(target):
                _move_into_place(temporary, target, working / "old")
        finally:
            if working is not None:
                shutil.rmtree(working, ignore_errors=True)
            if lock is not None:
                os.close(lock)


def _sync(path: Path) -> None:
    """Wait until a file's data, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move_into_place(temporary: Path, target: Path, retired: Path) -> None:
    if os.path.lexists(target) and _exchange(temporary, target):
        return
    try:
        if os.path.lexists(target):
            os.replace(target, retired)
        os.replace(temporary, target)
    except BaseException:
        # Also for an interrupt between the two renames: the old content is still whole.
        if os.path.lexists(retired) and not os.path.lexists(target):
            os.replace(retired, target)
        raise


def _exchange(first: Path, second: Path) -> bool:
    """Swap two paths in one step; return False where kernel or filesystem cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    names = os.fsencode(first), os.fsencode(second)
    if renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(second))


def _try_lock(descriptor: int) -> bool:
    """Lock a folder until it is closed or the process ends, however it ends.

    Returns:
        False if another process holds it, or the filesystem has no such locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _repair(target: Path) -> None:
    """Put back or remove what writers of `target` left that were killed."""
    # The random part of a name that mkdtemp makes has no dash: no other target's name fits.
    name = re.compile(re.escape(f"{_TEMPORARY_PREFIX}{target.name}-") + "[a-z0-9_]+")
    left = [path for path in target.parent.glob(".*") if name.fullmatch(path.name)]
    for working in left:
        with _explained(target):
            try:
                lock = os.open(working, os.O_RDONLY | os.O_DIRECTORY)
            except OSError:
                continue  # gone meanwhile, or another user's
            try:
                if not any((working / part).exists() for part in ("new", "old")):
                    continue
                if not _try_lock(lock):
                    continue
                if (working / "old").exists() and not os.path.lexists(target):
                    os.replace(working / "old", target)
                    _LOG.warning("%s is back: a writer was killed while replacing it", target)
                shutil.rmtree(working, ignore_errors=True)
            finally:
                os.close(lock)


@contextlib.contextmanager
def _made_parents(target: Path, advice: str = RUN_AGAIN) -> Iterator[None]:
    """Make the missing folders above `target`, and remove those again if the block raises."""
    made: list[Path] = []
    try:
        with _explained(target, advice):
            for folder in reversed([path for path in target.parents if not path.exists()]):
                with contextlib.suppress(FileExistsError):
                    folder.mkdir()
                    made.append(folder)
            target.parent.mkdir(exist_ok=True)  # an error if it is a file
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # somebody else uses one: it and those above stay
            for folder in reversed(made):
                folder.rmdir()
        raise


@contextlib.contextmanager
def _explained(target: Path, advice: str = RUN_AGAIN) -> Iterator[None]:
    """Say of any OSError that `target` cannot be written, and what to do."""
    try:
        yield
    except OSError as error:
        # NumPy reports a write that was cut short without an errno.
        reason = error.strerror or f"the disk may be full ({error})"
        where = f" ({error.filename})" if error.filename else ""
        raise OutputError(f"cannot write {target}: {reason}{where}. {advice}") from error


@contextlib.contextmanager
def _explained_if_about(temporary: Path, target: Path, advice: str = RUN_AGAIN) -> Iterator[None]:
    """Say so of those errors that come from writing; a caller's block also reads and prints."""
    try:
        yield
    except OSError as error:
        if not _is_about(error, temporary):
            raise
        with _explained(target, advice):
            raise


def _is_about(error: OSError, temporary: Path) -> bool:
    # `shutil.copyfile` names its source first and what it writes second, whichever was at fault.
    names = [
        str(name) for name in (error.filename, error.filename2) if isinstance(name, (str, Path))
    ]
    inside = [Path(name).absolute().is_relative_to(temporary) for name in names]
    if error.errno in _WRITE_ERRORS:
        return not names or any(inside)
    # NumPy's own words for a write that was cut short.
    return inside[:1] == [True] or (error.errno is None and "written" in str(error))


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that a killed `atomic_file` left in a folder of one writer."""
    for path in folder.glob(f"{_TEMPORARY_PREFIX}*"):
        if path.is_file():
            path.unlink(missing_ok=True)


def _current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
