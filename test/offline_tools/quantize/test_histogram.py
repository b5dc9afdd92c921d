"""A massive activation must not hide the values beside it, and the order of samples not matter."""

from __future__ import annotations

import numpy as np
import pytest

from offline_tools.quantize.histogram import MagnitudeHistogram


def _filled(*parts: np.ndarray) -> MagnitudeHistogram:
    histogram = MagnitudeHistogram()
    for part in parts:
        histogram.add(part)
    return histogram


def test_quantiles_stay_exact_beside_a_massive_activation() -> None:
    values = np.abs(np.random.RandomState(0).standard_normal(100_000)).astype(np.float32)
    massive = np.array([-1.9e4], np.float32)
    found = _filled(values, massive).quantile(0.99)
    assert found == pytest.approx(np.quantile(values, 0.99), rel=2e-3)


def test_maximum_and_total_are_exact_and_negative_values_count() -> None:
    histogram = _filled(np.array([[0.0, -3.5], [2.0, 1e-30]], np.float32))
    assert histogram.max == 3.5
    assert histogram.total == 4


def test_the_order_and_the_split_of_samples_do_not_matter() -> None:
    values = np.random.RandomState(1).standard_cauchy(5000).astype(np.float32)
    whole = _filled(values).linear(2048, 10.0)
    parts = _filled(values[::-1][:123], values[::-1][123:]).linear(2048, 10.0)
    assert np.array_equal(whole, parts)


def test_linear_bins_agree_with_numpy_where_they_are_wider_than_ours() -> None:
    values = np.random.RandomState(2).uniform(0.0, 8.0, 200_000).astype(np.float32)
    found = _filled(values).linear(64, 8.0)
    wanted, _ = np.histogram(values, bins=64, range=(0.0, 8.0))
    assert found.sum() == len(values)
    assert np.abs(found - wanted).max() <= 10


def test_what_lies_above_the_top_is_in_the_last_bin() -> None:
    found = _filled(np.array([1.0, 7.0, 9.0], np.float32)).linear(4, 2.0)
    assert found.sum() == 3.0
    assert found[-1] == 2.0


def test_half_precision_values_are_counted_as_their_exact_value() -> None:
    values = np.array([65504.0, 0.5], np.float16)
    assert _filled(values).max == 65504.0


def test_nothing_is_nothing() -> None:
    histogram = _filled(np.empty((0, 4), np.float32))
    assert (histogram.max, histogram.total) == (0.0, 0)
