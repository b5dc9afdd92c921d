"""Hazards of moving TensorRT's copy of an engine behind a file: other memory, bytes, a full disk.

The copies are made as TensorRT 8.6 was seen to make them: `malloc`, and the plan's bytes from an
odd offset on. Memory, files and mappings are real. That it is so with TensorRT itself, and that
its engines run on, is shown on a GPU (docs/verification.md).
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import resource
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from groot_int8_ros.policy.engines import host_copy
from groot_int8_ros.policy.engines.host_copy import HostCopy, Span, move_copies, private_memory
from groot_int8_ros.policy.engines.tensorrt_engine import mapped_once

MIB = 1 << 20
REGION = 40 * MIB
OFFSET = 521_253
"""Where the region's bytes begin in the plan; no multiple of a page."""

_LIBC = ctypes.CDLL(None)
_LIBC.malloc.restype = ctypes.c_void_p
_LIBC.malloc.argtypes = [ctypes.c_size_t]
_LIBC.free.argtypes = [ctypes.c_void_p]


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A folder whose files are not themselves in memory."""
    for folder in (tmp_path, Path("/var/tmp")):
        if not host_copy._is_in_memory(folder):
            return folder
    pytest.skip(f"{tmp_path} and /var/tmp are in memory, so nothing can be moved out of it")


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine's file with two regions of `REGION` bytes behind its header."""
    path = tmp_path_factory.mktemp("engine") / "backbone.engine"
    path.write_bytes(os.urandom(OFFSET + 2 * REGION + 777))
    return path


@pytest.fixture
def allocate() -> Iterator[Callable[[bytes], int]]:
    """Allocates as a C++ library does, and returns the address; all is freed afterwards."""
    addresses = []

    def start(content: bytes) -> int:
        address = int(_LIBC.malloc(len(content)))
        ctypes.memmove(address, content, len(content))
        addresses.append(address)
        return address

    yield start
    for address in addresses:
        _LIBC.free(address)


def region(plan: Path, number: int = 0) -> bytes:
    """What TensorRT copies of a plan."""
    start = OFFSET + number * (REGION + 77)
    return plan.read_bytes()[start : start + REGION]


def move(
    plan: Path,
    before: list[Span],
    *folders: Path,
    is_plain: Callable[[int], bool] = lambda address: True,
) -> HostCopy:
    with mapped_once(plan) as mapped:
        return move_copies(mapped, before, folders, is_plain)


