"""Intervals and paired tests of what episodes give.

Owns: formulas on arrays, without what the numbers stand for. Episodes of two setups are paired by
the seed of their scene. Nothing here assumes a normal distribution: a difference of means is
tested by flipping signs and its interval is resampled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from groot_int8_ros.policy.types import BoolArray, Float64Array

_Z_95 = 1.959964
_DRAWS = 10_000
# Up to here all assignments of signs are counted instead of drawn.
_MOST_EXACT = 13


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Return the 95 % interval of a proportion (Wilson 1927, J. Am. Stat. Assoc. 22)."""
    share = successes / trials
    spread = _Z_95**2 / trials
    middle = (share + spread / 2.0) / (1.0 + spread)
    half = (
        _Z_95 * math.sqrt(share * (1.0 - share) / trials + spread / (4.0 * trials)) / (1 + spread)
    )
    return max(0.0, middle - half), min(1.0, middle + half)


def mcnemar_p(first: BoolArray, second: BoolArray) -> float:
    """Return the exact two-sided p of McNemar's test (Psychometrika 12, 1947).

    Of the pairs that differ, each side is as often the better one by chance: a binomial test.

    Args:
        first: Successes, bool, shape (N,).
        second: Those of the same scenes, same shape.
    """
    better, worse = int((second & ~first).sum()), int((first & ~second).sum())
    differing, fewer = better + worse, min(better, worse)
    tail = sum(math.comb(differing, k) for k in range(fewer + 1))
    return min(1.0, 2.0 * tail / 2.0**differing)


def paired_share_interval(first: BoolArray, second: BoolArray) -> tuple[float, float]:
    """Return the 95 % interval of the difference of two paired proportions, second less first.

    Newcombe 1998 (Stat. Med. 17, 2635), method 10: from the Wilson intervals of both, with their
    correlation. Unlike a resampled one it has a width where no episode failed.
    """
    count = len(first)
    both, neither = int((first & second).sum()), int((~first & ~second).sum())
    gained, lost = int((second & ~first).sum()), int((first & ~second).sum())
    share_1, share_2 = (both + lost) / count, (both + gained) / count
    low_1, high_1 = wilson_interval(both + lost, count)
    low_2, high_2 = wilson_interval(both + gained, count)
    margins = (both + lost) * (gained + neither) * (both + gained) * (lost + neither)
    numerator = float(both * neither - lost * gained)
    if numerator > 0.0:
        numerator = max(numerator - count / 2.0, 0.0)
    correlation = numerator / math.sqrt(margins) if margins else 0.0

    def width(one: float, other: float) -> float:
        square = one**2 - 2.0 * correlation * one * other + other**2
        return math.sqrt(max(0.0, square))

    difference = share_2 - share_1
    return (
        difference - width(share_2 - low_2, high_1 - share_1),
        difference + width(high_2 - share_2, share_1 - low_1),
    )


def sign_flip_p(differences: Float64Array, *, seed: int = 0) -> float:
    """Return the two-sided p of paired differences whose mean is 0 by chance.

    The permutation test of pairs (Fisher 1935, The Design of Experiments, ch. 3): without an
    effect each difference is as likely with the other sign. All assignments of signs are counted
    where there are few, else 10,000 are drawn, which bounds p from below at 1/10,001.

    Args:
        differences: float64, shape (N,).
        seed: Of the draws.
    """
    count = len(differences)
    observed = abs(float(differences.sum()))
    if count <= _MOST_EXACT:
        bits = (np.arange(2**count)[:, None] >> np.arange(count)) & 1
        extra = 0
    else:
        bits = np.random.RandomState(seed).randint(0, 2, (_DRAWS, count))
        extra = 1
    sums = np.abs((2.0 * bits - 1.0) @ differences)
    # What differs from the observed sum by rounding alone is equal to it.
    reached = int((sums >= observed * (1.0 - 1e-9)).sum())
    return (reached + extra) / (len(sums) + extra)


def mean_interval(values: Float64Array, *, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % interval of a mean: percentiles of 10,000 resampled means (Efron 1979)."""
    random = np.random.RandomState(seed)
    means = values[random.randint(0, len(values), (_DRAWS, len(values)))].mean(axis=1)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p values corrected for their number (Holm 1979, Scand. J. Stat. 6), in their order.

    Those below 0.05 hold together with at most 5 % chance that one of them is wrong.
    """
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable").tolist()):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected
