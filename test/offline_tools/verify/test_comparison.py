"""Hazards of a verdict: NaN that passes, a constant error that passes, a mask off by one token."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from offline_tools.verify.comparison import MIN_COSINE, compare, compare_masks, worst

_SHAPES = hnp.array_shapes(min_dims=1, max_dims=3, max_side=6)
_ARRAYS: st.SearchStrategy[NDArray[Any]] = hnp.arrays(
    np.float32, _SHAPES, elements=st.floats(-1e4, 1e4, width=32)
)


@given(_ARRAYS)
def test_a_tensor_agrees_with_itself(array: NDArray[Any]) -> None:
    found = compare("x", array, array.copy())
    assert found.passed
    assert found.relative_l2 == found.p99_absolute == found.max_absolute == 0.0
    assert found.cosine == pytest.approx(1.0)


@given(_ARRAYS, st.data())
def test_a_value_that_is_not_finite_never_passes(array: NDArray[Any], data: st.DataObject) -> None:
    spoilt = array.copy()
    index = data.draw(st.integers(0, array.size - 1))
    spoilt.reshape(-1)[index] = data.draw(st.sampled_from([np.nan, np.inf, -np.inf]))
    assert not compare("x", array, spoilt, atol=math.inf).passed
    # Neither does one that PyTorch computed, whatever the other engine says.
    assert not compare("x", spoilt, array, atol=math.inf).passed
    assert not compare("x", spoilt, spoilt, atol=math.inf).passed


@given(_ARRAYS)
def test_opposite_tensors_fail_unless_they_are_zero(array: NDArray[Any]) -> None:
    found = compare("x", array, -array, atol=math.inf)
    assert found.passed == (not array.any())


def test_zero_tensor_agrees_with_zeros_alone() -> None:
    zeros, small = np.zeros(8, np.float32), np.full(8, 1e-6, np.float32)
    assert compare("x", zeros, zeros).passed
    assert not compare("x", zeros, small).passed
    assert not compare("x", small, zeros).passed


def test_cosine_alone_does_not_hide_a_wrong_scale() -> None:
    reference = np.linspace(-1, 1, 1000, dtype=np.float32)
    found = compare("x", reference, 3 * reference, atol=0.5)
    assert found.cosine > MIN_COSINE
    assert found.p99_absolute == pytest.approx(1.98, abs=0.01)
    assert not found.passed
    assert compare("x", reference, 3 * reference, atol=2.0).passed


def test_p99_alone_does_not_hide_a_wrong_direction() -> None:
    reference = np.random.RandomState(0).standard_normal(1000).astype(np.float32) * 1e-3
    found = compare("x", reference, reference[::-1])
    assert found.p99_absolute < 0.5
    assert not found.passed


def test_one_outlier_in_a_hundred_does_not_decide_but_two_do() -> None:
    reference = np.full(1000, 100.0, np.float32)
    for outliers, passed in ((9, True), (20, False)):
        found = reference.copy()
        found[:outliers] += 1.0
        result = compare("x", reference, found, atol=0.5)
        assert result.passed == passed
        assert result.max_absolute == 1.0


def test_metrics_are_those_of_their_definitions() -> None:
    found = compare("x", np.array([3.0, 4.0]), np.array([3.0, 5.0]), atol=2.0)
    assert found.relative_l2 == pytest.approx(1 / 5)
    assert found.cosine == pytest.approx(29 / (5 * math.sqrt(34)))
    assert found.max_absolute == 1.0


def test_half_precision_is_compared_in_float64() -> None:
    # The dot product of these overflows float16 and loses digits in float32.
    large = np.full(4096, 6e4, np.float16)
    assert compare("x", large.astype(np.float32), large).cosine == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize(
    ("reference", "found", "message"),
    [
        (np.zeros((2, 3)), np.zeros((3, 2)), "x: shapes"),
        (np.zeros((1, 3)), np.zeros(3), "x: shapes"),
        (np.zeros((0, 3)), np.zeros((0, 3)), "x: nothing to compare"),
    ],
)
def test_tensors_that_cannot_be_compared_are_a_bug(
    reference: NDArray[Any], found: NDArray[Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        compare("x", reference, found)


def test_masks_must_be_equal_in_every_token() -> None:
    mask = np.zeros((1, 2000), bool)
    mask[0, 50:60] = True
    assert compare_masks("m", mask, mask.copy()).passed
    other = mask.copy()
    other[0, 60] = True
    found = compare_masks("m", mask, other)
    assert not found.passed
    assert found.relative_l2 == pytest.approx(1 / 2000)


def test_masks_of_other_shapes_are_a_bug() -> None:
    with pytest.raises(ValueError, match="m: shapes"):
        compare_masks("m", np.ones((1, 5), bool), np.ones((1, 1), bool))


def test_worst_of_several_observations_fails_if_one_does() -> None:
    reference = np.linspace(1, 2, 100)
    good = compare("x", reference, reference)
    bad = compare("x", reference, reference + 1.0)
    broken = compare("x", reference, np.full(100, np.nan))
    folded = worst([good, bad, good])
    assert not folded.passed
    assert (folded.cosine, folded.max_absolute) == (bad.cosine, bad.max_absolute)
    folded = worst([good, broken])
    assert not folded.passed
    assert math.isnan(folded.max_absolute)
    assert folded.to_dict()["max_absolute"] is None
    assert folded.to_dict()["passed"] is False
