"""The simulated robot as a ROS 2 process: cameras and joint states out, commands in.

Owns: the loop over control periods, `/clock`, episodes and their results. Takes the commands of
`chunk_executor_node` on the topics of a robot with ros2_control, so nothing of the node knows that
the robot is simulated. Between two episodes the table is set anew and the arm stays where it is,
as on a real robot. `/clock` never jumps back.

Time is real, or stepped: then it stands after each observation until the policy's chunk for it is
there, and in each control period until both controllers were commanded, so a slow machine makes
the episode slow and not the robot late. The executor is the one that robots run, whose watchdogs
live on the steady clock; where time stands they need patience (`simulated_arm_stepped.yaml`). A
command may be one control period older than the clock, since both go their ways at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from rclpy.executors import SingleThreadedExecutor
from rclpy.qos import QoSProfile
from std_msgs.msg import Float64MultiArray, String
from trajectory_msgs.msg import JointTrajectory

from groot_int8_ros.errors import GrootError
from groot_int8_ros.policy.types import Float64Array, UInt8Array
from groot_int8_ros.ros.joints import stamp_ns
from groot_int8_ros.ros.managed_node import RELIABLE
from offline_tools.simulation.environment import CONTROL_PERIOD_S, Tabletop
from offline_tools.simulation.kinematics import JOINTS
from offline_tools.simulation.ros_messages import (
    ARM_COMMAND_TOPIC,
    CHUNK_TOPIC,
    GRIPPER_COMMAND_TOPIC,
    RobotTopics,
)
from offline_tools.simulation.smoothness import jerk_rad_s3, largest_step_rad
from offline_tools.simulation.tasks import Task

_PERIOD_NS = round(CONTROL_PERIOD_S * 1e9)
_NEWEST = QoSProfile(depth=1)
_ARM = len(JOINTS) - 1
# After a success the policy withdraws the arm before the table is set anew.
_WITHDRAW_S = 1.5
_STILL_RAD = 1e-4
_STILL_STEPS = round(1.0 / CONTROL_PERIOD_S)
_LOOK_S = 0.05
# What one subscriber of the policy received and the other lost is sent to both again.
_REPEAT_S = 3.0
_BOTH = frozenset(("arm", "gripper"))
RESULT_TOPIC = "simulated_robot/result"


class NodesSilentError(GrootError):
    """Policy or executor gave nothing while a stepped clock waited for it."""


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
        largest_step_rad: Largest change of a joint's command in one control period, to success.
        jerk_rad_s3: Root mean square of the third derivative of the measured joints, to success.
        wall_s: Real time of the episode.
    """

    seed: int
    task: Task
    success: bool
    time_s: float
    commands: int
    tracking_error_rad: float
    largest_step_rad: float
    jerk_rad_s3: float
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
        patience_s: Real time within which a stepped clock expects an answer; None for real time.
    """

    def __init__(
        self,
        node: Any,
        executor: SingleThreadedExecutor,
        simulation: Tabletop,
        *,
        start_ns: int,
        camera_steps: int = 5,
        patience_s: float | None = None,
    ) -> None:
        self._executor = executor
        self._simulation = simulation
        self._now_ns = start_ns - _PERIOD_NS
        self._camera_steps = camera_steps
        self._patience_s = patience_s
        self._steps = 0
        self._has_begun = False
        self._commands = 0
        self._commanded: set[str] = set()
        self._chunk_ns = 0
        self._frames: Mapping[str, UInt8Array] = {}
        self._looked = False
        self._due_s = 0.0
        self._target = simulation.target_rad()
        self.topics = RobotTopics(node)
        self._results = node.create_publisher(String, RESULT_TOPIC, 10)
        self._subscriptions = [
            node.create_subscription(JointTrajectory, ARM_COMMAND_TOPIC, self._on_arm, _NEWEST),
            node.create_subscription(
                Float64MultiArray, GRIPPER_COMMAND_TOPIC, self._on_gripper, _NEWEST
            ),
            node.create_subscription(JointTrajectory, CHUNK_TOPIC, self._on_chunk, RELIABLE),
        ]

    def episode(
        self,
        seed: int,
        task: Task,
        *,
        limit_s: float,
        go_on: Callable[[float], bool],
        on_frames: Callable[[Mapping[str, UInt8Array]], None] | None = None,
    ) -> LiveResult | None:
        """Set the table, tell the task, and run until it is done or the time is over.

        Args:
            seed: Seed of the scene.
            task: What is asked.
            limit_s: Simulated time.
            go_on: Waits for a time of `time.monotonic()` and says whether to go on.
            on_frames: Called with the frames that are published until success.

        Returns:
            The result, or None when told to end.

        Raises:
            NodesSilentError: Time is stepped, and an answer did not come.
        """
        stood = self._simulation.joints_rad() if self._has_begun else None
        self._simulation.reset(seed)
        if stood is None:
            self._target = self._simulation.target_rad()
        else:
            self._simulation.put_arm(stood)
        self._has_begun = True
        self._commands, began_s = 0, time.monotonic()
        # The instruction is to be heard before the first picture.
        self._steps = -1
        self.topics.publish_instruction(task.instruction)
        tracking = _Tracking()
        success_s: float | None = None
        commanded: list[Float64Array] = []
        measured: list[Float64Array] = []
        self._due_s = began_s
        pass_period = self._pass_real_period if self._patience_s is None else self._pass_stepped
        for step in range(round((limit_s + _WITHDRAW_S) / CONTROL_PERIOD_S)):
            elapsed_s = step * CONTROL_PERIOD_S
            if success_s is None and elapsed_s >= limit_s:
                break
            if success_s is not None and elapsed_s >= success_s + _WITHDRAW_S:
                break
            self._publish()
            if self._looked and on_frames is not None and success_s is None:
                on_frames(self._frames)
            if not pass_period(go_on):
                return None
            if success_s is None:
                commanded.append(self._target.copy())
                measured.append(self._simulation.joints_rad())
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
            largest_step_rad=largest_step_rad(commanded),
            jerk_rad_s3=jerk_rad_s3(measured, CONTROL_PERIOD_S),
            wall_s=time.monotonic() - began_s,
        )

    def publish_result(self, text: str) -> None:
        """Publish a result as JSON."""
        self._results.publish(String(data=text))

    def idle(self, go_on: Callable[[float], bool], until: Callable[[], bool]) -> bool:
        """Publish in real time, without a task, until something holds; False when told to end."""
        self._due_s = time.monotonic()
        while not until():
            self._publish()
            if not self._pass_real_period(go_on):
                return False
            self._simulation.step(self._target)
        return True

    @property
    def commands(self) -> int:
        """Commands that arrived since the table was set."""
        return self._commands

    def _publish(self) -> None:
        self._now_ns += _PERIOD_NS
        self.topics.publish_clock(self._now_ns)
        self.topics.publish_joints(self._simulation.joints_rad(), self._now_ns)
        self._looked = self._steps % self._camera_steps == 0
        if self._looked:
            self._frames = self._simulation.frames()
            self.topics.publish_frames(self._frames, self._now_ns)
        self._steps += 1

    def _pass_real_period(self, go_on: Callable[[float], bool]) -> bool:
        self._due_s += CONTROL_PERIOD_S
        if not go_on(self._due_s):
            return False
        # What is late is not made up for: time passes more slowly instead.
        self._due_s = max(self._due_s, time.monotonic() - CONTROL_PERIOD_S)
        self._take_commands()
        return True

    def _pass_stepped(self, go_on: Callable[[float], bool]) -> bool:
        if self._looked and not self._await(
            lambda: self._chunk_ns >= self._now_ns,
            go_on,
            "the policy node gave no chunk for an observation",
            self._publish_again,
        ):
            return False
        # A command that waits here was given before the chunk, or before the clock.
        self._take_commands()
        self._commanded.clear()
        return self._await(
            lambda: self._commanded >= _BOTH, go_on, "the executor commanded nothing"
        )

    def _publish_again(self) -> None:
        self.topics.publish_clock(self._now_ns)
        self.topics.publish_joints(self._simulation.joints_rad(), self._now_ns)
        self.topics.publish_frames(self._frames, self._now_ns)

    def _await(
        self,
        met: Callable[[], bool],
        go_on: Callable[[float], bool],
        what: str,
        again: Callable[[], None] = lambda: None,
    ) -> bool:
        """Wait for an answer while time stands; False when told to end."""
        assert self._patience_s is not None
        began_s = repeated_s = time.monotonic()
        while not met():
            now_s = time.monotonic()
            if not go_on(now_s):
                return False
            if now_s - began_s > self._patience_s:
                raise NodesSilentError(
                    f"{what} within {self._patience_s:g} s. Its log and /diagnostics say why; "
                    "docs/closed_loop.md has the parameters that a stepped clock needs."
                )
            if now_s - repeated_s > _REPEAT_S:
                repeated_s = now_s
                again()
            self._executor.spin_once(timeout_sec=_LOOK_S)
        return True

    def _take_commands(self) -> None:
        # One callback a call: two topics of commands, the chunks, the answer to being enabled.
        for _ in range(4):
            self._executor.spin_once(timeout_sec=0.0)

    def _on_arm(self, message: Any) -> None:
        if not message.points:
            return
        for name, position in zip(message.joint_names, message.points[-1].positions, strict=False):
            if name in JOINTS and np.isfinite(position):
                self._target[JOINTS.index(name)] = position
        self._commands += 1
        self._commanded.add("arm")

    def _on_gripper(self, message: Any) -> None:
        if len(message.data) == 1 and np.isfinite(message.data[0]):
            self._target[_ARM] = message.data[0]
            self._commands += 1
            self._commanded.add("gripper")

    def _on_chunk(self, message: Any) -> None:
        self._chunk_ns = stamp_ns(message.header)
