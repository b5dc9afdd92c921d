"""Hazards of moving TensorRT's copy of an engine behind a file: other memory, bytes, a full disk.

The copies are made as TensorRT 8.6 was seen to make them: a mapping of their own, and the plan's
bytes from an odd offset on. Memory, files and mappings are real. That it is so with TensorRT
itself, and that its engines run on, is shown on a GPU (docs/verification.md).
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import shutil
import tempfile
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from groot_int8_ros.policy.engines import host_copy
from groot_int8_ros.policy.engines.host_copy import HostCopy, Span, move_copies, private_memory

from ..full_disk import file_size_limit
from ..page_cache import PAGE, keeps_files_in_memory, resident_bytes, resident_file_bytes
from ..private_mapping import address_in, private_mapping

MIB = 1 << 20
REGION = 40 * MIB
OFFSET = 521_253
"""Where the first region's bytes begin in the plan; no multiple of a page."""

LIBC = ctypes.CDLL(None, use_errno=True)

Allocate = Callable[[bytes], int]


def in_memory(address: int, size: int = REGION) -> int:
    return resident_bytes(address, size)


def stays(address: int) -> bool:
    return in_memory(address) > REGION - 2 * PAGE


def digest_at(address: int, size: int = REGION) -> str:
    return hashlib.sha256(ctypes.string_at(address, size)).hexdigest()


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A folder with room whose files are not themselves in memory."""
    for folder in (tmp_path, Path("/var/tmp")):
        if shutil.disk_usage(folder).free > 2 << 30 and not keeps_files_in_memory(folder):
            return folder
    pytest.skip(f"{tmp_path} and /var/tmp are in memory or full, so nothing can be moved there")


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine's file with two regions of `REGION` bytes behind its header."""
    path = tmp_path_factory.mktemp("engine") / "backbone.engine"
    path.write_bytes(os.urandom(OFFSET + 2 * REGION + 777))
    return path


@pytest.fixture
def allocate() -> Iterator[Allocate]:
    """Allocates as glibc does what is large, and returns the address; all is freed afterwards."""
    allocated = []

    def start(content: bytes) -> int:
        memory = private_mapping(content)
        allocated.append(memory)
        return address_in(memory)

    yield start
    for memory in allocated:
        memory.close()


@dataclass(frozen=True)
class Copied:
    """What TensorRT left: memory of before, and where the copy's bytes are."""

    content: bytes
    before: list[Span]
    address: int


@pytest.fixture
def copied(plan: Path, allocate: Allocate) -> Copied:
    """The first region's copy, as it is right after an engine was loaded."""
    content = region(plan)
    before = private_memory()
    return Copied(content, before, allocate(content))


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
    return move_copies(plan, before, folders, is_plain)