def in_memory(address: int, size: int = REGION) -> int:
    """Bytes of whole pages that are resident, by the kernel's page table."""
    page = mmap.PAGESIZE
    first, behind = -(-address // page), (address + size) // page
    with Path("/proc/self/pagemap").open("rb", buffering=0) as stream:
        stream.seek(first * 8)
        entries = np.frombuffer(stream.read((behind - first) * 8), np.uint64)
    return int((entries >> np.uint64(63)).sum()) * page


def digest_at(address: int, size: int = REGION) -> str:
    return hashlib.sha256(ctypes.string_at(address, size)).hexdigest()


def test_copy_leaves_memory_and_the_library_that_made_it_sees_no_change(
    plan: Path, disk: Path, allocate: Callable[[bytes], int]
) -> None:
    content, names = region(plan), sorted(disk.iterdir())
    before = private_memory()
    address = allocate(content)
    assert in_memory(address) > REGION - 2 * mmap.PAGESIZE
    moved = move(plan, before, disk)
    assert moved.reason == ""
    assert REGION - 2 * mmap.PAGESIZE < moved.found_bytes <= REGION
    assert moved.kept_bytes == 0
    assert in_memory(address) == 0
    assert sorted(disk.iterdir()) == names, "the file has no name"
    assert digest_at(address) == hashlib.sha256(content).hexdigest()
    # A write is the process's own, as before.
    middle = address + REGION // 2
    ctypes.memset(middle, content[REGION // 2] ^ 1, 1)
    changed = bytearray(content)
    changed[REGION // 2] ^= 1
    assert digest_at(address) == hashlib.sha256(changed).hexdigest()
    assert region(plan) == content


def test_freeing_the_copy_gives_addresses_and_disk_back(plan: Path, disk: Path) -> None:
    content = region(plan)
    before = private_memory()
    address = int(_LIBC.malloc(REGION))
    ctypes.memmove(address, content, REGION)
    assert move(plan, before, disk).kept_bytes == 0
    maps = Path("/proc/self/maps")
    nameless = f"{disk}/#"
    assert any("(deleted)" in line for line in maps.read_text().splitlines() if nameless in line)
    _LIBC.free(address)
    assert nameless not in maps.read_text()


def test_copies_of_two_regions_are_both_found(
    plan: Path, disk: Path, allocate: Callable[[bytes], int]
) -> None:
    # The allocator puts them side by side, as one span of the kernel's, each shifted by its own.
    contents = [region(plan, number) for number in (0, 1)]
    before = private_memory()
    addresses = [allocate(content) for content in contents]
    moved = move(plan, before, disk)
    assert 2 * (REGION - 2 * mmap.PAGESIZE) < moved.moved_bytes <= 2 * REGION
    for address, content in zip(addresses, contents, strict=True):
        assert in_memory(address) == 0
        assert digest_at(address) == hashlib.sha256(content).hexdigest()


def test_pages_that_hold_something_else_stay(
    plan: Path, disk: Path, allocate: Callable[[bytes], int]
) -> None:
    changed = bytearray(region(plan))
    changed[REGION // 3] ^= 1
    content = bytes(changed)
    del changed
    before = private_memory()
    address = allocate(content)
    moved = move(plan, before, disk)
    assert REGION - 4 * mmap.PAGESIZE < moved.moved_bytes < REGION
    assert in_memory(address) == mmap.PAGESIZE, "the page that was written to"
    assert digest_at(address) == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("content", [os.urandom(REGION), bytes(REGION)], ids=["other", "zeros"])
def test_memory_of_another_is_not_touched(
    plan: Path, disk: Path, allocate: Callable[[bytes], int], content: bytes
) -> None:
    before = private_memory()
    address = allocate(content)
    ctypes.memset(address, 1, 1)
    resident = in_memory(address)
    assert move(plan, before, disk) == HostCopy()
    assert in_memory(address) == resident


def test_memory_from_before_the_engine_was_loaded_is_not_touched(
    plan: Path, disk: Path, allocate: Callable[[bytes], int]
) -> None:
    address = allocate(region(plan))
    assert move(plan, private_memory(), disk) == HostCopy()
    assert in_memory(address) > REGION - 2 * mmap.PAGESIZE


def test_memory_that_cuda_knows_is_not_touched(
    plan: Path, disk: Path, allocate: Callable[[bytes], int]
) -> None:
    content = region(plan)
    before = private_memory()
    address = allocate(content)
    assert move(plan, before, disk, is_plain=lambda address: False) == HostCopy()
    assert in_memory(address) > REGION - 2 * mmap.PAGESIZE


def test_without_a_disk_the_copy_stays_and_each_folder_is_told(
    plan: Path, disk: Path, allocate: Callable[[bytes], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = region(plan)
    before = private_memory()
    address = allocate(content)
    memory, missing = Path("/dev/shm"), disk / "missing"
    kept = move(plan, before, memory, missing)
    assert kept.kept_bytes == kept.found_bytes > 0
    assert kept.reason == (f"{memory} is itself in memory; {missing}: No such file or directory")
    monkeypatch.setattr(host_copy, "_SPARE_BYTES", 1 << 60)
    assert "GiB of room" in move(plan, before, disk).reason
    monkeypatch.undo()
    assert in_memory(address) > REGION - 2 * mmap.PAGESIZE
    assert move(plan, before, missing, disk).kept_bytes == 0, "the next folder is taken"


def test_folder_that_may_not_be_written_is_told(
    plan: Path, disk: Path, allocate: Callable[[bytes], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    content = region(plan)
    before = private_memory()
    allocate(content)
    # Tests may run as root, whom no folder refuses.
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    assert move(plan, before, disk).reason == f"{disk}: Permission denied"


def test_disk_that_fills_up_leaves_the_rest_in_memory_and_all_bytes_right(
    plan: Path, disk: Path, allocate: Callable[[bytes], int]
) -> None:
    content = region(plan)
    before = private_memory()
    address = allocate(content)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (36 * MIB, limits[1]))
    try:
        moved = move(plan, before, disk)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert 0 < moved.moved_bytes < moved.found_bytes
    assert moved.reason == f"{disk}: File too large"
    assert in_memory(address) < moved.kept_bytes + 2 * mmap.PAGESIZE
    assert digest_at(address) == hashlib.sha256(content).hexdigest()
