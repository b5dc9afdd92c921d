"""Hazards of the action error: wrong unit, wrong pairs, the last episode's left in."""

from __future__ import annotations

import math

import numpy as np
import pytest

from groot_int8_ros.policy.types import ActionChunk, CommittedActions, Observation
from offline_tools.compare_closed_loop.judge import JudgedPolicy
from offline_tools.simulation.robot import robot_description


class _Offset:
    """Answers every observation with one value, in degrees."""

    def __init__(self, degrees: float) -> None:
        self.robot = robot_description()
        self.degrees = degrees
        self.asked: list[int] = []

    def infer(
        self,
        observation: Observation,
        *,
        seed: int | None = None,
        committed: CommittedActions | None = None,
    ) -> ActionChunk:
        self.asked.append(observation.stamp_ns)
        actions = {
            key: np.full((16, len(joints)), self.degrees, np.float32)
            for key, joints in self.robot.action_joints.items()
        }
        actions["gripper"][3] += self.degrees
        return ActionChunk(
            actions, observation.stamp_ns, 0.1 * np.arange(16.0), np.zeros((16, 1), np.float32), 0
        )


def _ask(policy: JudgedPolicy, *stamps_ns: int) -> list[ActionChunk]:
    return [policy.infer(Observation({}, {}, "", stamp)) for stamp in stamps_ns]


def test_every_third_answer_is_compared_in_radians_and_the_judged_one_is_given() -> None:
    judged, reference = _Offset(2.0), _Offset(1.0)
    policy = JudgedPolicy(judged, reference, 3)
    answers = _ask(policy, 1, 2, 3, 4)
    assert all(chunk.actions["gripper"][0, 0] == 2.0 for chunk in answers)
    assert reference.asked == [1, 4]
    errors = policy.take_errors()
    # One of 16 x 6 targets is two degrees off, the others one.
    square = (95 * 1.0 + 4.0) / 96
    assert errors["action_error_rad"] == pytest.approx(math.radians(math.sqrt(square)))
    assert errors["largest_action_error_rad"] == pytest.approx(math.radians(2.0))


def test_each_episode_begins_anew() -> None:
    judged, reference = _Offset(2.0), _Offset(1.0)
    policy = JudgedPolicy(judged, reference, 3)
    _ask(policy, 1, 2)
    policy.take_errors()
    reference.degrees = 2.0
    _ask(policy, 3)
    assert reference.asked == [1, 3]
    assert policy.take_errors()["largest_action_error_rad"] == 0.0
