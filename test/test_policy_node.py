"""The policy node as a user runs it: its own process, real DDS, a real bundle.

Each test waits for what it expects with a generous deadline and publishes like a camera driver
meanwhile, so that a slow machine makes it slower and not red.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

pytest.importorskip("rclpy", reason="needs the ROS 2 Python packages")
pytest.importorskip("onnxruntime", reason="needs ONNX Runtime")

from geometry_msgs.msg import Twist
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from rclpy.executors import SingleThreadedExecutor
from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.qos import DurabilityPolicy, QoSProfile
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import Header, String
from trajectory_msgs.msg import JointTrajectory

from groot_int8_ros.policy.bundle import open_bundle
from groot_int8_ros.policy.engines.onnxruntime_engine import OnnxRuntimeEngine
from groot_int8_ros.policy.policy import Policy
from groot_int8_ros.policy.prefix_model import compute_prefix
from groot_int8_ros.policy.robot import joint_to_policy, policy_to_joint
from groot_int8_ros.policy.types import Observation
from groot_int8_ros.policy_node import PolicyNode
from groot_int8_ros.ros.field_map import FieldMap
from groot_int8_ros.ros.joints import stamp_ns, time_message

from .nodes import DEADLINE_S, Listener, NodeProcess

# Within the range whose ports lie below Linux's ephemeral ones, another for each test process.
DOMAIN_ID = 1 + os.getpid() % 100
SEED = 11
INSTRUCTION = "pick up the cube"
# The joints' names are the robot's, not the data set's: the node maps them by its parameters.
ROBOT_PREFIX = "robot/"


@pytest.fixture(scope="module")
def policy(tiny_bundle: Path) -> Iterator[Policy]:
    loaded = Policy.load(tiny_bundle, threads=1)
    yield loaded
    loaded.close()


class Robot(Listener):
    """The other side of the topics: publishes sensors, collects what the node says."""

    period_s = 0.1

    def __init__(self, node: Node, executor: SingleThreadedExecutor, policy: Policy) -> None:
        super().__init__(node, executor, "policy_node")
        self.policy = policy
        self.restart_content()
        first, *others = policy.robot.cameras
        self.raw_camera = first
        self.compressed_cameras = others
        self.joint_names = list(
            dict.fromkeys(
                ROBOT_PREFIX + joint.name
                for joints in policy.robot.state_joints.values()
                for joint in joints
            )
        )
        self._publishers = {
            camera.key: node.create_publisher(
                Image if camera is first else CompressedImage, f"/test/{camera.key}", 1
            )
            for camera in policy.robot.cameras
        }
        self._joint_publisher = node.create_publisher(JointState, "/test/joint_states", 1)
        self.instructions = node.create_publisher(String, "/test/instruction", 1)
        self.clock = node.create_publisher(Clock, "/clock", 1)
        self.frames: dict[tuple[str, int], np.ndarray] = {}
        self.positions: dict[int, dict[str, float]] = {}
        self.chunks: list[JointTrajectory] = []
        self.infos: list[dict[str, Any]] = []
        node.create_subscription(
            JointTrajectory, "/policy_node/action_chunk", self.chunks.append, 50
        )
        node.create_subscription(
            String,
            "/policy_node/chunk_info",
            lambda message: self.infos.append(json.loads(message.data)),
            50,
        )

    def restart_content(self) -> None:
        """Let the frames and joint values begin again, as when a bag is looped."""
        self._random = np.random.default_rng(5)

    def observe(
        self,
        stamp: int | None = None,
        *,
        frame: Callable[[Image], None] = lambda message: None,
        jpeg: Callable[[CompressedImage], None] = lambda message: None,
        joints: Callable[[JointState], None] = lambda message: None,
        skip: tuple[str, ...] = (),
    ) -> None:
        """Publish one new observation; the functions spoil its messages."""
        stamp = self.node.get_clock().now().nanoseconds if stamp is None else stamp
        values = dict(
            zip(
                self.joint_names,
                self._random.uniform(-0.5, 0.5, len(self.joint_names)).tolist(),
                strict=True,
            )
        )
        self.positions[stamp] = values
        # Another order each time, among joints of other parts of the robot.
        names = [*self._random.permutation(self.joint_names).tolist(), "wheel"]
        message = JointState(name=names, position=[values.get(name, math.nan) for name in names])
        message.header.stamp = time_message(stamp)
        joints(message)
        if "joint_state" not in skip:
            self._joint_publisher.publish(message)
        for camera in self.policy.robot.cameras:
            rgb = self._random.integers(0, 256, (camera.height, camera.width, 3), dtype=np.uint8)
            self.frames[camera.key, stamp] = rgb
            if camera is self.raw_camera:
                padded = np.pad(rgb[:, :, ::-1].reshape(camera.height, -1), ((0, 0), (0, 8)))
                image = Image(
                    height=camera.height,
                    width=camera.width,
                    encoding="bgr8",
                    step=padded.shape[1],
                    data=padded.tobytes(),
                )
                frame(image)
            else:
                _, data = cv2.imencode(".png", rgb[:, :, ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 1])
                image = CompressedImage(format="png", data=data.tobytes())
                jpeg(image)
            image.header.stamp = time_message(stamp)
            if camera.key not in skip:
                self._publishers[camera.key].publish(image)

    def expected(self, info: dict[str, Any], policy: Policy | None = None) -> np.ndarray:
        """Compute the chunk of `info` again from what was published."""
        streams = info["streams"]
        positions = self.positions[streams["joint_state"]["stamp_ns"]]
        state = {
            key: joint_to_policy(
                joints, [positions[ROBOT_PREFIX + joint.name] for joint in joints]
            ).astype(np.float32)
            for key, joints in self.policy.robot.state_joints.items()
        }
        images = {
            camera.key: self.frames[camera.key, streams[f"camera {camera.key}"]["stamp_ns"]]
            for camera in self.policy.robot.cameras
        }
        chunk = (policy or self.policy).infer(
            Observation(images, state, info["instruction"], info["stamp_ns"]), seed=info["seed"]
        )
        return np.concatenate(
            [
                policy_to_joint(joints, chunk.actions[key].astype(np.float64))
                for key, joints in self.policy.robot.action_joints.items()
            ],
            axis=1,
        )

    def pairs(self) -> list[tuple[JointTrajectory, dict[str, Any]]]:
        """Chunks with their infos, as far as both have arrived."""
        by_stamp = {info["stamp_ns"]: info for info in self.infos}
        return [
            (chunk, by_stamp[stamp_ns(chunk.header)])
            for chunk in self.chunks
            if stamp_ns(chunk.header) in by_stamp
        ]

    def settle(self) -> None:
        """Forget everything, what was on its way already too."""
        counts = [-1]
        while counts[-1] != len(self.chunks):
            counts.append(len(self.chunks))
            self.spin(self.period_s)
        self.forget()

    def forget(self) -> None:
        super().forget()
        self.chunks.clear()
        self.infos.clear()


StartNode = Callable[..., NodeProcess]


@pytest.fixture
def start_node(tmp_path: Path, tiny_bundle: Path, policy: Policy) -> Iterator[StartNode]:
    started: list[NodeProcess] = []

    def start(**changes: object) -> NodeProcess:
        parameters = robot_parameters(policy, tiny_bundle) | changes
        folder = tmp_path / f"node{len(started)}"
        started.append(NodeProcess("policy_node", folder, parameters, DOMAIN_ID))
        return started[-1]

    yield start
    for node in started:
        node.kill()


def robot_parameters(policy: Policy, bundle: Path) -> dict[str, object]:
    _, *others = policy.robot.cameras
    cameras = {camera.key: {"topic": f"/test/{camera.key}"} for camera in policy.robot.cameras}
    for camera in others:
        cameras[camera.key]["transport"] = "compressed"
    return {
        "bundle": str(bundle),
        "threads": 1,
        "seed": SEED,
        "instruction": INSTRUCTION,
        "instruction_topic": "/test/instruction",
        "joint_state_topic": "/test/joint_states",
        "inference_rate_hz": 20.0,
        "max_observation_age_s": 5.0,
        "max_observation_skew_s": 5.0,
        # On a busy machine frames get lost, which is not what is looked at here.
        "sensor_qos": {"reliability": "reliable"},
        "autostart": True,
        "cameras": cameras,
    } | {
        group: {
            key: {"names": [ROBOT_PREFIX + joint.name for joint in joints]}
            for key, joints in described.items()
        }
        for group, described in (
            ("state_joints", policy.robot.state_joints),
            ("action_joints", policy.robot.action_joints),
        )
    }


@pytest.fixture
def robot(ros_node: Callable[..., Any], policy: Policy) -> Iterator[Robot]:
    with ros_node("robot", DOMAIN_ID) as (node, executor):
        yield Robot(node, executor, policy)


def test_every_chunk_is_what_the_policy_gives_on_the_same_messages(
    start_node: StartNode, robot: Robot
) -> None:
    start_node()
    robot.until(lambda: len(robot.pairs()) >= 6, "six chunks", robot.observe)
    pairs = robot.pairs()
    for chunk, info in pairs:
        assert info["seed"] == SEED
        assert info["instruction"] == INSTRUCTION
        cameras = [name for name in info["streams"] if name.startswith("camera ")]
        assert len(cameras) == len(robot.policy.robot.cameras)
        assert info["stamp_ns"] == max(info["streams"][name]["stamp_ns"] for name in cameras)
        assert {"read", "preprocess", "backbone", "action_head", "total"} <= set(info["timings_s"])
        expected = robot.expected(info)
        assert chunk.joint_names == [
            ROBOT_PREFIX + joint.name
            for joints in robot.policy.robot.action_joints.values()
            for joint in joints
        ]
        np.testing.assert_allclose(
            [list(point.positions) for point in chunk.points], expected, rtol=1e-5, atol=1e-5
        )
        times = [p.time_from_start.sec + p.time_from_start.nanosec * 1e-9 for p in chunk.points]
        steps = np.diff(times)
        np.testing.assert_allclose(steps, robot.policy.robot.action_period_s, rtol=1e-6)
    stamps = [stamp_ns(chunk.header) for chunk, _ in pairs]
    assert len(set(stamps)) == len(stamps), "an observation was used twice"
    numbers = [info["number"] for _, info in pairs]
    assert numbers == sorted(set(numbers))


def test_unusable_input_is_held_named_and_recovered_from(
    start_node: StartNode, robot: Robot
) -> None:
    start_node(max_observation_age_s=60.0)
    robot.until(lambda: robot.pairs(), "a first chunk", robot.observe)

    def wrong_size(message: Image) -> None:
        message.height, message.width, message.step = 16, 16, 48

    def cut(message: Image) -> None:
        message.data = bytes(message.data)[:100]

    def wrong_encoding(message: Image) -> None:
        message.encoding = "bayer_rggb8"

    def lose(message: JointState) -> None:
        place = message.name.index(robot.joint_names[0])
        del message.name[place]
        del message.position[place]

    def not_a_number(message: JointState) -> None:
        message.position[message.name.index(robot.joint_names[1])] = math.nan

    def double(message: JointState) -> None:
        message.name = [*message.name, message.name[0]]
        message.position = [*message.position, 0.0]

    def unstamped(message: JointState) -> None:
        message.header.stamp = time_message(0)

    faults: list[tuple[dict[str, Any], str]] = [
        ({"frame": wrong_size}, f"/test/{robot.raw_camera.key}.*16x16"),
        ({"frame": cut}, f"/test/{robot.raw_camera.key}.*truncated"),
        ({"frame": wrong_encoding}, f"/test/{robot.raw_camera.key}.*bayer_rggb8"),
        ({"joints": lose}, f"missing {robot.joint_names[0]}"),
        ({"joints": not_a_number}, f"{robot.joint_names[1]} is not a finite"),
        ({"joints": double}, "named more than once"),
        ({"joints": unstamped}, "unstamped.*joint_state"),
    ]
    if robot.compressed_cameras:

        def corrupt(message: CompressedImage) -> None:
            message.data = b"\xff\xd8\xff" + bytes(100) + b"\xff\xd9"

        key = robot.compressed_cameras[0].key
        faults.append(({"jpeg": corrupt}, f"/test/{key}.*corrupt"))

    for fault, words in faults:
        robot.until(
            partial(robot.says, "inference", words),
            f"hold with {words!r}",
            partial(robot.observe, **fault),
        )
        # Once the fault is told, nothing may come out of it.
        robot.settle()
        for _ in range(3):
            robot.observe(**fault)
            robot.spin(robot.period_s)
        assert not robot.chunks, words
        robot.until(lambda: robot.pairs(), f"a chunk after {words!r}", robot.observe)


@pytest.mark.parametrize("kind", [JointTrajectory, Twist])
def test_state_in_a_message_of_the_robots_own_is_read_by_configuration_alone(
    start_node: StartNode, robot: Robot, kind: type[Any]
) -> None:
    # Nested and indexed fields; the second has no header, so that its arrival is its stamp.
    paths = [f"points[1].positions[{index}]" for index in range(len(robot.joint_names))]
    if kind is Twist:
        paths = [f"{part}.{axis}" for part in ("linear", "angular") for axis in "xyz"]
    fields = dict(zip(robot.joint_names, paths, strict=True))
    publisher = robot.node.create_publisher(kind, "/test/low_state", 1)
    field_map = FieldMap(kind, fields)
    values = dict(zip(robot.joint_names, np.linspace(-0.5, 0.5, len(fields)), strict=True))

    def observe() -> None:
        stamp = robot.node.get_clock().now().nanoseconds
        message = kind()
        if kind is JointTrajectory:
            message.header.stamp = time_message(stamp)
        field_map.write(message, np.array([*values.values()]))
        publisher.publish(message)
        robot.observe(stamp, skip=("joint_state",))

    start_node(
        joint_state_topic="/test/low_state",
        joint_state_type=f"{kind.__module__.split('.')[0]}/msg/{kind.__name__}",
        joint_state_fields=[f"{name} = {path}" for name, path in fields.items()],
    )
    chunk, info = robot.until(lambda: robot.pairs(), "a chunk", observe)[0]
    robot.positions[info["streams"]["joint_state"]["stamp_ns"]] = values
    np.testing.assert_allclose(
        [list(point.positions) for point in chunk.points],
        robot.expected(info),
        rtol=1e-5,
        atol=1e-5,
    )


def test_field_that_is_not_in_the_message_fails_configure_with_its_name(
    start_node: StartNode, robot: Robot
) -> None:
    start_node(
        joint_state_type="geometry_msgs/msg/Twist",
        joint_state_fields=[f"{name} = linear.w" for name in robot.joint_names],
    )
    robot.until(
        partial(robot.says, "engine", "configuring failed.*no field 'w'; it has x, y, z"),
        "reason on /diagnostics",
    )


def test_silent_and_stale_streams_are_named_and_recovered_from(
    start_node: StartNode, robot: Robot
) -> None:
    start_node(max_observation_age_s=1.0)
    raw = robot.raw_camera.key
    robot.until(
        lambda: f"no message from camera {raw}" in robot.status("inference"),
        "the camera that never came",
        lambda: robot.observe(skip=(raw,)),
    )
    assert not robot.chunks
    robot.until(lambda: robot.pairs(), "a chunk", robot.observe)
    for stream, name in ((raw, f"camera {raw}"), ("joint_state", "joint_state")):
        without_it = partial(robot.observe, skip=(stream,))
        words = f"^holding: stale: {name}"
        robot.until(partial(robot.says, "inference", words), f"stale {name}", without_it)
        robot.until(partial(robot.says, name, "^stale"), f"status of {name}", without_it)
        robot.forget()
        robot.until(lambda: robot.pairs(), f"a chunk after stale {name}", robot.observe)
    result = robot.set("max_observation_skew_s", 0.0)
    assert result.successful, result.reason
    robot.until(
        lambda: "skewed" in robot.status("inference"),
        "skew",
        lambda: robot.observe(
            joints=lambda message: setattr(
                message.header,
                "stamp",
                time_message(stamp_ns(message.header) - 100_000_000),
            )
        ),
    )


def test_camera_that_stamps_the_same_picture_again_is_held_named_and_recovered_from(
    start_node: StartNode, robot: Robot
) -> None:
    start_node(max_frozen_s=0.5)
    robot.until(lambda: robot.pairs(), "a chunk", robot.observe)
    name = f"camera {robot.raw_camera.key}"
    still = bytes(robot.raw_camera.height * (robot.raw_camera.width * 3 + 8))
    freeze = partial(robot.observe, frame=lambda message: setattr(message, "data", still))
    robot.until(
        partial(robot.says, "inference", rf"^holding: frozen: {name} \(/test/.*max_frozen_s"),
        "frozen camera",
        freeze,
    )
    robot.until(partial(robot.says, name, "^frozen"), "status of the camera", freeze)
    counts = robot.values("inference")
    assert int(counts["holds: frozen"]) >= 1
    robot.settle()
    for _ in range(3):
        freeze()
        robot.spin(robot.period_s)
    assert not robot.chunks
    assert robot.set("max_frozen_s", 0.0).successful
    robot.until(lambda: robot.pairs(), "a chunk though it is frozen", freeze)
    assert robot.set("max_frozen_s", 0.5).successful
    robot.until(partial(robot.says, name, "^frozen"), "frozen camera again", freeze)
    robot.forget()
    robot.until(lambda: robot.pairs(), "a chunk of moving pictures", robot.observe)


def test_instruction_is_replaced_and_an_unusable_one_is_never_the_old_task(
    start_node: StartNode, robot: Robot
) -> None:
    start_node(instruction="")
    robot.until(lambda: robot.status("instruction"), "diagnostics", robot.observe)
    robot.until(lambda: "holding: instruction" in robot.status("inference"), "hold", robot.observe)
    assert not robot.chunks
    robot.instructions.publish(String(data="open the drawer"))
    chunk, info = robot.until(lambda: robot.pairs(), "chunk after instruction", robot.observe)[0]
    assert info["instruction"] == "open the drawer"
    np.testing.assert_allclose(
        [list(point.positions) for point in chunk.points],
        robot.expected(info),
        rtol=1e-5,
        atol=1e-5,
    )
    for unusable in ("x" * 10_000, "", "   "):
        # The status of the last one's hold would pass for this one's.
        robot.forget()
        robot.instructions.publish(String(data=unusable))
        robot.until(
            lambda: "holding: instruction" in robot.status("inference"), "hold", robot.observe
        )
        robot.settle()
        for _ in range(3):
            robot.observe()
            robot.spin(robot.period_s)
        assert not robot.chunks, f"{len(unusable)} characters"
        result = robot.set("instruction", "close the drawer")
        assert result.successful, result.reason
        robot.until(lambda: robot.pairs(), "chunk after good instruction", robot.observe)
        assert {info["instruction"] for info in robot.infos} == {"close the drawer"}


def test_instruction_that_was_latched_before_the_node_came_counts(
    start_node: StartNode, robot: Robot
) -> None:
    # As a bag's player or `ros2 topic pub --qos-durability transient_local` keep theirs.
    latched = robot.node.create_publisher(
        String,
        "/test/instruction",
        QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL),
    )
    latched.publish(String(data="wipe the table"))
    start_node(instruction="")
    robot.until(lambda: robot.pairs(), "a chunk of the latched instruction", robot.observe)
    assert {info["instruction"] for info in robot.infos} == {"wipe the table"}
    # What was kept must not outlive a newer instruction of somebody else.
    robot.instructions.publish(String(data="stack the cups"))
    robot.until(
        lambda: robot.infos[-1]["instruction"] == "stack the cups", "newer task", robot.observe
    )
    robot.forget()
    robot.until(lambda: len(robot.infos) >= 3, "more chunks", robot.observe)
    assert {info["instruction"] for info in robot.infos} == {"stack the cups"}


def test_unknown_instruction_is_held_until_its_prefix_is_computed_and_answered_then(
    start_node: StartNode, robot: Robot, small_deployed: Path
) -> None:
    node = start_node(bundle=str(small_deployed))
    robot.until(lambda: robot.pairs(), "a chunk of a known instruction", robot.observe)
    robot.instructions.publish(String(data="Open the drawer!"))
    robot.until(
        lambda: robot.infos[-1]["instruction"] == "Open the drawer!", "new task", robot.observe
    )
    names = [info["instruction"] for info in robot.infos]
    # The old task until it was replaced, then nothing until the new one could be answered.
    assert names == sorted(names, key=[INSTRUCTION, "Open the drawer!"].index)
    assert "is being computed on the CPU" in node.text()
    assert "is there after" in node.text()
    deployed = Policy.load(small_deployed, threads=1)
    deployed.add_prefix(compute_prefix(open_bundle(small_deployed), "open the drawer", threads=1))
    chunk, info = robot.until(
        lambda: [pair for pair in robot.pairs() if pair[1]["instruction"] != INSTRUCTION],
        "the new task's chunk with its info",
        robot.observe,
    )[0]
    np.testing.assert_allclose(
        [list(point.positions) for point in chunk.points],
        robot.expected(info, deployed),
        rtol=1e-5,
        atol=1e-5,
    )
    deployed.close()


def test_unknown_instruction_without_prefix_model_is_refused_by_name(
    start_node: StartNode,
    robot: Robot,
    write_small_deployed: Callable[..., Path],
    tiny_bundle: Path,
    tmp_path: Path,
) -> None:
    bundle = write_small_deployed(tmp_path / "bundle", tiny_bundle, prefix_model=False)
    start_node(bundle=str(bundle), instruction="open the drawer")
    robot.until(
        lambda: robot.says("instruction", "'pick up the cube'; 'put it down'.*add-instruction"),
        "refusal",
        robot.observe,
    )
    assert not robot.chunks
    assert robot.set("instruction", INSTRUCTION).successful
    robot.until(lambda: robot.pairs(), "a chunk of a known instruction", robot.observe)


def test_camera_of_another_size_and_costly_graphs_are_told_at_configure(
    start_node: StartNode, robot: Robot
) -> None:
    node = start_node(autostart=False)
    assert robot.state() == "unconfigured"

    def shrink(message: Image) -> None:
        message.width, message.step = 32, 3 * 32
        message.data = bytes(3 * 32 * message.height)

    def told() -> re.Match[str] | None:
        return re.search(
            r"32x480 pixels, but the bundle was exported.*groot-int8 export", node.text()
        )

    request = ChangeState.Request(transition=Transition(id=Transition.TRANSITION_CONFIGURE))
    end = time.monotonic() + DEADLINE_S
    while True:
        future = robot._change.call_async(request)
        robot.until(
            future.done,
            "answer of configure",
            lambda: robot.observe(frame=shrink, skip=(robot.compressed_cameras[0].key,)),
        )
        # It goes on: the driver may be set right while the node runs.
        assert future.result().success
        if told():
            break
        # On a busy machine no frame may have come within the moment that is waited for.
        assert time.monotonic() < end
        assert robot.change(Transition.TRANSITION_CLEANUP)
    assert "every chunk takes 8 runs of graphs instead of 2" in node.text()


@pytest.fixture
def own_node(robot: Robot, policy: Policy, tiny_bundle: Path) -> Iterator[PolicyNode]:
    """The node in this process, where its inside can be reached; not configured yet."""
    overrides = {
        ".".join(path): value
        for path, value in _leaves(robot_parameters(policy, tiny_bundle))
        if path != ("autostart",)
    }
    node = PolicyNode(
        context=robot.node.context,
        parameter_overrides=[Parameter(name, value=value) for name, value in overrides.items()],
    )
    robot.executor.add_node(node)
    yield node
    node.close()
    robot.executor.remove_node(node)
    node.destroy_node()


def test_what_an_engine_remarks_of_how_it_was_loaded_is_logged(
    own_node: PolicyNode, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(OnnxRuntimeEngine, "remarks", ("it runs without a CUDA graph: no",))
    assert own_node.trigger_configure() == TransitionCallbackReturn.SUCCESS
    log = capfd.readouterr().err
    assert own_node._policy is not None
    for graph in own_node._policy.manifest.engine_graphs:
        assert re.search(rf"\[WARN\].*{graph}: it runs without a CUDA graph: no", log)


def test_activate_works_again_once_a_hung_inference_has_returned(
    robot: Robot, own_node: PolicyNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("groot_int8_ros.policy_node.STOP_TIMEOUT_S", 0.2)
    node = own_node
    hanging, release = threading.Event(), threading.Event()
    try:
        assert node.trigger_configure() == TransitionCallbackReturn.SUCCESS
        assert node._streams is not None
        read = node._streams.read

        def hang(*arguments: Any) -> Observation:
            hanging.set()
            assert release.wait(DEADLINE_S)
            return read(*arguments)

        monkeypatch.setattr(node._streams, "read", hang)
        assert node.trigger_activate() == TransitionCallbackReturn.SUCCESS
        robot.until(hanging.is_set, "an inference under way", robot.observe)
        assert node.trigger_deactivate() == TransitionCallbackReturn.SUCCESS
        assert node.trigger_activate() == TransitionCallbackReturn.FAILURE
        release.set()
        robot.until(
            lambda: node.trigger_activate() == TransitionCallbackReturn.SUCCESS, "activation"
        )
        robot.until(lambda: robot.pairs(), "a chunk", robot.observe)
    finally:
        release.set()


def _leaves(
    tree: Mapping[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, name))
        else:
            yield (*path, name), value


def test_transitions_can_be_retried_and_publish_only_while_active(
    start_node: StartNode, robot: Robot, tiny_bundle: Path, tmp_path: Path
) -> None:
    node = start_node(bundle=str(tmp_path / "nothing"), autostart=False)
    assert robot.state() == "unconfigured"
    assert not robot.change(Transition.TRANSITION_CONFIGURE)
    assert robot.state() == "unconfigured"
    assert str(tmp_path / "nothing") in node.text()
    robot.until(
        lambda: robot.status("engine").startswith("configuring failed"), "reason on /diagnostics"
    )

    assert robot.set("bundle", str(tiny_bundle)).successful
    for activations in (2, 1):
        assert robot.change(Transition.TRANSITION_CONFIGURE)
        refused = robot.set("bundle", "/elsewhere")
        assert not refused.successful
        assert "cleanup" in refused.reason
        for _ in range(5):
            robot.observe()
            robot.spin(robot.period_s)
        assert not robot.chunks
        for _ in range(activations):
            assert robot.change(Transition.TRANSITION_ACTIVATE)
            robot.until(lambda: robot.pairs(), "a chunk while active", robot.observe)
            assert robot.change(Transition.TRANSITION_DEACTIVATE)
            robot.settle()
            for _ in range(5):
                robot.observe()
                robot.spin(robot.period_s)
            assert not robot.chunks, "a chunk after deactivate"
        assert robot.change(Transition.TRANSITION_CLEANUP)
        assert robot.state() == "unconfigured"

    assert robot.change(Transition.TRANSITION_CONFIGURE)
    assert robot.change(Transition.TRANSITION_ACTIVATE)
    assert robot.change(Transition.TRANSITION_ACTIVE_SHUTDOWN)
    assert robot.state() == "finalized"
    assert node.end(signal.SIGTERM) == 0
    assert "Traceback" not in node.text()


def test_looped_bag_never_mixes_its_passes_and_repeats_its_chunks(
    start_node: StartNode, robot: Robot, small_deployed: Path
) -> None:
    # Quick graphs answer most observations, so that two passes soon have one in common. With
    # these limits nothing but the jump itself tells the passes apart.
    start_node(
        bundle=str(small_deployed),
        use_sim_time=True,
        max_observation_age_s=600.0,
        max_observation_skew_s=600.0,
    )
    period_ns, length_ns = 200_000_000, 5_000_000_000
    clock_ns = start_ns = 0

    def tick() -> None:
        nonlocal clock_ns
        clock_ns += period_ns
        robot.clock.publish(Clock(clock=time_message(clock_ns)))
        robot.observe(clock_ns)

    def pass_is_over() -> bool:
        return len(robot.pairs()) >= 4 and clock_ns > start_ns + length_ns

    def play(start: int) -> dict[str, list[list[float]]]:
        nonlocal clock_ns, start_ns
        clock_ns = start_ns = start
        robot.restart_content()
        robot.forget()
        robot.until(pass_is_over, "a pass", tick)
        return {
            json.dumps(info["streams"]): [list(point.positions) for point in chunk.points]
            for chunk, info in robot.pairs()
        }

    play(1_000_000_000_000)
    first = play(500_000_000_000)
    for streams in map(json.loads, first):
        stamps = [stream["stamp_ns"] for stream in streams.values()]
        assert max(stamps) < 1_000_000_000_000 or min(stamps) >= 1_000_000_000_000, (
            "frames of two passes in one observation"
        )
    again: dict[str, list[list[float]]] = {}
    end = time.monotonic() + DEADLINE_S
    # Which frames are lost differs from pass to pass.
    while not first.keys() & again.keys():
        assert time.monotonic() < end, "no observation was met in two passes"
        again |= play(500_000_000_000)
    for key in first.keys() & again.keys():
        np.testing.assert_allclose(first[key], again[key], rtol=1e-6)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_the_node_cleanly(
    start_node: StartNode, robot: Robot, number: signal.Signals
) -> None:
    node = start_node()
    robot.until(lambda: robot.pairs(), "a chunk", robot.observe)
    robot.observe()
    assert node.end(number) == 0
    assert "Traceback" not in node.text()


def test_long_loading_is_told_on_diagnostics_and_a_signal_ends_it(
    start_node: StartNode, robot: Robot, bundle_copy: Path
) -> None:
    # A file that takes minutes to hash and no room on the disk: its end is never reached.
    padding, size = bundle_copy / "onnx" / "padding.bin", 1 << 37
    with padding.open("wb") as sparse:
        sparse.truncate(size)
    manifest = bundle_copy / "manifest.json"
    content = json.loads(manifest.read_text())
    content["files"]["onnx/padding.bin"] = {"sha256": "0" * 64, "bytes": size}
    manifest.write_text(json.dumps(content))

    heartbeats: list[str] = []
    robot.node.create_subscription(
        Header, "/policy_node/heartbeat", lambda message: heartbeats.append(message.frame_id), 10
    )
    node = start_node(bundle=str(bundle_copy))
    done = set()

    def progressing() -> bool:
        found = re.search(
            r"^configuring: verifying the bundle, (.*) of 1374[0-9.]* MB", robot.status("engine")
        )
        if found:
            done.add(found[1])
        return len(done) >= 2 and heartbeats.count("configuring") >= 2

    robot.until(progressing, "progress of the verification")
    assert node.end(signal.SIGTERM) == 0
    assert "a signal came while verifying" in node.text()
    assert "Traceback" not in node.text()


def test_signal_while_the_bundle_is_loading_ends_the_node_cleanly(start_node: StartNode) -> None:
    node = start_node()
    end = time.monotonic() + DEADLINE_S
    while "loading bundle" not in node.text():
        assert time.monotonic() < end
        assert node.process.poll() is None
        time.sleep(0.01)
    assert node.end(signal.SIGTERM) == 0
    assert "Traceback" not in node.text()


def test_wrong_parameter_ends_the_node_with_one_message(start_node: StartNode) -> None:
    node = start_node(inference_rate_hz=0.0)
    assert node.process.wait(DEADLINE_S) == 2
    assert "'inference_rate_hz'" in node.text()
    assert "Traceback" not in node.text()
