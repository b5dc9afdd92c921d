"""What TensorRT keeps of an engine in the host's memory: found, and put behind a file.

Owns: `HostCopy`, `private_memory`, `move_copies`. Must not import torch or TensorRT.

TensorRT 8.6 copies each compiled region of an engine, byte for byte out of the plan, into memory
of its own and keeps it until the engine is closed; nothing in its interface gives it back, and
after the first run nothing was seen to read it (docs/engines.md, "At run time"). On a board whose
CPU and GPU share memory that is every weight twice. Here the pages of such a copy are replaced by
pages of a file with the same bytes, which the kernel loads only if somebody reads them. For
TensorRT nothing changes: the addresses and what they hold stay, a write stays private, freeing
frees.

What is replaced is narrow on purpose: memory that appeared while the engine was loaded, is private
to this process and unknown to CUDA, and of that only long runs of pages that hold what the
engine's file holds, in its order, and that begin and end with more than one value. Other memory is
at most read, and by the kernel's hand, so memory that another thread frees meanwhile is an error
and no fault. A piece is replaced when its file's pages were seen to leave memory; what cannot be
replaced stays as TensorRT made it.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

Span = tuple[int, int]
"""First address, and the one behind the last."""

_MAPS = Path("/proc/self/maps")
_MEMORY = Path("/proc/self/mem")

# From here on glibc asks the kernel for every allocation that freed memory does not serve.
_LEAST_BYTES = 32 << 20
# Shorter runs of equal pages are not worth a mapping each.
_SHORTEST_RUN = 1 << 20
_CHUNK_BYTES = 32 << 20
# What has to be left on the disk: logs and recordings go on.
_SPARE_BYTES = 1 << 30

# How much is read of an engine's file in vain, about half a second for each GB.
_SEARCH_BYTES = 6 << 30
_SAMPLE_BYTES = 64
_SAMPLE_VALUES = 16

_MAP_FIXED = 0x10
_MAP_FAILED = ctypes.c_void_p(-1).value


@dataclass(frozen=True)
class HostCopy:
    """What became of TensorRT's copy of an engine.

    Attributes:
        found_bytes: Length of the pages that hold the engine's bytes.
        moved: The spans that are a file's now.
        reason: Why some are not, or what could not be searched; empty if neither is the case.
    """

    found_bytes: int = 0
    moved: tuple[Span, ...] = ()
    reason: str = ""

    @property
    def moved_bytes(self) -> int:
        """Length of the spans that are a file's now."""
        return sum(map(_length, self.moved))

    @property
    def kept_bytes(self) -> int:
        """What stays in memory beside the engine."""
        return self.found_bytes - self.moved_bytes

    def returned_bytes(self) -> int:
        """Return how much of what was moved is in memory again, for somebody read it.

        Only while the engine is loaded: the addresses are others' afterwards.
        """
        return sum(_resident_bytes(start, end - start) for start, end in self.moved)


def private_memory() -> list[Span]:
    """Return the process's writable memory that belongs to no file.

    Returns:
        Ascending spans of whole pages, without the main heap and stack; none where there is no
        `/proc`.
    """
    try:
        # Paths may be of any bytes, and only a line feed ends a line.
        lines = _MAPS.read_bytes().split(b"\n")
    except OSError:
        return []
    spans = []
    for line in filter(None, lines):
        addresses, access, _offset, _device, inode, *name = line.split(maxsplit=5)
        # A kernel may let allocators name theirs: `[anon: ...]`.
        if access == b"rw-p" and inode == b"0" and (not name or name[0].startswith(b"[anon:")):
            start, end = (int(address, 16) for address in addresses.split(b"-"))
            spans.append((start, end))
    return spans


