"""Hazards of writing: a failure half-way, an interrupt between renames, a file in the way."""

from __future__ import annotations

import hashlib
import os
import resource
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import pytest

from groot_int8_ros.errors import OutputError
from groot_int8_ros.policy import files
from groot_int8_ros.policy.files import atomic_directory, atomic_file, sha256_of_file

_FILE_LIMIT_BYTES = 4096


@contextmanager
def _full_disk() -> Iterator[None]:
    # A limit on file sizes makes a write fail with an OSError, as a full disk does.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (_FILE_LIMIT_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _write_folder(target: Path, content: str) -> None:
    with atomic_directory(target) as folder:
        (folder / "a.txt").write_text(content)
        (folder / "inner").mkdir()
        (folder / "inner" / "b.txt").write_text(content)


def _half_write_file(target: Path, failure: type[BaseException]) -> None:
    with atomic_file(target) as temporary:
        temporary.write_text("half")
        raise failure


def _half_write_folder(target: Path, failure: type[BaseException]) -> None:
    with atomic_directory(target) as folder:
        (folder / "a.txt").write_text("half")
        raise failure


def _content(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_hash_is_that_of_the_whole_file_across_read_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_HASH_BLOCK_BYTES", 7)
    content = bytes(range(256)) * 3
    path = tmp_path / "data"
    path.write_bytes(content)
    assert sha256_of_file(path) == hashlib.sha256(content).hexdigest()


def test_file_appears_whole_in_a_folder_that_did_not_exist(tmp_path: Path) -> None:
    target = tmp_path / "new" / "deep" / "report.json"
    with atomic_file(target) as temporary:
        temporary.write_text("content")
        assert not target.exists()
    assert target.read_text() == "content"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit])
def test_file_keeps_its_old_content_when_writing_fails(
    tmp_path: Path, failure: type[BaseException]
) -> None:
    target = tmp_path / "report.json"
    target.write_text("old")
    with pytest.raises(failure):
        _half_write_file(target, failure)
    assert _content(tmp_path) == {"report.json": "old"}


def test_written_things_have_the_permissions_that_the_umask_asks_for(tmp_path: Path) -> None:
    # mkstemp and mkdtemp make private files, which another user of the robot could not read.
    previous = os.umask(0o027)
    try:
        with atomic_file(tmp_path / "file") as temporary:
            temporary.write_text("content")
        _write_folder(tmp_path / "folder", "content")
    finally:
        os.umask(previous)
    modes = {name: (tmp_path / name).stat().st_mode & 0o777 for name in ("file", "folder")}
    assert modes == {"file": 0o640, "folder": 0o750}


@pytest.mark.parametrize("writer", [atomic_file, atomic_directory])
def test_target_below_a_regular_file_is_an_output_error(tmp_path: Path, writer: object) -> None:
    (tmp_path / "file").write_text("in the way")
    target = tmp_path / "file" / "bundle"
    open_writer: AbstractContextManager[Path] = writer(target)  # type: ignore[operator]
    with pytest.raises(OutputError, match=r"cannot write .*bundle: .*\(.*file\)\. "), open_writer:
        pytest.fail("the writer gave a path to write to")
    assert _content(tmp_path) == {"file": "in the way"}


@pytest.mark.parametrize("there_before", [False, True])
def test_full_disk_names_the_target_and_leaves_what_was_there(
    tmp_path: Path, there_before: bool
) -> None:
    target = tmp_path / "bundle"
    if there_before:
        _write_folder(target, "old")
    before = _content(tmp_path)
    with (
        _full_disk(),
        pytest.raises(OutputError, match=r"cannot write .*bundle: File too large.*free space"),
    ):
        _write_folder(target, "x" * (2 * _FILE_LIMIT_BYTES))
    assert _content(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"] * there_before


def test_array_that_a_full_disk_cuts_short_is_an_output_error(tmp_path: Path) -> None:
    array = np.zeros(2 * _FILE_LIMIT_BYTES, np.uint8)
    with (
        _full_disk(),
        pytest.raises(OutputError, match=r"cannot write .*weights: the disk may be full"),
        atomic_file(tmp_path / "weights") as temporary,
    ):
        array.tofile(temporary)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_while_a_file_is_written_leaves_nothing(tmp_path: Path) -> None:
    with (
        _full_disk(),
        pytest.raises(OutputError, match=r"report\.json: File too large"),
        atomic_file(tmp_path / "report.json") as temporary,
    ):
        temporary.write_bytes(b"x" * (2 * _FILE_LIMIT_BYTES))
    assert list(tmp_path.iterdir()) == []


def test_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    target.mkdir()
    (target / "stale.txt").write_text("from the old bundle")
    _write_folder(target, "new")
    assert _content(tmp_path) == {"bundle/a.txt": "new", "bundle/inner/b.txt": "new"}
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit])
def test_old_folder_stays_whole_when_filling_the_new_one_fails(
    tmp_path: Path, failure: type[BaseException]
) -> None:
    target = tmp_path / "bundle"
    _write_folder(target, "old")
    with pytest.raises(failure):
        _half_write_folder(target, failure)
    assert _content(tmp_path) == {"bundle/a.txt": "old", "bundle/inner/b.txt": "old"}
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("renames_before", [0, 1, 2])
@pytest.mark.parametrize("there_before", [False, True])
def test_interrupt_at_each_rename_leaves_the_old_or_the_new_folder_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames_before: int, there_before: bool
) -> None:
    target = tmp_path / "bundle"
    if there_before:
        _write_folder(target, "old")
    rename = os.replace
    done = 0

    def interrupted(source: Path, destination: Path) -> None:
        nonlocal done
        if done == renames_before:
            done += 1
            raise KeyboardInterrupt
        done += 1
        rename(source, destination)

    monkeypatch.setattr(os, "replace", interrupted)
    finished = False
    try:
        _write_folder(target, "new")
        finished = True
    except KeyboardInterrupt:
        pass
    monkeypatch.undo()
    # With nothing there before, there is one rename: a later interrupt never comes.
    assert finished == (renames_before >= (2 if there_before else 1))
    expected = "new" if finished else "old" if there_before else None
    found = {path.name: _content(path) for path in tmp_path.iterdir()}
    if expected is None:
        assert found == {}
    else:
        assert found == {"bundle": {"a.txt": expected, "inner/b.txt": expected}}


def test_relative_target_survives_a_change_of_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with atomic_directory(Path("bundle")) as folder:
        os.chdir(elsewhere)
        (folder / "a.txt").write_text("content")
    assert (tmp_path / "bundle" / "a.txt").read_text() == "content"
