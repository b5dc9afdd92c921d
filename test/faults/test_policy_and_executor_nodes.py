"""The fault matrix end to end: policy node and chunk executor as processes, over real DDS.

A fault goes in at one end, as a camera, a joint state, an engine or a signal. What has to be seen
at the other is always the same: the policy node names the fault, the executor holds and says why,
no command breaks a limit, and both go on by themselves once the fault has gone.

The robot stands still whatever it is commanded, so that every chunk can be reached.
GROOT_FAULT_ROUNDS is the number of SIGTERMs at random moments.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="needs the ROS 2 Python packages")
pytest.importorskip("onnxruntime", reason="needs ONNX Runtime")

from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import String
from trajectory_msgs.msg import JointTrajectory

from groot_int8_ros.policy.bundle import open_bundle
from groot_int8_ros.policy.robot import RobotDescription
from groot_int8_ros.ros.joints import time_message

from .system import (
    DOMAIN_ID,
    POSE,
    ExecutorListener,
    Processes,
    check_standing_arm,
    standing_arm,
)

ROUNDS = max(1, int(os.environ.get("GROOT_FAULT_ROUNDS", "3")) // 3)
# From one row to the next, a tenth of a second later.
ROW_STEP = 0.05
KNOWN, OTHER = "pick up the cube", "put it down"
POLICY, PLAIN = "policy_node", ["-m", "groot_int8_ros.policy_node"]

# The real node with the real engine, until a file asks for a fault.
FAULTY_ENGINE = """
import os, signal, sys, time
from pathlib import Path
from groot_int8_ros import policy_node as node
from groot_int8_ros.policy.engines.onnxruntime_engine import OnnxRuntimeEngine as Engine
from groot_int8_ros.ros import diagnostics

asked, run = Path(sys.argv.pop(1)), Engine.run
diagnostics.HUNG_AFTER_S = 1.0

def faulty(self, feeds):
    fault = asked.read_text()
    if fault == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if fault == "raises":
        raise RuntimeError("the device was lost")
    if fault == "slow":
        time.sleep(1.0)
    while fault == "hangs" and asked.read_text() == fault:
        time.sleep(0.05)
    outputs = run(self, feeds)
    return {name: value * float("nan") for name, value in outputs.items()} if fault == "nan" \
        else outputs

