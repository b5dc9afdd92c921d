"""The calibration recorder as a user runs it: its own process, real DDS, a real bundle.

What it stores is held against what was published and against what the policy computes; the policy
node, where there is one, is a third process.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="needs the ROS 2 Python packages")
pytest.importorskip("onnxruntime", reason="needs ONNX Runtime")

import rclpy
from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.parameter import Parameter
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import String
from trajectory_msgs.msg import JointTrajectory

from groot_int8_ros.calibration_recorder_node import CalibrationRecorderNode
from groot_int8_ros.capture.inference import run_on
from groot_int8_ros.capture.sample import CaptureSample
from groot_int8_ros.capture.store import CaptureStore
from groot_int8_ros.control.commitment import Commitment
from groot_int8_ros.errors import CaptureError
from groot_int8_ros.policy.policy import Policy, draw_noise
from groot_int8_ros.policy.types import Observation
from groot_int8_ros.ros.executor_messages import commitment_message
from groot_int8_ros.ros.joints import time_message
from offline_tools.bags.episode_to_bag import BagOptions, convert_episode
from offline_tools.calibration.bag_source import BagInputs, BagSource
from offline_tools.calibration.run import capture, complete

from .nodes import DEADLINE_S, Listener, NodeProcess

# Another range than the other node tests' domains: suites may run side by side.
DOMAIN_ID = 1 + (os.getpid() + 50) % 100
SEED = 11
SECOND = 1_000_000_000
RECORDER = "calibration_recorder"


@pytest.fixture(scope="module")
def policy(tiny_bundle: Path) -> Iterator[Policy]:
    loaded = Policy.load(tiny_bundle, threads=1)
    yield loaded
    loaded.close()


class Robot(Listener):
    """Publishes cameras and joints, and remembers what it published by stamp."""

    period_s = 0.1

    def __init__(self, node: Node, executor: SingleThreadedExecutor, policy: Policy) -> None:
        super().__init__(node, executor, RECORDER, ("pause", "resume", "finish"))
        self._policy = policy
        self._random = np.random.default_rng(3)
        self._cameras = {
            camera: node.create_publisher(Image, f"/cameras/{camera.key}/image_raw", 5)
            for camera in policy.robot.cameras
        }
        self._joints = node.create_publisher(JointState, "/joint_states", 5)
        self._instruction = node.create_publisher(String, "/instruction", 5)
        self._clock = node.create_publisher(Clock, "/clock", 5)
        self._commitments = node.create_publisher(JointTrajectory, "/chunk_executor/committed", 5)
        self.published: dict[int, Observation] = {}

    def observe(self, stamp: int | None = None, instruction: str = "pick up the cube") -> int:
        """Publish one observation; with a stamp, /clock says that stamp too."""
        if stamp is None:
            stamp = int(self.node.get_clock().now().nanoseconds)
        else:
            self._clock.publish(Clock(clock=time_message(stamp)))
        # Content is a function of the stamp, so that a loop brings the same again.
        random = np.random.default_rng(stamp)
        robot = self._policy.robot
        state = {
            key: random.uniform(-0.5, 0.5, len(joints)).astype(np.float32)
            for key, joints in robot.state_joints.items()
        }
        images = {
            camera.key: random.integers(0, 256, (camera.height, camera.width, 3), dtype=np.uint8)
            for camera in robot.cameras
        }
        self.published[stamp] = Observation(images, state, instruction, stamp)
        self._instruction.publish(String(data=instruction))
        joints = JointState(
            name=[joint.name for joints in robot.state_joints.values() for joint in joints],
            position=np.concatenate(list(state.values())).astype(np.float64).tolist(),
        )
        joints.header.stamp = time_message(stamp)
        self._joints.publish(joints)
        for camera, publisher in self._cameras.items():
            frame = images[camera.key]
            message = Image(
                height=camera.height,
                width=camera.width,
                encoding="rgb8",
                step=camera.width * 3,
                data=frame.tobytes(),
            )
            message.header.stamp = time_message(stamp)
            publisher.publish(message)
        return stamp

    def observe_committed(self) -> None:
        """Publish one observation, and before it what an executor has committed itself to."""
        joints = [j.name for group in self._policy.robot.action_joints.values() for j in group]
        after_s = self._policy.time_from_start_s[:4]
        now_ns = int(self.node.get_clock().now().nanoseconds)
        due_ns = now_ns + np.round((after_s - after_s[0] - 0.5) * 1e9).astype(np.int64)
        due_ns[-1] = now_ns + round(after_s[-1] * 1e9)
        targets = self._random.uniform(-0.2, 0.2, (len(due_ns), len(joints)))
        commitment = Commitment(now_ns, tuple(joints), due_ns, targets)
        self._commitments.publish(commitment_message(commitment))
        self.observe()

    @property
    def said(self) -> str:
        return self.status("recorder")


@pytest.fixture
def robot(ros_node: Callable[..., Any], policy: Policy) -> Iterator[Robot]:
    with ros_node("robot", DOMAIN_ID) as (node, executor):
        yield Robot(node, executor, policy)


Start = Callable[..., NodeProcess]


@pytest.fixture
def start(tmp_path: Path, tiny_bundle: Path) -> Iterator[Start]:
    started: list[NodeProcess] = []

    def begin(
        module: str = "calibration_recorder_node",
        **changes: object,
    ) -> NodeProcess:
        parameters: dict[str, object] = {
            "bundle": str(tiny_bundle),
            "threads": 1,
            "seed": SEED,
            "inference_rate_hz": 20.0,
            "max_observation_age_s": 5.0,
            "max_observation_skew_s": 0.05,
            "sensor_qos.reliability": "reliable",
            "sensor_qos.depth": 5,
            "autostart": True,
        }
        if module == "calibration_recorder_node":
            parameters |= {"output": str(tmp_path / "store"), "samples_per_shard": 2}
        folder = tmp_path / f"node{len(started)}"
        started.append(NodeProcess(module, folder, parameters | changes, DOMAIN_ID))
        return started[-1]

    yield begin
    for node in started:
        node.kill()


@pytest.fixture(autouse=True)
def transports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDDS_BUILTIN_TRANSPORTS", "UDPv4")


def assert_as_published(sample: CaptureSample, robot: Robot) -> Observation:
    observation = robot.published[sample.stamp_ns]
    assert sample.images is not None
    for key, image in observation.images.items():
        np.testing.assert_array_equal(sample.images[key], image)
    for key, values in observation.state.items():
        np.testing.assert_array_equal(sample.state[key], values)
    assert sample.instruction == observation.instruction
    return observation


def test_recorded_chunks_are_completed_to_what_the_policy_computes_bit_for_bit(
    start: Start, robot: Robot, policy: Policy, tmp_path: Path
) -> None:
    recorder = start(samples=6)
    robot.until(lambda: "no chunk of policy_node" in robot.said, "the recorder's complaint")
    start("policy_node")
    robot.until(
        lambda: robot.count("recorder", "offered") >= 9,
        "nine paired chunks",
        robot.observe_committed,
    )
    answer = robot.trigger("finish")
    assert answer.success, answer.message
    assert answer.message.startswith("6 samples of ")
    assert robot.trigger("finish").success
    assert not robot.trigger("resume").success
    assert recorder.end(signal.SIGINT) == 0
    assert "Traceback" not in recorder.text()

    store = CaptureStore.open(tmp_path / "store")
    assert store.index.finished
    assert store.index.offered >= 9
    assert len(store) == 6
    store.check_bundle(policy.manifest)
    direct = {}
    for sample in store.samples():
        observation = assert_as_published(sample, robot)
        assert sample.seed == SEED
        np.testing.assert_array_equal(
            sample.noise, draw_noise(SEED, sample.stamp_ns, policy.noise_shape)
        )
        # Rows that the policy was not given would give another chunk than it published.
        direct[sample.stamp_ns] = run_on(
            policy,
            observation,
            sample.source,
            seed=SEED,
            keep_images=True,
            committed=sample.committed,
        )
        assert sample.chunk is not None
        wanted = direct[sample.stamp_ns].chunk
        assert wanted is not None
        for key, actions in wanted.actions.items():
            # The published trajectory is float64, so a float32 target comes back as it was.
            np.testing.assert_allclose(sample.chunk.actions[key], actions, rtol=1e-5, atol=1e-6)

    assert any(sample.committed for sample in store.samples())
    # Both ways, from the robot's record and straight from the observation, give the same arrays.
    done = complete(policy, store, tmp_path / "full", keep_images=True, report=lambda _: None)
    assert done.completed == 6
    assert max(done.largest_difference.values()) <= 1e-5
    for sample in done.store.samples():
        found, wanted_arrays = sample.arrays(), direct[sample.stamp_ns].arrays()
        assert found.keys() == wanted_arrays.keys()
        for name, array in found.items():
            np.testing.assert_array_equal(array, wanted_arrays[name], err_msg=name)
    assert len(done.store.feeds("dit")) == 6 * policy.manifest.denoising_steps


def test_without_a_policy_node_it_records_pauses_and_goes_on(
    start: Start, robot: Robot, policy: Policy, tmp_path: Path
) -> None:
    recorder = start(with_chunks=False, samples=4)
    robot.until(lambda: robot.count("recorder", "offered") >= 6, "six observations", robot.observe)
    assert robot.trigger("pause").success
    robot.until(lambda: robot.said == "paused", "the pause")
    before = robot.count("recorder", "offered")
    for _ in range(5):
        robot.observe()
        robot.spin(robot.period_s)
    assert robot.trigger("resume").success
    # Nothing is published yet, so on a slow machine it may say by then that the sensors are stale.
    robot.until(lambda: robot.said != "paused", "the end of the pause")
    assert robot.count("recorder", "offered") <= before + 1, "it recorded while paused"
    robot.until(lambda: robot.count("recorder", "offered") >= before + 3, "more", robot.observe)
    assert recorder.end(signal.SIGTERM) == 0
    store = CaptureStore.open(tmp_path / "store")
    assert store.index.finished, "SIGTERM did not finish the store"
    assert len(store) == 4
    for sample in store.samples():
        assert_as_published(sample, robot)
        assert sample.chunk is None
        np.testing.assert_array_equal(
            sample.noise, draw_noise(SEED, sample.stamp_ns, policy.noise_shape)
        )
    # The whole run counts, not its first observations.
    stamps = sorted(robot.published)
    assert max(sample.stamp_ns for sample in store.samples()) > stamps[6]
    assert complete(policy, store, tmp_path / "full", report=lambda _: None).completed == 4


def test_recorder_that_runs_the_policy_stores_what_its_graphs_were_given(
    start: Start, robot: Robot, policy: Policy, tmp_path: Path
) -> None:
    recorder = start(with_chunks=False, run_policy=True, threads=1, samples=3)
    robot.until(
        lambda: robot.count("recorder", "offered") >= 5, "five observations", robot.observe
    )
    assert recorder.end(signal.SIGTERM) == 0, recorder.text()
    store = CaptureStore.open(tmp_path / "store")
    assert len(store) == 3
    assert store.meta.engine == "onnxruntime"
    for sample in store.samples():
        observation = assert_as_published(sample, robot)
        wanted = run_on(policy, observation, sample.source, seed=SEED, keep_images=True).arrays()
        found = sample.arrays()
        assert found.keys() == wanted.keys()
        for name, array in found.items():
            np.testing.assert_array_equal(array, wanted[name], err_msg=name)
    # Nothing is missing: the store calibrates as it is.
    assert len(store.feeds("dit")) == 3 * policy.manifest.denoising_steps
    assert complete(policy, store, tmp_path / "full", report=lambda _: None).completed == 0


def test_played_bag_gives_the_arrays_that_are_read_from_the_bag_itself(
    start: Start, robot: Robot, policy: Policy, tiny_dataset: Path, tmp_path: Path
) -> None:
    bag = tmp_path / "bag"
    # Compressed frames are small enough for the tests' transport.
    convert_episode(
        tiny_dataset, 0, bag, BagOptions(start_time_ns=1000 * SECOND, compression="png")
    )
    read = capture(
        policy,
        BagSource(bag, policy, BagInputs.read(None, None)),
        tmp_path / "read",
        samples=100,
        seed=SEED,
        keep_images=True,
        report=lambda _: None,
    )
    compressed = {f"cameras.{c.key}.transport": "compressed" for c in policy.robot.cameras}
    recorder = start(
        **compressed,
        **{
            "with_chunks": False,
            "run_policy": True,
            "use_sim_time": True,
            "samples": 100,
            "inference_rate_hz": 200.0,
            # One moment of the bag is one observation, however its messages arrive.
            "max_observation_skew_s": 0.001,
            "sensor_qos.reliability": "best_effort",
        },
    )
    robot.until(lambda: robot.said, "the recorder")
    player = [sys.executable, "-m", "offline_tools.cli", "play-bag", str(bag), "--clock"]
    played = subprocess.run(
        [*player, "--rate", "0.5"],
        env=os.environ | {"ROS_DOMAIN_ID": str(DOMAIN_ID)},
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_S,
    )
    assert played.returncode == 0, played.stderr
    assert recorder.end(signal.SIGINT) == 0, recorder.text()
    wanted = {sample.stamp_ns: sample.arrays() for sample in read.store.samples()}
    samples = list(CaptureStore.open(tmp_path / "store").samples())
    assert len(samples) >= 3
    for sample in samples:
        found = sample.arrays()
        assert found.keys() == wanted[sample.stamp_ns].keys()
        for name, array in found.items():
            np.testing.assert_array_equal(array, wanted[sample.stamp_ns][name], err_msg=name)


def test_node_that_is_not_active_collects_nothing(tiny_bundle: Path, tmp_path: Path) -> None:
    context = Context()
    rclpy.init(args=[], context=context, domain_id=DOMAIN_ID)
    parameters = {"bundle": str(tiny_bundle), "output": str(tmp_path / "store")}
    overrides = [Parameter(name, value=value) for name, value in parameters.items()]
    node = CalibrationRecorderNode(context=context, parameter_overrides=overrides)
    try:
        node.trigger_configure()
        pairing = node._pairing
        assert pairing is not None
        foreign = String(data="{}")
        node._on_chunk_info(foreign)
        assert pairing.foreign == "", "an inactive node listened"
        node.trigger_activate()
        node._on_chunk_info(foreign)
        assert pairing.foreign, "an active node did not listen"
    finally:
        node.close()
        node.destroy_node()
        rclpy.shutdown(context=context)


def test_policy_node_and_a_policy_of_its_own_exclude_each_other(
    start: Start, robot: Robot
) -> None:
    recorder = start(with_chunks=True, run_policy=True)
    robot.until(lambda: "both true" in robot.said, "the contradiction")
    assert recorder.end(signal.SIGTERM) == 0


def test_looped_bag_in_simulation_time_gives_each_moment_once(
    start: Start, robot: Robot, tmp_path: Path
) -> None:
    recorder = start(with_chunks=False, use_sim_time=True, samples=100)
    robot.until(lambda: robot.said, "the recorder")
    moments = [1000 * SECOND + i * SECOND // 5 for i in range(8)]

    def passes() -> Iterator[int]:
        while True:
            yield from moments

    following = passes()

    def tick() -> None:
        robot.observe(next(following))

    robot.until(lambda: robot.count("recorder", "offered") >= 20, "twenty observations", tick)
    assert recorder.end(signal.SIGINT) == 0
    samples = list(CaptureStore.open(tmp_path / "store").samples())
    stamps = [sample.stamp_ns for sample in samples]
    assert len(set(stamps)) == len(stamps) <= len(moments)
    for sample in samples:
        assert_as_published(sample, robot)


def test_killed_recorder_loses_at_most_the_samples_it_held(
    start: Start, robot: Robot, tmp_path: Path
) -> None:
    recorder = start(with_chunks=False, samples=50)
    robot.until(lambda: robot.count("recorder", "kept") >= 5, "five samples", robot.observe)
    kept = robot.count("recorder", "kept")
    recorder.end(signal.SIGKILL)
    store = CaptureStore.open(tmp_path / "store")
    assert not store.index.finished
    assert len(store) >= kept - 2
    for sample in store.samples():
        assert_as_published(sample, robot)


def test_full_disk_stops_the_recording_with_its_reason_and_keeps_what_was_written(
    start: Start, robot: Robot, policy: Policy, tmp_path: Path
) -> None:
    recorder = start(with_chunks=False, samples=50, samples_per_shard=1)
    frame_bytes = sum(3 * camera.height * camera.width for camera in policy.robot.cameras)
    robot.until(lambda: robot.count("recorder", "kept") >= 3, "three samples", robot.observe)
    # A limit on file sizes makes a write fail with an OSError, as a full disk does.
    limits = resource.prlimit(recorder.process.pid, resource.RLIMIT_FSIZE)
    full = (frame_bytes // 2, limits[1])
    resource.prlimit(recorder.process.pid, resource.RLIMIT_FSIZE, full)
    robot.until(lambda: robot.said.startswith("stopped: cannot write"), "the stop", robot.observe)
    assert "were written before are whole" in robot.said
    whole = len(list(CaptureStore.open(tmp_path / "store").samples()))
    assert whole >= 3
    refused = robot.trigger("finish")
    assert not refused.success
    assert "cannot write" in refused.message
    resource.prlimit(recorder.process.pid, resource.RLIMIT_FSIZE, limits)
    assert robot.trigger("resume").success
    assert recorder.end(signal.SIGINT) == 0
    store = CaptureStore.open(tmp_path / "store")
    assert store.index.finished
    assert len(store) > whole, "the sample that did not fit was lost"


def test_occupied_folder_is_left_alone_and_configuring_says_so(
    start: Start, robot: Robot, tmp_path: Path
) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "mine.txt").write_text("keep")
    recorder = start(with_chunks=False)
    robot.until(lambda: "exists and is not empty" in robot.said, "the refusal")
    assert not robot.trigger("finish").success
    assert recorder.end(signal.SIGINT) == 0
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["mine.txt"]


def test_run_without_observations_leaves_no_store_and_says_so(
    start: Start, robot: Robot, tmp_path: Path
) -> None:
    recorder = start(with_chunks=False)
    robot.until(lambda: "missing" in robot.said, "what is missing")
    answer = robot.trigger("finish")
    assert not answer.success
    assert "no sample was captured" in answer.message
    assert recorder.end(signal.SIGINT) == 0
    with pytest.raises(CaptureError, match="no capture store"):
        CaptureStore.open(tmp_path / "store")
