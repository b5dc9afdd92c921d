"""Hazards of the closed loop: a policy that cannot, an instruction unheard, latency ignored."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from groot_int8_ros.policy.types import UInt8Array
from offline_tools.closed_loop.episode import LoopSettings, run_episode
from offline_tools.closed_loop.torch_policy import TorchPolicy
from offline_tools.simulation.environment import Tabletop
from offline_tools.simulation.robot import FRAME_SIZES
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
