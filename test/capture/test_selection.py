"""Hazards of choosing samples: a set of one moment, of one task, or another one at each run."""

from __future__ import annotations

import math

import numpy as np
import pytest

from groot_int8_ros.capture.selection import Candidate, Selector

RATE_HZ = 20
SECOND = 1_000_000_000


def walk(steps: int, seed: int, *, rest: int = 0) -> list[Candidate]:
    """A run at 20 Hz: a wandering arm of four joints that may rest at first."""
    random = np.random.RandomState(seed)
    moves = random.standard_normal((steps, 4)) * 0.05
    moves[:rest] = 0.0
    states = np.tanh(np.cumsum(moves, axis=0)).astype(np.float32)
    start = 1_700_000_000 * SECOND
    return [
        Candidate(start + i * SECOND // RATE_HZ, state, "pick") for i, state in enumerate(states)
    ]


def select(run: list[Candidate], budget: int) -> list[int]:
    selector = Selector(budget)
    kept: set[int] = set()
    for one in run:
        decision = selector.offer(one)
        if decision.evicted is not None:
            kept.remove(decision.evicted)
        if decision.ticket is not None:
            kept.add(decision.ticket)
        assert len(kept) <= budget
    assert sorted(kept) == sorted(selector.tickets)
    assert selector.offered == len(run)
    return sorted(kept)


def distances(run: list[Candidate]) -> np.ndarray:
    """The documented distance, computed at once over a whole run without pauses."""
    states = np.stack([one.state for one in run]).astype(np.float64)
    stamps = np.array([one.stamp_ns - run[0].stamp_ns for one in run]) / SECOND
    span = 2.0 ** math.ceil(math.log2(max(stamps[-1], 1.0)))
    squares = ((states[:, None] - states[None]) ** 2).mean(axis=2)
    squares += np.minimum(np.abs(stamps[:, None] - stamps[None]) / span, 1.0) ** 2
    tasks = np.array([one.instruction for one in run])
    squares += tasks[:, None] != tasks[None]
    return np.asarray(np.sqrt(squares))


def farthest_points(table: np.ndarray, budget: int) -> list[int]:
    """Gonzalez's selection, which sees the whole run."""
    chosen = [0]
    while len(chosen) < budget:
        chosen.append(int(table[:, chosen].min(axis=1).argmax()))
    return chosen


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", [8, 40])
def test_run_is_covered_nearly_as_well_as_by_a_choice_that_sees_it_whole(
    seed: int, budget: int
) -> None:
    run = walk(1200, seed, rest=400)
    table = distances(run)

    def radius(chosen: list[int]) -> float:
        return float(table[:, chosen].min(axis=1).max())

    chosen = select(run, budget)
    assert len(chosen) == budget
    best = radius(farthest_points(table, budget))
    assert radius(chosen) <= 1.6 * best
    # The control: the first N, or what a filled buffer would keep.
    assert radius(list(range(budget))) > 2.5 * best


def test_resting_robot_is_sampled_over_the_whole_time() -> None:
    run = walk(2000, 0, rest=2000)
    chosen = select(run, 20)
    gaps = np.diff([0, *chosen, len(run) - 1])
    # Pure time is the worst case of the incremental choice: three times the ideal gap.
    assert gaps.max() <= 3.0 * len(run) / 20


def test_same_run_gives_the_same_choice() -> None:
    assert select(walk(600, 3), 25) == select(walk(600, 3), 25)


def test_looped_recording_adds_nothing() -> None:
    run = walk(200, 1)
    selector = Selector(500)
    for one in run * 3:
        selector.offer(one)
    assert selector.tickets == list(range(200))


def test_rare_instruction_is_kept() -> None:
    run = walk(1000, 2)
    run[700] = Candidate(run[700].stamp_ns, run[700].state, "place")
    assert 700 in select(run, 10)


@pytest.mark.parametrize("jump_s", [-86_400, 3_600, 1_700_000_000])
def test_jump_of_the_clock_does_not_squash_the_run_into_one_moment(jump_s: int) -> None:
    run = walk(2000, 0, rest=2000)
    jumped = [
        Candidate(one.stamp_ns + (jump_s * SECOND if i >= 1000 else 0), one.state, "pick")
        for i, one in enumerate(run)
    ]
    chosen = np.array(select(jumped, 20))
    for half in (chosen[chosen < 1000], chosen[chosen >= 1000] - 1000):
        assert len(half) >= 7
        assert np.diff([0, *half, 999]).max() <= 400


def test_smallest_distance_between_kept_observations_never_falls() -> None:
    # The invariant behind the choice, on a run whose span does not change meanwhile.
    run = [
        Candidate(0, state, "pick")
        for state in np.random.RandomState(4).uniform(-1, 1, (400, 3)).astype(np.float32)
    ]
    selector = Selector(15)
    table = np.sqrt(
        (
            (np.stack([r.state for r in run])[:, None] - np.stack([r.state for r in run])[None])
            ** 2
        ).mean(axis=2)
    )
    smallest = 0.0
    for one in run:
        selector.offer(one)
        if len(selector.tickets) == 15:
            kept = table[np.ix_(selector.tickets, selector.tickets)]
            now = float(kept[~np.eye(15, dtype=bool)].min())
            assert now >= smallest - 1e-6
            smallest = now
    assert smallest > 0.3


def test_budget_of_one_is_the_first_observation() -> None:
    assert select(walk(50, 0), 1) == [0]
