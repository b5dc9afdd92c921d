"""Hazards of the arm's formulas: a scene of other lengths, a hand that tilts, a reach invented."""

from __future__ import annotations

import math

import mujoco
import numpy as np
import pytest

from offline_tools.simulation.kinematics import (
    HIGH_RAD,
    JOINTS,
    LOW_RAD,
    Place,
    arm_joints,
    hand_place,
)
from offline_tools.simulation.scene import scene_xml


def test_forward_kinematics_are_those_of_the_scene() -> None:
    model = mujoco.MjModel.from_xml_string(scene_xml())
    data = mujoco.MjData(model)
    random = np.random.RandomState(0)
    for _ in range(50):
        joints = random.uniform(LOW_RAD, HIGH_RAD)
        for name, value in zip(JOINTS, joints, strict=True):
            data.joint(name).qpos = value
        mujoco.mj_kinematics(model, data)
        place = hand_place(joints)
        expected = [
            place.radius_m * math.cos(place.pan_rad),
            place.radius_m * math.sin(place.pan_rad),
            place.height_m,
        ]
        np.testing.assert_allclose(data.site("grasp").xpos, expected, atol=1e-9)


@pytest.mark.parametrize("pan", [-0.9, 0.0, 0.7])
@pytest.mark.parametrize("radius", [0.13, 0.2, 0.25])
@pytest.mark.parametrize("height", [0.015, 0.09])
def test_inverse_kinematics_reach_the_place_fingers_down_within_the_limits(
    pan: float, radius: float, height: float
) -> None:
    joints = arm_joints(Place(pan, radius, height))
    np.testing.assert_allclose(hand_place(joints).array(), [pan, radius, height], atol=1e-9)
    assert joints[1] + joints[2] + joints[3] + math.pi / 2 == pytest.approx(math.pi)
    assert (joints >= LOW_RAD[:5]).all()
    assert (joints <= HIGH_RAD[:5]).all()


def test_a_place_out_of_reach_is_answered_with_the_stretched_arm_towards_it() -> None:
    joints = arm_joints(Place(0.3, 0.9, 0.05))
    assert np.isfinite(joints).all()
    assert abs(joints[2] + math.pi / 2) < 0.02  # forearm in line with the upper arm
