"""The executor: hazards between a policy that may do anything and joints that may not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from groot_int8_ros.control import executor as reasons
from groot_int8_ros.control.chunks import MALFORMED, NOT_FINITE
from groot_int8_ros.control.gates import Range
from groot_int8_ros.control.limits import JointLimits
from groot_int8_ros.control.seams import SeamSettings
from groot_int8_ros.control.types import NANOSECONDS
from groot_int8_ros.errors import ConfigurationError

if TYPE_CHECKING:
    from test.control.conftest import Bench, MakeBench

MakeChannel = Callable[..., Any]


def wave(t: float) -> float:
    """A slow trajectory that starts at the robot's pose and is never at rest for long."""
    return 0.3 * (1.0 - math.cos(2.0 * t))


def holds(bench: Bench, channel: str = "arm") -> str | None:
    found = next(c for c in bench.commands[-1].channels if c.name == channel).hold
    return found.reason if found else None


def running(make_bench: MakeBench, seconds: float = 1.0, **settings: Any) -> Bench:
    bench = make_bench(**settings)
    assert bench.enable() is None
    bench.run(wave, seconds)
    assert bench.commands[-1].mode == "running"
    return bench


def test_nothing_is_commanded_until_enabled(make_bench: MakeBench) -> None:
    bench = make_bench()
    for _ in range(20):
        bench.chunk(wave)
        assert bench.step().channels == ()
    assert bench.enable() is None
    assert bench.step().channels
    # What was planned before is not executed: nobody allowed it.
    assert holds(bench) == reasons.WAITING


def test_each_row_is_executed_when_it_is_due_and_not_from_row_0(make_bench: MakeBench) -> None:
    bench = running(make_bench, 3.0)
    assert bench.values()[-1] == pytest.approx(wave(bench.time_s), abs=2e-3)
    # The chunks were 0.1 s old on arrival: rows 0 and 1 of each, 50 ms apart, were past.
    assert bench.executor.counters.rows_skipped_last == 2
    assert bench.executor.counters.underruns == 0


def test_a_joint_that_ignores_its_commands_is_told_and_one_that_trails_is_not(
    make_bench: MakeBench, make_arm: MakeChannel
) -> None:
    channels = (make_arm(tracking_tolerance=np.full(2, 0.1)),)
    bench = running(make_bench, 4.0, channels=channels)
    bench.follows = False
    late = trailing = ignoring = 0.0
    told: set[str] = set()
    for _ in range(10):
        bench.chunk(wave)
        for _ in range(20):
            # 0.4 s behind its commands.
            bench.measured["shoulder"] = float(bench.values()[-20][0])
            (sent,) = bench.step().channels
            late = max(late, abs(bench.measured["shoulder"] - sent.values[0]))
            trailing, ignoring = np.maximum((trailing, ignoring), sent.tracking_error)
            told |= set(sent.astray)
            assert sent.hold is None
    assert late > 0.2 > 0.02 > trailing
    assert ignoring > 0.1
    assert told == {"elbow"}
    assert bench.executor.counters.astray["arm: elbow"] >= 1
    assert bench.executor.counters.astray["arm: shoulder"] == 0
    # It follows again.
    bench.follows = True
    bench.run(wave, 1.0)
    assert bench.commands[-1].channels[0].astray == ()


def test_first_command_far_from_the_pose_is_ramped_slowly(make_bench: MakeBench) -> None:
    bench = make_bench(ramp_fraction=0.1)
    assert bench.enable() is None
    modes = []
    for _ in range(600):
        if bench.executor.counters.steps % 10 == 0:
            bench.chunk(lambda t: 1.5)
        modes.append(bench.step().mode)
    speeds = np.abs(np.diff(bench.values(), axis=0)).max(axis=1) / 0.02
    ramped = [speed for speed, mode in zip(speeds, modes[1:], strict=True) if mode == "ramping"]
    assert len(ramped) > 50
    assert max(ramped) <= 0.1 * 1.5 + 1e-9
    assert modes[-1] == "running"
    np.testing.assert_allclose(bench.values()[-1], 1.5, atol=1e-3)


