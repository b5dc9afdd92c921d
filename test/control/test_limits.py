"""Limits: no command breaks one, whatever the target, and none is in the way of a good target."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from groot_int8_ros.control.limits import (
    JointLimits,
    Motion,
    brake,
    follow,
    follow_velocity,
    top_speed,
)
from groot_int8_ros.errors import ConfigurationError

PERIOD_S = 0.02
# Relative to the numbers at hand; a limit that is missed by more is missed.
ROUNDING = 1e-9

anything = st.floats(allow_nan=True, allow_infinity=True, width=64)
targets = st.one_of(st.floats(-4.0, 4.0), anything)
rates = st.one_of(st.just(np.inf), st.floats(1e-3, 50.0))
times = st.one_of(
    st.just(PERIOD_S), st.floats(1e-6, 3.0 * PERIOD_S), st.sampled_from([0.0, -1.0, 1e9])
)


@st.composite
def limits(draw: st.DrawFn, joints: int = 2) -> JointLimits:
    columns: dict[str, list[float]] = {name: [] for name in JointLimits.__dataclass_fields__}
    for _ in range(joints):
        lower = draw(st.one_of(st.just(-np.inf), st.floats(-3.0, 0.0)))
        columns["lower"].append(lower)
        columns["upper"].append(draw(st.one_of(st.just(np.inf), st.floats(0.0, 3.0))))
        for name in ("velocity", "acceleration", "step"):
            columns[name].append(draw(rates))
    return JointLimits(**{name: np.array(values) for name, values in columns.items()})


@st.composite
def starts(draw: st.DrawFn, limit: JointLimits) -> Motion:
    share = np.array(draw(st.lists(st.floats(0.0, 1.0), min_size=2, max_size=2)))
    low, high = np.maximum(limit.lower, -5.0), np.minimum(limit.upper, 5.0)
    return Motion.at_rest(np.clip(low + share * (high - low), limit.lower, limit.upper))


def check(limit: JointLimits, last: Motion, new: Motion, dt_s: float) -> None:
    """Assert that a position command keeps every limit after the last one."""
    dt_s = min(dt_s, PERIOD_S)
    moved = np.abs(new.position - last.position)
    slack = ROUNDING * (1.0 + np.abs(new.position) + np.abs(last.position))
    assert np.isfinite(new.position).all()
    assert np.isfinite(new.velocity).all()
    assert (limit.lower <= new.position).all()
    assert (new.position <= limit.upper).all()
    if not dt_s > 0.0:
        assert not moved.any()
        return
    fastest = top_speed(limit, PERIOD_S)
    assert (np.abs(new.velocity) <= fastest * (1.0 + ROUNDING)).all()
    assert (moved <= fastest * dt_s + slack).all()
    assert (moved <= limit.step + slack).all()
    # The velocity that is accounted for is the one that is commanded.
    assert (np.abs(new.position - last.position - new.velocity * dt_s) <= slack).all()
    changed = np.abs(new.velocity - last.velocity)
    assert (changed <= limit.acceleration * dt_s * (1.0 + 1e-6) + ROUNDING).all()


@given(data=st.data())
def test_no_position_command_breaks_a_limit_whatever_the_target(data: st.DataObject) -> None:
    limit = data.draw(limits())
    motion = data.draw(starts(limit))
    for _ in range(data.draw(st.integers(1, 40))):
        dt_s = data.draw(times)
        if data.draw(st.booleans()):
            target = np.array([data.draw(targets), data.draw(targets)])
            moving = np.array([data.draw(targets), data.draw(targets)])
            fraction = data.draw(st.sampled_from([1.0, 0.2]))
            new, _ = follow(limit, PERIOD_S, motion, target, moving, dt_s, fraction)
        else:
            new = brake(limit, PERIOD_S, motion, dt_s)
        check(limit, motion, new, dt_s)
        motion = new


@given(data=st.data())
def test_no_velocity_command_breaks_a_limit_whatever_the_target(data: st.DataObject) -> None:
    limit = data.draw(limits())
    motion = Motion.at_rest(np.zeros(2))
    for _ in range(data.draw(st.integers(1, 40))):
        dt_s = data.draw(times)
        target = np.array([data.draw(targets), data.draw(targets)])
        new, _ = follow_velocity(limit, PERIOD_S, motion, target, dt_s)
        assert (limit.lower <= new.position).all()
        assert (new.position <= limit.upper).all()
        assert (np.abs(new.position) <= limit.velocity).all()
        changed = np.abs(new.position - motion.position)
        assert (changed <= limit.step * (1.0 + ROUNDING)).all()
        if dt_s > 0.0:
            bound = limit.acceleration * min(dt_s, PERIOD_S)
            assert (changed <= bound * (1.0 + ROUNDING) + 1e-12).all()
        else:
            assert not changed.any()
        motion = new


@given(
    acceleration=st.floats(0.5, 50.0),
    speed=st.floats(0.01, 2.0),
    steps=st.lists(st.floats(0.001, PERIOD_S), min_size=4, max_size=4),
)
def test_braking_takes_no_longer_way_than_the_proof_says(
    acceleration: float, speed: float, steps: list[float]
) -> None:
    limit = JointLimits.of(1, acceleration=acceleration)
    motion = Motion(np.zeros(1), np.array([speed]))
    count = 0
    while not motion.resting:
        motion = brake(limit, PERIOD_S, motion, steps[count % 4])
        count += 1
        assert count < 100_000
    assert 0.0 <= motion.position[0] <= speed**2 / (2.0 * acceleration) + ROUNDING
    assert (brake(limit, PERIOD_S, motion, PERIOD_S).position == motion.position).all()


def test_a_target_within_the_limits_is_met_exactly() -> None:
    limit = JointLimits.of(1, lower=-2.0, upper=2.0, velocity=2.0, acceleration=8.0, step=0.05)

    def target(step: int) -> np.ndarray:
        return np.array([np.cos(1.5 * step * PERIOD_S)])

    motion = Motion.at_rest(target(0))
    for step in range(1, 300):
        moving = (target(step) - target(step - 1)) / PERIOD_S
        motion, clamped = follow(limit, PERIOD_S, motion, target(step), moving, PERIOD_S)
        np.testing.assert_allclose(motion.position, target(step), atol=1e-6)
        assert not clamped.position.any()
        assert not clamped.velocity.any()
    assert np.abs(motion.velocity).max() > 0.1, "the trajectory stands still and shows nothing"


def test_a_jump_is_caught_up_with_and_not_overshot() -> None:
    limit = JointLimits.of(1, velocity=1.0, acceleration=5.0)
    motion = Motion.at_rest(np.zeros(1))
    positions = []
    for _ in range(150):
        motion, _ = follow(limit, PERIOD_S, motion, np.ones(1), np.zeros(1), PERIOD_S)
        positions.append(motion.position[0])
    assert max(positions) <= 1.0 + 1e-9
    assert positions[-1] == pytest.approx(1.0, abs=1e-6)
    # 0.2 s to reach 1 rad/s, 0.1 rad on the way; as much to stop; 0.8 rad in between.
    assert positions[int(1.3 / PERIOD_S)] == pytest.approx(1.0, abs=0.02)


def test_what_kept_a_joint_from_its_target_is_said() -> None:
    limit = JointLimits.of(3, lower=-1.0, upper=1.0, velocity=1.0, acceleration=5.0)
    motion = Motion(np.array([1.0, 0.0, 0.0]), np.array([0.0, 1.0, 0.0]))
    target = np.array([1.5, 0.9, 0.01])
    _, clamped = follow(limit, PERIOD_S, motion, target, np.zeros(3), PERIOD_S)
    assert clamped.position.tolist() == [True, False, False]
    assert clamped.velocity.tolist() == [False, True, False]
    assert clamped.acceleration.tolist() == [False, False, True]


def test_a_late_step_is_not_a_larger_one() -> None:
    limit = JointLimits.of(1, velocity=1.0)
    late, _ = follow(limit, PERIOD_S, Motion.at_rest(np.zeros(1)), np.ones(1), np.zeros(1), 5.0)
    assert late.position[0] == pytest.approx(PERIOD_S)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lower": 1.0, "upper": 0.0}, "upper"),
        ({"lower": np.nan}, "lower"),
        ({"lower": np.inf}, "lower"),
        ({"upper": np.nan}, "upper"),
        ({"velocity": 0.0}, "velocity"),
        ({"velocity": np.nan}, "velocity"),
        ({"acceleration": -1.0}, "acceleration"),
        ({"step": 0.0}, "step"),
    ],
)
def test_impossible_limits_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=f"'{message}' of joint 0"):
        JointLimits.of(1, **change)


def test_the_tighter_of_two_limits_counts() -> None:
    tight = JointLimits.of(1, lower=-1.0, velocity=2.0).tightened(
        JointLimits.of(1, lower=-2.0, upper=0.5, velocity=1.0)
    )
    assert [tight.lower[0], tight.upper[0], tight.velocity[0]] == [-1.0, 0.5, 1.0]
    with pytest.raises(ConfigurationError, match="upper"):
        JointLimits.of(1, lower=1.0).tightened(JointLimits.of(1, upper=0.0))
