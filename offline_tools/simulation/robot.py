"""The simulated robot as the policy knows it: cameras, joints in degrees, ten rows a second.

Owns: the description and the conversion of joint vectors. Must not import MuJoCo.
"""

from __future__ import annotations

import numpy as np

from groot_int8_ros.policy.robot import RobotDescription
from groot_int8_ros.policy.types import CameraSpec, Float32Array, Float64Array, JointSpec
from offline_tools.simulation.kinematics import JOINTS

ACTION_PERIOD_S = 0.1
FRAME_SIZES = {"front": (240, 320), "wrist": (240, 320)}
JOINT_KEYS = {"single_arm": JOINTS[:5], "gripper": JOINTS[5:]}


def robot_description() -> RobotDescription:
    """Return what `groot-int8 export --robot` and the node need to know of the robot."""
    joints = {
        key: tuple(JointSpec(name, unit="degrees") for name in names)
        for key, names in JOINT_KEYS.items()
    }
    return RobotDescription(
        cameras=tuple(
            CameraSpec(key, height, width) for key, (height, width) in FRAME_SIZES.items()
        ),
        state_joints=joints,
        action_joints=joints,
        action_period_s=ACTION_PERIOD_S,
    )


def degrees(joints_rad: Float64Array) -> Float32Array:
    """Turn joint angles into the policy's values, float32, same shape."""
    return np.degrees(joints_rad).astype(np.float32)


def by_key(values: Float32Array) -> dict[str, Float32Array]:
    """Split values of all joints, shape (..., 6), into state or action keys."""
    arm = len(JOINT_KEYS["single_arm"])
    return {"single_arm": values[..., :arm], "gripper": values[..., arm:]}
