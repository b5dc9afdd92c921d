"""Hazards of the robot process: commands that get lost, a clock that goes back, still pictures."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="rclpy is not installed: no topics")

from offline_tools.simulation.environment import Tabletop
from offline_tools.simulation.expert import plan
from offline_tools.simulation.kinematics import JOINTS
from offline_tools.simulation.tasks import Task

_TASK = Task("green", "right")


@pytest.fixture
def ros(ros_node: Callable[..., Any]) -> Iterator[tuple[Any, Any]]:
    with ros_node("robot_under_test", 91) as made:
        yield made


def test_commands_over_topics_fulfil_the_task_and_time_goes_on(
    simulation: Tabletop, ros: tuple[Any, Any]
) -> None:
    from rosgraph_msgs.msg import Clock
    from std_msgs.msg import Float64MultiArray
    from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

    from offline_tools.simulation.live_robot import LiveRobot
    from offline_tools.simulation.ros_messages import (
        ARM_COMMAND_TOPIC,
        GRIPPER_COMMAND_TOPIC,
    )

    node, executor = ros
    arm = node.create_publisher(JointTrajectory, ARM_COMMAND_TOPIC, 10)
    gripper = node.create_publisher(Float64MultiArray, GRIPPER_COMMAND_TOPIC, 10)
    clocks: list[int] = []
    node.create_subscription(
        Clock, "/clock", lambda m: clocks.append(m.clock.sec * 10**9 + m.clock.nanosec), 10
    )
    robot = LiveRobot(node, executor, simulation, start_ns=7_000_000_000, camera_steps=25)
    path: list[Any] = []

    def command(_due_s: float) -> bool:
        if not path:
            path.extend(reversed(plan(simulation, _TASK).tolist()))
        target = path.pop() if len(path) > 1 else path[0]
        point = JointTrajectoryPoint(positions=target[:5])
        arm.publish(JointTrajectory(joint_names=list(JOINTS[:5]), points=[point]))
        gripper.publish(Float64MultiArray(data=target[5:]))
        time.sleep(0.002)
        return True

    simulation.reset(2)
    result = robot.episode(2, _TASK, limit_s=12.0, go_on=command)
    assert result is not None
    assert result.success
    assert result.commands > 200
    assert result.tracking_error_rad < 0.05
    assert clocks[0] >= 7_000_000_000
    assert (np.diff(clocks) > 0).all()


def test_told_to_end_an_episode_has_no_result(simulation: Tabletop, ros: tuple[Any, Any]) -> None:
    from offline_tools.simulation.live_robot import LiveRobot

    robot = LiveRobot(*ros, simulation, start_ns=1, camera_steps=10**6)
    assert robot.episode(0, _TASK, limit_s=1.0, go_on=lambda _: False) is None


def test_a_stepped_clock_stands_until_policy_and_executor_have_answered(
    simulation: Tabletop, ros: tuple[Any, Any]
) -> None:
    from rosgraph_msgs.msg import Clock
    from sensor_msgs.msg import Image
    from std_msgs.msg import Float64MultiArray
    from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

    from offline_tools.simulation.live_robot import LiveRobot, NodesSilentError
    from offline_tools.simulation.ros_messages import (
        ARM_COMMAND_TOPIC,
        CHUNK_TOPIC,
        GRIPPER_COMMAND_TOPIC,
    )

    node, executor = ros
    chunks = node.create_publisher(JointTrajectory, CHUNK_TOPIC, 10)
    arm = node.create_publisher(JointTrajectory, ARM_COMMAND_TOPIC, 10)
    gripper = node.create_publisher(Float64MultiArray, GRIPPER_COMMAND_TOPIC, 10)
    clocks: list[int] = []
    pictures: list[int] = []
    node.create_subscription(
        Clock, "/clock", lambda m: clocks.append(m.clock.sec * 10**9 + m.clock.nanosec), 10
    )
    node.create_subscription(
        Image,
        "cameras/front/image_raw",
        lambda m: pictures.append(m.header.stamp.sec * 10**9 + m.header.stamp.nanosec),
        10,
    )
    robot = LiveRobot(*ros, simulation, start_ns=10**9, camera_steps=4, patience_s=20.0)
    said: list[str] = []
    silent: set[str] = set()

    def answer(_due_s: float) -> bool:
        """Say one thing a call: the executor first, so that it alone cannot move the clock."""
        point = JointTrajectoryPoint(positions=[0.0] * 5)
        for name, publisher, message in (
            ("arm", arm, JointTrajectory(joint_names=list(JOINTS[:5]), points=[point])),
            ("gripper", gripper, Float64MultiArray(data=[0.0])),
        ):
            if name not in silent:
                publisher.publish(message)
        if len(clocks) < 5 and pictures and len(said) < 20:
            said.append("waited")
            assert clocks[-1] == pictures[0], "time went on without a chunk"
        elif pictures and "policy" not in silent:
            chunk = JointTrajectory()
            chunk.header.stamp.sec, chunk.header.stamp.nanosec = divmod(pictures[-1], 10**9)
            chunks.publish(chunk)
        return True

    result = robot.episode(0, _TASK, limit_s=0.2, go_on=answer)
    assert result is not None
    assert len(said) == 20
    end_s = time.monotonic() + 60.0
    while len(clocks) < 10 or len(pictures) < 3:
        assert time.monotonic() < end_s
        executor.spin_once(timeout_sec=0.1)
    assert clocks == [10**9 + 20_000_000 * step for step in range(10)]
    assert pictures == clocks[1::4]
    robot._patience_s = 0.3
    silent.add("gripper")
    with pytest.raises(NodesSilentError, match="executor commanded nothing"):
        robot.episode(0, _TASK, limit_s=0.2, go_on=answer)
    silent.symmetric_difference_update({"gripper", "policy"})
    with pytest.raises(NodesSilentError, match="no chunk for an observation"):
        robot.episode(0, _TASK, limit_s=0.2, go_on=answer)


def test_an_arm_that_ignores_commands_shows_as_a_tracking_error() -> None:
    from offline_tools.simulation.live_robot import _Tracking

    tracking = _Tracking()
    for step in range(120):
        target = np.full(6, min(step, 40) * 0.01)
        tracking.look(target, np.zeros(6))
    assert tracking.largest_rad == pytest.approx(0.4)
    # One that follows late is no error: its target has not stood still.
    moving = _Tracking()
    for step in range(200):
        moving.look(np.full(6, step * 0.01), np.full(6, (step - 8) * 0.01))
    assert moving.largest_rad == 0.0


def test_a_scene_at_rest_does_not_look_like_a_frozen_camera() -> None:
    from offline_tools.simulation.ros_messages import image_message, noisy

    frame = np.full((6, 7, 3), 100, np.uint8)
    first, second = noisy(frame, 10**18), noisy(frame, 10**18 + 1)
    assert (first != second).any()
    np.testing.assert_array_equal(first, noisy(frame, 10**18))
    assert np.abs(first.astype(int) - frame).max() <= 1
    message = image_message(first, "front", 3_000_000_007)
    assert (message.header.stamp.sec, message.header.stamp.nanosec) == (3, 7)
    np.testing.assert_array_equal(np.frombuffer(message.data, np.uint8).reshape(6, 7, 3), first)