def test_first_command_far_from_the_pose_is_refused_if_so_wished(make_bench: MakeBench) -> None:
    bench = make_bench(first_command="refuse")
    assert bench.enable() is None
    for _ in range(20):
        bench.chunk(lambda t: 0.5)
        bench.step(2)
    assert holds(bench) == reasons.FAR
    assert not bench.values().any()
    bench.chunk(lambda t: 0.2)
    bench.step(50)
    np.testing.assert_allclose(bench.values()[-1][0], 0.2, atol=0.01)


def test_guard_is_armed_again_after_a_hold(make_bench: MakeBench) -> None:
    bench = running(make_bench, first_command="refuse")
    bench.step(100)  # the chunks are over
    stopped = bench.values()[-1]
    bench.chunk(lambda t: stopped[0] + 1.0)
    bench.step()
    assert holds(bench) == reasons.FAR


def test_positions_stay_at_the_last_command_and_velocities_go_to_zero(
    make_bench: MakeBench,
) -> None:
    bench = running(make_bench)
    bench.step(100)
    assert holds(bench) is not None
    held = bench.values()[-1]
    # The arm sags under its own weight, and the hold does not follow it down.
    bench.follows = False
    bench.measured = {name: value - 0.02 for name, value in bench.measured.items()}
    bench.step(100)
    assert (bench.values()[-1] == held).all()
    assert not bench.values("base")[-1].any()
    assert bench.commands[-1].resting


def test_enabling_again_does_not_let_a_sagging_arm_sink(make_bench: MakeBench) -> None:
    bench = running(make_bench)
    bench.follows = False
    for _ in range(5):
        bench.executor.disable()
        bench.step(100)
        held = bench.values()[-1]
        bench.measured = {
            name: value - 0.03 for name, value in zip(bench.measured, held, strict=True)
        }
        bench.state()
        bench.step()
        assert bench.enable() is None
        bench.step()
        assert (bench.values()[-1] == held).all()
    # But one that was moved by hand starts where it stands.
    bench.executor.disable()
    bench.step(100)
    bench.measured = dict.fromkeys(bench.measured, 1.0)
    bench.step()
    assert bench.enable() is None
    bench.step()
    assert (bench.values()[-1] == 1.0).all()


@pytest.mark.parametrize("stop", ["disable", "estop", "underrun", "stale"])
def test_every_stop_brakes_within_the_limits_and_ends_in_a_hold(
    make_bench: MakeBench, stop: str
) -> None:
    bench = running(make_bench, 0.8)
    moving = bench.values()[-1] - bench.values()[-2]
    assert np.abs(moving).max() > 0.005, "nothing moves, so nothing is shown"
    before = len(bench.values())
    if stop == "disable":
        bench.executor.disable()
    elif stop == "estop":
        bench.executor.estop("button")
    for _ in range(100):
        bench.step(state=stop != "stale")
    velocities = np.diff(bench.values(), axis=0) / 0.02
    changes = np.abs(np.diff(velocities, axis=0))[before - 3 :]
    assert changes.max() <= 20.0 * 0.02 + 1e-9
    last = [command for command in bench.commands if command.channels][-1]
    assert last.resting
    assert (bench.values()[-1] == bench.values()[-2]).all()


def test_disabling_ends_in_holds_and_then_silence(make_bench: MakeBench) -> None:
    bench = running(make_bench, final_holds=4)
    bench.executor.disable()
    before = len(bench.commands)
    bench.step(100)
    stopping = [command for command in bench.commands[before:] if command.channels]
    assert [command.resting for command in stopping[-4:]] == [True] * 4
    assert bench.commands[-1].channels == ()
    assert not bench.executor.commanding


def test_estop_is_latched_until_it_is_reset(make_bench: MakeBench) -> None:
    bench = running(make_bench)
    bench.executor.estop("first")
    bench.executor.estop("second")
    bench.chunk(wave)
    bench.step(100)
    # It goes on holding: one lost message must not be the end of it.
    assert bench.commands[-1].mode == "estop"
    assert bench.commands[-1].resting
    refusal = bench.enable()
    assert refusal is not None
    assert "first" in refusal.message
    bench.executor.reset_estop()
    bench.chunk(wave)
    bench.step(10)
    assert bench.commands[-1].channels == ()
    assert bench.enable() is None
    assert bench.executor.counters.estops == 1


