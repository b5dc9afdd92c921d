"""Hazards of writing: a failure half-way, an interrupt between renames, a file in the way."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import signal
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest

from groot_int8_ros.errors import OutputError
from groot_int8_ros.policy import files
from groot_int8_ros.policy.files import (
    atomic_directory,
    atomic_file,
    refuse_occupied,
    sha256_of_file,
)

from ..full_disk import file_size_limit

_FILE_LIMIT_BYTES = 4096


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


def test_file_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What a power cut leaves cannot be tried out; the order that decides it can be seen.
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        done.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def renamed(source: Path, target: Path) -> None:
        done.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    with atomic_file(tmp_path / "shard") as temporary:
        temporary.write_text("data")
    assert done == [temporary.name, "rename", tmp_path.name]


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
        file_size_limit(_FILE_LIMIT_BYTES),
        pytest.raises(OutputError, match=r"cannot write .*bundle: File too large.*free space"),
    ):
        _write_folder(target, "x" * (2 * _FILE_LIMIT_BYTES))
    assert _content(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"] * there_before


def test_array_that_a_full_disk_cuts_short_is_an_output_error(tmp_path: Path) -> None:
    array = np.zeros(2 * _FILE_LIMIT_BYTES, np.uint8)
    with (
        file_size_limit(_FILE_LIMIT_BYTES),
        pytest.raises(OutputError, match=r"cannot write .*weights: the disk may be full"),
        atomic_file(tmp_path / "weights") as temporary,
    ):
        array.tofile(temporary)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_while_a_file_is_written_leaves_nothing(tmp_path: Path) -> None:
    with (
        file_size_limit(_FILE_LIMIT_BYTES),
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
    # As on a filesystem that cannot swap two names in one step.
    monkeypatch.setattr(files, "_exchange", lambda *_: False)
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


def _exchange_works(folder: Path) -> bool:
    for name in ("one", "two"):
        (folder / name).mkdir()
    works = files._exchange(folder / "one", folder / "two")
    for name in ("one", "two"):
        (folder / name).rmdir()
    return works


@pytest.mark.parametrize("interrupted_after", [False, True])
def test_folder_is_replaced_in_one_step_where_the_filesystem_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted_after: bool
) -> None:
    if not _exchange_works(tmp_path):
        pytest.skip(f"the filesystem of {tmp_path} has no RENAME_EXCHANGE")
    target = tmp_path / "bundle"
    _write_folder(target, "old")
    exchange = files._exchange

    def exchange_and_stop(first: Path, second: Path) -> bool:
        exchange(first, second)
        raise KeyboardInterrupt

    def no_rename(*_: object) -> None:
        pytest.fail("the target was renamed away, so for a moment it was not there")

    monkeypatch.setattr(os, "replace", no_rename)
    if interrupted_after:
        monkeypatch.setattr(files, "_exchange", exchange_and_stop)
        with pytest.raises(KeyboardInterrupt):
            _write_folder(target, "new")
    else:
        _write_folder(target, "new")
    assert _content(tmp_path) == {"bundle/a.txt": "new", "bundle/inner/b.txt": "new"}


def test_exchange_that_fails_for_a_reason_is_an_output_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write_folder(tmp_path / "bundle", "old")

    def refuse(_first: Path, second: Path) -> bool:
        # What a target that is a mount point gives.
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(second))

    monkeypatch.setattr(files, "_exchange", refuse)
    with pytest.raises(OutputError, match=r"cannot write .*bundle: Device or resource busy"):
        _write_folder(tmp_path / "bundle", "new")
    assert _content(tmp_path) == {"bundle/a.txt": "old", "bundle/inner/b.txt": "old"}


_KILLED_BETWEEN_THE_RENAMES = """
import os, signal, sys
from pathlib import Path
from groot_int8_ros.policy import files
files._exchange = lambda *_: False
rename = os.replace
def rename_and_die(*names):
    rename(*names)
    os.kill(os.getpid(), signal.SIGKILL)
os.replace = rename_and_die
with files.atomic_directory(Path(sys.argv[1])) as folder:
    (folder / "a.txt").write_text("new")
