"""Hazards of the closed loop: a policy that cannot, an instruction unheard, latency ignored."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from groot_int8_ros.control.seams import SeamSettings
from groot_int8_ros.policy.types import ActionChunk, CommittedActions, Observation, UInt8Array
from offline_tools.closed_loop.channels import CHANNELS
from offline_tools.closed_loop.episode import LoopSettings, run_episode
from offline_tools.closed_loop.torch_policy import TorchPolicy
from offline_tools.parameter_file import read_parameter_file
from offline_tools.simulation.environment import Tabletop
from offline_tools.simulation.robot import FRAME_SIZES, robot_description
from offline_tools.simulation.tasks import TASKS, other_task
from offline_tools.training.shipped import POLICY_FOLDER


def test_the_shipped_policy_is_small_enough_to_ship() -> None:
    assert sum(path.stat().st_size for path in POLICY_FOLDER.iterdir()) <= 15e6


@pytest.mark.parametrize("seed", [12, 16])
def test_the_shipped_policy_does_what_it_is_asked(
    simulation: Tabletop, policy: TorchPolicy, seed: int
) -> None:
    task = TASKS[seed % len(TASKS)]
    shown: list[Mapping[str, UInt8Array]] = []
    result = run_episode(
        simulation, policy, seed, task, task, LoopSettings(inference_period_s=0.4), shown.append
    )
    assert result.success
    assert result.held_s == 0.0
    assert result.largest_step_rad < 0.3
    assert len(shown) == result.inferences
    assert {key: frame.shape[:2] for key, frame in shown[0].items()} == FRAME_SIZES


def test_told_another_task_it_does_that_one(simulation: Tabletop, policy: TorchPolicy) -> None:
    asked = TASKS[0]
    told = other_task(asked, 0)
    settings = LoopSettings(inference_period_s=0.4, limit_s=5.0, stop_at_success=False)
    result = run_episode(simulation, policy, 18, asked, told, settings)
    assert result.told_success
    assert not result.success
    assert result.time_s == pytest.approx(5.0)


def test_until_the_first_chunk_arrives_the_arm_holds(
    simulation: Tabletop, policy: TorchPolicy
) -> None:
    settings = LoopSettings(latency_s=0.3, limit_s=0.6)
    result = run_episode(simulation, policy, 1, TASKS[1], TASKS[1], settings)
    assert result.held_s == pytest.approx(0.3, abs=0.021)
    # While an answer is awaited no other is asked for.
    assert result.inferences == 2


def test_the_loops_channels_are_those_of_the_nodes_parameter_file(repository_root: Path) -> None:
    parameters = repository_root / "config" / "simulated_arm_node.yaml"
    given = read_parameter_file(parameters)
    assert [channel.name for channel in CHANNELS] == given["channels"]
    for channel in CHANNELS:
        prefix = f"channel.{channel.name}."
        assert list(channel.joints) == given[prefix + "joints"]
        for name in ("guard_distance", "start_tolerance"):
            assert set(getattr(channel, name)) == set(given[prefix + name])
        for name in ("velocity", "acceleration"):
            assert set(getattr(channel.limits, name)) == set(given[prefix + name])
        # The file's are rounded inwards.
        for name in ("lower", "upper"):
            np.testing.assert_allclose(
                getattr(channel.limits, name), given[prefix + name], rtol=0.0, atol=1e-4
            )


class _Promises:
    """A policy that keeps what it is promised and answers with where the arm stands."""

    def __init__(self) -> None:
        self.robot = robot_description()
        self.given: list[tuple[int, CommittedActions | None]] = []

    def infer(
        self,
        observation: Observation,
        *,
        seed: int | None = None,
        committed: CommittedActions | None = None,
    ) -> ActionChunk:
        self.given.append((observation.stamp_ns, committed))
        actions = {}
        for key, state in observation.state.items():
            actions[key] = np.repeat(state[None], 16, axis=0)
            # Each answer goes a little elsewhere than the last one.
            actions[key][4:] += 2.0 * (-1) ** len(self.given)
            if committed is not None:
                actions[key][list(committed.rows)] = committed.actions[key]
        return ActionChunk(
            actions, observation.stamp_ns, 0.1 * np.arange(16.0), np.zeros((16, 1), np.float32), 0
        )


def test_with_rtc_the_policy_is_told_what_is_executed_meanwhile(simulation: Tabletop) -> None:
    promised = _Promises()
    settings = LoopSettings(latency_s=0.3, limit_s=1.6, seam=SeamSettings("rtc"))
    result = run_episode(simulation, promised, 1, TASKS[1], TASKS[1], settings)
    rows = [None if rows is None else list(rows.rows) for _, rows in promised.given]
    # The executor knows no latency before its warm-up is over; then rows of 0, 0.1, 0.2 and 0.3 s
    # are past when the answer is there.
    assert rows[:3] == [None, None, None]
    assert set(map(tuple, filter(None, rows[3:]))) == {(0, 1, 2, 3)}
    assert len(rows) > 4
    assert result.prefix_mismatches <= 3
    free = _Promises()
    settings = LoopSettings(latency_s=0.3, limit_s=1.6, seam=SeamSettings("switch"))
    run_episode(simulation, free, 1, TASKS[1], TASKS[1], settings)
    assert all(rows is None for _, rows in free.given)