def test_copy_leaves_memory_and_the_library_that_made_it_sees_no_change(
    plan: Path, disk: Path, allocate: Allocate
) -> None:
    content, names = region(plan), sorted(disk.iterdir())
    before = private_memory()
    address = allocate(content)
    assert stays(address)
    moved = move(plan, before, disk)
    assert moved.reason == ""
    assert REGION - 2 * PAGE < moved.found_bytes <= REGION
    assert moved.kept_bytes == 0
    assert (in_memory(address), moved.returned_bytes()) == (0, 0)
    assert sorted(disk.iterdir()) == names, "the file has no name"
    assert digest_at(address) == digest(content)
    assert moved.returned_bytes() == moved.moved_bytes, "all of it was read"
    kinds = {
        line.split()[1]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if any(line.startswith(f"{start:x}-") for start, _ in moved.moved)
    }
    assert kinds == {"rw-p"}, "a write is the process's own, as before"
    middle = address + REGION // 2
    ctypes.memset(middle, content[REGION // 2] ^ 1, 1)
    changed = bytearray(content)
    changed[REGION // 2] ^= 1
    assert digest_at(address) == digest(bytes(changed))
    assert region(plan) == content


def test_plan_leaves_nothing_in_memory_by_being_searched(
    plan: Path, disk: Path, copied: Copied
) -> None:
    if keeps_files_in_memory(plan.parent):
        pytest.skip(f"{plan.parent} is in memory")
    assert move(plan, copied.before, disk).kept_bytes == 0
    assert resident_file_bytes(plan) == 0


def test_freeing_the_copy_gives_addresses_and_disk_back(plan: Path, disk: Path) -> None:
    content = region(plan)
    before = private_memory()
    memory = private_mapping(content)
    assert move(plan, before, disk).kept_bytes == 0
    maps = Path("/proc/self/maps")
    nameless = f"{disk}/#"
    assert any("(deleted)" in line for line in maps.read_text().splitlines() if nameless in line)
    memory.close()
    assert nameless not in maps.read_text()


def test_copies_of_two_regions_are_both_found(plan: Path, disk: Path, allocate: Allocate) -> None:
    # The allocator puts them side by side, as one span of the kernel's, each shifted by its own.
    contents = [region(plan, number) for number in (0, 1)]
    before = private_memory()
    addresses = [allocate(content) for content in contents]
    moved = move(plan, before, disk)
    assert 2 * (REGION - 2 * PAGE) < moved.moved_bytes <= 2 * REGION
    assert [in_memory(address) for address in addresses] == [0, 0]
    for address, content in zip(addresses, contents, strict=True):
        assert digest_at(address) == digest(content)


def test_copy_is_found_among_other_memory(plan: Path, disk: Path, allocate: Allocate) -> None:
    content, other = region(plan), os.urandom(8 * MIB) * 20
    before = private_memory()
    allocate(other)
    address = allocate(content)
    allocate(other)
    moved = move(plan, before, disk)
    assert REGION - 2 * PAGE < moved.moved_bytes <= REGION
    assert in_memory(address) == 0


def test_copy_is_found_though_a_part_of_it_stands_in_the_plan_before(
    tmp_path: Path, disk: Path, allocate: Allocate
) -> None:
    content = os.urandom(REGION)
    plan = tmp_path / "dit_model.engine"
    # The sample is taken from the middle of the span, whose first 16 bytes are the allocator's.
    middle = content[REGION // 2 - PAGE : REGION // 2 + 2 * PAGE]
    plan.write_bytes(middle + os.urandom(OFFSET) + content)
    before = private_memory()
    address = allocate(content)
    assert move(plan, before, disk).moved_bytes > REGION - 2 * PAGE
    assert in_memory(address) == 0


def test_pages_that_hold_something_else_stay(plan: Path, disk: Path, allocate: Allocate) -> None:
    changed = bytearray(region(plan))
    # One byte alone, and a stretch of runs that are not worth a mapping each.
    changed[REGION // 3] ^= 1
    for at in range(30 * MIB, 34 * MIB, MIB // 2):
        changed[at] ^= 1
    content = bytes(changed)
    del changed
    before = private_memory()
    address = allocate(content)
    moved = move(plan, before, disk)
    stretch = 7 * MIB // 2
    assert REGION - stretch - 8 * PAGE < moved.moved_bytes < REGION - stretch
    assert stretch < in_memory(address) < stretch + 4 * PAGE
    assert digest_at(address) == digest(content)


@pytest.mark.parametrize("content", [os.urandom(REGION), bytes(REGION)], ids=["other", "zeros"])
def test_memory_of_another_is_not_touched(
    plan: Path, disk: Path, allocate: Allocate, content: bytes
) -> None:
    before = private_memory()
    address = allocate(content)
    ctypes.memset(address, 1, 1)
    resident = in_memory(address)
    assert move(plan, before, disk) == HostCopy()
    assert in_memory(address) == resident


def test_memory_from_before_the_engine_was_loaded_is_not_touched(
    plan: Path, disk: Path, allocate: Allocate
) -> None:
    address = allocate(region(plan))
    assert move(plan, private_memory(), disk) == HostCopy()
    assert stays(address)


@pytest.mark.parametrize("end", ["first", "last"])
def test_memory_that_cuda_knows_is_not_touched(
    plan: Path, disk: Path, copied: Copied, end: str
) -> None:
    middle = copied.address + REGION // 2
    known = range(middle) if end == "first" else range(middle, copied.address + REGION)
    kept = move(plan, copied.before, disk, is_plain=lambda at: at not in known)
    assert kept.kept_bytes == kept.found_bytes > REGION - 2 * PAGE
    assert kept.reason == "CUDA uses some of that memory itself"
    assert stays(copied.address)


def test_without_a_disk_the_copy_stays_and_each_folder_is_told(
    plan: Path, disk: Path, copied: Copied, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, missing = Path("/dev/shm"), disk / "missing"
    kept = move(plan, copied.before, memory, missing)
    assert kept.kept_bytes == kept.found_bytes > 0
    assert kept.reason == (
        f"{memory}: keeps its files, or this process its pages, in memory; "
        f"{missing}: No such file or directory"
    )
    with monkeypatch.context() as patch:
        patch.setattr(host_copy, "_SPARE_BYTES", 1 << 60)
        assert "has no room of" in move(plan, copied.before, disk).reason
    assert stays(copied.address)
    assert move(plan, copied.before, memory, missing, disk).reason == "", (
        "the next folder is taken"
    )
    assert in_memory(copied.address) == 0
    assert digest_at(copied.address) == digest(copied.content)


def test_folder_that_may_not_be_written_is_told(
    plan: Path, disk: Path, copied: Copied, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    # Tests may run as root, whom no folder refuses.
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    assert move(plan, copied.before, disk).reason == f"{disk}: Permission denied"


def test_disk_that_fills_up_leaves_the_rest_in_memory_and_all_bytes_right(
    plan: Path, disk: Path, copied: Copied
) -> None:
    with file_size_limit(36 * MIB):
        moved = move(plan, copied.before, disk)
    assert 0 < moved.moved_bytes < moved.found_bytes
    assert moved.reason == f"{disk}: File too large"
    assert in_memory(copied.address) < moved.kept_bytes + 2 * PAGE
    assert digest_at(copied.address) == digest(copied.content)


def test_process_that_locks_its_memory_keeps_the_copy(
    plan: Path, disk: Path, copied: Copied
) -> None:
    future = 2
    if LIBC.mlockall(future) != 0:
        pytest.skip(f"this user may not lock memory: {os.strerror(ctypes.get_errno())}")
    try:
        moved = move(plan, copied.before, disk)
    finally:
        LIBC.munlockall()
    assert moved.kept_bytes == moved.found_bytes > 0
    assert "this process its pages, in memory" in moved.reason
    assert digest_at(copied.address) == digest(copied.content)


def test_memory_that_goes_away_meanwhile_is_no_fault_and_no_obstacle(
    plan: Path, disk: Path, copied: Copied, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As when another thread frees what it had: this process would be killed for reading it.
    memory = private_mapping(bytes(2 * REGION))
    freed = address_in(memory)
    memory.close()
    gone = (freed // PAGE * PAGE, freed // PAGE * PAGE + 2 * REGION)
    found = host_copy._without(private_memory(), copied.before)
    monkeypatch.setattr(host_copy, "private_memory", lambda: sorted([*found, gone]))
    moved = move(plan, [], disk)
    assert moved.reason == "80 MiB could not be read (Input/output error)"
    assert moved.kept_bytes == 0
    assert in_memory(copied.address) == 0


def test_memory_that_was_not_searched_is_told(
    plan: Path, disk: Path, allocate: Allocate, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = os.urandom(REGION)
    before = private_memory()
    allocate(content)
    monkeypatch.setattr(host_copy, "_SEARCH_BYTES", 0)
    assert move(plan, before, disk).reason == "40 MiB were not searched to the end"


def test_memory_of_one_value_costs_no_search(
    plan: Path, disk: Path, allocate: Allocate, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = region(plan)
    # Larger, so looked at first.
    zeros = bytes(4 * REGION)
    before = private_memory()
    allocate(zeros)
    address = allocate(content)
    monkeypatch.setattr(host_copy, "_SEARCH_BYTES", 0)
    assert move(plan, before, disk).reason == ""
    assert in_memory(address) == 0


def test_lack_of_memory_is_told(
    plan: Path, disk: Path, copied: Copied, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(host_copy, "_array", refuse)
    assert move(plan, copied.before, disk).reason == "MemoryError()"


@pytest.mark.parametrize(("beyond", "moved"), [(-PAGE, False), (PAGE, True)])
def test_disk_needs_room_for_the_copy_and_some_to_spare(
    plan: Path,
    disk: Path,
    copied: Copied,
    monkeypatch: pytest.MonkeyPatch,
    beyond: int,
    moved: bool,
) -> None:
    room = host_copy._SPARE_BYTES + REGION - 2 * PAGE + beyond
    monkeypatch.setattr(
        os, "statvfs", lambda folder: types.SimpleNamespace(f_bavail=room, f_frsize=1)
    )
    assert (move(plan, copied.before, disk).kept_bytes == 0) == moved


def test_zeros_beside_a_copy_are_nobody_s_proof(
    tmp_path: Path, disk: Path, allocate: Allocate
) -> None:
    # What another thread has there and has not written to yet equals the plan, too.
    content, zeros = os.urandom(REGION), bytes(8 * MIB)
    plan = tmp_path / "dit_model.engine"
    plan.write_bytes(os.urandom(OFFSET) + zeros + content + zeros)
    both = zeros + content + zeros
    before = private_memory()
    address = allocate(both)
    moved = move(plan, before, disk)
    # A page at each end holds both.
    assert REGION - 2 * PAGE < moved.moved_bytes <= REGION + PAGE
    assert in_memory(address, len(zeros)) >= len(zeros) - 2 * PAGE
    assert in_memory(address + len(zeros) + REGION, len(zeros)) >= len(zeros) - 2 * PAGE
    assert digest_at(address, len(both)) == digest(both)


def test_sample_across_the_pieces_that_the_plan_is_read_in_is_found(
    tmp_path: Path, disk: Path, allocate: Allocate, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = os.urandom(REGION)
    plan = tmp_path / "dit_model.engine"
    before = private_memory()
    address = allocate(content)
    (span,) = (
        span for span in host_copy._without(private_memory(), before) if address in range(*span)
    )
    sample = next(host_copy._spread(*span)) - address
    header = host_copy._CHUNK_BYTES - host_copy._SAMPLE_BYTES // 2 - sample
    plan.write_bytes(os.urandom(header) + content)
    # The first sample has to do.
    monkeypatch.setattr(host_copy, "_SEARCH_BYTES", 0)
    assert move(plan, before, disk).reason == ""
    assert in_memory(address) == 0


def test_plan_that_is_gone_is_told(plan: Path, disk: Path, copied: Copied) -> None:
    assert move(plan.with_name("gone"), copied.before, disk).reason == "No such file or directory"


def test_mapped_file_of_any_name_is_no_obstacle(tmp_path: Path, allocate: Allocate) -> None:
    with (tmp_path / os.fsdecode(b"caf\xe9 \xe2\x80\xa8 \r x")).open("wb+") as stream:
        stream.write(bytes(PAGE))
        stream.flush()
        with mmap.mmap(stream.fileno(), PAGE):
            address = allocate(bytes(REGION))
            assert any(start <= address < end for start, end in private_memory())
