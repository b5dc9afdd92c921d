"""Hazards of the results: episodes counted twice, other options' results mixed in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from offline_tools.cli import main
from offline_tools.training.shipped import POLICY_FOLDER

_QUICK = ("--inference-period-s", "1.2", "--denoising-steps", "1")


def _run(output: Path, *more: str) -> int:
    return main(
        [
            "closed-loop",
            "--checkpoint",
            str(POLICY_FOLDER),
            "--output",
            str(output),
            *_QUICK,
            *more,
        ]
    )


def test_an_interrupted_run_goes_on_and_other_options_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "results.jsonl"
    assert _run(output, "--episodes", "1") == 0
    # A kill in the middle of a line: that episode is run again.
    with output.open("a") as stream:
        stream.write('{"seed": 1, "succ')
    first = output.read_text().splitlines()[1]
    film = tmp_path / "film.png"
    assert _run(output, "--episodes", "2", "--film", str(film)) == 0
    assert not film.exists(), "a finished episode was run again"
    assert [json.loads(line)["seed"] for line in output.read_text().splitlines()[1:]] == [0, 1]
    capsys.readouterr()
    assert _run(output, "--episodes", "1", "--latency-s", "0.1") == 2
    assert "other options" in capsys.readouterr().err
    assert output.read_text().splitlines()[1] == first
