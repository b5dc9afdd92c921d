"""Hazards of kept hashes: a change that is not noticed, a file that is read each time."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from offline_tools.pipeline.file_hashes import FILE_NAME, FileHashes


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def write(path: Path, content: bytes, mtime_ns: int) -> Path:
    path.write_bytes(content)
    os.utime(path, ns=(mtime_ns, mtime_ns))
    return path


@pytest.fixture
def state(tmp_path: Path) -> Path:
    folder = tmp_path / "state"
    folder.mkdir()
    return folder


def test_other_content_of_the_same_size_is_noticed(tmp_path: Path, state: Path) -> None:
    one = write(tmp_path / "a.mp4", b"one", 1_000)
    assert FileHashes(state).of([one]) == [sha256(b"one")]
    # A nanosecond is enough.
    write(one, b"two", 1_001)
    assert FileHashes(state).of([one]) == [sha256(b"two")]


def test_file_of_known_size_and_time_is_not_read_again_in_this_run_or_the_next(
    tmp_path: Path, state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [write(tmp_path / f"{name}.mp4", name.encode(), 1_000) for name in ("a", "b")]
    hashes = FileHashes(state)
    wanted = hashes.of(files)
    assert "reading 2 new or changed videos" in capsys.readouterr().out
    # Whoever reads it now sees another content: the old hash shows that nobody did.
    write(files[0], b"x", 1_000)
    assert hashes.of(files) == wanted
    assert FileHashes(state).of(files) == wanted
    assert capsys.readouterr().out == ""
    write(files[1], b"longer", 1_000)
    assert FileHashes(state).of(files) == [wanted[0], sha256(b"longer")]
    assert "reading 1 new" in capsys.readouterr().out


def test_hashes_of_files_that_are_gone_are_not_kept(tmp_path: Path, state: Path) -> None:
    files = [write(tmp_path / f"{name}.mp4", name.encode(), 1_000) for name in ("a", "b")]
    FileHashes(state).of(files)
    FileHashes(state).of(files[1:])
    assert [Path(path).name for path in json.loads((state / FILE_NAME).read_text())] == ["b.mp4"]


@pytest.mark.parametrize("content", ["", "[]", '{"a": 1}', '{"a": [1, 2]}', '{"a": ["x", 1, ""]}'])
def test_damaged_hashes_count_as_none(tmp_path: Path, state: Path, content: str) -> None:
    (state / FILE_NAME).write_text(content)
    one = write(tmp_path / "a.mp4", b"one", 1_000)
    assert FileHashes(state).of([one]) == [sha256(b"one")]


def test_nothing_is_written_where_no_pipeline_ran(tmp_path: Path) -> None:
    one = write(tmp_path / "a.mp4", b"one", 1_000)
    assert FileHashes(tmp_path / "none").of([one]) == [sha256(b"one")]
    assert not (tmp_path / "none").exists()
