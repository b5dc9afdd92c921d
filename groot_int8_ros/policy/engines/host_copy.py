"""What TensorRT keeps of an engine in the host's memory: found, and put behind a file.

Owns: `HostCopy`, `private_memory`, `move_copies`. Must not import torch or TensorRT.

TensorRT 8.6 copies each compiled region of an engine, byte for byte out of the plan, into memory
of its own and keeps it until the engine is closed; nothing in its interface gives it back, and
nothing was seen to read it again (docs/engines.md, "At run time"). On a board whose CPU and GPU
share memory that is every weight twice. Here the pages of such a copy are replaced by pages of a
file with the same bytes, which the kernel loads only if somebody reads them. For TensorRT nothing
changes: the addresses and what they hold stay, a write stays private, freeing frees.

What is replaced is narrow on purpose. Memory is looked at only if it appeared while the engine was
loaded, is private to this process, and is unknown to CUDA; of that only pages that hold what the
engine's file holds, in its order. So no memory of a driver or of another thread is touched. When
anything fails, what was not replaced stays as TensorRT made it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

_MAPS = Path("/proc/self/maps")
_MOUNTS = Path("/proc/self/mountinfo")
_IN_MEMORY = {"ramfs", "tmpfs"}

# From here on glibc gives every allocation pages of its own, whatever it learnt from earlier ones.
_LEAST_BYTES = 32 << 20
_CHUNK_BYTES = 32 << 20
# What has to be left on the disk: logs and recordings go on.
_SPARE_BYTES = 1 << 30

# Shorter runs of equal pages are not worth a mapping each.
_SHORTEST_RUN = 1 << 20

_PROBES = 4
_PROBE_BYTES = 64
_PROBE_VALUES = 16

_MAP_FIXED = 0x10
_MAP_FAILED = ctypes.c_void_p(-1).value

Span = tuple[int, int]
"""First address, and the one behind the last."""


@dataclass(frozen=True)
class HostCopy:
    """What became of TensorRT's copy of an engine.

    Attributes:
        found_bytes: Length of the pages that hold the engine's bytes.
        moved_bytes: How many of them are a file's now.
        reason: Why some are not; empty if all are.
    """

    found_bytes: int = 0
    moved_bytes: int = 0
    reason: str = ""

    @property
    def kept_bytes(self) -> int:
        """What stays in memory beside the engine."""
        return self.found_bytes - self.moved_bytes


def private_memory() -> list[Span]:
    """Return the process's writable memory that belongs to no file and is no heap or stack.

    Returns:
        Ascending spans of whole pages; none where there is no `/proc`.
    """
    try:
        lines = _MAPS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    spans = []
    for line in lines:
        addresses, access, _offset, _device, inode, *name = line.split(maxsplit=5)
        # A kernel may let allocators name theirs: `[anon: ...]`.
        if access == "rw-p" and inode == "0" and (not name or name[0].startswith("[anon:")):
            start, end = (int(address, 16) for address in addresses.split("-"))
            spans.append((start, end))
    return spans


def move_copies(
    plan: mmap.mmap,
    before: Sequence[Span],
    folders: Iterable[Path],
    is_plain: Callable[[int], bool],
) -> HostCopy:
    """Put what was copied of an engine's file into the process's memory behind a file.

    Call it as soon as the engine is loaded, before anything runs it.

    Args:
        plan: The engine's file.
        before: `private_memory()` of before it was loaded.
        folders: Where the file may be, the first that suits; it has no name there, and is gone
            with the memory, which is when the engine is closed or the process ends.
        is_plain: Tells of an address whether CUDA knows nothing of the memory there.

    Returns:
        What was found and moved. Nothing is raised: a copy that stays costs memory and no more.
    """
    copies = [
        (start, end)
        for span in _without(private_memory(), before)
        for start, end in _copies(plan, span)
        if is_plain(start) and is_plain(end - 1)
    ]
    found = sum(end - start for start, end in copies)
    if not copies:
        return HostCopy()
    stream, where = _open_file(folders, found)
    if stream is None:
        return HostCopy(found, 0, where)
    moved, reason = 0, ""
    with stream:
        try:
            for start, end in copies:
                for at in range(start, end, _CHUNK_BYTES):
                    size = min(_CHUNK_BYTES, end - at)
                    _move(at, size, stream.fileno(), moved)
                    moved += size
        except OSError as error:
            reason = f"{where}: {error.strerror}"
    return HostCopy(found, moved, reason)


def _without(spans: Sequence[Span], others: Sequence[Span]) -> list[Span]:
    left = []
    for start, end in spans:
        for other_start, other_end in others:
            if other_end <= start or end <= other_start:
                continue
            if start < other_start:
                left.append((start, other_start))
            start = min(end, other_end)
        if start < end:
            left.append((start, end))
    return left


def _copies(plan: mmap.mmap, span: Span) -> Iterator[Span]:
    """Yield the runs of whole pages of a span that hold bytes of the plan, in its order."""
    unknown = [span]
    while unknown:
        start, end = unknown.pop()
        if end - start < _LEAST_BYTES:
            continue
        offset = _plan_offset(plan, start, end)
        if offset is None:
            continue
        runs = [
            (first, behind)
            for first, behind in _equal_pages(plan, start, end, offset)
            if behind - first >= _SHORTEST_RUN
        ]
        yield from runs
        # Another region's copy may lie beside it, shifted by another length.
        if runs:
            unknown += _without([(start, end)], runs)


def _plan_offset(plan: mmap.mmap, start: int, end: int) -> int | None:
    """Return where in the plan the byte at `start` would be, judged by what lies behind it."""
    for probe in range(_PROBES):
        at = (end - start) * (2 * probe + 1) // (2 * _PROBES)
        sample = _bytes_at(start + at, _PROBE_BYTES).tobytes()
        # A run of one value is anywhere.
        if len(set(sample)) < _PROBE_VALUES:
            continue
        found = plan.find(sample, 0)
        if found >= 0:
            return found - at
    return None


def _equal_pages(plan: mmap.mmap, start: int, end: int, offset: int) -> Iterator[Span]:
    """Yield the runs of whole pages that equal the plan's bytes from `offset` on."""
    page = mmap.PAGESIZE
    first = start + -(-max(0, -offset) // page) * page
    behind = start + min(end - start, len(plan) - offset) // page * page
    run = first
    for at in range(first, behind, _CHUNK_BYTES):
        size = min(_CHUNK_BYTES, behind - at)
        in_plan = np.frombuffer(plan, np.uint8, size, offset + at - start)
        equal = (_bytes_at(at, size) == in_plan).reshape(-1, page).all(axis=1)
        del in_plan  # or the mapping could not be closed
        for unequal in np.flatnonzero(~equal):
            address = at + int(unequal) * page
            if run < address:
                yield run, address
            run = address + page
    if run < behind:
        yield run, behind


def _bytes_at(address: int, size: int) -> NDArray[np.uint8]:
    memory: Any = (ctypes.c_uint8 * size).from_address(address)
    return np.frombuffer(memory, np.uint8)


def _open_file(folders: Iterable[Path], size: int) -> tuple[IO[bytes] | None, str]:
    """Open a file without a name on a disk that has room.

    Returns:
        The file and its folder, or None and what is wrong with each folder.
    """
    reasons = []
    for folder in folders:
        try:
            disk = os.statvfs(folder)
            if _is_in_memory(folder):
                reasons.append(f"{folder} is itself in memory")
            elif disk.f_bavail * disk.f_frsize < size + _SPARE_BYTES:
                reasons.append(f"{folder} lacks {(size + _SPARE_BYTES) / 2**30:.1f} GiB of room")
            else:
                return tempfile.TemporaryFile(dir=folder), str(folder)
        except OSError as error:
            reasons.append(f"{folder}: {error.strerror}")
    return None, "; ".join(reasons)


def _is_in_memory(folder: Path) -> bool:
    number = folder.stat().st_dev
    device = f"{os.major(number)}:{os.minor(number)}"
    for line in _MOUNTS.read_text(encoding="utf-8").splitlines():
        mount, _, filesystem = line.partition(" - ")
        if mount.split()[2] == device:
            return filesystem.split()[0] in _IN_MEMORY
    return False


def _move(address: int, size: int, file: int, offset: int) -> None:
    memory = _bytes_at(address, size).data
    written = 0
    while written < size:
        written += os.pwrite(file, memory[written:], offset + written)
    # The kernel drops no page that is not on the disk yet.
    os.fdatasync(file)
    os.posix_fadvise(file, offset, size, os.POSIX_FADV_DONTNEED)
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    mapped = library.mmap(
        ctypes.c_void_p(address),
        ctypes.c_size_t(size),
        mmap.PROT_READ | mmap.PROT_WRITE,
        mmap.MAP_PRIVATE | _MAP_FIXED,
        file,
        ctypes.c_long(offset),
    )
    if mapped == _MAP_FAILED:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
