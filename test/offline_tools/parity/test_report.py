from __future__ import annotations

import numpy as np
import pytest

from offline_tools.parity.report import Report, Rule, compare


def test_the_relative_error_is_a_ratio_of_norms() -> None:
    recorded = np.array([3.0, 4.0])
    result = compare("f", "b", "s", Rule.RELATIVE, recorded + np.array([0.0, 0.0005]), recorded)
    assert result.relative == pytest.approx(1e-4)
    assert result.max_abs == pytest.approx(5e-4)


@pytest.mark.parametrize(("error", "passed"), [(0.9e-4, True), (1.1e-4, False)])
def test_the_limit_is_one_in_ten_thousand(error: float, passed: bool) -> None:
    recorded = np.ones(8)
    assert compare("f", "b", "s", Rule.RELATIVE, recorded + error, recorded).passed == passed


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("rule", list(Rule))
def test_values_that_are_not_finite_never_pass(value: float, rule: Rule) -> None:
    recorded = np.array([1.0, 2.0])
    assert not compare("f", "b", "s", rule, np.array([1.0, value]), recorded).passed
    # Not even where the recording has them too: it is broken then.
    broken = np.array([1.0, value])
    assert not compare("f", "b", "s", rule, broken, broken).passed


@pytest.mark.parametrize("rule", list(Rule))
def test_arrays_that_would_broadcast_fail(rule: Rule) -> None:
    result = compare("f", "b", "s", rule, np.ones((2, 1)), np.ones((2, 2)))
    assert not result.passed
    assert "(2, 1)" in result.remark


def test_an_error_where_only_zeros_were_recorded_fails() -> None:
    assert compare("f", "b", "s", Rule.RELATIVE, np.zeros(3), np.zeros(3)).passed
    assert not compare("f", "b", "s", Rule.RELATIVE, np.full(3, 1e-9), np.zeros(3)).passed


def test_one_wrong_token_or_mask_fails() -> None:
    ids = np.arange(5)
    other = ids.copy()
    other[2] = 9
    assert not compare("f", "b", "s", Rule.EXACT, other, ids).passed
    assert not compare("f", "b", "s", Rule.EXACT, ids % 2 == 0, ids % 2 == 1).passed
    assert not compare("f", "b", "s", Rule.EXACT, "text", "texts").passed


@pytest.mark.parametrize(
    ("pixels", "levels", "passed"), [(1, 1, True), (1, 2, False), (2, 1, False)]
)
def test_images_may_be_off_by_one_level_on_one_pixel_in_a_thousand(
    pixels: int, levels: int, passed: bool
) -> None:
    recorded = np.full(1000, 7, dtype=np.uint8)
    computed = recorded.copy()
    # Downwards: a difference taken in uint8 would wrap around.
    computed[:pixels] -= levels
    assert compare("f", "b", "s", Rule.IMAGE, computed, recorded).passed == passed


def test_the_table_names_failures_and_notes() -> None:
    report = Report()
    report.add("file", "good", "input", Rule.RELATIVE, np.ones(2), np.ones(2))
    report.add("file", "bad", "input", Rule.EXACT, np.ones(2), np.zeros(2))
    report.note("something was not recorded")
    table = report.table()
    assert "2 comparisons, 1 failed" in table
    assert "FAILED, has to be equal: file bad" in table
    assert "note: something was not recorded" in table
    assert [result.boundary for result in report.failures] == ["bad"]
