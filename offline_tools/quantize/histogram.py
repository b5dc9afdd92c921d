"""Histograms of magnitudes that need no range in advance.

Owns: `MagnitudeHistogram`. Must not import onnx or torch.

A massive activation is four orders of magnitude above the rest of its tensor. A histogram of
equal bins up to the maximum, as calibrators keep it, then holds all other values in its first bin,
and bins chosen from the first sample are wrong for the second. So magnitudes are counted by the
leading bits of their float32 representation: 1024 equal bins in each octave, from 2**-24 to 2**24.
That is one shift and one count, exact to merge, the same in whatever order the samples come, and
in the top octave as fine as 2048 equal bins up to the maximum.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from groot_int8_ros.policy.types import Float64Array, Int64Array

_MANTISSA_BITS = 10
_SHIFT = 23 - _MANTISSA_BITS
_LOWEST_EXPONENT, _HIGHEST_EXPONENT = -24, 24
_FIRST = (127 + _LOWEST_EXPONENT) << _MANTISSA_BITS
_BINS = (_HIGHEST_EXPONENT - _LOWEST_EXPONENT) << _MANTISSA_BITS


def _edges() -> Float64Array:
    octaves = np.arange(_LOWEST_EXPONENT, _HIGHEST_EXPONENT)
    steps = np.arange(1 << _MANTISSA_BITS) / (1 << _MANTISSA_BITS)
    inner = np.ldexp((1.0 + steps)[None, :], octaves[:, None]).ravel()
    return np.concatenate([[0.0], inner, [np.ldexp(1.0, _HIGHEST_EXPONENT)]])


# Bin i holds magnitudes from _EDGES[i] to _EDGES[i + 1]; bin 0 holds all below 2**-24.
_EDGES = _edges()


class MagnitudeHistogram:
    """Counts of |x|, and its exact maximum."""

    def __init__(self) -> None:
        self._counts: Int64Array = np.zeros(_BINS + 1, np.int64)
        self._max = 0.0

    @property
    def max(self) -> float:
        """The largest magnitude seen."""
        return self._max

    @property
    def total(self) -> int:
        """How many values were counted."""
        return int(self._counts.sum())

    def add(self, values: NDArray[Any]) -> None:
        """Count values.

        Args:
            values: Finite floats of any shape.
        """
        if not values.size:
            return
        flat = np.abs(values.astype(np.float32, copy=False).ravel())
        codes = (flat.view(np.int32) >> _SHIFT) - (_FIRST - 1)
        np.clip(codes, 0, _BINS, out=codes)
        self._counts += np.bincount(codes, minlength=_BINS + 1)
        self._max = max(self._max, float(flat.max()))

    def quantile(self, fraction: float) -> float:
        """Return the magnitude that a fraction of the values does not exceed.

        Args:
            fraction: From 0 to 1.
        """
        cumulative = np.cumsum(self._counts)
        index = int(np.searchsorted(cumulative, fraction * cumulative[-1]))
        return float(min(_EDGES[index + 1], self._max))

    def linear(self, bins: int, top: float) -> Float64Array:
        """Return the counts in equal bins from 0 to `top`; what is above stands in the last one.

        A bin of the octaves that crosses an edge is split in proportion to its width.
        """
        cumulative = np.concatenate([[0.0], np.cumsum(self._counts, dtype=np.float64)])
        edges = np.linspace(0.0, top, bins + 1)
        at_edges = np.interp(edges, _EDGES, cumulative)
        counts: Float64Array = np.diff(at_edges)
        counts[-1] += cumulative[-1] - at_edges[-1]
        return counts