def move_copies(
    plan: Path,
    before: Sequence[Span],
    folders: Iterable[Path],
    is_plain: Callable[[int], bool],
) -> HostCopy:
    """Put what was copied of an engine's file into the process's memory behind another file.

    Call it after the engine's first run, which still reads the copy, and while nothing runs it.

    Args:
        plan: The engine's file.
        before: `private_memory()` of before it was loaded.
        folders: Where the other file may be, the first that suits; it has no name there, and is
            gone with the memory, which is when the engine is closed or the process ends.
        is_plain: Tells of an address whether CUDA knows nothing of the memory there.

    Returns:
        What was found and moved. A copy that stays costs memory and no more, so no error of the
        system's is raised.
    """
    # A copy shows as memory of its length, so there is mostly nothing to read.
    spans = [span for span in _without(private_memory(), before) if _length(span) >= _LEAST_BYTES]
    if not spans:
        return HostCopy()
    found, moved = 0, list[Span]()
    reasons = []
    try:
        with ExitStack() as stack:
            search = _Search(stack.enter_context(plan.open("rb", buffering=0)), stack)
            copies = [
                copy for span in sorted(spans, key=_length)[::-1] for copy in search.copies(span)
            ]
            reasons += search.reasons
            found = sum(map(_length, copies))
            plain = [
                (start, end) for start, end in copies if is_plain(start) and is_plain(end - 1)
            ]
            if len(plain) < len(copies):
                reasons.append("CUDA uses some of that memory itself")
            mover = _Mover(folders, found, stack)
            for start, end in plain:
                for at in range(start, end, _CHUNK_BYTES):
                    size = min(_CHUNK_BYTES, end - at)
                    mover.move(at, size)
                    moved.append((at, at + size))
    except (OSError, MemoryError) as error:
        reasons.append(getattr(error, "strerror", None) or repr(error))
    return HostCopy(found, tuple(moved), "; ".join(reasons))


def _length(span: Span) -> int:
    return span[1] - span[0]


def _without(spans: Sequence[Span], others: Sequence[Span]) -> list[Span]:
    """Return what of ascending spans is in none of other ascending spans."""
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


