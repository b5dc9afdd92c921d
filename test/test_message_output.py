"""Hazards of a robot that speaks messages of its own: fields that do not fit, holds that are lost.

The real node over real DDS. What is installed with nested and indexed fields stands for a robot's
own messages: MultiDOFJointState is read, MultiDOFJointTrajectory commanded.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="needs the ROS 2 Python packages")

from builtin_interfaces.msg import Duration
from geometry_msgs.msg import Transform, Vector3
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.parameter import Parameter
from sensor_msgs.msg import MultiDOFJointState
from trajectory_msgs.msg import (
    JointTrajectory,
    JointTrajectoryPoint,
    MultiDOFJointTrajectory,
)

from groot_int8_ros.chunk_executor_node import ChunkExecutorNode
from groot_int8_ros.errors import ConfigurationError
from groot_int8_ros.ros.executor_messages import CommandWriter, MeasuredPositions
from groot_int8_ros.ros.executor_parameters import OutputParameters

from .nodes import Listener

DOMAIN_ID = 1 + os.getpid() % 100
FIELDS = {
    "lift": "points[0].transforms[1].translation.z",
    "yaw": "points[0].transforms[0].rotation.x",
}
CONSTANTS = {
    "points[0].velocities[1].angular.y": "60.0",
    "joint_names[0]": "both",
    "points[0].time_from_start.nanosec": "20000000",
}
PARAMETERS: dict[str, Any] = {
    "channels": ["body"],
    "joint_state_topic": "/body/state",
    "joint_state_type": "sensor_msgs/msg/MultiDOFJointState",
    "joint_state_fields": [
        "lift = transforms[1].translation.z",
        "yaw = transforms[0].rotation.x",
    ],
    "joint_state_timeout_s": 10.0,
    "chunk_timeout_s": 10.0,
    "channel.body.joints": ["lift", "yaw"],
    "channel.body.output": "message",
    "channel.body.output_type": "trajectory_msgs/msg/MultiDOFJointTrajectory",
    "channel.body.output_fields": [f"{joint} = {path}" for joint, path in FIELDS.items()],
    "channel.body.output_constants": [f"{path} = {text}" for path, text in CONSTANTS.items()],
    "channel.body.topic": "/body/command",
    "channel.body.upper": [0.3],
    "channel.body.lower": [-0.3],
    "channel.body.velocity": [1.0],
    "channel.body.acceleration": [10.0],
    "channel.body.guard_distance": [20.0],
    "autostart": True,
}


class Body(Listener):
    """The robot's side: stands where it is told to, and remembers what it was told."""

    period_s = 0.02

    def __init__(self, node: Node, executor: SingleThreadedExecutor) -> None:
        super().__init__(node, executor, "chunk_executor", ["enable"])
        self.commands: list[MultiDOFJointTrajectory] = []
        self.at = [0.1, -0.2]
        self._states = node.create_publisher(MultiDOFJointState, "/body/state", 10)
        self._chunks = node.create_publisher(JointTrajectory, "/policy_node/action_chunk", 10)
        node.create_subscription(MultiDOFJointTrajectory, "/body/command", self._on_command, 500)

    def _on_command(self, message: MultiDOFJointTrajectory) -> None:
        self.commands.append(message)
        self.at = self.positions[-1]

    @property
    def positions(self) -> list[list[float]]:
        return [
            [
                message.points[0].transforms[1].translation.z,
                message.points[0].transforms[0].rotation.x,
            ]
            for message in self.commands
        ]

    def publish(self) -> None:
        lift, yaw = self.at
        message = MultiDOFJointState(transforms=[Transform(), Transform()])
        message.header.stamp = self.node.get_clock().now().to_msg()
        message.transforms[1].translation = Vector3(z=lift)
        message.transforms[0].rotation.x = yaw
        self._states.publish(message)

    def reaches_the_limit(self) -> bool:
        if self.positions[-1] == [0.3, 0.3]:
            return True
        self._send_chunk()
        return False

    def _send_chunk(self) -> None:
        message = JointTrajectory(joint_names=["yaw", "lift"])
        message.header.stamp = self.node.get_clock().now().to_msg()
        message.points = [
            # Far beyond the limits.
            JointTrajectoryPoint(positions=[9.0, 9.0], time_from_start=Duration(nanosec=n * 10**8))
            for n in range(10)
        ]
        self._chunks.publish(message)


def test_a_robot_with_messages_of_its_own_is_read_commanded_and_held(
    ros_node: Callable[..., Any],
) -> None:
    with ros_node("body", DOMAIN_ID) as (other, executor):
        _read_commanded_and_held(Body(other, executor))


def _read_commanded_and_held(body: Body) -> None:
    node = ChunkExecutorNode(
        context=body.node.context,
        parameter_overrides=[Parameter(name, value=value) for name, value in PARAMETERS.items()],
    )
    body.executor.add_node(node)
    try:
        body.until(lambda: body.trigger("enable").success, "enabled")
        body.until(lambda: body.commands, "commands")
        np.testing.assert_allclose(body.positions[0], [0.1, -0.2], atol=1e-9)
        body.until(body.reaches_the_limit, "both at their upper limit")
        first = body.commands[-1]
        assert first.points[0].velocities[1].angular.y == 60.0
        assert first.joint_names == ["both"]
        assert first.points[0].time_from_start.nanosec == 20_000_000
        assert first.header.stamp.sec > 0
        steps = np.diff(body.positions, axis=0)
        assert np.abs(steps).max() <= 1.0 * 0.02 + 1e-9
        assert np.max(body.positions) <= 0.3

        count = len(body.commands)
        node.close()
        body.until(lambda: len(body.commands) >= count + 3, "the final holds")
        assert body.positions[-3:] == [[0.3, 0.3]] * 3
    finally:
        node.close()
        body.executor.remove_node(node)
        node.destroy_node()


OUTPUT = OutputParameters(
    "message",
    "/body/command",
    (),
    0.02,
    "trajectory_msgs/msg/MultiDOFJointTrajectory",
    FIELDS,
    CONSTANTS,
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"type_name": "acme_msgs/msg/LowCmd"}, "cannot be imported"),
        ({"fields": {"lift": "points[0].none"}}, "has no field 'none'"),
        ({"fields": {"lift": "points.transforms[0].rotation.x"}}, "say which of its entries"),
        ({"fields": {"lift": "points[0].time_from_start.sec"}}, "would round a command"),
        ({"constants": {FIELDS["lift"]: "1.0"}}, "is the field of 'lift'"),
        ({"constants": {"points[0].time_from_start.sec": "0.5"}}, "cannot hold '0.5'"),
        ({"constants": {"points[0].time_from_start.sec": "high"}}, "cannot hold 'high'"),
        ({"constants": {"header.stamp": "1"}}, "which is no number"),
    ],
)
def test_what_does_not_fit_the_message_is_refused_at_configure(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        CommandWriter(("lift", "yaw"), replace(OUTPUT, **changes))


def test_a_state_message_without_a_joint_or_a_stamp() -> None:
    lines = ["lift = translation.z"]
    with pytest.raises(ConfigurationError, match="no field for yaw"):
        MeasuredPositions("geometry_msgs/msg/Transform", lines, ["lift", "yaw"])
    with pytest.raises(ConfigurationError, match="is for another message"):
        MeasuredPositions("sensor_msgs/msg/JointState", lines, ["lift"])
    reader = MeasuredPositions("geometry_msgs/msg/Transform", lines, ["lift"])
    message = Transform(translation=Vector3(z=0.5))
    # It counts from its arrival.
    assert reader.read(message, 7) == (("lift",), [0.5], 7)
