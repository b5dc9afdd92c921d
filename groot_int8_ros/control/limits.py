"""Limits on what is commanded, and the one step that can never break them.

Owns: `JointLimits` and the functions that move a command one control period on. Must not import
ROS or anything of the package but its errors and types. A command is position-like (a joint's
target) or velocity-like (a base's twist, a velocity controller's target); `follow` moves the
first, `follow_velocity` the second.

Why a position step is always possible. A joint at distance `gap` from a position limit that moves
towards it at `v` can stop in time iff `v² / 2a <= gap`, `a` being its largest acceleration.
Commands move by `x' = x + v' dt`, so braking at `a` covers at most `v² / 2a`, whatever the lengths
of the steps: each step uses the lower of the two speeds at its ends. A step keeps the inequality
for the next one by choosing `v' dt + v'² / 2a <= gap`; braking fully, `v' = v - a dt`, always
satisfies it where the inequality held before. So position, velocity and acceleration limits hold
together, for steps of any length up to the control period.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from groot_int8_ros.control.types import BoolArray, Float64Array, plausible
from groot_int8_ros.errors import ConfigurationError


@dataclass(frozen=True)
class JointLimits:
    """Limits of some joints, each float64, shape (J,); infinite where a joint has none.

    Attributes:
        lower: Smallest command, in the command's unit (radians, metres, or per second).
        upper: Largest command.
        velocity: Fastest change of a position, unit/s; largest magnitude of a velocity command.
        acceleration: Fastest change of velocity, unit/s².
        step: Largest change between two commands.

    Raises:
        ConfigurationError: Shapes differ, a bound is not a number, a range is empty or a rate is
            not positive.
    """

    lower: Float64Array
    upper: Float64Array
    velocity: Float64Array
    acceleration: Float64Array
    step: Float64Array

    def __post_init__(self) -> None:
        sizes = {getattr(self, field.name).shape for field in fields(self)}
        if len(sizes) != 1 or len(next(iter(sizes))) != 1:
            raise ConfigurationError(
                "limits need one value for each joint: "
                + ", ".join(f"{f.name} has shape {getattr(self, f.name).shape}" for f in _FIELDS)
            )
        for name, bad, wish in (
            ("lower", ~(self.lower < np.inf), "a number"),
            ("upper", ~(self.upper > -np.inf), "a number"),
            ("upper", ~(self.lower <= self.upper), "at least as large as lower"),
            ("velocity", ~(self.velocity > 0.0), "above 0"),
            ("acceleration", ~(self.acceleration > 0.0), "above 0"),
            ("step", ~(self.step > 0.0), "above 0"),
        ):
            if bad.any():
                index = int(np.flatnonzero(bad)[0])
                value = getattr(self, name)[index]
                raise ConfigurationError(f"limit '{name}' of joint {index} is {value}, not {wish}")

    @classmethod
    def of(
        cls,
        joints: int,
        *,
        lower: float = -np.inf,
        upper: float = np.inf,
        velocity: float = np.inf,
        acceleration: float = np.inf,
        step: float = np.inf,
    ) -> JointLimits:
        """Return the same limits for every one of `joints` joints."""
        values = (lower, upper, velocity, acceleration, step)
        return cls(*(np.full(joints, value, np.float64) for value in values))

    def tightened(self, other: JointLimits) -> JointLimits:
        """Return the tighter of two limits, joint by joint.

        Raises:
            ConfigurationError: Nothing is left of a joint's range.
        """
        return JointLimits(
            lower=np.maximum(self.lower, other.lower),
            upper=np.minimum(self.upper, other.upper),
            velocity=np.minimum(self.velocity, other.velocity),
            acceleration=np.minimum(self.acceleration, other.acceleration),
            step=np.minimum(self.step, other.step),
        )


_FIELDS = fields(JointLimits)


@dataclass(frozen=True)
class Motion:
    """A command and how fast it is changing.

    Attributes:
        position: The command, float64, shape (J,).
        velocity: Its rate of change, unit/s, float64, shape (J,).
    """

    position: Float64Array
    velocity: Float64Array

    @classmethod
    def at_rest(cls, position: Float64Array) -> Motion:
        """Return the motion that stands still at a position."""
        return cls(np.array(position, np.float64), np.zeros(len(position)))

    @property
    def resting(self) -> bool:
        """Whether no joint moves."""
        return not self.velocity.any()


@dataclass(frozen=True)
class Clamped:
    """Which joints a limit kept from what was asked, each bool, shape (J,).

    Attributes:
        position: The target lay outside the joint's range.
        velocity: The target asked for more speed, or for a larger step.
        acceleration: The target asked for a faster change of speed.
    """

    position: BoolArray
    velocity: BoolArray
    acceleration: BoolArray


def top_speed(limits: JointLimits, period_s: float) -> Float64Array:
    """Return the speed that velocity and step allow together, float64, shape (J,).

    Args:
        limits: Of the joints.
        period_s: Control period, seconds. No step of a command takes longer, so a speed of
            `step / period_s` never makes one larger than `step`.
    """
    return np.minimum(limits.velocity, limits.step / period_s)


def follow(
    limits: JointLimits,
    period_s: float,
    motion: Motion,
    target: Float64Array,
    target_velocity: Float64Array,
    dt_s: float,
    speed_fraction: float = 1.0,
) -> tuple[Motion, Clamped]:
    """Move a position command one step towards a moving target, within all limits.

    A target that itself keeps the limits is met exactly. One that jumped is caught up with on top
    of its own velocity, at a speed from which the joint can still stop at it.

    Args:
        limits: Of the joints.
        period_s: Control period, seconds.
        motion: The last command. Its position must lie within the limits.
        target: Where to be after the step, float64, shape (J,). A joint whose target or target
            velocity is not a plausible number brakes.
        target_velocity: The target's velocity during the step, float64, shape (J,).
        dt_s: Time since the last command, seconds. More than the control period counts as the
            period: a late step must not be a larger one. Not positive: nothing changes.
        speed_fraction: Part of the top speed that may be used; braking is not affected.

    Returns:
        The next command, and what the limits kept from the target.
    """
    dt_s = min(dt_s, period_s)
    joints = len(motion.position)
    if not dt_s > 0.0:
        nothing = np.zeros(joints, bool)
        return motion, Clamped(nothing, nothing, nothing)
    finite = plausible(target) & plausible(target_velocity)
    inside = np.clip(np.where(finite, target, motion.position), limits.lower, limits.upper)
    outside = finite & (inside != target)
    carried = np.where(finite & ~outside, target_velocity, 0.0)

    fastest = top_speed(limits, period_s) * speed_fraction
    carried = np.clip(carried, -fastest, fastest)
    behind = inside - motion.position - carried * dt_s
    caught_up = np.copysign(_stoppable_speed(np.abs(behind), limits.acceleration, dt_s), behind)
    asked = np.where(finite, carried + caught_up, 0.0)
    wanted = np.clip(asked, -fastest, fastest)
    velocity = _within_reach(limits, motion, wanted, dt_s)
    moved = np.clip(motion.position + velocity * dt_s, limits.lower, limits.upper)

    needed = np.where(finite, (inside - motion.position) / dt_s, 0.0)
    too_fast = np.abs(needed) > fastest * (1.0 + _ROUNDING)
    short = np.abs(moved - inside) > _ROUNDING * (1.0 + np.abs(inside))
    return Motion(moved, velocity), Clamped(outside, too_fast, finite & short & ~too_fast)


def brake(limits: JointLimits, period_s: float, motion: Motion, dt_s: float) -> Motion:
    """Slow a position command down as fast as the acceleration limit allows, then keep it.

    Args:
        limits: Of the joints.
        period_s: Control period, seconds.
        motion: The last command.
        dt_s: See `follow`.

    Returns:
        The next command; at rest it is the last one again.
    """
    dt_s = min(dt_s, period_s)
    if not dt_s > 0.0:
        return motion
    velocity = _within_reach(limits, motion, np.zeros(len(motion.position)), dt_s)
    moved = np.clip(motion.position + velocity * dt_s, limits.lower, limits.upper)
    return Motion(moved, velocity)


def follow_velocity(
    limits: JointLimits, period_s: float, motion: Motion, target: Float64Array, dt_s: float
) -> tuple[Motion, Clamped]:
    """Move a velocity command one step towards a target, within all limits.

    Args:
        limits: Of the joints; `velocity` bounds the command's magnitude, `acceleration` its rate
            of change, `step` its change between two commands.
        period_s: Control period, seconds.
        motion: The last command: `position` is the commanded velocity, `velocity` its rate.
        target: The velocity to command, float64, shape (J,); 0 where it is no plausible number.
        dt_s: See `follow`.

    Returns:
        The next command, and what the limits kept from the target.
    """
    dt_s = min(dt_s, period_s)
    joints = len(motion.position)
    if not dt_s > 0.0:
        nothing = np.zeros(joints, bool)
        return motion, Clamped(nothing, nothing, nothing)
    wanted = np.where(plausible(target), target, 0.0)
    inside = np.clip(wanted, limits.lower, limits.upper)
    slow = np.clip(inside, -limits.velocity, limits.velocity)
    reach = np.minimum(limits.acceleration * dt_s, limits.step)
    command = np.clip(slow, motion.position - reach, motion.position + reach)
    rate = (command - motion.position) / dt_s
    return Motion(command, rate), Clamped(inside != wanted, slow != inside, command != slow)


# What is left of a difference that is none, relative to the numbers it is made of.
_ROUNDING = 1e-9


def _stoppable_speed(gap: Float64Array, acceleration: Float64Array, dt_s: float) -> Float64Array:
    """Return the largest v with `v dt + v² / 2a <= gap`.

    The quadratic's root, written without the difference of two large numbers and so that an
    infinite acceleration gives `gap / dt`.
    """
    return 2.0 * gap / (dt_s + np.sqrt(dt_s * dt_s + 2.0 * gap / acceleration))


def _within_reach(
    limits: JointLimits, motion: Motion, wanted: Float64Array, dt_s: float
) -> Float64Array:
    """Return the velocity nearest to the wanted one that keeps acceleration and position."""
    with np.errstate(invalid="ignore"):
        change = limits.acceleration * dt_s
        up = _stoppable_speed(limits.upper - motion.position, limits.acceleration, dt_s)
        down = -_stoppable_speed(motion.position - limits.lower, limits.acceleration, dt_s)
    # No position limit: infinity over infinity.
    up = np.where(np.isinf(limits.upper), np.inf, up)
    down = np.where(np.isinf(limits.lower), -np.inf, down)
    low, high = motion.velocity - change, motion.velocity + change
    return np.clip(np.clip(wanted, down, up), low, high)
