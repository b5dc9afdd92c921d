"""The replay's figures: lateness, jumps and dead time that are there, and none that are not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from offline_tools.cli import EXIT_USER_ERROR, main
from offline_tools.replay.command import generated
from offline_tools.replay.figures import Figures, figures, lag_s, seam_jumps
from offline_tools.replay.simulation import (
    ROADS,
    LatencyModel,
    Options,
    PolicyModel,
    Road,
    Run,
    simulate,
)

STEADY = LatencyModel(median_s=0.2, jitter=0.0, outlier_share=0.0, warm_up_s=1.0)


def of(road: Road, options: Options) -> Figures:
    return figures(
        road, [simulate(motion, road, options) for motion in generated(1, seconds=10.0)]
    )


def test_a_policy_that_agrees_with_itself_leaves_no_seam() -> None:
    options = Options(STEADY, PolicyModel(disagreement=0.0))
    for road in ("switch", "linear_blend", "temporal_ensemble", "rtc"):
        found = of(road, options)
        assert found.error_rms < 1e-3, road
        assert found.lag_s == 0.0, road
        assert found.dead_s == 0.0, road
        assert found.seam_jump_max < 1e-2, road


def test_playing_from_row_0_lags_by_the_latency_and_the_observations_age() -> None:
    found = of("row_0", Options(STEADY, PolicyModel(disagreement=0.0)))
    assert found.lag_s == pytest.approx(0.2 + 0.05, abs=0.04)
    assert found.dead_s == 0.0


def test_waiting_for_each_chunk_is_dead_for_each_inference() -> None:
    (motion,) = generated(1)
    found = simulate(motion, "wait", Options(STEADY, PolicyModel(disagreement=0.0)))
    dead = found.dead[found.seams[0] :]
    assert dead.sum() * 0.02 == pytest.approx(0.2 * (len(found.seams) - 1), rel=0.2)


def test_seams_are_as_smooth_as_they_promise() -> None:
    options = Options(STEADY, PolicyModel(disagreement=0.05))
    jumps = {road: of(road, options).seam_jump_mean for road in ROADS if road != "wait"}
    assert jumps["rtc"] < jumps["linear_blend"] < jumps["switch"]
    assert jumps["temporal_ensemble"] < jumps["switch"]
    assert of("rtc", options).prefix_mismatches <= 2


def test_a_chunk_shorter_than_two_latencies_runs_out() -> None:
    short = of("linear_blend", Options(STEADY, PolicyModel(horizon=10)))
    assert short.dead_share > 0.1
    assert short.late_chunks > 10
    enough = of("linear_blend", Options(STEADY, PolicyModel(horizon=16)))
    assert enough.dead_share == 0.0


def test_the_executors_limits_round_off_a_resume() -> None:
    latency = replace(STEADY, outlier_share=0.1)
    free = of("switch", Options(latency, PolicyModel()))
    limited = of("switch", Options(latency, PolicyModel(), limit_factor=2.0))
    assert limited.resume_jump_max < 0.5 * free.resume_jump_max


def planted(commands: np.ndarray, recorded: np.ndarray, seams: tuple[int, ...]) -> Run:
    times_ns = 20_000_000 * np.arange(len(commands), dtype=np.int64)
    dead = np.zeros(len(commands), bool)
    return Run(times_ns, commands, recorded, dead, seams, 0, 0, 0.0)


def test_figures_find_what_was_planted() -> None:
    times = 0.02 * np.arange(500)[:, None]
    recorded = np.sin(times)
    late = planted(np.sin(times - 0.3), recorded, (0,))
    assert lag_s(late, 0.02) == pytest.approx(0.3)
    jumped = recorded.copy()
    jumped[250:] += 0.25
    (jump,) = seam_jumps(planted(jumped, recorded, (0, 250)), after_hold=False)
    assert jump == pytest.approx(0.25, abs=1e-3)
    assert not seam_jumps(planted(jumped, recorded, (0, 250)), after_hold=True).size
    (none,) = seam_jumps(planted(jumped, recorded, (0, 260)), after_hold=False)
    assert none < 1e-3


def test_recorded_episodes_make_the_table(
    g1_dataset_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pyarrow", reason="reading a dataset needs pyarrow")
    report = tmp_path / "report.json"
    words = ["chunk-replay", "--dataset", str(g1_dataset_dir), "--traj-ids", "0", "2"]
    assert main([*words, "--roads", "row_0", "rtc", "--output", str(report)]) == 0
    shown = capsys.readouterr().out
    assert "2 motions" in shown
    assert [line.split("|")[1].strip() for line in shown.splitlines()[3:]] == [
        *("recording", "row_0", "rtc")
    ]
    _, row_0, rtc = json.loads(report.read_text())
    assert row_0["lag_s"] > 0.2
    assert rtc["lag_s"] < 0.1
    assert 0.0 < rtc["error_rms"] < row_0["error_rms"]


def test_a_missing_dataset_is_a_usage_error(tmp_path: Path) -> None:
    assert main(["chunk-replay", "--dataset", str(tmp_path / "nothing")]) == EXIT_USER_ERROR
