"""Real-time chunking end to end: policy node and chunk executor as processes, over real DDS.

The robot stands still whatever it is commanded: relative actions are decoded against one state
then, so that a row which one chunk can express can be expressed by the next.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="needs the ROS 2 Python packages")
pytest.importorskip("onnxruntime", reason="needs ONNX Runtime")

from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import String
from trajectory_msgs.msg import JointTrajectory

from groot_int8_ros.policy.policy import Policy
from groot_int8_ros.policy.robot import joint_to_policy, policy_to_joint
from groot_int8_ros.policy.types import CommittedActions, Observation
from groot_int8_ros.ros.executor_messages import commitment_of
from groot_int8_ros.ros.joints import stamp_ns, time_message

from .faults.system import (
    DOMAIN_ID,
    POSE,
    ExecutorListener,
    Processes,
    check_standing_arm,
    standing_arm,
)

POLICY, INSTRUCTION = "policy_node", "pick up the cube"
# Of the bundle `slow_rows`.
ROW_S, RANGE = 0.1, 1.0


class Robot(ExecutorListener):
    """Cameras, joints that stand still, and an ear for everything that is said."""

    period_s = 0.05

    def __init__(self, node: Node, executor: SingleThreadedExecutor, policy: Policy) -> None:
        super().__init__(node, executor)
        self.policy = policy
        self._random = np.random.default_rng(3)
        self.joints = [j for group in policy.robot.state_joints.values() for j in group]
        self.frames: dict[tuple[str, int], np.ndarray] = {}
        self.chunks: dict[int, JointTrajectory] = {}
        self.infos: dict[int, dict[str, Any]] = {}
        self.commitments: list[JointTrajectory] = []
        self.commands: list[list[float]] = []
        self._cameras = {
            camera.key: node.create_publisher(Image, f"/cameras/{camera.key}/image_raw", 1)
            for camera in policy.robot.cameras
        }
        self._states = node.create_publisher(JointState, "/joint_states", 10)
        hear: Callable[..., Any] = node.create_subscription
        hear(JointTrajectory, "/policy_node/action_chunk", self._on_chunk, 200)
        hear(String, "/policy_node/chunk_info", self._on_info, 200)
        hear(JointTrajectory, "/chunk_executor/committed", self.commitments.append, 1000)
        hear(JointTrajectory, "/test/arm", self._on_command, 1000)

    def _on_chunk(self, message: JointTrajectory) -> None:
        self.chunks[stamp_ns(message.header)] = message

    def _on_info(self, message: String) -> None:
        info = json.loads(message.data)
        self.infos[info["stamp_ns"]] = info

    def _on_command(self, message: JointTrajectory) -> None:
        self.commands.append(list(message.points[0].positions))

    def publish(self) -> None:
        stamp = self.node.get_clock().now().nanoseconds
        state = JointState(
            name=[joint.name for joint in self.joints], position=[POSE] * len(self.joints)
        )
        state.header.stamp = time_message(stamp)
        self._states.publish(state)
        for camera in self.policy.robot.cameras:
            shape = (camera.height, camera.width, 3)
            rgb = self._random.integers(0, 256, shape, dtype=np.uint8)
            self.frames[camera.key, stamp] = rgb
            image = Image(
                height=camera.height,
                width=camera.width,
                encoding="rgb8",
                step=3 * camera.width,
                data=rgb.tobytes(),
            )
            image.header.stamp = time_message(stamp)
            self._cameras[camera.key].publish(image)

    def commands_heard(self) -> int:
        return len(self.commands)

    def committed(self) -> list[int]:
        """Stamps of the chunks with committed rows that have arrived whole."""
        whole = sorted(self.chunks.keys() & self.infos.keys())
        return [stamp for stamp in whole if self.infos[stamp]["committed"]]

    def expected(self, info: dict[str, Any]) -> np.ndarray:
        """Compute a chunk again from what was published."""
        observation = Observation(
            {
                camera.key: self.frames[
                    camera.key, info["streams"][f"camera {camera.key}"]["stamp_ns"]
                ]
                for camera in self.policy.robot.cameras
            },
            {
                key: joint_to_policy(joints, [POSE] * len(joints)).astype(np.float32)
                for key, joints in self.policy.robot.state_joints.items()
            },
            info["instruction"],
            info["stamp_ns"],
        )
        chunk = self.policy.infer(
            observation, None, info["seed"], CommittedActions.from_dict(info["committed"])
        )
        return self.in_joints(chunk.actions)

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the lowest and highest target of each joint that a row can express."""
        middle = np.concatenate(
            [
                np.zeros(key.dim) if key.reference_state_key is None else np.full(key.dim, POSE)
                for key in self.policy.processor.action_keys
            ]
        )
        return middle - RANGE, middle + RANGE

    def in_joints(self, actions: Any) -> np.ndarray:
        """Return actions as the robot's messages hold them, shape (rows, joints)."""
        parts = [
            policy_to_joint(joints, np.asarray(actions[key], np.float64))
            for key, joints in self.policy.robot.action_joints.items()
        ]
        return np.concatenate(parts, axis=1)


