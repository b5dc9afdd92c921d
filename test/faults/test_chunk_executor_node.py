"""The fault matrix of the chunk executor: its own process, real DDS, a policy in a third process.

Each fault says what has to be seen. In all of them the commands that came keep the limits, and the
node recovers by itself where the fault goes. GROOT_FAULT_ROUNDS is the number of SIGTERMs at
random moments; `make faults` runs the long form.

A slow machine makes these tests slower and not red: what is to happen is waited for, and a fault
begins when the robot is seen to move, not after a time.
"""

from __future__ import annotations

import math
import os
import random
import signal
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="needs the ROS 2 Python packages")

from geometry_msgs.msg import Twist
from lifecycle_msgs.msg import Transition
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import JointState
from std_msgs.msg import Float64MultiArray
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from groot_int8_ros.policy.types import CommittedActions, JointSpec
from groot_int8_ros.ros.committed_rows import CommittedReader
from groot_int8_ros.ros.joints import time_message

from ..nodes import DEADLINE_S
from .policy_peer import LATENCY_NS, chunk, wave
from .system import DOMAIN_ID, ExecutorListener, Processes

ROUNDS = int(os.environ.get("GROOT_FAULT_ROUNDS", "3"))

UPPER, SPEED, ACCELERATION, PERIOD_S = 0.5, 1.0, 10.0, 0.02
PARAMETERS: dict[str, Any] = {
    "channels": ["arm", "hand", "base"],
    "joint_state_topic": "/test/joint_states",
    "chunk_timeout_s": 0.6,
    "joint_state_timeout_s": 0.3,
    "control_rate_hz": 1.0 / PERIOD_S,
    "autostart": True,
    "channel": {
        "arm": {
            "joints": ["shoulder", "elbow"],
            "topic": "/test/arm",
            "lower": [-UPPER],
            "upper": [UPPER],
            "velocity": [SPEED],
            "acceleration": [ACCELERATION],
            "guard_distance": [5.0],
        },
        "hand": {
            "joints": ["jaw"],
            "output": "float64_multi_array",
            "topic": "/test/hand",
            "velocity": [SPEED],
            "acceleration": [ACCELERATION],
            "guard_distance": [5.0],
        },
        "base": {
            "joints": ["base_x", "base_yaw"],
            "interface": "velocity",
            "output": "twist",
            "axes": ["linear.x", "angular.z"],
            "topic": "/test/base",
            "velocity": [0.5],
            "acceleration": [2.0],
        },
    },
}


class Robot(ExecutorListener):
    """The other side of the executor: joints that do what they are told, and a listener."""

    def __init__(self, node: Node, executor: SingleThreadedExecutor) -> None:
        super().__init__(node, executor)
        self.positions = {"shoulder": 0.0, "elbow": 0.0, "jaw": 0.0}
        self.spoil: Callable[[JointState], JointState | None] = lambda message: message
        self.arm: list[list[float]] = []
        self.hand: list[float] = []
        self.base: list[tuple[float, float]] = []
        self.clock_ns: int | None = None
        self._states = node.create_publisher(JointState, "/test/joint_states", 10)
        self.clock = node.create_publisher(Clock, "/clock", 10)
        node.create_subscription(JointTrajectory, "/test/arm", self._on_arm, 1000)
        node.create_subscription(Float64MultiArray, "/test/hand", self._on_hand, 1000)
        node.create_subscription(Twist, "/test/base", self._on_base, 1000)

    def _on_arm(self, message: JointTrajectory) -> None:
        (point,) = message.points
        self.arm.append(list(point.positions))
        self.positions |= dict(zip(message.joint_names, point.positions, strict=True))

    def _on_hand(self, message: Float64MultiArray) -> None:
        self.hand.append(message.data[0])
        self.positions["jaw"] = message.data[0]

    def _on_base(self, message: Twist) -> None:
        self.base.append((message.linear.x, message.angular.z))

    def publish(self) -> None:
        stamp = self.clock_ns or self.node.get_clock().now().nanoseconds
        names = [*self.positions, "wheel"]
        message = JointState(name=names, position=[*self.positions.values(), math.nan])
        message.header.stamp = time_message(stamp)
        spoilt = self.spoil(message)
        if spoilt is not None:
            self._states.publish(spoilt)

    def commands_heard(self) -> int:
        return len(self.arm) + len(self.hand) + len(self.base)

    def moves(self) -> bool:
        """Whether the newest commands are those of a robot at work."""
        recent = np.array(self.arm[-10:])
        return len(recent) == 10 and bool(np.ptp(recent, axis=0).max() > 1e-3)

    def rests(self) -> bool:
        """Whether the newest commands are a hold: nothing changes, the base stands."""
        return (
            len(self.arm) >= 10
            and len({tuple(values) for values in self.arm[-10:]}) == 1
            and len(set(self.hand[-10:])) == 1
            and set(self.base[-10:]) == {(0.0, 0.0)}
        )

    def begin(self) -> None:
        """Forget all that an executor before has said and done."""
        self.forget()
        self.arm.clear()
        self.hand.clear()
        self.base.clear()
        self.positions = dict.fromkeys(self.positions, 0.0)

    def check_limits(self) -> None:
        """Assert that no command that came broke a limit."""
        arm, base = np.array(self.arm), np.array(self.base)
        assert np.isfinite(arm).all()
        assert np.abs(arm).max() <= UPPER
        step = SPEED * PERIOD_S * (1.0 + 1e-6)
        assert np.abs(np.diff(arm, axis=0)).max() <= step
        assert np.abs(np.diff(self.hand)).max() <= step
        assert np.abs(base).max() <= 0.5
        assert np.abs(np.diff(base, axis=0)).max() <= 2.0 * PERIOD_S * (1.0 + 1e-6)


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    made = Processes(tmp_path_factory.mktemp("executor"), PARAMETERS)
    yield made
    for process in made.all:
        made.end(process)


