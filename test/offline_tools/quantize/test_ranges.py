"""Static ranges: what is clipped, and that no range is zero."""

from __future__ import annotations

import numpy as np
import pytest

from offline_tools.quantize.histogram import MagnitudeHistogram
from offline_tools.quantize.ranges import static_range


def _histogram(values: np.ndarray) -> MagnitudeHistogram:
    histogram = MagnitudeHistogram()
    histogram.add(values.astype(np.float32))
    return histogram


def _gaussian() -> np.ndarray:
    return np.random.RandomState(0).standard_normal(200_000)


@pytest.mark.parametrize("method", ["max", "entropy", "percentile"])
def test_an_activation_of_zeros_has_a_range_that_can_be_divided_by(method: str) -> None:
    assert static_range(_histogram(np.zeros(10)), method) == 1.0


@pytest.mark.parametrize("method", ["max", "entropy", "percentile"])
def test_mostly_zeros_still_have_a_positive_range(method: str) -> None:
    values = np.zeros(1_000_000)
    values[0] = 2.0
    assert 0.0 < static_range(_histogram(values), method) <= 2.0


def test_max_takes_the_outlier_and_percentile_leaves_it() -> None:
    histogram = _histogram(np.append(_gaussian(), 500.0))
    assert static_range(histogram, "max") == 500.0
    assert static_range(histogram, "percentile", 99.9) == pytest.approx(3.29, rel=0.05)


def test_entropy_clips_a_long_tail_and_keeps_most_of_the_body() -> None:
    values = np.append(_gaussian(), np.linspace(8.0, 60.0, 40))
    found = static_range(_histogram(values), "entropy")
    assert 3.0 < found < 30.0


def test_entropy_keeps_a_uniform_distribution_whole() -> None:
    values = np.random.RandomState(0).uniform(-4.0, 4.0, 200_000)
    assert static_range(_histogram(values), "entropy") == pytest.approx(4.0, rel=0.05)
