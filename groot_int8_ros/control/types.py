"""Numbers of the control package: array types, and what passes for a number.

Owns: their names, and `plausible`. Must not import anything from the package.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Float64Array = NDArray[np.float64]
Int64Array = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

NANOSECONDS = 1_000_000_000

# Far beyond any joint there is; arithmetic with what lies within cannot overflow.
_LARGEST = 1e12


def plausible(values: Float64Array) -> BoolArray:
    """Return which values are numbers that a joint could have, bool, same shape."""
    good: BoolArray = np.abs(values) <= _LARGEST
    return good
