"""Hazards of the comparison: scenes paired wrongly, a failure that looks quick, no correction."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from offline_tools.compare_closed_loop.comparison import SUCCESS, Episodes, compare_section
from offline_tools.compare_closed_loop.plan import Cell, Section

_BASE, _OTHER = Cell(), Cell(engine="int8-row")
_SECTION = Section("engines", ((_BASE, _BASE), (_OTHER, _BASE)), 40)


def _episode(seed: int, **changed: Any) -> dict[str, Any]:
    # Scenes differ far more than engines do.
    hardness = float(np.random.RandomState(seed).uniform(1.0, 9.0))
    episode = {
        "seed": seed,
        "success": True,
        "time_s": hardness,
        "jerk_rad_s3": 100.0 * hardness,
        "largest_step_rad": 0.01 * hardness,
    }
    return episode | changed


def _episodes(count: int, **changed: Any) -> Episodes:
    return {seed: _episode(seed, **changed) for seed in range(count)}


def test_a_small_difference_on_the_same_scenes_is_found_however_much_scenes_differ() -> None:
    found = {
        seed: {**episode, "jerk_rad_s3": episode["jerk_rad_s3"] + 2.0 + (seed % 3) - 1.0}
        for seed, episode in _episodes(40).items()
    }
    # The other order must not pair a scene with another one.
    found = dict(reversed(found.items()))
    base, other = compare_section(_SECTION, {_BASE: _episodes(40), _OTHER: found})
    assert base.baseline is None
    assert not base.differences
    jerk = other.differences["jerk_rad_s3"]
    assert jerk.mean == pytest.approx(2.0, abs=0.05)
    assert 1.5 < jerk.interval[0] < jerk.interval[1] < 2.5
    assert jerk.real
    # Nothing else differs at all.
    assert [name for name, one in other.differences.items() if one.real] == ["jerk_rad_s3"]
    assert other.differences["time_s"].interval == (0.0, 0.0)


def test_a_lost_episode_counts_with_its_whole_time() -> None:
    found = dict(_episodes(40))
    for seed in range(8):
        found[seed] = _episode(seed, success=False, time_s=12.0)
    _, other = compare_section(_SECTION, {_BASE: _episodes(40), _OTHER: found})
    assert (other.successes, other.episodes) == (32, 40)
    success = other.differences[SUCCESS]
    assert success.mean == pytest.approx(-0.2)
    assert success.p == pytest.approx(2 / 2**8)
    assert other.differences["time_s"].mean > 0.0
    # One of four tests of the section: Holm multiplies the smallest by four.
    assert success.corrected_p >= success.p * 2.0


def test_only_scenes_that_both_have_run_are_compared() -> None:
    results = {_BASE: _episodes(60), _OTHER: {seed: _episode(seed) for seed in (3, 5, 90)}}
    base, other = compare_section(_SECTION, results)
    assert base.episodes == 40, "no more than the section asks for"
    assert other.episodes == 2
    assert compare_section(_SECTION, {_OTHER: _episodes(5)}) == []
    assert len(compare_section(_SECTION, {_BASE: _episodes(5)})) == 1


def test_the_action_error_is_the_root_of_the_mean_square_over_scenes() -> None:
    errors = [{"action_error_rad": 0.003, "largest_action_error_rad": 0.01}] * 20
    errors += [{"action_error_rad": 0.004, "largest_action_error_rad": 0.02}] * 20
    found = {seed: _episode(seed, **error) for seed, error in enumerate(errors)}
    _, other = compare_section(_SECTION, {_BASE: _episodes(40), _OTHER: found})
    assert other.action_error is not None
    mean, (low, high), largest = other.action_error
    assert mean == pytest.approx(np.sqrt(12.5) * 1e-3)
    assert 0.003 < low < mean < high < 0.004
    assert largest == 0.02
