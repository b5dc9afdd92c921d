"""No command of the executor ever breaks a limit, whatever is put in and in which order."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from groot_int8_ros.control.chunks import TimedChunk
from groot_int8_ros.control.command import ChannelCommand
from groot_int8_ros.control.executor import Executor
from groot_int8_ros.control.gates import Range
from groot_int8_ros.control.limits import JointLimits, top_speed
from groot_int8_ros.control.seams import SEAM_KINDS, SeamSettings
from groot_int8_ros.control.settings import Channel, ExecutorSettings
from groot_int8_ros.control.types import NANOSECONDS

PERIOD_S = 0.02
START_NS = 1_700_000_000 * NANOSECONDS
JOINTS = ("a", "b", "wheel")
ROUNDING = 1e-9

ARM_LIMITS = JointLimits(
    lower=np.array([-1.0, -np.inf]),
    upper=np.array([1.5, np.inf]),
    velocity=np.array([2.0, 1.0]),
    acceleration=np.array([10.0, np.inf]),
    step=np.array([np.inf, 0.01]),
)
BASE_LIMITS = JointLimits.of(1, lower=-0.2, upper=1.0, velocity=0.5, acceleration=3.0)

numbers = st.one_of(
    st.floats(-2.0, 2.0),
    st.floats(-2.0, 2.0),
    st.sampled_from([np.nan, np.inf, -np.inf, 1e308, 1e11, -1e11, 0.0]),
)


@st.composite
def chunks(draw: st.DrawFn) -> dict[str, Any]:
    rows = draw(st.integers(0, 6))
    joints = draw(st.sampled_from([JOINTS, JOINTS, JOINTS[::-1], ("a", "b"), ("a", "a"), ("x",)]))
    spacing_ns = draw(st.sampled_from([50_000_000, 50_000_000, 1, 10**9, 0, -1]))
    return {
        "kind": "chunk",
        "age_s": draw(st.sampled_from([0.05, 0.05, 0.2, 0.5, 3.0, -1.0, -0.05, 1e9])),
        "joints": joints,
        "spacing_ns": spacing_ns,
        "targets": [[draw(numbers) for _ in joints] for _ in range(rows)],
    }


@st.composite
def good_chunks(draw: st.DrawFn) -> dict[str, Any]:
    start, end = draw(st.floats(-0.3, 0.3)), draw(st.floats(-1.2, 1.7))
    return {
        "kind": "chunk",
        "age_s": 0.05,
        "joints": JOINTS,
        "spacing_ns": 50_000_000,
        "targets": [[start + row / 15 * (end - start)] * 3 for row in range(16)],
    }


joint_states = st.fixed_dictionaries(
    {
        "kind": st.just("state"),
        "names": st.sampled_from([("a", "b"), ("a", "b"), ("b", "a"), ("a",), ("a", "a"), ()]),
        "positions": st.lists(numbers, min_size=2, max_size=2),
        "age_s": st.sampled_from([0.0, 0.0, 0.0, 1.0, -1.0, 1e9]),
    }
)
steps = st.fixed_dictionaries(
    {
        "kind": st.just("step"),
        "count": st.integers(1, 12),
        "seconds": st.sampled_from([PERIOD_S, PERIOD_S, PERIOD_S, 0.005, 0.3, 0.0, 1e-9]),
        # The robot is where it is told to be, as it mostly is.
        "follows": st.sampled_from([True, True, False]),
    }
)
jumps = st.fixed_dictionaries(
    {
        "kind": st.just("jump"),
        "ros_s": st.sampled_from([-1e6, -1.0, -0.01, 0.4, 10.0, 1e6]),
        "steady_s": st.sampled_from([0.0, 0.0, -1.0, 5.0]),
    }
)
calls = st.sampled_from(
    [{"kind": kind} for kind in ("enable", "enable", "disable", "estop", "reset_estop", "jumped")]
)
events = st.lists(
    st.one_of(good_chunks(), chunks(), steps, steps, steps, joint_states, jumps, calls),
    max_size=40,
)


@st.composite
def executors(draw: st.DrawFn) -> Executor:
    statistics = Range(np.array([-1.0, -1.0]), np.array([1.0, 1.0]), 0.5)
    arm = Channel(
        "arm",
        ("a", "b"),
        "position",
        ARM_LIMITS,
        guard_distance=np.full(2, 0.3),
        start_tolerance=np.full(2, draw(st.sampled_from([0.0, 0.1, 10.0]))),
        statistics=draw(st.sampled_from([None, statistics])),
    )
    base = Channel("base", ("wheel",), "velocity", BASE_LIMITS, np.ones(1), np.zeros(1))
    return Executor(
        ExecutorSettings(
            (arm, base),
            control_period_s=PERIOD_S,
            seam=SeamSettings(
                draw(st.sampled_from(SEAM_KINDS)), draw(st.sampled_from([0.0, 0.1, 2.0]))
            ),
            lead_s=draw(st.sampled_from([0.0, 0.1])),
            first_command=draw(st.sampled_from(["ramp", "refuse"])),
            on_outside_state=draw(st.sampled_from(["refuse", "ignore"])),
            hold_together=draw(st.booleans()),
        )
    )


class Watcher:
    """Compares each command with the one before it."""

    def __init__(self) -> None:
        self.last: dict[str, ChannelCommand] = {}
        self.moved = 0.0

    def see(self, channels: tuple[ChannelCommand, ...], dt_s: float) -> None:
        for channel in channels:
            if channel.name == "arm":
                self._arm(channel, dt_s)
            else:
                self._base(channel, dt_s)
        # What was not commanded for a period is not continued: the executor was off.
        self.last = {channel.name: channel for channel in channels}

    def _arm(self, new: ChannelCommand, dt_s: float) -> None:
        limits = ARM_LIMITS
        assert np.isfinite(new.values).all()
        assert (limits.lower <= new.values).all()
        assert (new.values <= limits.upper).all()
        fastest = top_speed(limits, PERIOD_S)
        assert (np.abs(new.rates) <= fastest * (1.0 + ROUNDING)).all()
        last = self.last.get("arm")
        if last is None:
            return
        moved = np.abs(new.values - last.values)
        self.moved = max(self.moved, float(moved.max()))
        slack = ROUNDING * (1.0 + np.abs(new.values))
        if dt_s <= 0.0:
            assert not moved.any()
            return
        assert (moved <= fastest * dt_s + slack).all()
        assert (moved <= limits.step + slack).all()
        change = np.abs(new.rates - last.rates)
        assert (change <= limits.acceleration * dt_s * (1.0 + 1e-6) + ROUNDING).all()
        assert (np.abs(new.values - last.values - new.rates * dt_s) <= slack).all()

    def _base(self, new: ChannelCommand, dt_s: float) -> None:
        assert np.isfinite(new.values).all()
        assert (np.abs(new.values) <= 0.5).all()
        assert (new.values >= -0.2).all()
        last = self.last.get("base")
        before = np.zeros(1) if last is None else last.values
        assert (np.abs(new.values - before) <= 3.0 * max(dt_s, 0.0) + 1e-12).all()


# Properties of an executor that never moves would say nothing.
MOVING: list[dict[str, Any]] = [
    {"kind": "enable"},
    {
        "kind": "chunk",
        "age_s": 0.05,
        "joints": JOINTS,
        "spacing_ns": 50_000_000,
        "targets": [[0.05 * row, 0.05 * row, 0.4] for row in range(16)],
    },
    {"kind": "step", "count": 10, "seconds": PERIOD_S, "follows": True},
]


def run(executor: Executor, script: list[dict[str, Any]]) -> Watcher:
    """Play a script against an executor and watch what it commands."""
    watcher = Watcher()
    now_ns, steady_ns = START_NS, 10**12
    stepped_ns = steady_ns - round(PERIOD_S * NANOSECONDS)
    measured = np.zeros(2)

    def tell(names: Any, positions: Any, age_s: float = 0.0) -> None:
        stamp_ns = now_ns - round(age_s * NANOSECONDS)
        executor.on_joint_state(names, positions, stamp_ns, now_ns, steady_ns)

    tell(("a", "b"), measured)
    for event in script:
        if event["kind"] == "chunk":
            stamp_ns = now_ns - round(event["age_s"] * NANOSECONDS)
            rows, joints = len(event["targets"]), event["joints"]
            executor.on_chunk(
                TimedChunk(
                    stamp_ns,
                    joints,
                    stamp_ns + event["spacing_ns"] * np.arange(rows, dtype=np.int64),
                    np.array(event["targets"], np.float64).reshape(rows, len(joints)),
                ),
                now_ns,
                steady_ns,
            )
        elif event["kind"] == "state":
            tell(event["names"], event["positions"][: len(event["names"])], event["age_s"])
        elif event["kind"] == "jump":
            now_ns += round(event["ros_s"] * NANOSECONDS)
            steady_ns += round(event["steady_s"] * NANOSECONDS)
        elif event["kind"] == "step":
            for _ in range(event["count"]):
                now_ns += round(event["seconds"] * NANOSECONDS)
                steady_ns += round(event["seconds"] * NANOSECONDS)
                if event["follows"]:
                    tell(("a", "b"), measured)
                dt_s = min((steady_ns - stepped_ns) / NANOSECONDS, PERIOD_S)
                stepped_ns = steady_ns
                command = executor.step(now_ns, steady_ns)
                watcher.see(command.channels, dt_s)
                if command.channels:
                    measured = command.channels[0].values
                executor.commitment(now_ns)
        elif event["kind"] == "enable":
            tell(("a", "b"), measured)
            executor.enable(now_ns, steady_ns)
        elif event["kind"] == "estop":
            executor.estop("property")
        elif event["kind"] == "jumped":
            executor.on_clock_jump()
        else:
            getattr(executor, event["kind"])()
    return watcher


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
@given(executor=executors(), script=events)
def test_no_command_breaks_a_limit_whatever_is_put_in(
    executor: Executor, script: list[dict[str, Any]]
) -> None:
    run(executor, [*MOVING, *script])


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(executor=executors(), script=events)
def test_after_any_input_a_stop_comes_to_rest_within_its_braking_time(
    executor: Executor, script: list[dict[str, Any]]
) -> None:
    run(executor, [*MOVING, *script])
    now_ns, steady_ns = START_NS + 10**18, 10**15
    executor.disable()
    # 2 rad/s at 10 rad/s² is 0.2 s; the final holds are three more.
    command = executor.step(now_ns, steady_ns)
    for _ in range(round(0.2 / PERIOD_S) + 5):
        now_ns += 20_000_000
        steady_ns += 20_000_000
        command = executor.step(now_ns, steady_ns)
    assert command.resting
    if executor.estop_reason is None:
        assert command.channels == ()


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(setting=executors(), script=events)
def test_the_same_input_gives_the_same_commands(
    setting: Executor, script: list[dict[str, Any]]
) -> None:
    first, second = Executor(setting.settings), Executor(setting.settings)
    one, other = (
        run(first, [*MOVING, *script]),
        run(second, [*MOVING, *script]),
    )
    assert one.last.keys() == other.last.keys()
    for name, channel in one.last.items():
        np.testing.assert_array_equal(channel.values, other.last[name].values)
    assert first.counters == second.counters


def test_what_every_script_begins_with_moves() -> None:
    for kind in SEAM_KINDS:
        arm = Channel("arm", ("a", "b"), "position", ARM_LIMITS, np.full(2, 0.3), np.full(2, 0.1))
        base = Channel("base", ("wheel",), "velocity", BASE_LIMITS, np.ones(1), np.zeros(1))
        executor = Executor(ExecutorSettings((arm, base), PERIOD_S, seam=SeamSettings(kind)))
        assert run(executor, MOVING).moved > 0.005
