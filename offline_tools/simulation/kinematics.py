"""Forward and inverse kinematics of the simulated arm, in closed form.

Owns: the arm's lengths and joint limits, and the map between joint angles and the gripper's
place. Must not import MuJoCo, so that a test can hold the scene to these formulas.

The arm has the proportions of an SO-101: pan, lift, elbow and wrist flexion in one vertical
plane, wrist roll, and a gripper with one moving jaw. Pitches are measured from straight up towards
the front: the upper arm's is the lift; at zero the forearm points forwards; the hand continues it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from groot_int8_ros.policy.types import Float64Array

JOINTS = (
    "shoulder_pan",
    "shoulder_lift",
    "elbow_flex",
    "wrist_flex",
    "wrist_roll",
    "gripper",
)

SHOULDER_FORWARD_M = 0.03
SHOULDER_HEIGHT_M = 0.11
UPPER_ARM_M = 0.125
FOREARM_M = 0.14
# From the wrist's flexion axis to the middle between the jaws' pads.
HAND_M = 0.12

LOW_RAD = np.radians([-100.0, -100.0, -110.0, -110.0, -150.0, -24.0])
HIGH_RAD = np.radians([100.0, 100.0, 110.0, 110.0, 150.0, 60.0])

_HAND_DOWN_RAD = math.pi


@dataclass(frozen=True)
class Place:
    """Where the hand is, with the fingers pointing straight down.

    Attributes:
        pan_rad: Direction from the base, positive to the robot's left.
        radius_m: Horizontal distance from the base's axis to the middle between the pads.
        height_m: Height of that point above the table.
    """

    pan_rad: float
    radius_m: float
    height_m: float

    @classmethod
    def at(cls, x_m: float, y_m: float, height_m: float) -> Place:
        """Return the place above a point of the table, x to the front and y to the left."""
        return cls(math.atan2(y_m, x_m), math.hypot(x_m, y_m), height_m)

    def array(self) -> Float64Array:
        """Return pan, radius and height, float64, shape (3,)."""
        return np.array([self.pan_rad, self.radius_m, self.height_m])


def arm_joints(place: Place) -> Float64Array:
    """Return the five arm joints that bring the hand to a place, fingers down, elbow up.

    The roll equals the pan, which keeps the jaws' direction fixed over the table. A place out of
    reach is answered with the nearest stretched or folded arm.

    Args:
        place: Where the middle between the pads should be.

    Returns:
        Pan, lift, elbow, wrist flexion and roll, radians, float64, shape (5,).
    """
    forward = place.radius_m - SHOULDER_FORWARD_M
    up = place.height_m + HAND_M - SHOULDER_HEIGHT_M
    reach = math.hypot(forward, up)
    reach = min(max(reach, abs(UPPER_ARM_M - FOREARM_M) + 1e-6), UPPER_ARM_M + FOREARM_M - 1e-6)
    direction = math.atan2(forward, up)
    cosine = (UPPER_ARM_M**2 + reach**2 - FOREARM_M**2) / (2.0 * UPPER_ARM_M * reach)
    lift = direction - math.acos(min(max(cosine, -1.0), 1.0))
    wrist_forward, wrist_up = reach * math.sin(direction), reach * math.cos(direction)
    forearm_pitch = math.atan2(
        wrist_forward - UPPER_ARM_M * math.sin(lift), wrist_up - UPPER_ARM_M * math.cos(lift)
    )
    elbow = forearm_pitch - lift - math.pi / 2.0
    flex = _HAND_DOWN_RAD - forearm_pitch
    return np.array([place.pan_rad, lift, elbow, flex, place.pan_rad])


def hand_place(joints_rad: Float64Array) -> Place:
    """Return where the middle between the pads is, for any pose of the arm.

    Args:
        joints_rad: Joint angles, radians; only the first four count, float, shape (>= 4,).
    """
    pan, lift, elbow, flex = (float(value) for value in joints_rad[:4])
    forearm = lift + elbow + math.pi / 2.0
    hand = forearm + flex
    radius = (
        SHOULDER_FORWARD_M
        + UPPER_ARM_M * math.sin(lift)
        + FOREARM_M * math.sin(forearm)
        + HAND_M * math.sin(hand)
    )
    height = (
        SHOULDER_HEIGHT_M
        + UPPER_ARM_M * math.cos(lift)
        + FOREARM_M * math.cos(forearm)
        + HAND_M * math.cos(hand)
    )
    return Place(pan, radius, height)
