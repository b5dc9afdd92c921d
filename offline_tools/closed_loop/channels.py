"""The simulated robot's channels, as `config/simulated_arm_node.yaml` gives them to the executor.

Owns: `CHANNELS`. Must not import ROS: the stepped loop runs where ROS is not installed. A test
holds the two together.
"""

from __future__ import annotations

import numpy as np

from groot_int8_ros.control.limits import JointLimits
from groot_int8_ros.control.settings import Channel
from offline_tools.simulation.kinematics import HIGH_RAD, JOINTS, LOW_RAD

_ARM = len(JOINTS) - 1


def _channel(
    name: str,
    columns: slice,
    velocity_rad_s: float,
    acceleration_rad_s2: float,
    guard_distance_rad: float,
    start_tolerance_rad: float,
) -> Channel:
    joints: tuple[str, ...] = tuple(JOINTS[columns])
    free = JointLimits.of(len(joints), velocity=velocity_rad_s, acceleration=acceleration_rad_s2)
    limits = JointLimits(
        LOW_RAD[columns], HIGH_RAD[columns], free.velocity, free.acceleration, free.step
    )
    return Channel(
        name,
        joints,
        "position",
        limits,
        guard_distance=np.full(len(joints), guard_distance_rad),
        start_tolerance=np.full(len(joints), start_tolerance_rad),
    )


# In the order of `JOINTS`, so that the channels' commands side by side are the robot's target.
CHANNELS = (
    _channel("arm", slice(0, _ARM), 4.0, 60.0, 0.6, 0.1),
    # Holding a cube the gripper stands away from what it is told.
    _channel("gripper", slice(_ARM, None), 6.0, 120.0, 1.2, 0.6),
)