@pytest.fixture
def robot(ros_node: Callable[..., Any], slow_rows: Path) -> Iterator[Robot]:
    policy = Policy.load(slow_rows, threads=1)
    with ros_node("robot", DOMAIN_ID) as (node, executor):
        yield Robot(node, executor, policy)
    policy.close()


@pytest.fixture
def processes(robot: Robot, tmp_path: Path) -> Iterator[Processes]:
    made = Processes(tmp_path, standing_arm(robot.policy.robot))
    yield made
    for process in made.all:
        made.end(process)


def test_a_chunk_begins_with_what_the_executor_had_committed_and_a_dead_policy_ends_in_a_hold(
    processes: Processes, robot: Robot, slow_rows: Path
) -> None:
    processes.executor(seam={"kind": "rtc"}, joint_state_timeout_s=1.0)
    policy, _ = processes.node(
        ["-m", "groot_int8_ros.policy_node"],
        "policy",
        {
            "bundle": str(slow_rows),
            "threads": 1,
            "instruction": INSTRUCTION,
            "inference_rate_hz": 4.0,
            "max_observation_age_s": 2.0,
            "max_observation_skew_s": 1.0,
            # On a busy machine frames get lost, which is not what is looked at here.
            "sensor_qos": {"reliability": "reliable"},
            "autostart": True,
        },
    )
    robot.enable()
    robot.until(lambda: len(robot.committed()) >= 8, "chunks with committed rows")
    robot.until(
        lambda: robot.says("commitment", "begins with what", POLICY),
        "the commitment's status",
    )
    robot.until(lambda: robot.says("chunk length", "long enough", POLICY), "chunks that last")

    low, high = robot.bounds()
    for stamp in robot.committed():
        info, message = robot.infos[stamp], robot.chunks[stamp]
        rows = [list(point.positions) for point in message.points]
        count = len(info["committed"]["rows"])
        assert info["committed"]["rows"] == list(range(count))
        assert 0 < count < len(rows)
        # Every row as it can be computed again, and the first ones as they were promised.
        np.testing.assert_allclose(rows, robot.expected(info), rtol=1e-5, atol=1e-5)
        given = robot.in_joints(CommittedActions.from_dict(info["committed"]).actions)
        due_ns = stamp + np.round(np.arange(count) * ROW_S * 1e9).astype(np.int64)
        laid = [commitment.on_rows(due_ns) for commitment in map(commitment_of, robot.commitments)]
        promises = [targets for targets, mask in laid if mask.all()]
        assert any(np.allclose(given, promise, rtol=1e-5, atol=1e-5) for promise in promises)
        # What lies between two rows can lie beyond all that a row can say.
        np.testing.assert_allclose(rows[:count], np.clip(given, low, high), rtol=1e-5, atol=1e-5)

    robot.forget()
    policy.send_signal(signal.SIGKILL)
    policy.wait()
    robot.until(
        lambda: robot.says("channel arm", "holding: (chunks have|no rows)"),
        "the hold's reason",
    )
    robot.until(lambda: len({tuple(c) for c in robot.commands[-10:]}) == 1, "a hold")
    commands = np.array(robot.commands)
    assert np.ptp(commands, axis=0).max() > 0.01, "the robot was never moved"
    check_standing_arm(robot.commands)
