"""Real-time chunking end to end: policy node and chunk executor as processes, over real DDS.

The robot stands still whatever it is commanded: relative actions are decoded against one state
then, so that a row which one chunk can express can be expressed by the next.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

pytest.importorskip("rclpy", reason="needs the ROS 2 Python packages")
pytest.importorskip("onnxruntime", reason="needs ONNX Runtime")

import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import String
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from groot_int8_ros.policy.policy import Policy
from groot_int8_ros.policy.robot import joint_to_policy, policy_to_joint
from groot_int8_ros.policy.types import CommittedActions, Observation
from groot_int8_ros.ros.executor_messages import commitment_of
from groot_int8_ros.ros.joints import stamp_ns, time_message

DEADLINE_S = 120.0
ASK_AGAIN_S = 2.0
FRAME_S = 0.05
DOMAIN_ID = 1 + os.getpid() % 100
INSTRUCTION = "pick up the cube"
# Of the bundle `slow_rows`.
ROW_S, RANGE = 0.1, 1.0
# Where every joint stands.
POSE = 0.1
SPEED, CONTROL_S, REACH = 2.0, 0.02, 3.0


class Robot:
    """Cameras, joints that stand still, and an ear for everything that is said."""

    def __init__(self, node: Node, executor: SingleThreadedExecutor, policy: Policy) -> None:
        self.node = node
        self.policy = policy
        self._executor = executor
        self._random = np.random.default_rng(3)
        self.joints = [j for group in policy.robot.state_joints.values() for j in group]
        self.frames: dict[tuple[str, int], np.ndarray] = {}
        self.chunks: dict[int, JointTrajectory] = {}
        self.infos: dict[int, dict[str, Any]] = {}
        self.commitments: list[JointTrajectory] = []
        self.commands: list[list[float]] = []
        self.statuses: dict[str, DiagnosticStatus] = {}
        self._cameras = {
            camera.key: node.create_publisher(Image, f"/cameras/{camera.key}/image_raw", 1)
            for camera in policy.robot.cameras
        }
        self._states = node.create_publisher(JointState, "/joint_states", 10)
        self._enable: Any = node.create_client(Trigger, "/chunk_executor/enable")
        hear: Callable[..., Any] = node.create_subscription
        hear(JointTrajectory, "/policy_node/action_chunk", self._on_chunk, 200)
        hear(String, "/policy_node/chunk_info", self._on_info, 200)
        hear(JointTrajectory, "/chunk_executor/committed", self.commitments.append, 1000)
        hear(JointTrajectory, "/test/arm", self._on_command, 1000)
        hear(DiagnosticArray, "/diagnostics", self._on_diagnostics, 50)

    def _on_chunk(self, message: JointTrajectory) -> None:
        self.chunks[stamp_ns(message.header)] = message

    def _on_info(self, message: String) -> None:
        info = json.loads(message.data)
        self.infos[info["stamp_ns"]] = info

    def _on_command(self, message: JointTrajectory) -> None:
        self.commands.append(list(message.points[0].positions))

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        self.statuses |= {status.name: status for status in message.status}

    def _observe(self) -> None:
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

    def until(self, met: Callable[[], Any], what: str) -> Any:
        """Publish and listen until something is so."""
        end_s = time.monotonic() + DEADLINE_S
        while time.monotonic() < end_s:
            self._observe()
            next_s = time.monotonic() + FRAME_S
            while (left_s := next_s - time.monotonic()) > 0:
                self._executor.spin_once(timeout_sec=left_s)
            if found := met():
                return found
        states = {name: status.message for name, status in self.statuses.items()}
        pytest.fail(f"not seen within {DEADLINE_S} s: {what}; diagnostics say {states}")

    def enable(self) -> None:
        """Ask until it is granted: a first answer may get lost, and joint states have to come."""
        futures: list[Any] = []
        asked_s = 0.0

        def granted() -> bool:
            nonlocal asked_s
            if self._enable.service_is_ready() and time.monotonic() - asked_s > ASK_AGAIN_S:
                asked_s = time.monotonic()
                futures.append(self._enable.call_async(Trigger.Request()))
            return any(future.done() and future.result().success for future in futures)

        self.until(granted, "enabling")

    def says(self, name: str, pattern: str) -> bool:
        found = self.statuses.get(name)
        return found is not None and re.search(pattern, found.message) is not None

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
def robot(slow_rows: Path) -> Iterator[Robot]:
    policy = Policy.load(slow_rows, threads=1)
    context = Context()
    rclpy.init(args=[], context=context, domain_id=DOMAIN_ID)
    node = Node("robot", context=context)
    executor = SingleThreadedExecutor(context=context)
    executor.add_node(node)
    yield Robot(node, executor, policy)
    executor.shutdown()
    node.destroy_node()
    rclpy.shutdown(context=context)
    policy.close()


StartNode = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[StartNode]:
    started: list[subprocess.Popen[bytes]] = []

    def start_node(module: str, **parameters: object) -> subprocess.Popen[bytes]:
        file = tmp_path / f"{module}.yaml"
        file.write_text(yaml.safe_dump({"/**": {"ros__parameters": parameters}}))
        words = [sys.executable, "-m", f"groot_int8_ros.{module}"]
        with (tmp_path / f"{module}.txt").open("w") as log:
            started.append(
                subprocess.Popen(
                    [*words, "--ros-args", "--params-file", str(file)],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=os.environ | {"ROS_DOMAIN_ID": str(DOMAIN_ID), "OMP_NUM_THREADS": "1"},
                )
            )
        return started[-1]

    yield start_node
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()


def test_a_chunk_begins_with_what_the_executor_had_committed_and_a_dead_policy_ends_in_a_hold(
    start: StartNode, robot: Robot, slow_rows: Path
) -> None:
    names = [j.name for group in robot.policy.robot.action_joints.values() for j in group]
    start(
        "chunk_executor_node",
        channels=["arm"],
        autostart=True,
        seam={"kind": "rtc"},
        joint_state_timeout_s=1.0,
        control_rate_hz=1.0 / CONTROL_S,
        channel={
            "arm": {
                "joints": names,
                "topic": "/test/arm",
                "lower": [-REACH],
                "upper": [REACH],
                "velocity": [SPEED],
                "acceleration": [20.0],
                "guard_distance": [100.0],
            }
        },
    )
    policy = start(
        "policy_node",
        bundle=str(slow_rows),
        threads=1,
        instruction=INSTRUCTION,
        inference_rate_hz=4.0,
        max_observation_age_s=2.0,
        max_observation_skew_s=1.0,
        # On a busy machine frames get lost, which is not what is looked at here.
        sensor_qos={"reliability": "reliable"},
        autostart=True,
    )
    robot.enable()
    robot.until(lambda: len(robot.committed()) >= 8, "chunks with committed rows")
    robot.until(
        lambda: robot.says("policy_node: commitment", "begins with what"),
        "the commitment's status",
    )
    robot.until(lambda: robot.says("policy_node: chunk length", "long enough"), "chunks that last")

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

    robot.statuses.clear()
    policy.send_signal(signal.SIGKILL)
    policy.wait()
    robot.until(
        lambda: robot.says("chunk_executor: channel arm", "holding: (chunks have|no rows)"),
        "the hold's reason",
    )
    robot.until(lambda: len({tuple(c) for c in robot.commands[-10:]}) == 1, "a hold")
    commands = np.array(robot.commands)
    assert np.ptp(commands, axis=0).max() > 0.01, "the robot was never moved"
    assert np.abs(commands).max() <= REACH
    assert np.abs(np.diff(commands, axis=0)).max() <= SPEED * CONTROL_S * (1.0 + 1e-6)
