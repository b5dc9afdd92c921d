"""Action chunks by time: which row is due, and what lies between two rows.

Owns: `TimedChunk`, what makes one unusable, and `Rows`, its interpolation. Must not import ROS or
the policy.

Row i of a chunk is due at the observation's stamp plus its time from the start. Executing a chunk
at time t therefore means the value for t: rows that were due while the policy computed are
skipped, because the robot was somewhere else meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from groot_int8_ros.control.types import (
    NANOSECONDS,
    Float64Array,
    Int64Array,
    plausible,
)


@dataclass(frozen=True)
class TimedChunk:
    """One answer of the policy, as it arrived.

    Attributes:
        stamp_ns: The observation's time.
        joint_names: Name of each column.
        due_ns: When each row is due, int64, shape (R,).
        targets: Targets in the units of the robot's messages, float64, shape (R, J).
    """

    stamp_ns: int
    joint_names: tuple[str, ...]
    due_ns: Int64Array
    targets: Float64Array


@dataclass(frozen=True)
class Refusal:
    """Why something was not taken.

    Attributes:
        reason: One of this package's reasons, a few words; counted.
        message: The same for a person, with names and numbers.
    """

    reason: str
    message: str


MALFORMED = "malformed chunk"
NOT_FINITE = "not finite"

# More than any policy answers at once.
_MOST_ROWS = 4096


def shape_fault(chunk: TimedChunk) -> Refusal | None:
    """Return what makes a chunk unusable whatever the robot does, or None."""
    names, rows = chunk.joint_names, len(chunk.due_ns)
    repeated = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if repeated:
        return Refusal(MALFORMED, f"the chunk names the joint {repeated[0]} more than once")
    if not 0 < rows <= _MOST_ROWS or chunk.targets.shape != (rows, len(names)):
        return Refusal(
            MALFORMED,
            f"the chunk has {rows} rows and {len(names)} joints, but targets of shape "
            f"{chunk.targets.shape}",
        )
    if (np.diff(chunk.due_ns) <= 0).any():
        return Refusal(MALFORMED, "the times of the chunk's rows do not increase")
    finite = [bool(plausible(column).all()) for column in chunk.targets.T]
    if not all(finite):
        bad = [name for name, good in zip(names, finite, strict=True) if not good]
        return Refusal(
            NOT_FINITE, f"the chunk's targets of {', '.join(bad)} are not finite numbers"
        )
    return None


class Rows:
    """Some columns of a chunk as a smooth function of time.

    Cubic Hermite pieces through the rows, with the tangents of second-order finite differences
    (`numpy.gradient`; on even spacing Catmull and Rom's, 1974): the velocity has no steps at the
    rows, which at control rate would be spikes of acceleration.

    Args:
        due_ns: When each row is due, int64, shape (R,), increasing.
        values: float64, shape (R, J), finite.
    """

    def __init__(self, due_ns: Int64Array, values: Float64Array) -> None:
        self.due_ns = due_ns
        self.values = values
        # Seconds since the first row: as float64, nanoseconds since 1970 are 200 ns coarse.
        self._times_s = (due_ns - due_ns[0]) / NANOSECONDS
        self._slopes = np.zeros_like(values)
        if len(due_ns) > 2:
            self._slopes[:] = np.gradient(values, self._times_s, axis=0, edge_order=2)
        elif len(due_ns) == 2:
            self._slopes[:] = (values[1] - values[0]) / self._times_s[1]

    @property
    def first_ns(self) -> int:
        """When the first row is due."""
        return int(self.due_ns[0])

    @property
    def last_ns(self) -> int:
        """When the last row is due."""
        return int(self.due_ns[-1])

    def at(self, now_ns: int) -> Float64Array:
        """Return the value for a time, float64, shape (J,).

        Before the first row it is the first row, after the last the last one.
        """
        if now_ns <= self.first_ns:
            return np.array(self.values[0])
        if now_ns >= self.last_ns:
            return np.array(self.values[-1])
        row = int(np.searchsorted(self.due_ns, now_ns, side="right")) - 1
        span_s = self._times_s[row + 1] - self._times_s[row]
        u = ((now_ns - self.first_ns) / NANOSECONDS - self._times_s[row]) / span_s
        start, end = self.values[row], self.values[row + 1]
        leaving, arriving = self._slopes[row] * span_s, self._slopes[row + 1] * span_s
        value: Float64Array = (
            start
            + u * leaving
            + u**2 * (3.0 * (end - start) - 2.0 * leaving - arriving)
            + u**3 * (2.0 * (start - end) + leaving + arriving)
        )
        return value

    def past_rows(self, now_ns: int) -> int:
        """Return how many rows were due before a time."""
        return int(np.searchsorted(self.due_ns, now_ns, side="left"))
