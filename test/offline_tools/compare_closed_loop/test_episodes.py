"""Hazards of the runs: an episode run twice, an error that is not one, a mistake left unsaid."""

from __future__ import annotations

from pathlib import Path

import pytest

from groot_int8_ros.errors import ConfigurationError
from offline_tools.closed_loop.results import read_results
from offline_tools.compare_closed_loop.episodes import Job, run_job, run_jobs
from offline_tools.compare_closed_loop.plan import Cell
from offline_tools.training.shipped import POLICY_FOLDER


def _job(folder: Path, steps: int, episodes: int) -> Job:
    cell = Cell(engine="pytorch", denoising_steps=steps)
    return Job(cell, POLICY_FOLDER, POLICY_FOLDER, folder / f"{steps}.jsonl", episodes, 0)


def test_a_cell_is_judged_and_gone_on_with(tmp_path: Path) -> None:
    job = _job(tmp_path, 1, 2)
    answers = iter([False, True])
    assert run_job(job, lambda: next(answers)) == (1, 1), "told to stop after the first episode"
    setup, episodes = read_results(job.output)
    assert setup["denoising_steps"] == 1
    # Of one step against four; against itself there would be none.
    assert 1e-4 < episodes[0]["action_error_rad"] < episodes[0]["largest_action_error_rad"] < 0.5
    before = job.output.read_bytes()
    assert run_job(_job(tmp_path, 1, 1)) == (1, 1)
    assert job.output.read_bytes() == before


def test_what_a_process_finds_wrong_reaches_the_user(tmp_path: Path) -> None:
    job = _job(tmp_path, 1, 1)
    job.output.write_text('{"setup": {"model": "another"}}\n')
    with pytest.raises(ConfigurationError, match="another bundle"):
        run_jobs([job], 1, lambda _line: None)
