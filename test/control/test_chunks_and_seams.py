"""Chunks by time and their seams: rows at the wrong time, jumps, and prefixes that do not fit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from groot_int8_ros.control.chunks import Rows
from groot_int8_ros.control.seams import SEAM_KINDS, Plan, SeamSettings
from groot_int8_ros.control.types import NANOSECONDS
from groot_int8_ros.errors import ConfigurationError

START_NS = 1_700_000_000 * NANOSECONDS
ROW_NS = 50_000_000


def rows(values: list[float], start_ns: int = START_NS) -> Rows:
    due_ns = start_ns + ROW_NS * np.arange(len(values), dtype=np.int64)
    return Rows(due_ns, np.array(values, np.float64)[:, None])


def at(seconds: float) -> int:
    return START_NS + round(seconds * NANOSECONDS)


def test_a_row_is_met_at_its_time() -> None:
    chunk = rows([0.0, 1.0, -1.0, 0.5])
    for index, value in enumerate([0.0, 1.0, -1.0, 0.5]):
        assert chunk.at(START_NS + index * ROW_NS) == pytest.approx(value)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_short_chunks_have_values_too(count: int) -> None:
    chunk = rows([1.0, 2.0, 3.0][:count])
    assert chunk.at(START_NS - 1) == 1.0
    assert chunk.at(at(60.0)) == float(count)
    if count > 1:
        assert chunk.at(START_NS + ROW_NS // 2) == pytest.approx(1.5)


def test_between_rows_the_velocity_has_no_steps() -> None:
    def smooth(t: float) -> float:
        return float(np.sin(3.0 * t))

    chunk = rows([smooth(index * 0.05) for index in range(20)])
    times = np.arange(0.0, 0.95, 0.002)
    values = np.array([chunk.at(at(t))[0] for t in times])
    np.testing.assert_allclose(values, np.sin(3.0 * times), atol=5e-4)
    acceleration = np.diff(values, 2) / 0.002**2
    # Straight lines between the rows would give steps of 0.4 rad/s in 2 ms: 200 rad/s².
    assert np.abs(acceleration).max() < 20.0


def test_rows_that_were_due_are_past() -> None:
    chunk = rows([0.0] * 8)
    assert [chunk.past_rows(at(t)) for t in (-1.0, 0.0, 0.01, 0.05, 0.051, 9.0)] == [
        *(0, 0, 1, 1, 2, 8)
    ]


def follow_up(kind: str, jump: float = 1.0, **settings: float) -> tuple[Plan, float]:
    """A chunk of zeros, and at 0.2 s one of `jump`."""
    plan = Plan(SeamSettings(kind, **settings))  # type: ignore[arg-type]
    assert plan.add(rows([0.0] * 16), START_NS) == 0.0
    return plan, plan.add(rows([jump] * 16, at(0.1)), at(0.2))


def target(plan: Plan, seconds: float) -> float | None:
    value = plan.at(at(seconds))
    return None if value is None else float(value[0])


def test_switch_takes_the_newest_at_once() -> None:
    plan, jump = follow_up("switch")
    assert jump == 1.0
    assert [target(plan, t) for t in (0.19, 0.2, 0.5)] == [0.0, 1.0, 1.0]


def test_linear_blend_has_no_jump_and_ends_on_the_newest() -> None:
    plan, _ = follow_up("linear_blend", blend_s=0.2)
    assert [target(plan, t) for t in (0.2, 0.3, 0.4, 0.5)] == pytest.approx([0.0, 0.5, 1.0, 1.0])


def test_a_chunk_during_a_blend_is_blended_to_from_what_is_commanded() -> None:
    plan, _ = follow_up("linear_blend", blend_s=0.2)
    before = target(plan, 0.3)
    jump = plan.add(rows([-1.0] * 16, at(0.2)), at(0.3))
    assert jump == pytest.approx(1.5)
    assert target(plan, 0.3) == before == pytest.approx(0.5)
    assert target(plan, 0.5) == pytest.approx(-1.0)


def test_ensemble_weighs_as_its_paper_says() -> None:
    plan, _ = follow_up("temporal_ensemble", ensemble_decay=0.5)
    weight = np.exp(-0.5)
    assert target(plan, 0.3) == pytest.approx(weight / (1.0 + weight))
    # The older chunk's last row is due at 0.75 s; afterwards the newer one is alone.
    assert target(plan, 0.8) == pytest.approx(1.0)


def test_rtc_takes_a_chunk_that_kept_its_prefix_at_once_and_blends_to_another() -> None:
    plan, _ = follow_up("rtc", jump=0.01, blend_s=0.2)
    assert target(plan, 0.2) == pytest.approx(0.01)
    plan, _ = follow_up("rtc", jump=1.0, blend_s=0.2)
    assert [target(plan, t) for t in (0.2, 0.3)] == pytest.approx([0.0, 0.5])


@pytest.mark.parametrize("kind", SEAM_KINDS)
def test_a_plan_is_over_after_its_last_row(kind: str) -> None:
    plan, _ = follow_up(kind)
    assert target(plan, 0.85) is not None
    assert target(plan, 0.86) is None


@pytest.mark.parametrize("kind", SEAM_KINDS)
def test_the_targets_velocity_is_the_new_chunks_and_not_the_seams_jump(kind: str) -> None:
    plan, _ = follow_up(kind, blend_s=0.0)
    now, before = plan.at(at(0.2)), plan.before(at(0.2), 0.02)
    assert now is not None
    assert before is not None
    assert now - before == pytest.approx(0.0)


@given(
    kind=st.sampled_from(SEAM_KINDS),
    arrivals=st.lists(
        st.tuples(st.integers(0, 400), st.floats(-1.0, 1.0), st.integers(1, 8)), max_size=40
    ),
)
def test_a_plan_never_leaves_the_hull_of_its_chunks_and_stays_small(
    kind: str, arrivals: list[tuple[int, float, int]]
) -> None:
    plan = Plan(SeamSettings(kind))  # type: ignore[arg-type]
    now_ns = START_NS
    for wait_ms, value, count in arrivals:
        now_ns += wait_ms * 1_000_000
        plan.add(rows([value] * count, now_ns - 100_000_000), now_ns)
        found = plan.at(now_ns)
        assert found is None or -1.0 - 1e-9 <= found[0] <= 1.0 + 1e-9
        assert len(plan._chunks) <= 16


@pytest.mark.parametrize(
    ("name", "value"),
    [("kind", "hope"), ("blend_s", -1.0), ("blend_s", np.nan), ("ensemble_decay", np.inf)],
)
def test_impossible_seams_are_refused(name: str, value: object) -> None:
    with pytest.raises(ConfigurationError, match="hope" if name == "kind" else name):
        SeamSettings(**{name: value})  # type: ignore[arg-type]
