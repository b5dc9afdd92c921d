"""The running policy node as a policy for the closed loop: stepped time over real topics.

Owns: `NodePolicy`. An observation is published with `/clock` at its stamp, and the clock stands
until the node's chunk for that stamp is there; so the node may be as slow as it is on this
machine, and the result does not depend on it. The node needs `use_sim_time`.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

import numpy as np
import rclpy
from rclpy.executors import SingleThreadedExecutor
from trajectory_msgs.msg import JointTrajectory

from groot_int8_ros.errors import ConfigurationError, GrootError
from groot_int8_ros.policy.robot import RobotDescription, joint_to_policy
from groot_int8_ros.policy.types import ActionChunk, CommittedActions, Observation
from groot_int8_ros.ros.executor_messages import chunk_of
from groot_int8_ros.ros.managed_node import RELIABLE
from offline_tools.simulation.ros_messages import CHUNK_TOPIC, RobotTopics

_LOOK_S = 0.05
# What one subscriber of the node received and the other lost is sent to both again.
_REPEAT_S = 3.0


class NodeSilentError(GrootError):
    """The policy node is not there, or gives no chunk."""


class NodePolicy:
    """Asks the policy node over DDS. A context manager that owns the ROS context."""

    def __init__(self, robot: RobotDescription, *, timeout_s: float = 30.0) -> None:
        """Join the ROS domain.

        Args:
            robot: Joints and action period of the bundle that the node runs.
            timeout_s: Wall time within which the node must be there, and must answer.
        """
        self._robot = robot
        self._timeout_s = timeout_s
        self._context = rclpy.Context()
        rclpy.init(context=self._context)
        self._node = rclpy.create_node("simulated_robot", context=self._context)
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self._node)
        self._topics = RobotTopics(self._node)
        self._chunks: dict[int, Any] = {}
        self._subscription = self._node.create_subscription(
            JointTrajectory, CHUNK_TOPIC, self._on_chunk, RELIABLE
        )
        self._instruction: str | None = None

    def __enter__(self) -> NodePolicy:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def robot(self) -> RobotDescription:
        """Cameras, joints and action period."""
        return self._robot

    def infer(
        self,
        observation: Observation,
        *,
        seed: int | None = None,
        committed: CommittedActions | None = None,
    ) -> ActionChunk:
        """Publish an observation and wait for the node's chunk.

        Args:
            observation: Published as it is, joint values in radians.
            seed: The node's own parameter decides; this one is not sent.
            committed: The node hears of them from the executor node alone.

        Raises:
            ConfigurationError: Rows are committed.
            NodeSilentError: There is no node, or no chunk within the time.
        """
        if committed is not None:
            raise ConfigurationError(
                "the stepped loop cannot tell the node of committed rows: choose another seam, or "
                "run chunk_executor_node with seam.kind rtc"
            )
        self._wait_until_watched()
        stamp = observation.stamp_ns
        self._chunks.clear()
        end_s = time.monotonic() + self._timeout_s
        while stamp not in self._chunks:
            self._publish(observation)
            repeat_s = min(time.monotonic() + _REPEAT_S, end_s)
            while stamp not in self._chunks and time.monotonic() < repeat_s:
                self._executor.spin_once(timeout_sec=_LOOK_S)
            if stamp not in self._chunks and time.monotonic() >= end_s:
                raise NodeSilentError(
                    f"the policy node gave no chunk within {self._timeout_s:g} s. Its log and "
                    "/diagnostics say why it holds; it needs use_sim_time, and to be active."
                )
        return self._answer(self._chunks[stamp], observation)

    def close(self) -> None:
        """Leave the ROS domain."""
        self._executor.shutdown()
        self._node.destroy_node()
        rclpy.shutdown(context=self._context)

    def _on_chunk(self, message: Any) -> None:
        self._chunks[chunk_of(message).stamp_ns] = message

    def _wait_until_watched(self) -> None:
        end_s = time.monotonic() + self._timeout_s
        while not (
            self._topics.watched() and self._node.count_publishers(self._subscription.topic_name)
        ):
            if time.monotonic() > end_s:
                raise NodeSilentError(
                    "no policy node receives the cameras and joint states. Start it with "
                    "config/simulated_arm_node.yaml, its bundle and use_sim_time, and in the "
                    "same ROS_DOMAIN_ID."
                )
            self._executor.spin_once(timeout_sec=_LOOK_S)

    def _publish(self, observation: Observation) -> None:
        stamp = observation.stamp_ns
        self._topics.publish_clock(stamp)
        if observation.instruction != self._instruction:
            self._topics.publish_instruction(observation.instruction)
            self._instruction = observation.instruction
        state = np.concatenate([observation.state[key] for key in self._robot.state_joints])
        self._topics.publish_joints(np.radians(state.astype(np.float64)), stamp)
        self._topics.publish_frames(observation.images, stamp)

    def _answer(self, message: Any, observation: Observation) -> ActionChunk:
        chunk = chunk_of(message)
        actions = {}
        for key, joints in self._robot.action_joints.items():
            columns = [chunk.joint_names.index(joint.name) for joint in joints]
            rows = [joint_to_policy(joints, row[columns].tolist()) for row in chunk.targets]
            actions[key] = np.stack(rows).astype(np.float32)
        return ActionChunk(
            actions=actions,
            stamp_ns=observation.stamp_ns,
            time_from_start_s=(chunk.due_ns - chunk.stamp_ns) / 1e9,
            action_pred=np.empty((0, 0), np.float32),
            seed=None,
        )
