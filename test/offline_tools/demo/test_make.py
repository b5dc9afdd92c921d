"""Generating data must not cost anybody theirs."""

from __future__ import annotations

from pathlib import Path

import pytest

from offline_tools.cli import main


@pytest.mark.parametrize("command", ["make-dataset", "make-checkpoint"])
def test_a_folder_with_something_in_it_is_refused_and_kept(
    command: str, tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    more = ["--dataset", str(tiny_dataset)] if command == "make-checkpoint" else []
    assert main([command, "--output", str(tmp_path), *more]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