@pytest.fixture(scope="module")
def robot(ros_node: Callable[..., Any]) -> Iterator[Robot]:
    with ros_node("robot", DOMAIN_ID) as (node, executor):
        yield Robot(node, executor)


@pytest.fixture(scope="module")
def started(processes: Processes, robot: Robot) -> Iterator[subprocess.Popen[bytes]]:
    """One executor for all faults that it has to recover from by itself."""
    process = processes.executor()
    robot.state()
    robot.until(lambda: robot.says("executor", "commands are disabled"), "an active executor")
    yield process
    processes.end(process)


@pytest.fixture
def at_work(
    request: pytest.FixtureRequest,
    processes: Processes,
    robot: Robot,
    started: subprocess.Popen[bytes],
) -> Iterator[subprocess.Popen[bytes]]:
    """A policy in its own process, good until its fault is asked for, and a robot that moves."""
    robot.spoil = lambda message: message
    peer = processes.peer(getattr(request, "param", "good"))
    robot.enable()
    # The robot may still move to what the test before was told.
    robot.until(lambda: "ready" in processes.peer_log.read_text(), "chunks of this policy")
    robot.until(robot.moves, "commands that move")
    yield peer
    for process in processes.all:
        if process is not started:
            processes.end(process)
    robot.spoil = lambda message: message
    assert started.poll() is None, processes.log.read_text()
    robot.check_limits()


def test_nothing_is_commanded_until_it_is_enabled(
    processes: Processes, robot: Robot, started: subprocess.Popen[bytes]
) -> None:
    peer = processes.peer("good")
    robot.until(
        lambda: robot.says("chunks", "accepted") and robot.count("chunks", "chunks") > 5,
        "chunks that are heard",
    )
    assert not robot.arm
    assert not robot.hand
    assert not robot.base
    processes.end(peer)


def _lose_elbow(message: JointState) -> JointState:
    place = message.name.index("elbow")
    names, positions = list(message.name), list(message.position)
    del names[place], positions[place]
    message.name, message.position = names, positions
    return message


def _nan_elbow(message: JointState) -> JointState:
    positions = list(message.position)
    positions[message.name.index("elbow")] = math.nan
    message.position = positions
    return message


@pytest.mark.parametrize(
    ("spoil", "status"),
    [
        (lambda message: None, "joint state is stale.*shoulder, elbow, jaw"),
        (_lose_elbow, "joint state is stale: no state of elbow "),
        (_nan_elbow, "joint state is stale.*position of elbow is not a finite number"),
    ],
    ids=["stops", "loses a joint", "nan"],
)
def test_joint_state_fails_and_comes_back(
    robot: Robot,
    at_work: subprocess.Popen[bytes],
    spoil: Callable[[JointState], JointState | None],
    status: str,
) -> None:
    robot.forget()
    robot.spoil = spoil
    robot.until(lambda: robot.says("joint states", status), "the joint state's fault")
    robot.until(robot.rests, "a hold")
    robot.until(lambda: robot.says("channel arm", "holding: joint state"), "the hold's reason")
    robot.spoil = lambda message: message
    robot.until(robot.moves, "commands that move again")