Engine.run = faulty
sys.exit(node.main())
"""

Spoil = Callable[[Any], Any]


class Robot(ExecutorListener):
    """Cameras, joints that stand still, and a listener."""

    period_s = 0.05

    def __init__(
        self, node: Node, executor: SingleThreadedExecutor, description: RobotDescription
    ) -> None:
        super().__init__(node, executor)
        self.description = description
        self.camera = description.cameras[0].key
        self.joints = [j.name for group in description.state_joints.values() for j in group]
        self.spoil: dict[str, Spoil] = {}
        self.commands: list[list[float]] = []
        self.clock_ns: int | None = None
        self.tasks: list[str] = []
        self._ticks = 0
        self._frames = {
            camera.key: (_frame(camera.height, camera.width), self._image_publisher(camera.key))
            for camera in description.cameras
        }
        self._states = node.create_publisher(JointState, "/joint_states", 10)
        self.clock = node.create_publisher(Clock, "/clock", 10)
        self.instructions = node.create_publisher(String, "/instruction", 10)
        node.create_subscription(JointTrajectory, "/test/arm", self._on_command, 1000)
        node.create_subscription(String, "/policy_node/chunk_info", self._on_info, 100)

    def _image_publisher(self, key: str) -> Any:
        return self.node.create_publisher(Image, f"/cameras/{key}/image_raw", 1)

    def _on_command(self, message: JointTrajectory) -> None:
        self.commands.append(list(message.points[0].positions))

    def _on_info(self, message: String) -> None:
        self.tasks.append(json.loads(message.data)["instruction"])

    def publish(self) -> None:
        if self.clock_ns is not None:
            self.clock_ns += round(self.period_s * 1e9)
            self.clock.publish(Clock(clock=time_message(self.clock_ns)))
        stamp = time_message(self.clock_ns or self.node.get_clock().now().nanoseconds)
        state = JointState(name=self.joints, position=[POSE] * len(self.joints))
        state.header.stamp = stamp
        self._send(self._states, state, "joint_state")
        self._ticks += 1
        for key, (image, publisher) in self._frames.items():
            image.header.stamp = stamp
            image.data[0] = self._ticks % 256
            self._send(publisher, image, key)

    def _send(self, publisher: Any, message: Any, stream: str) -> None:
        spoilt = self.spoil[stream](message) if stream in self.spoil else message
        if spoilt is not None:
            publisher.publish(spoilt)

    def commands_heard(self) -> int:
        return len(self.commands)

    def moves(self) -> bool:
        """Whether the newest commands are those of a robot at work."""
        recent = np.array(self.commands[-10:])
        return len(recent) == 10 and bool(np.ptp(recent, axis=0).max() > 1e-4)

    def rests(self) -> bool:
        """Whether the newest commands are a hold."""
        return len(self.commands) >= 10 and len({tuple(one) for one in self.commands[-10:]}) == 1

    def holds(self, policy: str | None, executor: str) -> None:
        """Wait for a fault at both ends, and for the hold."""
        if policy is not None:
            self.until(lambda: self.says("inference", policy, POLICY), f"policy node: {policy}")
        self.until(lambda: self.says("channel arm", executor), f"executor: {executor}")
        self.until(self.rests, "a hold")

    def works(self) -> None:
        """Wait for a robot that moves."""
        self.until(self.moves, "commands that move")


def _frame(height: int, width: int) -> Image:
    image = Image(height=height, width=width, encoding="rgb8", step=3 * width)
    image.data.frombytes(np.random.default_rng(3).bytes(3 * width * height))
    return image


class System:
    """Both nodes, the robot, and the file that asks the engine for a fault."""

    def __init__(self, processes: Processes, robot: Robot, bundle: Path) -> None:
        self.processes = processes
        self.robot = robot
        self.bundle = bundle
        self.asked = processes.folder / "fault.txt"
        self.executor: subprocess.Popen[bytes] | None = None
        self.policy: subprocess.Popen[bytes] | None = None
        self._words: list[str] = []
        self._changes: dict[str, Any] = {}

    def start_policy(self, words: list[str], **changes: Any) -> subprocess.Popen[bytes]:
        self.asked.write_text("")
        self._words = words
        self.policy, self.log = self.processes.node(
            words,
            "policy",
            {
                "bundle": str(self.bundle),
                "threads": 1,
                "instruction": KNOWN,
                "inference_rate_hz": 8.0,
                "max_observation_age_s": 0.8,
                "max_observation_skew_s": 0.4,
                "max_frozen_s": 0.5,
                # On a busy machine frames get lost, which is not what is looked at here.
                "sensor_qos": {"reliability": "reliable"},
                "autostart": True,
                **changes,
            },
        )
        return self.policy

    def at_work(self, words: list[str]) -> None:
        """Have both nodes run, and wait until the robot moves."""
        self.robot.spoil.clear()
        if self.executor is None or self.executor.poll() is not None:
            self.executor = self.processes.executor()
        if self.policy is None or self.policy.poll() is not None or self._words != words:
            if self.policy is not None:
                self.processes.end(self.policy)
            self.start_policy(words)
        self.robot.enable()
        self.robot.works()
        self.robot.forget()

    def faulty_engine(self) -> list[str]:
        return ["-c", FAULTY_ENGINE, str(self.asked)]

    def end(self) -> None:
        for process in self.processes.all:
            self.processes.end(process)


@pytest.fixture(scope="module")
def bundle(
    slow_rows: Path, reseal: Callable[[Path], None], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The bundle, whose actions all lie beyond what can be expressed, with rows that move."""
    folder = Path(shutil.copytree(slow_rows, tmp_path_factory.mktemp("moving") / "bundle"))
    file = folder / "statistics.json"
    (statistics,) = (tree := json.loads(file.read_text())).values()
    for numbers in statistics["relative_action"].values():
        for name in ("max", "q99"):
            rows = np.asarray(numbers[name])
            numbers[name] = (0.1 + ROW_STEP * np.indices(rows.shape)[0]).tolist()
    file.write_text(json.dumps(tree))
    reseal(folder)
    return folder


@pytest.fixture(scope="module")
def robot(ros_node: Callable[..., Any], bundle: Path) -> Iterator[Robot]:
    with ros_node("robot", DOMAIN_ID) as (node, executor):
        yield Robot(node, executor, open_bundle(bundle).manifest.robot)