def test_an_end_in_full_motion_leaves_a_hold_behind(make_bench: MakeBench) -> None:
    bench = running(make_bench, 0.8)
    assert np.abs(np.diff(bench.values("base")[-2:], axis=0)).max() > 0.0
    hold = bench.executor.end()
    arm, base = hold.channels
    assert hold.resting
    assert (arm.values == bench.values()[-1]).all()
    assert not base.values.any()


def test_what_has_ended_commands_nothing_even_while_a_stop_is_latched(
    make_bench: MakeBench,
) -> None:
    bench = running(make_bench)
    bench.executor.estop("button")
    bench.step(50)
    bench.executor.end()
    # The arm is moved by hand; a hold at the old pose would be a jump.
    bench.measured = dict.fromkeys(bench.measured, -1.0)
    assert bench.step(5).channels == ()
    bench.executor.reset_estop()
    assert bench.enable() is None
    assert bench.step().channels[0].values.tolist() == [-1.0, -1.0]


def test_estop_before_enabling_keeps_it_from_being_enabled(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.executor.estop("button")
    assert bench.enable() is not None
    assert bench.step().channels == ()


def test_a_stalled_policy_is_a_hold_before_its_rows_are_over(make_bench: MakeBench) -> None:
    bench = make_bench(chunk_timeout_s=0.4)
    bench.enable()
    bench.chunk(wave, rows=200)
    bench.step(15)
    assert holds(bench) is None
    bench.step(10)
    assert holds(bench) == reasons.STALLED


def test_stricter_settings_count_from_the_next_step_and_wrong_ones_change_nothing(
    make_bench: MakeBench,
) -> None:
    bench = running(make_bench, 1.0)
    bench.executor.tighten({"chunk_timeout_s": 0.06})
    bench.step(5)
    assert holds(bench) == reasons.STALLED
    with pytest.raises(ConfigurationError):
        bench.executor.tighten({"joint_state_timeout_s": -1.0})
    assert bench.executor.settings.chunk_timeout_s == 0.06


def test_rows_that_run_out_are_a_hold_and_are_counted(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.enable()
    bench.chunk(wave, rows=8)
    bench.step(40)
    assert holds(bench) == reasons.UNDERRUN
    assert bench.executor.counters.underruns == 2  # one for each channel
    bench.chunk(wave)
    assert bench.executor.counters.late_chunks == 1


def test_one_channel_that_gets_nothing_holds_and_the_others_with_it(
    make_bench: MakeBench,
) -> None:
    bench = running(make_bench, chunk_timeout_s=0.4)
    for _ in range(40):
        if bench.executor.counters.steps % 5 == 0:
            assert bench.chunk(wave, joints=("shoulder", "elbow", "forward")) is None
        bench.step()
    assert holds(bench, "base") == reasons.STALLED
    assert holds(bench, "arm") == reasons.OTHER


def test_channels_hold_alone_if_so_wished(make_bench: MakeBench) -> None:
    bench = running(make_bench, chunk_timeout_s=0.4, hold_together=False)
    for _ in range(40):
        if bench.executor.counters.steps % 5 == 0:
            bench.chunk(wave, joints=("shoulder", "elbow"))
        bench.step()
    assert holds(bench, "base") == reasons.STALLED
    assert holds(bench, "arm") is None


def test_a_joint_that_is_no_longer_measured_is_named(make_bench: MakeBench) -> None:
    bench = running(make_bench)
    del bench.measured["elbow"]
    bench.follows = False
    bench.step(20)
    held = bench.commands[-1].channels[0].hold
    assert held is not None
    assert held.reason == reasons.STALE_STATE
    assert "elbow" in held.message
    assert "shoulder" not in held.message


@pytest.mark.parametrize("position", [math.nan, math.inf, 1e300])
def test_a_measured_position_that_is_no_number_is_a_hold(
    make_bench: MakeBench, position: float
) -> None:
    bench = running(make_bench)
    bench.follows = False
    bench.measured["elbow"] = position
    bench.step(20)
    held = bench.commands[-1].channels[0].hold
    assert held is not None
    assert held.reason == reasons.STALE_STATE
    assert "elbow" in held.message
    assert "not a finite number" in held.message
    assert bench.executor.counters.refusals[f"joint state: {NOT_FINITE}"] > 5


def test_a_driver_that_repeats_its_last_message_is_not_believed(make_bench: MakeBench) -> None:
    bench = running(make_bench)
    stamp_ns = bench.now_ns
    for _ in range(15):
        bench.step(state=False)
        bench.executor.on_joint_state(
            list(bench.measured),
            list(bench.measured.values()),
            stamp_ns,
            bench.now_ns,
            bench.steady_ns,
        )
    assert holds(bench) == reasons.STALE_STATE


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda b: b.chunk(lambda t: math.nan), NOT_FINITE),
        (lambda b: b.chunk(lambda t: -math.inf), NOT_FINITE),
        (lambda b: b.chunk(lambda t: 1e200), NOT_FINITE),
        (lambda b: b.chunk(wave, age_s=2.5, rows=100), reasons.TOO_OLD),
        (lambda b: b.chunk(wave, rows=2), reasons.TOO_OLD),
        (lambda b: b.chunk(wave, age_s=-1.0), reasons.AHEAD),
        (lambda b: b.chunk(wave, age_s=0.3), reasons.REPEATED),
        (lambda b: b.chunk(wave, rows=0), MALFORMED),
        (lambda b: b.chunk(wave, joints=("shoulder", "shoulder")), MALFORMED),
        (lambda b: b.chunk(wave, joints=("wrist",)), reasons.NO_JOINTS),
    ],
)
def test_a_spoilt_chunk_is_refused_counted_and_changes_nothing(
    make_bench: MakeBench, spoil: Callable[[Bench], Any], reason: str
) -> None:
    bench, other = running(make_bench), running(make_bench)
    refusal = spoil(bench)
    assert refusal is not None
    assert refusal.reason == reason
    assert bench.executor.counters.refusals[f"chunk: {reason}"] == 1
    bench.step(10)
    other.step(10)
    np.testing.assert_array_equal(bench.values(), other.values())