def _ignore_commands(message: JointState) -> JointState:
    positions = list(message.position)
    positions[message.name.index("elbow")] = -0.5
    message.position = positions
    return message


def test_arm_that_ignores_its_commands_is_told(
    robot: Robot, at_work: subprocess.Popen[bytes]
) -> None:
    robot.forget()
    robot.spoil = _ignore_commands
    robot.until(lambda: robot.says("channel arm", r"not follow.*: elbow \(by 0"), "the joint")
    assert float(robot.values("channel arm")["tracking error: elbow"]) > 0.1
    assert robot.moves(), "a joint astray is not a hold"
    robot.spoil = lambda message: message
    robot.until(lambda: robot.says("channel arm", "^running"), "a joint that follows again")
    assert robot.count("executor", "not following: arm: elbow") >= 1


@pytest.mark.parametrize(
    ("at_work", "refused"),
    [
        ("slow", ""),
        ("late", "every row of a chunk was due|old on arrival"),
        ("hang", ""),
        ("crash", ""),
        ("nan", "elbow are not finite"),
    ],
    indirect=["at_work"],
)
def test_policy_fails_and_another_takes_over(
    processes: Processes, robot: Robot, at_work: subprocess.Popen[bytes], refused: str
) -> None:
    at_work.send_signal(signal.SIGUSR1)
    robot.forget()
    robot.until(
        lambda: robot.says("channel arm", "chunks have stalled|no rows left"),
        "the policy's fault",
    )
    robot.until(robot.rests, "a hold")
    if refused:
        robot.until(lambda: robot.says("chunks", refused), "why chunks are refused")
    processes.end(at_work)
    processes.peer("good")
    robot.until(robot.moves, "commands that move again")


def test_policy_is_killed(
    processes: Processes, robot: Robot, at_work: subprocess.Popen[bytes]
) -> None:
    robot.forget()
    at_work.send_signal(signal.SIGKILL)
    robot.until(robot.rests, "a hold")
    robot.until(lambda: robot.says("channel base", "holding: "), "the hold's reason")
    peer = processes.peer("good")
    robot.until(robot.moves, "commands that move again")
    processes.end(peer)


@pytest.mark.parametrize(
    ("at_work", "fault"),
    [(fault, fault) for fault in ("jump", "mixed", "flood")],
    indirect=["at_work"],
)
def test_policy_sends_what_no_robot_can_do(
    processes: Processes, robot: Robot, at_work: subprocess.Popen[bytes], fault: str
) -> None:
    names = ("chunk: malformed chunk", "chunk: repeated or reordered")
    refusals = [f"refused: {name}" for name in names]
    robot.until(lambda: robot.count("chunks", "chunks"), "counts")
    clamps = robot.count("executor", "clamps: arm: position")
    chunks = robot.count("chunks", "chunks")
    before = [robot.count("executor", name) for name in refusals]
    at_work.send_signal(signal.SIGUSR1)
    if fault == "jump":
        # A hold between the good chunks and the bad ones arms the guard again: a ramp, then.
        robot.until(
            lambda: (
                robot.count("executor", "clamps: arm: position") > clamps
                or robot.says("executor", "ramping")
            ),
            "clamps that are counted",
        )
    elif fault == "mixed":
        robot.until(
            lambda: all(
                robot.count("executor", name) > count + 5
                for name, count in zip(refusals, before, strict=True)
            ),
            "refusals that are counted",
        )
        robot.until(robot.moves, "the good chunks among them being executed")
    else:
        robot.until(lambda: robot.count("chunks", "chunks") > chunks + 300, "a flood")
        robot.until(robot.moves, "commands that move")
    processes.end(at_work)
    robot.until(robot.rests, "a hold")


def test_estop_is_latched_and_reset_by_its_own_call(
    robot: Robot, at_work: subprocess.Popen[bytes]
) -> None:
    assert robot.trigger("estop").success
    robot.until(robot.rests, "a hold")
    robot.until(lambda: robot.says("executor", "emergency stop: service"), "the stop's status")
    refused = robot.trigger("enable")
    assert not refused.success
    assert "reset" in refused.message
    count = len(robot.arm)
    robot.until(lambda: len(robot.arm) > count + 20, "holds that go on")
    assert robot.rests()
    assert robot.trigger("reset_estop").success
    assert not robot.moves()
    robot.enable()
    robot.until(robot.moves, "commands that move again")


