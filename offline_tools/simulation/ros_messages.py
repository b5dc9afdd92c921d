"""The simulated robot's topics: names, message types and the publishers.

Owns: `RobotTopics`. Must not import MuJoCo: the stepped loop and the robot's own process publish
through this. Names are those of `config/simulated_arm_node.yaml` and the nodes' defaults.

Everything is published reliably, which best-effort subscribers accept too: where time is stepped,
a lost frame would never come again.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import Any

import numpy as np
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import String

from groot_int8_ros.policy.types import Float64Array, UInt8Array
from groot_int8_ros.ros.joints import time_message
from groot_int8_ros.ros.topics import default_image_topic
from offline_tools.simulation.kinematics import JOINTS
from offline_tools.simulation.robot import FRAME_SIZES

CLOCK_TOPIC = "/clock"
JOINT_STATE_TOPIC = "joint_states"
INSTRUCTION_TOPIC = "instruction"
ARM_COMMAND_TOPIC = "/arm_controller/joint_trajectory"
GRIPPER_COMMAND_TOPIC = "/gripper_controller/commands"
CHUNK_TOPIC = "policy_node/action_chunk"

_RELIABLE = QoSProfile(depth=10, reliability=ReliabilityPolicy.RELIABLE)
# Who comes later hears the instruction in force, too.
_LATCHED = QoSProfile(
    depth=1,
    reliability=ReliabilityPolicy.RELIABLE,
    durability=DurabilityPolicy.TRANSIENT_LOCAL,
)


class RobotTopics:
    """Publishers of clock, cameras, joint states and instruction."""

    def __init__(self, node: Any) -> None:
        """Create them.

        Args:
            node: An rclpy node.
        """
        self._clock = node.create_publisher(Clock, CLOCK_TOPIC, _RELIABLE)
        self._joint_states = node.create_publisher(JointState, JOINT_STATE_TOPIC, _RELIABLE)
        self._instruction = node.create_publisher(String, INSTRUCTION_TOPIC, _LATCHED)
        self._images = {
            camera: node.create_publisher(Image, default_image_topic(camera, "raw"), _RELIABLE)
            for camera in FRAME_SIZES
        }

    def watched(self) -> bool:
        """Whether somebody receives every camera and the joint states."""
        return all(
            publisher.get_subscription_count() > 0
            for publisher in (self._joint_states, *self._images.values())
        )

    def publish_clock(self, now_ns: int) -> None:
        """Publish the time."""
        self._clock.publish(Clock(clock=time_message(now_ns)))

    def publish_joints(self, joints_rad: Float64Array, now_ns: int) -> None:
        """Publish measured joint angles, radians, shape (6,)."""
        message = JointState(name=list(JOINTS), position=joints_rad.tolist())
        message.header.stamp = time_message(now_ns)
        self._joint_states.publish(message)

    def publish_frames(self, frames: Mapping[str, UInt8Array], now_ns: int) -> None:
        """Publish one frame of each camera, with its sensor's noise.

        A rendered scene at rest is the same to the bit, which no camera's picture is: the node
        would take it for a frozen one. So the last bit of each pixel is noise.
        """
        for camera, publisher in self._images.items():
            publisher.publish(image_message(noisy(frames[camera], now_ns), camera, now_ns))

    def publish_instruction(self, instruction: str) -> None:
        """Publish the task in words."""
        self._instruction.publish(String(data=instruction))


def noisy(frame: UInt8Array, stamp_ns: int) -> UInt8Array:
    """Replace the last bit of each value of a frame by noise that its stamp decides."""
    random = np.random.RandomState([stamp_ns & 0xFFFFFFFF, stamp_ns >> 32])
    bits = np.frombuffer(random.bytes(-(-frame.size // 8)), np.uint8)
    noise = np.unpackbits(bits)[: frame.size].reshape(frame.shape)
    return np.asarray((frame & 0xFE) | noise, np.uint8)


def image_message(frame: UInt8Array, camera: str, stamp_ns: int) -> Image:
    """Return an RGB frame as `sensor_msgs/Image`."""
    height, width = frame.shape[:2]
    message = Image(
        height=height,
        width=width,
        encoding="rgb8",
        step=3 * width,
        # rclpy takes an array of bytes without looking at each of them.
        data=array("B", np.ascontiguousarray(frame).tobytes()),
    )
    message.header.stamp = time_message(stamp_ns)
    message.header.frame_id = camera
    return message