def test_a_chunk_outside_the_statistics_is_refused(
    make_bench: MakeBench, make_arm: MakeChannel
) -> None:
    seen = Range(np.array([-0.5, -0.5]), np.array([0.7, 0.7]), margin=0.1)
    bench = running(make_bench, channels=(make_arm(statistics=seen),))
    assert bench.chunk(lambda t: 0.8) is None  # within the margin
    bench.step()
    refusal = bench.chunk(lambda t: 0.9)
    assert refusal is not None
    assert refusal.reason == reasons.OUTSIDE
    assert "shoulder" in refusal.message


def test_a_pose_outside_the_statistics_is_a_hold(
    make_bench: MakeBench, make_arm: MakeChannel
) -> None:
    seen = Range(np.array([-0.5, -0.5]), np.array([0.7, 0.7]), margin=0.1)
    bench = running(make_bench, channels=(make_arm(statistics=seen),))
    bench.follows = False
    bench.measured["elbow"] = -1.0
    bench.step(2)
    held = bench.commands[-1].channels[0].hold
    assert held is not None
    assert held.reason == reasons.OUTSIDE
    assert "elbow" in held.message
    tolerant = running(
        make_bench, channels=(make_arm(statistics=seen),), on_outside_state="ignore"
    )
    tolerant.follows = False
    tolerant.measured["elbow"] = -1.0
    tolerant.step(2)
    assert holds(tolerant) is None