class _Search:
    """Finds runs of whole pages that hold a plan's bytes, in its order.

    Attributes:
        reasons: What could not be searched, and why.
    """

    def __init__(self, plan: IO[bytes], stack: ExitStack) -> None:
        self._plan = plan.fileno()
        self._plan_bytes = os.fstat(self._plan).st_size
        # What was read of the plan is not to stay in memory either.
        stack.callback(os.posix_fadvise, self._plan, 0, 0, os.POSIX_FADV_DONTNEED)
        self._memory = stack.enter_context(_MEMORY.open("rb", buffering=0)).fileno()
        self._left_bytes = _SEARCH_BYTES
        self.reasons: list[str] = []

    def copies(self, span: Span) -> list[Span]:
        """Return the runs inside a span, each at least `_SHORTEST_RUN` long."""
        found: list[Span] = []
        unknown = [span]
        try:
            while unknown:
                start, end = unknown.pop()
                runs = self._runs(start, end)
                found += runs
                # Another region's copy may lie beside it, shifted by another length.
                if runs:
                    unknown += _without([(start, end)], runs)
        except OSError as error:
            # Another thread freed it: not TensorRT's, or no longer of one piece.
            self.reasons.append(f"{_length(span) >> 20} MiB could not be read ({error.strerror})")
        return found

    def _runs(self, start: int, end: int) -> list[Span]:
        """Return the runs that share the first shift that is found; none if none is."""
        for at in _spread(start, end):
            sample = bytes(_read(self._memory, at, bytearray(_SAMPLE_BYTES)))
            # A run of one value is anywhere.
            if len(set(sample)) < _SAMPLE_VALUES:
                continue
            if self._left_bytes < 0:
                self.reasons.append(f"{(end - start) >> 20} MiB were not searched to the end")
                break
            found = self._find(sample)
            if found is not None:
                runs = list(self._equal_pages(start, end, found - (at - start)))
                if runs:
                    return runs
            self._left_bytes -= self._plan_bytes
        return []

    def _find(self, sample: bytes) -> int | None:
        chunk = bytearray(_CHUNK_BYTES)
        for offset in range(0, self._plan_bytes, _CHUNK_BYTES - _SAMPLE_BYTES):
            size = min(_CHUNK_BYTES, self._plan_bytes - offset)
            _read(self._plan, offset, memoryview(chunk)[:size])
            found = chunk.find(sample, 0, size)
            if found >= 0:
                return offset + found
        return None

    def _equal_pages(self, start: int, end: int, offset: int) -> Iterator[Span]:
        """Yield the runs of a span that equal the plan, its byte `offset` being at `start`."""
        page = mmap.PAGESIZE
        first = start + -(-max(0, -offset) // page) * page
        behind = start + min(end - start, self._plan_bytes - offset) // page * page
        ours, theirs = bytearray(_CHUNK_BYTES), bytearray(_CHUNK_BYTES)
        run = first
        unlike = []
        for at in range(first, behind, _CHUNK_BYTES):
            size = min(_CHUNK_BYTES, behind - at)
            in_memory = _array(_read(self._memory, at, memoryview(ours)[:size]))
            in_plan = _array(_read(self._plan, offset + at - start, memoryview(theirs)[:size]))
            equal = (in_memory == in_plan).reshape(-1, page).all(axis=1)
            unlike += [at + int(number) * page for number in np.flatnonzero(~equal)]
        for stop in [*unlike, behind]:
            # Memory beside a copy may hold zeros, as the plan may beside a region.
            while stop - run >= _SHORTEST_RUN and self._is_uniform(run):
                run += page
            last = stop
            while last - run >= _SHORTEST_RUN and self._is_uniform(last - page):
                last -= page
            if last - run >= _SHORTEST_RUN:
                yield run, last
            run = stop + page

    def _is_uniform(self, address: int) -> bool:
        page = _read(self._memory, address, bytearray(mmap.PAGESIZE))
        return len(set(page)) < _SAMPLE_VALUES


def _spread(start: int, end: int) -> Iterator[int]:
    """Yield addresses inside a span, ever closer to each other, down to half `_LEAST_BYTES`."""
    parts = 2
    while end - start >= _LEAST_BYTES * parts // 4:
        for part in range(1, parts, 2):
            yield start + (end - start) * part // parts
        parts *= 2


def _read(file: int, offset: int, buffer: bytearray | memoryview) -> memoryview:
    view = memoryview(buffer)
    done = 0
    while done < len(view):
        count = os.preadv(file, [view[done:]], offset + done)
        if count == 0:
            raise OSError(errno.EIO, "a file ended while it was read")
        done += count
    return view


def _array(view: memoryview) -> NDArray[np.uint8]:
    return np.frombuffer(view, np.uint8)


class _Mover:
    """Replaces memory by pages of a file on the first folder that takes it."""

    def __init__(self, folders: Iterable[Path], size: int, stack: ExitStack) -> None:
        self._candidates = iter(folders)
        self._size = size
        self._stack = stack
        self._reasons: list[str] = []
        self._file: int | None = None
        self._folder = Path()
        self._used = 0

    def move(self, address: int, size: int) -> None:
        """Replace whole pages of memory.

        Raises:
            OSError: It cannot be replaced; `strerror` says what is wrong with each folder.
        """
        while True:
            if self._file is None:
                self._file = self._open_next()
            try:
                self._write(self._file, address, size)
                _replace(address, size, self._file, self._used)
            except OSError as error:
                self._reasons.append(f"{self._folder}: {error.strerror}")
                os.ftruncate(self._file, self._used)
                self._file = None
            else:
                self._used += size
                return

    def _open_next(self) -> int:
        for folder in self._candidates:
            self._folder = folder
            try:
                disk = os.statvfs(folder)
                needed = self._size + _SPARE_BYTES
                if disk.f_bavail * disk.f_frsize < needed:
                    raise OSError(errno.ENOSPC, f"has no room of {needed / 2**30:.1f} GiB")
                stream = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
            except OSError as error:
                self._reasons.append(f"{folder}: {error.strerror}")
            else:
                self._stack.enter_context(stream)
                return stream.fileno()
        raise OSError(errno.ENOSPC, "; ".join(self._reasons))

    def _write(self, file: int, address: int, size: int) -> None:
        memory: Any = (ctypes.c_uint8 * size).from_address(address)
        view = memoryview(memory)
        written = 0
        while written < size:
            written += os.pwrite(file, view[written:], self._used + written)
        # The kernel drops no page that is not on the disk yet.
        os.fdatasync(file)
        os.posix_fadvise(file, self._used, size, os.POSIX_FADV_DONTNEED)


def _replace(address: int, size: int, file: int, offset: int) -> None:
    """Map a file's bytes at an address, if they can be mapped and do not come back with that.

    Tried elsewhere first: a mapping that fails where there was another may leave none.
    """
    trial = _map(None, size, file, offset, 0)
    try:
        # A few pages may be on their way out; a file system in memory, or mlockall, keeps all.
        if _resident_bytes(trial, size) > size // 16:
            raise OSError(errno.EBUSY, "keeps its files, or this process its pages, in memory")
    finally:
        _check(_library().munmap(ctypes.c_void_p(trial), ctypes.c_size_t(size)))
    _map(address, size, file, offset, _MAP_FIXED)


def _resident_bytes(address: int, size: int) -> int:
    pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    _check(_library().mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), pages))
    return sum(page & 1 for page in pages) * mmap.PAGESIZE


def _map(address: int | None, size: int, file: int, offset: int, flags: int) -> int:
    function = _library().mmap
    function.restype = ctypes.c_void_p
    mapped = function(
        ctypes.c_void_p(address),
        ctypes.c_size_t(size),
        mmap.PROT_READ | mmap.PROT_WRITE,
        mmap.MAP_PRIVATE | flags,
        file,
        ctypes.c_long(offset),
    )
    _check(-1 if mapped == _MAP_FAILED else 0)
    return int(mapped)


def _library() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def _check(status: int) -> None:
    if status != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
