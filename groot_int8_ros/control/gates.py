"""Values that lie outside what the policy has ever seen.

Owns: `Range`, the range of a training set with a margin. Must not import ROS or the policy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from groot_int8_ros.control.types import BoolArray, Float64Array


@dataclass(frozen=True)
class Range:
    """What the training set held, joint by joint, in the units of the robot's messages.

    Attributes:
        low: Smallest value, float64, shape (J,); minus infinity where nothing is known.
        high: Largest value, likewise.
        margin: How far outside a value may lie, as a part of the joint's own range.
    """

    low: Float64Array
    high: Float64Array
    margin: float

    def outside(self, values: Float64Array) -> BoolArray:
        """Return which joints lie outside, bool, shape (J,).

        Args:
            values: float64, shape (J,) or (R, J); with rows, one row outside is enough.
        """
        width = self.high - self.low
        slack = self.margin * np.where(np.isfinite(width), width, 0.0)
        rows = np.atleast_2d(values)
        inside = (rows >= self.low - slack) & (rows <= self.high + slack)
        return np.asarray(~inside.all(axis=0))