"""


@pytest.fixture
def lost(tmp_path: Path) -> Path:
    """A target whose old content a killed writer left under its temporary name."""
    target = tmp_path / "bundle"
    _write_folder(target, "old")
    done = subprocess.run(
        [sys.executable, "-c", _KILLED_BETWEEN_THE_RENAMES, str(target)], check=False, timeout=60
    )
    assert done.returncode == -signal.SIGKILL
    assert not target.exists()
    return target


def test_next_writer_puts_back_what_a_killed_one_moved_aside(
    lost: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(KeyError):
        _half_write_folder(lost, KeyError)
    assert _content(lost.parent) == {"bundle/a.txt": "old", "bundle/inner/b.txt": "old"}
    assert [path.name for path in lost.parent.iterdir()] == ["bundle"]
    assert f"{lost} is back: a writer was killed while replacing it" in caplog.text


def test_what_a_killed_writer_moved_aside_is_not_free_to_be_replaced(lost: Path) -> None:
    with pytest.raises(OutputError, match="already holds a thing: add --force"):
        refuse_occupied(lost, marker="a.txt", what="a thing")
    assert _content(lost) == {"a.txt": "old", "inner/b.txt": "old"}


def test_leftovers_of_another_target_stay_where_they_are(lost: Path) -> None:
    # The other target's name is the beginning of the lost one's.
    (working,) = lost.parent.iterdir()
    random = working.name.removeprefix(".partial-bundle-")
    other = working.rename(working.with_name(f".partial-bundle-2-{random}"))
    _write_folder(lost, "new")
    assert (other / "old" / "a.txt").read_text() == "old"


def test_live_writer_of_the_same_target_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    with atomic_directory(target) as first:
        (first / "a.txt").write_text("first")
        _write_folder(target, "second")
        refuse_occupied(tmp_path / "elsewhere")
        assert _content(target)["a.txt"] == "second"
        assert _content(first) == {"a.txt": "first"}
    assert _content(tmp_path) == {"bundle/a.txt": "first"}


def _print_into_a_closed_pipe(_: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        os.write(writer, b"50 %")
    finally:
        os.close(writer)


def _read_an_unreadable_shard(_: Path) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO), "/checkpoint/model.safetensors")


def _read_a_shard_through_a_dead_cable(_: Path) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def _copy_what_is_not_there(temporary: Path) -> None:
    shutil.copyfile("/nowhere/config.json", temporary)


def _fill_another_disk(_: Path) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/elsewhere/cache")


@pytest.mark.parametrize("writer", [atomic_file, atomic_directory])
@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (_print_into_a_closed_pipe, BrokenPipeError),
        (_read_an_unreadable_shard, OSError),
        (_read_a_shard_through_a_dead_cable, OSError),
        (_copy_what_is_not_there, FileNotFoundError),
        (_fill_another_disk, OSError),
    ],
)
def test_error_that_is_not_about_the_output_keeps_its_own_words(
    tmp_path: Path, writer: object, failure: object, kind: type[OSError]
) -> None:
    open_writer: AbstractContextManager[Path] = writer(tmp_path / "x" / "y")  # type: ignore[operator]
    with pytest.raises(kind) as caught, open_writer as temporary:
        failure(temporary)  # type: ignore[operator]
    assert "cannot write" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_copy_that_fills_the_disk_is_an_output_error(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"x" * (2 * _FILE_LIMIT_BYTES))
    with (
        file_size_limit(_FILE_LIMIT_BYTES),
        pytest.raises(OutputError, match=r"cannot write .*copy: File too large"),
        atomic_directory(tmp_path / "copy") as folder,
    ):
        shutil.copyfile(source, folder / "copied")
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("half_write", [_half_write_file, _half_write_folder])
def test_folders_made_for_a_target_that_never_came_are_removed_and_no_others(
    tmp_path: Path, half_write: object
) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(KeyError):
        half_write(tmp_path / "mine" / "a" / "b" / "bundle", KeyError)  # type: ignore[operator]
    assert list(tmp_path.rglob("*")) == [tmp_path / "mine"]


def test_made_folder_that_somebody_else_uses_by_now_stays(tmp_path: Path) -> None:
    writer = atomic_directory(tmp_path / "a" / "b" / "x")
    writer.__enter__()
    (tmp_path / "a" / "other").write_text("content")
    late = KeyError("late")
    with contextlib.suppress(KeyError):
        writer.__exit__(KeyError, late, None)
    assert list(tmp_path.rglob("*")) == [tmp_path / "a", tmp_path / "a" / "other"]


@pytest.mark.parametrize(
    ("there", "replace", "message"),
    [
        ("nothing", False, ""),
        ("empty folder", False, ""),
        ("marked folder", False, "already holds a thing: add --force to replace it"),
        ("marked folder", True, ""),
        ("other folder", True, "exists and is not a thing, so nothing was written to it"),
        ("file", True, "exists and is not a thing, so nothing was written to it"),
        ("dangling link", True, "exists and is not a thing, so nothing was written to it"),
    ],
)
def test_only_a_marked_folder_is_replaced_and_only_when_asked(
    tmp_path: Path, there: str, replace: bool, message: str
) -> None:
    target = tmp_path / "target"
    if "folder" in there:
        target.mkdir()
        if there != "empty folder":
            (target / there.partition(" ")[0]).write_text("content")
    elif there == "file":
        target.write_text("content")
    elif there == "dangling link":
        target.symlink_to(tmp_path / "unplugged")
    if not message:
        refuse_occupied(target, marker="marked", what="a thing", replace=replace)
        return
    with pytest.raises(OutputError, match=message):
        refuse_occupied(target, marker="marked", what="a thing", replace=replace)