def test_disable_ends_in_a_hold_and_silence(
    robot: Robot, at_work: subprocess.Popen[bytes]
) -> None:
    assert robot.trigger("disable").success
    robot.until(lambda: robot.says("executor", "commands are disabled"), "the end of commands")
    robot.settle()
    count = len(robot.arm)
    assert robot.arm[-1] == robot.arm[-2] == robot.arm[-3]
    assert robot.base[-1] == robot.base[-3] == (0.0, 0.0)
    robot.spin(0.5)
    assert len(robot.arm) == count


def test_deactivate_stops_the_robot_first_and_activate_does_not_start_it(
    robot: Robot, at_work: subprocess.Popen[bytes]
) -> None:
    refused = robot.set("chunk_timeout_s", 5.0)
    assert not refused.successful
    assert "cleanup" in refused.reason
    assert robot.change(Transition.TRANSITION_DEACTIVATE)
    robot.settle()
    count = len(robot.arm)
    assert robot.arm[-1] == robot.arm[-2] == robot.arm[-3]
    assert robot.base[-1] == (0.0, 0.0)
    refused = robot.trigger("enable")
    assert not refused.success
    assert "inactive" in refused.message
    assert robot.change(Transition.TRANSITION_ACTIVATE)
    robot.spin(0.5)
    assert len(robot.arm) == count, "activating alone commands"
    # Joint states may have stayed away for a moment: the executor refuses then, and rightly.
    robot.enable()
    robot.until(robot.moves, "commands that move again")


# From here on each test has an executor of its own: two on the same topics would be one too many.


@pytest.fixture
def alone(processes: Processes, robot: Robot) -> Processes:
    """No process but those that the test starts, and nothing heard yet."""
    for process in processes.all:
        processes.end(process)
    robot.settle()
    robot.begin()
    return processes


@pytest.mark.parametrize("jump_s", [-100.0, 100.0], ids=["back", "forward"])
def test_clock_jumps(alone: Processes, robot: Robot, jump_s: float) -> None:
    # ROS time is the test's own here, so the policy that is stamped with it lives in the test.
    process = alone.executor(use_sim_time=True)
    publisher = robot.node.create_publisher(JointTrajectory, "/policy_node/action_chunk", 10)
    robot.clock_ns, steps = 1_000_000_000_000, 0

    def tick(message: JointState) -> JointState:
        nonlocal steps
        assert robot.clock_ns is not None
        robot.clock_ns += 20_000_000
        steps += 1
        robot.clock.publish(Clock(clock=time_message(robot.clock_ns)))
        if steps % 5 == 0:
            publisher.publish(chunk(robot.clock_ns - LATENCY_NS))
        message.header.stamp = time_message(robot.clock_ns)
        return message

    robot.spoil = tick
    try:
        robot.enable()
        robot.until(robot.moves, "commands that move")
        robot.forget()
        robot.clock_ns += round(jump_s * 1e9)
        robot.until(lambda: robot.count("executor", "clock jumps") >= 1, "the jump")
        robot.until(robot.moves, "commands that move again")
        assert process.poll() is None
        robot.check_limits()
    finally:
        robot.clock_ns = None
        robot.spoil = lambda message: message
        robot.node.destroy_publisher(publisher)
        alone.end(process)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"control_rate_hz": 0.0}, "'control_rate_hz'"),
        ({"seam": {"kind": "hope"}}, "'seam.kind'"),
        ({"ramp_fraction": 2.0}, "'ramp_fraction'"),
    ],
)
def test_parameter_out_of_range_ends_the_node_with_one_message(
    alone: Processes, changes: dict[str, Any], message: str
) -> None:
    process = alone.executor(**changes)
    assert process.wait(DEADLINE_S) == 2
    assert message in alone.log.read_text()
    assert "Traceback" not in alone.log.read_text()


