"""Hazards of simulators in processes: answers mixed up, an error that hangs, a lost episode."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from groot_int8_ros.policy.types import Float32Array, UInt8Array
from offline_tools.simulation.tasks import TASKS, Task
from offline_tools.training.configuration import HORIZON
from offline_tools.training.simulators import SimulatorPool
from offline_tools.training.trainer import rollout


@pytest.fixture(scope="module")
def pool() -> Iterator[SimulatorPool]:
    with SimulatorPool(1) as started:
        yield started


def _still(images: UInt8Array, state: Float32Array, tasks: Sequence[Task]) -> Float32Array:
    assert len(images) == len(state) == len(tasks)
    return np.repeat(state[:, None], HORIZON, axis=1)


def test_a_policy_that_stands_still_fails_at_the_limit_and_is_corrected(
    pool: SimulatorPool,
) -> None:
    rollouts = [rollout(seed) for seed in (4, 3, 8)]
    outcomes, samples = pool.run(_still, rollouts, limit_s=1.5, rows=lambda: 8, labelled=True)
    assert [outcome.rollout.seed for outcome in outcomes] == [4, 3, 8]
    assert not any(outcome.success for outcome in outcomes)
    assert len(samples) == 3 * 3
    for one in samples:
        # The expert goes somewhere from where the policy stands.
        assert np.abs(one.chunk_deg[0, -1, :5] - one.state_deg[0, :5]).max() > 10.0
    assert sorted(int(one.task[0]) for one in samples) == sorted(
        3 * [rollout.asked.index for rollout in rollouts]
    )


def test_following_the_experts_corrections_fulfils_the_task(pool: SimulatorPool) -> None:
    # What is followed next is always the label of what was seen last.
    for seed in (5, 6, 7):
        connection = pool._connections[0]
        task = TASKS[seed % len(TASKS)]
        connection.send(("reset", (0, seed, task)))
        seen = pool._receive(connection)
        for _ in range(25):
            connection.send(("act", (0, seen.label[0], 4, task)))
            seen = pool._receive(connection)
            if task.index in seen.fulfilled:
                break
        assert task.index in seen.fulfilled, task


def test_demonstrations_arrive_whatever_their_order(pool: SimulatorPool) -> None:
    arrived = [samples for samples in pool.demonstrations([21, 22]) if samples is not None]
    assert len(arrived) == 2
    assert {samples.chunk_deg.shape[1:] for samples in arrived} == {(HORIZON, 6)}


def test_an_error_in_a_process_is_told_with_its_trace(pool: SimulatorPool) -> None:
    pool._connections[0].send(("reset", (99, 0, None)))
    with pytest.raises(RuntimeError, match="IndexError"):
        pool._receive(pool._connections[0])
