"""Whether the robot goes where it is told.

Owns: `Tracking`, the distance of measured positions from what was commanded of late. Must not
import ROS or the policy. It judges and never commands: a joint that does not follow is for a
person to look at.

A moving joint trails its command by its controller's delay, so a measured position is compared
with all commands of the last second: one that lies among them is late and not lost. A joint that
ignores its commands, or is stopped by something, stays outside.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from groot_int8_ros.control.types import NANOSECONDS, Float64Array

# Longer than any controller's delay, shorter than a motion.
_WINDOW_S = 1.0
# Commands are kept as ranges of so many parts of the window, whatever the control rate is.
_PARTS = 10
_PART_NS = round(_WINDOW_S * NANOSECONDS / _PARTS)


class Tracking:
    """The commands of one position channel's last second."""

    def __init__(self) -> None:
        self._parts: deque[tuple[int, Float64Array, Float64Array]] = deque(maxlen=_PARTS + 1)

    def add(self, commanded: Float64Array, steady_ns: int) -> None:
        """Note a command.

        Args:
            commanded: Positions, float64, shape (J,).
            steady_ns: Steady time.
        """
        part = steady_ns // _PART_NS
        if self._parts and self._parts[-1][0] == part:
            _, low, high = self._parts.pop()
            self._parts.append((part, np.minimum(low, commanded), np.maximum(high, commanded)))
        else:
            self._parts.append((part, commanded, commanded))

    def error(self, measured: Float64Array, steady_ns: int) -> Float64Array:
        """Return how far each joint stands from the commands of the last second.

        Args:
            measured: Positions, float64, shape (J,).
            steady_ns: Steady time.

        Returns:
            Distances of at least 0, float64, shape (J,); 0 while there are no commands.
        """
        oldest = steady_ns // _PART_NS - _PARTS
        while self._parts and self._parts[0][0] < oldest:
            self._parts.popleft()
        if not self._parts:
            return np.zeros_like(measured)
        low = np.min([part[1] for part in self._parts], axis=0)
        high = np.max([part[2] for part in self._parts], axis=0)
        return np.asarray(np.maximum(np.maximum(low - measured, measured - high), 0.0))

    def clear(self) -> None:
        """Forget the commands."""
        self._parts.clear()