def test_a_joint_outside_its_limits_cannot_be_enabled(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.measured["elbow"] = 2.2
    refusal = bench.enable()
    assert refusal is not None
    assert "elbow" in refusal.message
    # A little outside is a matter of calibration: the command begins at the limit.
    bench.measured["elbow"] = 2.04
    bench.step()
    assert bench.enable() is None
    assert bench.step().channels[0].values.tolist() == [0.0, 2.0]


def test_enabling_without_joint_states_is_refused(make_bench: MakeBench) -> None:
    bench = make_bench()
    refusal = bench.executor.enable(bench.now_ns, bench.steady_ns)
    assert refusal is not None
    assert refusal.reason == reasons.NO_STATE
    assert "shoulder, elbow" in refusal.message


@pytest.mark.parametrize("jump_s", [-3600.0, -1.0, 2.0, 3600.0])
def test_a_jump_of_ros_time_is_a_hold_and_is_recovered_from(
    make_bench: MakeBench, jump_s: float
) -> None:
    bench = running(make_bench)
    bench.now_ns += round(jump_s * NANOSECONDS)
    bench.step()
    assert holds(bench) == reasons.WAITING
    assert bench.executor.counters.clock_jumps == 1
    stopped = bench.step(30)
    assert stopped.resting
    bench.run(lambda t: bench.values()[-1][0], 1.0)
    assert bench.commands[-1].mode == "running"


def test_time_that_stands_still_stands_still_and_then_holds(make_bench: MakeBench) -> None:
    # A paused bag: ROS time does not move, the robot's limits and watchdogs do.
    bench = running(make_bench)
    for _ in range(80):
        bench.steady_ns += 20_000_000
        bench.commands.append(bench.executor.step(bench.now_ns, bench.steady_ns))
    assert holds(bench) is not None
    assert bench.commands[-1].resting
    assert bench.executor.counters.clock_jumps == 0


def test_late_steps_are_counted(make_bench: MakeBench) -> None:
    bench = running(make_bench)
    assert bench.executor.counters.deadline_misses == 0
    bench.now_ns += 30_000_000
    bench.steady_ns += 30_000_000
    bench.step()
    assert bench.executor.counters.deadline_misses == 1


def test_a_clamped_target_is_counted_by_channel_and_limit(make_bench: MakeBench) -> None:
    bench = running(make_bench, seam=SeamSettings("switch"))
    bench.chunk(lambda t: 5.0)
    bench.step(5)
    assert bench.executor.counters.clamps["arm: position"] == 5
    assert bench.executor.counters.clamps["base: velocity"] == 5


def test_a_lead_commands_rows_before_they_are_due(make_bench: MakeBench) -> None:
    early, plain = running(make_bench, 2.0, lead_s=0.1), running(make_bench, 2.0)
    np.testing.assert_allclose(early.values()[60:-5], plain.values()[65:], atol=5e-3)
    assert np.abs(early.values()[-1] - plain.values()[-1]).max() > 0.01


def test_a_velocity_channel_needs_no_joint_state(
    make_bench: MakeBench, make_base: MakeChannel
) -> None:
    bench = make_bench(channels=(make_base(),))
    assert bench.executor.enable(bench.now_ns, bench.steady_ns) is None
    bench.chunk(lambda t: 0.3)
    bench.step(20, state=False)
    assert bench.values("base")[-1].tolist() == pytest.approx([0.3, 0.3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"control_period_s": 0.0}, "control_period_s"),
        ({"chunk_timeout_s": math.nan}, "chunk_timeout_s"),
        ({"lead_s": -0.1}, "lead_s"),
        ({"ramp_fraction": 1.5}, "ramp_fraction"),
        ({"final_holds": 0}, "final_holds"),
        ({"first_command": "jump"}, "first_command"),
        ({"channels": ()}, "no channel"),
    ],
)
def test_impossible_settings_are_refused_by_name(
    make_bench: MakeBench, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make_bench(**change)


def test_impossible_channels_are_refused(
    make_bench: MakeBench, make_arm: MakeChannel, make_base: MakeChannel
) -> None:
    with pytest.raises(ConfigurationError, match="both command shoulder"):
        make_bench(channels=(make_arm(), make_arm(name="other")))
    with pytest.raises(ConfigurationError, match="same name"):
        make_bench(channels=(make_arm(), make_base(name="arm")))
    with pytest.raises(ConfigurationError, match="each named once"):
        make_arm(joints=("a", "a"))
    with pytest.raises(ConfigurationError, match="shape"):
        make_arm(joints=("a", "b", "c"))
    with pytest.raises(ConfigurationError, match="contain 0"):
        make_base(limits=JointLimits.of(2, lower=0.1, upper=1.0))