@pytest.mark.parametrize("number", range(ROUNDS))
def test_sigterm_at_a_random_moment_ends_in_a_hold(
    alone: Processes, robot: Robot, number: int
) -> None:
    draw = random.Random(number)
    process, peer = alone.executor(), alone.peer("good")
    robot.until(lambda: "configuring" in alone.log.read_text(), "the node's first words")
    # Every other round surely ends a robot at work; the others end what is there by then.
    if number % 2 == 0:
        robot.enable()
        robot.until(robot.moves, "commands that move")
        robot.spin(draw.uniform(0.0, 0.5))
    else:
        enable: Any = robot.node.create_client(Trigger, "/chunk_executor/enable")
        for _ in range(draw.randrange(40)):
            enable.call_async(Trigger.Request())
            robot.spin(0.05)
        robot.node.destroy_client(enable)
    process.send_signal(signal.SIGINT if number % 4 == 3 else signal.SIGTERM)
    robot.until(lambda: process.poll() is not None, "the node's end")
    robot.settle()
    assert process.returncode == 0, alone.log.read_text()
    assert "Traceback" not in alone.log.read_text()
    assert robot.arm or number % 2
    if robot.arm:
        assert robot.arm[-1] == robot.arm[-2] == robot.arm[-3]
        assert robot.hand[-1] == robot.hand[-3]
        assert robot.base[-1] == robot.base[-3] == (0.0, 0.0)
        robot.check_limits()
    alone.end(peer)


_BROKEN = """
import signal
import sys
from groot_int8_ros import chunk_executor_node as node
convert, broken = node.chunk_of, []
signal.signal(signal.SIGUSR1, lambda *_: broken.append(1))
node.chunk_of = lambda message: 1 / 0 if broken else convert(message)
sys.exit(node.main())
"""


def test_a_bug_in_the_executor_ends_in_a_hold(alone: Processes, robot: Robot) -> None:
    process, peer = alone.executor(_BROKEN), alone.peer("good")
    robot.enable()
    robot.until(robot.moves, "commands that move")
    process.send_signal(signal.SIGUSR1)
    robot.until(lambda: process.poll() is not None, "the node's end")
    robot.settle()
    assert process.returncode == 1
    assert "ZeroDivisionError" in alone.log.read_text()
    assert robot.arm[-1] == robot.arm[-2] == robot.arm[-3]
    assert robot.base[-1] == robot.base[-3] == (0.0, 0.0)
    robot.check_limits()
    alone.end(peer)


def test_what_is_committed_reaches_the_policy_as_it_is_executed(
    alone: Processes, robot: Robot
) -> None:
    messages: list[JointTrajectory] = []
    subscription = robot.node.create_subscription(
        JointTrajectory, "/chunk_executor/committed", messages.append, 10
    )
    process, peer = alone.executor(seam={"kind": "rtc"}), alone.peer("good")
    robot.enable()
    reader = CommittedReader(
        {
            "arm": (JointSpec("shoulder"), JointSpec("elbow")),
            "jaw": (JointSpec("jaw", "degrees"),),
        },
        np.linspace(0.0, 0.75, 16),
    )

    def committed() -> tuple[int, CommittedActions] | None:
        if not (robot.moves() and messages):
            return None
        stamp = robot.node.get_clock().now().nanoseconds - LATENCY_NS
        found = reader.read(messages[-1], stamp)
        # The latency of 60 ms lies ahead of now, and the observation as much behind it.
        return (stamp, found) if found and 2 <= len(found.rows) <= 6 else None

    observation_ns, found = robot.until(committed, "a commitment of a few rows")
    assert list(found.rows) == list(range(len(found.rows)))
    wanted = [wave(observation_ns * 1e-9 + 0.05 * row) for row in found.rows]
    np.testing.assert_allclose(found.actions["arm"][:, 0], wanted, atol=0.01)
    np.testing.assert_allclose(np.radians(found.actions["jaw"][:, 0]), wanted, atol=0.01)
    robot.node.destroy_subscription(subscription)
    alone.end(process)
    alone.end(peer)


def test_killed_executor_leaves_a_command_that_ends_by_itself(
    alone: Processes, robot: Robot
) -> None:
    points: list[JointTrajectory] = []
    subscription = robot.node.create_subscription(JointTrajectory, "/test/arm", points.append, 50)
    process, peer = alone.executor(), alone.peer("good")
    robot.enable()
    robot.until(robot.moves, "commands that move")
    process.send_signal(signal.SIGKILL)
    process.wait()
    robot.settle()
    # A joint_trajectory_controller goes to this point and stays: nothing in it says to go on.
    (point,) = points[-1].points
    assert not point.velocities
    assert not point.accelerations
    assert (point.time_from_start.sec, point.time_from_start.nanosec) == (0, 20_000_000)
    assert (points[-1].header.stamp.sec, points[-1].header.stamp.nanosec) == (0, 0)
    robot.node.destroy_subscription(subscription)
    alone.end(peer)