@pytest.fixture(scope="module")
def both(robot: Robot, bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """One executor for all, and policy nodes as they are wanted."""
    parameters = standing_arm(robot.description) | {
        "chunk_timeout_s": 0.6,
        "joint_state_timeout_s": 0.5,
    }
    system = System(Processes(tmp_path_factory.mktemp("both"), parameters), robot, bundle)
    yield system
    system.end()


@pytest.fixture
def at_work(both: System) -> Iterator[System]:
    """Both nodes as a user runs them, and a robot that moves."""
    both.at_work(PLAIN)
    yield both
    _check(both)


@pytest.fixture
def engine(both: System) -> Iterator[System]:
    """The same with a policy node whose engine can be asked for faults."""
    both.at_work(both.faulty_engine())
    yield both
    _check(both)


def _check(system: System) -> None:
    check_standing_arm(system.robot.commands)
    assert system.executor is not None
    assert system.executor.poll() is None, system.processes.log.read_text()


def _shrink(image: Image) -> Image:
    return Image(
        header=image.header, height=16, width=16, step=48, encoding="rgb8", data=bytes(768)
    )


def _other_encoding(image: Image) -> Image:
    return Image(
        header=image.header,
        height=image.height,
        width=image.width,
        step=image.step,
        encoding="bayer_rggb8",
        data=image.data,
    )


def _freeze(image: Image) -> Image:
    image.data[0] = 0
    return image


def _garbage(image: Image) -> Image:
    draw = random.Random(image.header.stamp.nanosec)
    return Image(
        header=image.header,
        height=draw.randrange(2**32),
        width=draw.randrange(2**32),
        step=draw.randrange(2**32),
        encoding=draw.choice(["", "rgb8", "bgr8", "mono16", "\x00", "8UC999", "x" * 10_000]),
        is_bigendian=draw.randrange(256),
        data=draw.randbytes(draw.randrange(5000)),
    )


def _lose_first(state: JointState) -> JointState:
    return JointState(header=state.header, name=state.name[1:], position=state.position[1:])


def _nan_first(state: JointState) -> JointState:
    return JointState(
        header=state.header, name=state.name, position=[math.nan, *state.position[1:]]
    )


_STALLED = "holding: chunks have stalled"


@pytest.mark.parametrize(
    ("stream", "spoil", "policy", "executor"),
    [
        ("camera", lambda message: None, "holding: stale: camera CAMERA", _STALLED),
        ("camera", _freeze, "holding: frozen: camera CAMERA", _STALLED),
        ("camera", _shrink, "holding: observation: .*CAMERA.*16x16", _STALLED),
        ("camera", _other_encoding, "holding: observation: .*CAMERA.*bayer_rggb8", _STALLED),
        ("camera", _garbage, "holding: observation: .*CAMERA", _STALLED),
        (
            "joint_state",
            lambda message: None,
            "holding: stale: joint_state",
            "holding: joint state is stale: no state of JOINT",
        ),
        (
            "joint_state",
            _lose_first,
            "holding: observation: .*missing JOINT",
            "holding: joint state is stale: no state of JOINT for",
        ),
        (
            "joint_state",
            _nan_first,
            "holding: observation: .*JOINT is not a finite",
            "holding: joint state is stale: .*position of JOINT is not a finite",
        ),
    ],
    ids=[
        "camera stops",
        "camera freezes",
        "camera changes size",
        "camera changes encoding",
        "camera sends garbage",
        "joint state stops",
        "joint state loses a joint",
        "joint state sends nan",
    ],
)
def test_input_fails_and_comes_back(
    at_work: System, stream: str, spoil: Spoil, policy: str, executor: str
) -> None:
    robot = at_work.robot

    def named(pattern: str) -> str:
        return pattern.replace("CAMERA", robot.camera).replace("JOINT", robot.joints[0])

    robot.spoil[robot.camera if stream == "camera" else stream] = spoil
    robot.holds(named(policy), named(executor))
    robot.spoil.clear()
    robot.works()


def test_instruction_flood_ends_with_the_newest_and_never_answers_an_old_one(
    at_work: System,
) -> None:
    robot, process = at_work.robot, at_work.policy
    assert process is not None
    robot.until(lambda: KNOWN in robot.tasks, "chunks of the first task")
    most_children = 0
    # None of them is in the bundle: each asks for a computation of its own.
    for number in range(2000):
        robot.instructions.publish(String(data=f"task {number}"))
        if number % 50 == 0:
            robot.spin(robot.period_s)
            most_children = max(most_children, len(_children(process.pid)))
    robot.holds("holding: instruction", _STALLED)
    assert at_work.log.read_text().count("is being computed") < 30, "a flood of processes"
    robot.tasks.clear()
    robot.instructions.publish(String(data=OTHER))
    robot.until(lambda: OTHER in robot.tasks, "chunks of the newest task")
    assert KNOWN not in robot.tasks
    assert most_children <= 2, "computations that nobody waits for any more"
    robot.works()
    robot.instructions.publish(String(data=KNOWN))
    robot.until(lambda: robot.tasks[-1] == KNOWN, "the first task again")


def _children(pid: int) -> list[str]:
    """Return the children of all threads of a process."""
    files = Path(f"/proc/{pid}/task").glob("*/children")
    return [child for file in files for child in file.read_text().split()]


def test_publisher_storm_is_survived(at_work: System) -> None:
    robot, processes = at_work.robot, at_work.processes
    camera = robot.description.cameras[0]
    topic = f"/cameras/{camera.key}/image_raw"
    name = f"camera {camera.key}"
    with (
        processes.storm(topic=topic, width=camera.width, height=camera.height),
        processes.storm(topic="/joint_states", names=robot.joints, value=POSE),
    ):
        robot.until(lambda: robot.count(name, "messages", POLICY), "counts")
        before = robot.count(name, "messages", POLICY)
        chunks = robot.count("inference", "chunks", POLICY)
        robot.until(
            lambda: robot.count("inference", "chunks", POLICY) > chunks + 20, "chunks in the storm"
        )
        robot.works()
        assert robot.count(name, "messages", POLICY) > before
        assert robot.set("chunk_timeout_s", 5.0).successful is False
    robot.works()


@pytest.mark.parametrize(
    ("fault", "policy"),
    [
        ("slow", None),
        ("hangs", "^hung: the inference under way"),
        ("raises", "holding: inference failed: RuntimeError: the device was lost"),
        ("nan", "holding: .*(NaN|not finite|infinite)"),
    ],
)
def test_engine_fails_and_comes_back(engine: System, fault: str, policy: str | None) -> None:
    engine.asked.write_text(fault)
    engine.robot.holds(policy, "holding: (chunks have stalled|no rows left)")
    engine.asked.write_text("")
    engine.robot.works()


@pytest.mark.parametrize("how", ["segmentation fault in the engine", "kill -9"])
def test_policy_node_dies_and_another_takes_over(both: System, how: str) -> None:
    # Each takes the node that the test before has left: starting one costs seconds.
    both.at_work(PLAIN if how == "kill -9" else both.faulty_engine())
    process = both.policy
    assert process is not None
    if how == "kill -9":
        process.kill()
    else:
        both.asked.write_text("segfault")
    both.robot.until(lambda: process.poll() is not None, "the policy node's end")
    assert process.returncode == (-signal.SIGKILL if how == "kill -9" else -signal.SIGSEGV)
    both.robot.forget()
    both.robot.holds(None, _STALLED)
    both.start_policy(PLAIN)
    both.robot.works()
    _check(both)


@pytest.mark.parametrize("number", range(ROUNDS))
def test_sigterm_of_the_policy_node_ends_in_a_hold(both: System, number: int) -> None:
    both.at_work(PLAIN)
    process = both.policy
    assert process is not None
    both.robot.spin(random.Random(number).uniform(0.0, 0.5))
    process.send_signal(signal.SIGTERM)
    both.robot.until(lambda: process.poll() is not None, "the policy node's end")
    assert process.returncode == 0, both.log.read_text()
    assert "Traceback" not in both.log.read_text()
    both.robot.forget()
    both.robot.holds(None, _STALLED)
    _check(both)


def test_executor_is_killed_and_the_next_one_commands_nothing_until_it_is_enabled(
    at_work: System,
) -> None:
    robot, killed = at_work.robot, at_work.executor
    assert killed is not None
    killed.kill()
    robot.until(lambda: killed.poll() is not None, "the executor's end")
    at_work.executor = at_work.processes.executor()
    robot.forget()
    robot.until(
        lambda: (
            robot.says("executor", "commands are disabled") and robot.count("chunks", "chunks") > 5
        ),
        "a new executor that hears the policy",
    )
    count = len(robot.commands)
    robot.spin(0.5)
    assert len(robot.commands) == count
    robot.commands.clear()
    robot.enable()
    robot.works()


def _jumped(robot: Robot, before: int) -> Callable[[], bool]:
    return lambda: robot.count("executor", "clock jumps") > before


def test_clock_jumps_back_and_forward(both: System) -> None:
    robot = both.robot
    both.end()
    robot.clock_ns = 1_000_000_000_000
    try:
        robot.settle()
        both.executor = both.processes.executor(use_sim_time=True)
        both.start_policy(PLAIN, use_sim_time=True)
        robot.commands.clear()
        robot.enable()
        robot.works()
        for jump_s in (-100.0, 100.0):
            robot.forget()
            robot.until(lambda: "clock jumps" in robot.values("executor"), "counts")
            before = robot.count("executor", "clock jumps")
            robot.clock_ns += round(jump_s * 1e9)
            robot.until(_jumped(robot, before), "the jump")
            robot.until(lambda: robot.says("inference", "^running", POLICY), "chunks again")
            robot.works()
        _check(both)
        assert both.policy is not None
        assert both.policy.poll() is None, both.log.read_text()
    finally:
        robot.clock_ns = None
