"""A small robot for the control tests: two position joints and a base."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from groot_int8_ros.control.chunks import TimedChunk
from groot_int8_ros.control.command import Command
from groot_int8_ros.control.executor import Executor
from groot_int8_ros.control.limits import JointLimits
from groot_int8_ros.control.settings import Channel, ExecutorSettings
from groot_int8_ros.control.types import NANOSECONDS

START_NS = 1_700_000_000 * NANOSECONDS
PERIOD_NS = 20_000_000
ROW_NS = 50_000_000
ARM = ("shoulder", "elbow")
BASE = ("forward", "turn")


def arm_channel(**changes: Any) -> Channel:
    limits = JointLimits.of(2, lower=-2.0, upper=2.0, velocity=1.5, acceleration=20.0)
    values: dict[str, Any] = {
        "name": "arm",
        "joints": ARM,
        "interface": "position",
        "limits": limits,
        "guard_distance": np.full(2, 0.3),
        "start_tolerance": np.full(2, 0.05),
    }
    return Channel(**(values | changes))


def base_channel(**changes: Any) -> Channel:
    values: dict[str, Any] = {
        "name": "base",
        "joints": BASE,
        "interface": "velocity",
        "limits": JointLimits.of(2, velocity=0.5, acceleration=2.0),
        "guard_distance": np.full(2, 1.0),
        "start_tolerance": np.full(2, 0.0),
    }
    return Channel(**(values | changes))


class Bench:
    """An executor with its two clocks, fed like the node feeds it."""

    def __init__(self, **settings: Any) -> None:
        channels = settings.pop("channels", (arm_channel(), base_channel()))
        self.settings = ExecutorSettings(channels=channels, **settings)
        self.executor = Executor(self.settings)
        self.now_ns = START_NS
        self.steady_ns = 5 * NANOSECONDS
        self.measured = dict.fromkeys(self.executor.state_joints, 0.0)
        self.joints = tuple(j for channel in channels for j in channel.joints)
        self.commands: list[Command] = []
        self.follows = True

    @property
    def time_s(self) -> float:
        """Seconds of ROS time since the start."""
        return (self.now_ns - START_NS) / NANOSECONDS

    def state(self, **changes: float) -> Any:
        positions = self.measured | changes
        return self.executor.on_joint_state(
            list(positions), list(positions.values()), self.now_ns, self.now_ns, self.steady_ns
        )

    def chunk(
        self,
        value: Callable[[float], Any] = lambda t: 0.0,
        *,
        age_s: float = 0.1,
        rows: int = 16,
        joints: tuple[str, ...] | None = None,
    ) -> Any:
        """Feed a chunk whose row for the time t since the start is `value(t)` for all joints."""
        joints = self.joints if joints is None else joints
        stamp_ns = self.now_ns - round(age_s * NANOSECONDS)
        due_ns = stamp_ns + ROW_NS * np.arange(rows)
        targets = np.array(
            [np.broadcast_to(value((due - START_NS) / NANOSECONDS), len(joints)) for due in due_ns]
        )
        return self.executor.on_chunk(
            TimedChunk(stamp_ns, joints, due_ns, targets.astype(np.float64)),
            self.now_ns,
            self.steady_ns,
        )

    def step(self, steps: int = 1, *, state: bool = True) -> Command:
        """Pass control periods; the robot does what it is told."""
        for _ in range(steps):
            self.now_ns += PERIOD_NS
            self.steady_ns += PERIOD_NS
            if state:
                self.state()
            self.commands.append(self.executor.step(self.now_ns, self.steady_ns))
            for channel in self.commands[-1].channels if self.follows else ():
                names = next(c for c in self.settings.channels if c.name == channel.name).joints
                if names[0] in self.measured:
                    self.measured |= dict(zip(names, channel.values.tolist(), strict=True))
        return self.commands[-1]

    def enable(self) -> Any:
        self.state()
        return self.executor.enable(self.now_ns, self.steady_ns)

    def run(self, value: Callable[[float], Any], seconds: float, every_s: float = 0.2) -> None:
        """Execute chunks of one trajectory, a new one every so often."""
        end_ns = self.now_ns + round(seconds * NANOSECONDS)
        next_ns = self.now_ns
        while self.now_ns < end_ns:
            if self.now_ns >= next_ns:
                assert self.chunk(value) is None
                next_ns += round(every_s * NANOSECONDS)
            self.step()

    def values(self, channel: str = "arm") -> np.ndarray:
        """The commands so far, shape (N, J)."""
        return np.array(
            [c.values for command in self.commands for c in command.channels if c.name == channel]
        )


MakeBench = Callable[..., Bench]


@pytest.fixture
def make_bench() -> MakeBench:
    return Bench


@pytest.fixture
def make_arm() -> Callable[..., Channel]:
    return arm_channel


@pytest.fixture
def make_base() -> Callable[..., Channel]:
    return base_channel
