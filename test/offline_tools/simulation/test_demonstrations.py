"""Hazards of recorded demonstrations: noise in the actions, rows that slip, a dataset unread."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from offline_tools.cli import main
from offline_tools.simulation import demonstrations
from offline_tools.simulation.demonstrations import chunks, demonstrate
from offline_tools.simulation.environment import Tabletop
from offline_tools.simulation.robot import ACTION_PERIOD_S, robot_description
from offline_tools.simulation.tasks import TASKS


def test_disturbed_demonstrations_mostly_succeed_and_repeat_to_the_bit(
    simulation: Tabletop,
) -> None:
    episodes = [demonstrate(simulation, seed) for seed in range(20)]
    assert sum(episode.success for episode in episodes) >= 18
    again = demonstrate(simulation, 3)
    np.testing.assert_array_equal(again.state_deg, episodes[3].state_deg)
    assert len({episode.task for episode in episodes}) == len(TASKS)


def test_actions_are_the_clean_path_and_the_state_is_not(
    simulation: Tabletop, monkeypatch: pytest.MonkeyPatch
) -> None:
    disturbed = demonstrate(simulation, 11)
    monkeypatch.setattr(demonstrations, "_LARGEST_ERROR_RAD", np.zeros(6))
    clean = demonstrate(simulation, 11)
    np.testing.assert_array_equal(disturbed.action_deg, clean.action_deg)
    assert np.abs(disturbed.state_deg - clean.state_deg).mean() > 0.2


def test_a_chunk_begins_with_the_rows_own_action_and_ends_held() -> None:
    action = np.arange(5, dtype=np.float32)[:, None] * np.ones(6, np.float32)
    following = chunks(action, 3)
    assert following.shape == (5, 3, 6)
    np.testing.assert_array_equal(
        following[:, :, 0], [[0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 4], [4, 4, 4]]
    )


def test_a_recorded_dataset_reads_back_with_its_instruction(tmp_path: Path) -> None:
    pytest.importorskip("av", reason="a dataset's videos need PyAV")
    from offline_tools.dataset.lerobot import LeRobotDataset

    folder = tmp_path / "dataset"
    assert main(
        ["make-sim-dataset", "--output", str(folder), "--episodes", "1", "--task", "blue/right"]
    ) == 0  # fmt: skip
    dataset = LeRobotDataset.open(folder)
    episode = dataset.episode(0)
    assert dataset.fps == pytest.approx(1.0 / ACTION_PERIOD_S)
    assert set(episode.instructions) == {"Put the blue cube on the right plate."}
    assert episode.state["single_arm"].shape == (len(episode), 5)
    frames = list(episode.frames("front"))
    assert len(frames) == len(episode)
    # The arm moves, so does its picture.
    assert np.abs(frames[0].astype(int) - frames[len(frames) // 2]).mean() > 1.0


def test_the_robot_file_in_config_describes_this_robot(repository_root: Path) -> None:
    from groot_int8_ros.policy.robot import load_robot

    assert load_robot(repository_root / "config" / "simulated_arm.yaml") == robot_description()
