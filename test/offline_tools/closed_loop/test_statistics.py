"""Hazards of the statistics: a formula off by a term, a correction in the wrong order."""

from __future__ import annotations

import math

import numpy as np
import pytest

from groot_int8_ros.policy.types import BoolArray
from offline_tools.closed_loop.statistics import (
    holm,
    mcnemar_p,
    mean_interval,
    paired_share_interval,
    sign_flip_p,
    wilson_interval,
)


def _pairs(both: int, first: int, second: int, neither: int) -> tuple[BoolArray, BoolArray]:
    counts = (both, first, second, neither)
    return (
        np.repeat(np.array([True, True, False, False]), counts),
        np.repeat(np.array([True, False, True, False]), counts),
    )


def test_the_interval_is_wilsons() -> None:
    # Values of Brown, Cai and DasGupta 2001 and of the closed form at the ends.
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson_interval(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert wilson_interval(100, 100) == pytest.approx((0.9630, 1.0), abs=1e-4)


def test_the_paired_interval_is_newcombes_method_10() -> None:
    # The first row of table II in Newcombe 1998: 36, 12, 2, 0.
    first, second = _pairs(36, 2, 12, 0)
    found = paired_share_interval(first, second)
    assert found == pytest.approx((0.0569, 0.3404), abs=1e-4)
    turned = paired_share_interval(second, first)
    assert turned == pytest.approx((-found[1], -found[0]))
    # Where nothing failed there is still something that is not known: Wilson's margin at the end.
    first, second = _pairs(100, 0, 0, 0)
    assert paired_share_interval(first, second) == pytest.approx((-0.0370, 0.0370), abs=1e-4)


def test_mcnemar_counts_the_pairs_that_differ_and_no_others() -> None:
    # Two-sided binomial tests of 1 of 10 and of 5 of 10: 22 / 1024 and 1.
    assert mcnemar_p(*_pairs(80, 9, 1, 10)) == pytest.approx(22 / 1024)
    assert mcnemar_p(*_pairs(0, 1, 9, 0)) == pytest.approx(22 / 1024)
    assert mcnemar_p(*_pairs(7, 5, 5, 0)) == 1.0
    assert mcnemar_p(*_pairs(100, 0, 0, 0)) == 1.0


def test_flipped_signs_are_counted_exactly_where_they_are_few() -> None:
    assert sign_flip_p(np.array([1.0, 2.0, 3.0, 4.0])) == 2 / 16
    # Of sums of 1, 1 and -3: three of eight assignments and their mirror images reach 1 or more.
    assert sign_flip_p(np.array([0.1, 0.1, -0.3])) == 1.0
    assert sign_flip_p(np.array([0.3, 0.3, 0.3, -0.1])) == 4 / 16
    assert sign_flip_p(np.zeros(50)) == 1.0


def test_drawn_signs_agree_with_the_normal_approximation() -> None:
    random = np.random.RandomState(1)
    values = random.standard_normal(100)
    values += 0.2 - values.mean()
    # z = 0.2 / (s / 10), with the second moment about 0 that the flips leave.
    z = 0.2 * 10.0 / np.sqrt((values**2).mean())
    assert sign_flip_p(values) == pytest.approx(math.erfc(z / math.sqrt(2.0)), abs=0.01)
    assert sign_flip_p(values) == sign_flip_p(values)
    assert sign_flip_p(np.ones(100)) == pytest.approx(1 / 10_001)


def test_the_resampled_interval_is_that_of_the_mean() -> None:
    values = np.random.RandomState(0).standard_normal(400)
    low, high = mean_interval(values)
    error = values.std() / 20.0
    assert (low, high) == pytest.approx(
        (values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.01
    )


def test_holm_keeps_order_and_never_falls() -> None:
    # 0.005 x 4, 0.01 x 3, 0.03 x 2; 0.04 x 1 would be below the one before it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6]) == [1.0, 1.0]
    assert holm([]) == []
