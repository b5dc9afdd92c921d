"""The simulated robot as a ROS 2 process in real time: cameras and joint states out, commands in.

Owns: the loop over control periods, `/clock`, episodes and their results. Takes the commands of
`chunk_executor_node` on the topics of a robot with ros2_control, so nothing of the node knows that
the robot is simulated. Between two episodes the table is set anew and the arm stays where it is,
as on a real robot. `/clock` never jumps back.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from rclpy.executors import SingleThreadedExecutor
from rclpy.qos import QoSProfile
from std_msgs.msg import Float64MultiArray, String
from trajectory_msgs.msg import JointTrajectory

from groot_int8_ros.policy.types import Float64Array
from offline_tools.simulation.environment import CONTROL_PERIOD_S, Tabletop
from offline_tools.simulation.kinematics import JOINTS
from offline_tools.simulation.ros_messages import (
    ARM_COMMAND_TOPIC,
    GRIPPER_COMMAND_TOPIC,
    RobotTopics,
)
from offline_tools.simulation.tasks import Task

_PERIOD_NS = round(CONTROL_PERIOD_S * 1e9)
_NEWEST = QoSProfile(depth=1)
_ARM = len(JOINTS) - 1
# After a success the policy withdraws the arm before the table is set anew.
_WITHDRAW_S = 1.5
_STILL_RAD = 1e-4
_STILL_STEPS = round(1.0 / CONTROL_PERIOD_S)
RESULT_TOPIC = "simulated_robot/result"


@dataclass(frozen=True)
class LiveResult:
    """How a live episode ended.

    Attributes:
        seed: Seed of the scene.
        task: What was asked.
        success: Whether it was fulfilled.
        time_s: Simulated time to success, or the limit.
        commands: Number of commands that arrived.
        tracking_error_rad: Largest distance of an arm's joint from a target that has stood still
            for a second: an arm that does not follow shows here.
        wall_s: Real time of the episode.
    """

    seed: int
    task: Task
    success: bool
    time_s: float
    commands: int
    tracking_error_rad: float
    wall_s: float


class _Tracking:
    """Watches joints whose target stands still."""

    def __init__(self) -> None:
        self.largest_rad = 0.0
        self._target: Float64Array | None = None
        self._still = np.zeros(_ARM, np.int64)

    def look(self, target_rad: Float64Array, measured_rad: Float64Array) -> None:
        # The gripper is left out: it stays off its target while it holds something.
        target, measured = target_rad[:_ARM], measured_rad[:_ARM]
        if self._target is not None:
            moved = np.abs(target - self._target) > _STILL_RAD
            self._still = np.where(moved, 0, self._still + 1)
        self._target = target.copy()
        off = np.abs(measured - target)[self._still >= _STILL_STEPS]
        self.largest_rad = max(self.largest_rad, float(off.max(initial=0.0)))


class LiveRobot:
    """The robot; its node belongs to the caller.

    Args:
        node: An rclpy node.
        executor: The executor that the node was added to.
        simulation: The simulated robot.
        start_ns: First time of `/clock`.
        camera_steps: Control periods between two frames of each camera.
    """

    def __init__(
        self,
        node: Any,
        executor: SingleThreadedExecutor,
        simulation: Tabletop,
        *,
        start_ns: int,
        camera_steps: int = 5,
    ) -> None:
        self._executor = executor
        self._simulation = simulation
        self._now_ns = start_ns
        self._camera_steps = camera_steps
        self._steps = 0
        self._commands = 0
        self._target = simulation.target_rad()
        self.topics = RobotTopics(node)
        self._results = node.create_publisher(String, RESULT_TOPIC, 10)
        self._subscriptions = [
            node.create_subscription(JointTrajectory, ARM_COMMAND_TOPIC, self._on_arm, _NEWEST),
            node.create_subscription(
                Float64MultiArray, GRIPPER_COMMAND_TOPIC, self._on_gripper, _NEWEST
            ),
        ]

    def episode(
        self, seed: int, task: Task, *, limit_s: float, go_on: Callable[[float], bool]
    ) -> LiveResult | None:
        """Set the table, tell the task, and run until it is done or the time is over.

        Args:
            seed: Seed of the scene.
            task: What is asked.
            limit_s: Simulated time.
            go_on: Waits for a time of `time.monotonic()` and says whether to go on.

        Returns:
            The result, or None when told to end.
        """
        stood = self._simulation.joints_rad() if self._steps else None
        self._simulation.reset(seed)
        if stood is None:
            self._target = self._simulation.target_rad()
        else:
            self._simulation.put_arm(stood)
        self._commands, began_s = 0, time.monotonic()
        self.topics.publish_instruction(task.instruction)
        tracking = _Tracking()
        success_s: float | None = None
        due_s = began_s
        for step in range(round((limit_s + _WITHDRAW_S) / CONTROL_PERIOD_S)):
            elapsed_s = step * CONTROL_PERIOD_S
            if success_s is None and elapsed_s >= limit_s:
                break
            if success_s is not None and elapsed_s >= success_s + _WITHDRAW_S:
                break
            self._publish()
            due_s += CONTROL_PERIOD_S
            if not go_on(due_s):
                return None
            # What is late is not made up for: time passes more slowly instead.
            due_s = max(due_s, time.monotonic() - CONTROL_PERIOD_S)
            self._take_commands()
            self._simulation.step(self._target)
            tracking.look(self._simulation.target_rad(), self._simulation.joints_rad())
            if success_s is None and self._simulation.success(task):
                success_s = elapsed_s
        return LiveResult(
            seed=seed,
            task=task,
            success=success_s is not None,
            time_s=limit_s if success_s is None else success_s,
            commands=self._commands,
            tracking_error_rad=tracking.largest_rad,
            wall_s=time.monotonic() - began_s,
        )

    def publish_result(self, text: str) -> None:
        """Publish a result as JSON."""
        self._results.publish(String(data=text))

    def idle(self, go_on: Callable[[float], bool], until: Callable[[], bool]) -> bool:
        """Publish without moving until something holds; return False when told to end."""
        due_s = time.monotonic()
        while not until():
            self._publish()
            due_s += CONTROL_PERIOD_S
            if not go_on(due_s):
                return False
            due_s = max(due_s, time.monotonic() - CONTROL_PERIOD_S)
            self._take_commands()
            self._simulation.step(self._target)
        return True

    @property
    def commands(self) -> int:
        """Commands that arrived since the table was set."""
        return self._commands

    def _publish(self) -> None:
        self.topics.publish_clock(self._now_ns)
        self.topics.publish_joints(self._simulation.joints_rad(), self._now_ns)
        if self._steps % self._camera_steps == 0:
            self.topics.publish_frames(self._simulation.frames(), self._now_ns)
        self._steps += 1
        self._now_ns += _PERIOD_NS

    def _take_commands(self) -> None:
        # One callback a call: clock and joint states have none, commands have two topics.
        for _ in range(4):
            self._executor.spin_once(timeout_sec=0.0)

    def _on_arm(self, message: Any) -> None:
        if not message.points:
            return
        for name, position in zip(message.joint_names, message.points[-1].positions, strict=False):
            if name in JOINTS and np.isfinite(position):
                self._target[JOINTS.index(name)] = position
        self._commands += 1

    def _on_gripper(self, message: Any) -> None:
        if len(message.data) == 1 and np.isfinite(message.data[0]):
            self._target[_ARM] = message.data[0]
            self._commands += 1
