"""From a histogram of an activation to the magnitude that int8's 127 stands for.

Owns: the three ways to choose a static range. Must not import onnx or torch.
"""

from __future__ import annotations

import numpy as np

from groot_int8_ros.policy.types import Float64Array
from offline_tools.quantize.histogram import MagnitudeHistogram

INT8_MAX = 127

# The share of values that the range `percentile` covers: what TensorRT's and ModelOpt's
# documentation suggest for transformers lies between 99.9 and 99.999 %.
DEFAULT_PERCENTILE = 99.99

_ENTROPY_BINS = 2048
_ENTROPY_LEVELS = 128


def static_range(
    histogram: MagnitudeHistogram, method: str, percentile: float = DEFAULT_PERCENTILE
) -> float:
    """Return the magnitude at which an activation is clipped.

    Args:
        histogram: Of the activation's magnitudes over the calibration set.
        method: `max`, the largest magnitude seen; `percentile`, the one that so many per cent of
            the values do not exceed; `entropy`, see `entropy_range`.
        percentile: For the method of that name, in per cent.

    Returns:
        A positive number; 1.0 for an activation that was always zero.
    """
    if histogram.max == 0.0:
        return 1.0
    if method == "max":
        return histogram.max
    if method == "percentile":
        # Where most values are zero the percentile can be zero, which is no range.
        return histogram.quantile(percentile / 100.0) or histogram.max
    if method == "entropy":
        return entropy_range(histogram)
    raise ValueError(f"unknown range method {method!r}")


def entropy_range(histogram: MagnitudeHistogram) -> float:
    """Return the clipping magnitude that loses least information.

    TensorRT's entropy calibration (S. Migacz, "8-bit Inference with TensorRT", GTC 2017): of all
    thresholds it takes the one whose clipped distribution P and its 128-level quantisation Q have
    the smallest Kullback-Leibler divergence. P is the histogram up to the threshold with the
    clipped values added to its last bin; Q merges the *unclipped* bins into 128 levels and spreads
    each level over those of its bins that are not empty.
    """
    top = histogram.max
    counts = histogram.linear(_ENTROPY_BINS, top)
    # Zeros are exact under every scale and would drown the rest of the distribution.
    counts[0] = 0.0
    if not counts.any():
        return top
    beyond = counts.sum() - np.cumsum(counts)
    best, best_divergence = _ENTROPY_BINS, np.inf
    for threshold in range(_ENTROPY_LEVELS, _ENTROPY_BINS + 1):
        inside = counts[:threshold]
        if not inside.any():
            continue
        divergence = _divergence(inside, float(beyond[threshold - 1]))
        if divergence < best_divergence:
            best, best_divergence = threshold, divergence
    # Of the best threshold's last bin, the upper edge.
    return float(top * best / _ENTROPY_BINS)


def _divergence(inside: Float64Array, clipped: float) -> float:
    """Return KL(P || Q) in nats."""
    filled = inside > 0.0
    starts = (np.arange(_ENTROPY_LEVELS) * len(inside)) // _ENTROPY_LEVELS
    mass = np.add.reduceat(inside, starts)
    occupied = np.add.reduceat(filled.astype(np.float64), starts)
    level = np.repeat(
        np.divide(mass, occupied, out=np.zeros_like(mass), where=occupied > 0.0),
        np.diff(np.append(starts, len(inside))),
    )
    reference = inside.copy()
    reference[-1] += clipped
    quantised = np.where(filled, level, 0.0)
    counted = reference > 0.0
    p = reference[counted] / reference.sum()
    q = quantised[counted] / quantised.sum()
    if (q == 0.0).any():
        # Clipped mass in a last bin that was empty: Q cannot explain it at all.
        return np.inf
    return float(np.sum(p * np.log(p / q)))
