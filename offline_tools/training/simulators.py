"""Simulators in processes of their own: demonstrations and rollouts many at a time.

Owns: the worker process, its few commands, and `SimulatorPool`. Must not import torch, so that a
worker starts quickly and holds no GPU memory but its renderer's.
"""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, cast

import numpy as np

from groot_int8_ros.policy.types import Float32Array, Float64Array, UInt8Array
from offline_tools.simulation.demonstrations import ROW_STEPS, Demonstration, demonstrate
from offline_tools.simulation.environment import Tabletop
from offline_tools.simulation.expert import plan
from offline_tools.simulation.robot import degrees
from offline_tools.simulation.tasks import TASKS, Task
from offline_tools.training.configuration import HORIZON
from offline_tools.training.samples import (
    Samples,
    episode_samples,
    network_images,
    truth_vector,
)

_SLOTS = 2
# A plan begins at rest, though the arm is moving: the chunk is read a little later in it, so that
# the policy does not learn to stop at every new chunk.
_LABEL_DELAY_STEPS = 5


@dataclass(frozen=True)
class Observed:
    """What one simulator shows at one instant.

    Attributes:
        images: Network images, uint8, shape (cameras, height, width, 3).
        state_deg: Measured joints, degrees, float32, shape (6,).
        time_s: Simulated time since the reset.
        fulfilled: Tasks that are fulfilled, by index in `TASKS`.
        label: The expert's chunk from here and the truth vector, where they were asked for.
    """

    images: UInt8Array
    state_deg: Float32Array
    time_s: float
    fulfilled: tuple[int, ...]
    label: tuple[Float32Array, Float32Array] | None


@dataclass(frozen=True)
class Rollout:
    """One episode to run.

    Attributes:
        seed: Seed of the scene.
        asked: Task that success is judged by.
        told: Task whose instruction the policy is given.
    """

    seed: int
    asked: Task
    told: Task


@dataclass(frozen=True)
class Outcome:
    """How a rollout ended.

    Attributes:
        rollout: What was run.
        success: Whether the asked task was fulfilled within the time.
        told_success: Whether the told one was.
        time_s: Simulated time to success, or the limit.
    """

    rollout: Rollout
    success: bool
    told_success: bool
    time_s: float


# Images (B, cameras, H, W, 3), state in degrees (B, 6) and tasks to chunks in degrees (B, H, 6).
BatchPolicy = Callable[[UInt8Array, Float32Array, Sequence[Task]], Float32Array]


def follow(simulation: Tabletop, chunk_deg: Float32Array, rows: int) -> None:
    """Follow a chunk for some rows, with straight lines between them."""
    targets = np.radians(chunk_deg.astype(np.float64))
    for step in range(rows * ROW_STEPS):
        row, part = divmod(step, ROW_STEPS)
        after = targets[min(row + 1, len(targets) - 1)]
        target: Float64Array = targets[row] + (after - targets[row]) * (part / ROW_STEPS)
        simulation.step(target)


class _Worker:
    """The commands that a process obeys."""

    def __init__(self) -> None:
        self._simulations = [Tabletop() for _ in range(_SLOTS)]

    def demonstrate(self, seed: int) -> Samples | None:
        images: list[UInt8Array] = []
        episode: Demonstration = demonstrate(
            self._simulations[0],
            seed,
            on_frames=lambda frames: images.append(network_images(frames)),
        )
        return episode_samples(episode, images) if episode.success else None

    def reset(self, slot: int, seed: int, label: Task | None) -> Observed:
        self._simulations[slot].reset(seed)
        return self._observe(slot, label)

    def act(self, slot: int, chunk_deg: Float32Array, rows: int, label: Task | None) -> Observed:
        follow(self._simulations[slot], chunk_deg, rows)
        return self._observe(slot, label)

    def _observe(self, slot: int, label: Task | None) -> Observed:
        simulation = self._simulations[slot]
        truth = simulation.truth()
        expert = None
        if label is not None:
            path = plan(simulation, label)
            rows = np.arange(HORIZON) * ROW_STEPS + _LABEL_DELAY_STEPS
            places = truth_vector(
                np.stack(list(truth.cubes.values())).astype(np.float32),
                np.stack(list(truth.plates.values())).astype(np.float32),
            )
            expert = (degrees(path[np.minimum(rows, len(path) - 1)]), places)
        return Observed(
            images=network_images(simulation.frames()),
            state_deg=degrees(simulation.joints_rad()),
            time_s=simulation.time_s,
            fulfilled=tuple(task.index for task in TASKS if truth.on_plate(task.cube, task.plate)),
            label=expert,
        )


def _serve(connection: Connection) -> None:
    worker = _Worker()
    while True:
        message = connection.recv()
        if message is None:
            return
        name, arguments = message
        try:
            connection.send((True, getattr(worker, name)(*arguments)))
        except Exception:
            connection.send((False, traceback.format_exc()))


class SimulatorPool:
    """Worker processes; a context manager that ends them."""

    def __init__(self, workers: int) -> None:
        """Start the processes.

        Args:
            workers: How many.
        """
        context = multiprocessing.get_context("spawn")
        self._connections: list[Connection] = []
        self._processes = []
        for _ in range(workers):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there,), daemon=True)
            process.start()
            there.close()
            self._connections.append(here)
            self._processes.append(process)

    def __enter__(self) -> SimulatorPool:
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self._connections:
            connection.send(None)
        for process in self._processes:
            process.join()

    def _receive(self, connection: Connection) -> Any:
        done, value = connection.recv()
        if not done:
            raise RuntimeError(f"a simulator process failed:\n{value}")
        return value

    def demonstrations(self, seeds: Sequence[int]) -> Iterator[Samples | None]:
        """Yield the samples of each successful demonstration, None for a failed one.

        The order is that in which they are ready, so the same seeds give the same set of samples
        in another order.
        """
        waiting = list(reversed(seeds))
        busy: set[Connection] = set()
        for connection in self._connections:
            if waiting:
                connection.send(("demonstrate", (waiting.pop(),)))
                busy.add(connection)
        while busy:
            for ready in wait(list(busy)):
                connection = cast("Connection", ready)
                samples = self._receive(connection)
                if waiting:
                    connection.send(("demonstrate", (waiting.pop(),)))
                else:
                    busy.discard(connection)
                yield samples

    def run(
        self,
        policy: BatchPolicy,
        rollouts: Sequence[Rollout],
        *,
        limit_s: float,
        rows: Callable[[], int],
        labelled: bool = False,
        stop_at_success: bool = True,
    ) -> tuple[list[Outcome], list[Samples]]:
        """Run episodes, as many side by side as there are simulators.

        Args:
            policy: Called with the observations of all simulators that wait for a chunk.
            rollouts: The episodes.
            limit_s: Simulated time after which an episode ends.
            rows: Called for each chunk: how many of its rows are followed before the next.
            labelled: Whether the expert labels each observation with the asked task.
            stop_at_success: Whether an episode ends once the asked task is fulfilled.

        Returns:
            The outcomes, in the order of the rollouts, and the labelled samples.
        """
        places = [(c, slot) for slot in range(_SLOTS) for c in range(len(self._connections))]
        waiting = list(reversed(list(enumerate(rollouts))))
        outcomes: dict[int, Outcome] = {}
        samples: list[Samples] = []
        active: dict[tuple[int, int], tuple[int, Rollout]] = {}
        sent: list[tuple[int, int]] = []

        def begin(place: tuple[int, int]) -> None:
            if waiting:
                number, rollout = waiting.pop()
                active[place] = (number, rollout)
                label = rollout.asked if labelled else None
                self._connections[place[0]].send(("reset", (place[1], rollout.seed, label)))
                sent.append(place)

        for place in places:
            begin(place)
        while sent:
            asking = sent.copy()
            sent.clear()
            alive: list[tuple[tuple[int, int], Observed, Task]] = []
            for place in asking:
                seen: Observed = self._receive(self._connections[place[0]])
                number, rollout = active[place]
                if seen.label is not None:
                    samples.append(_labelled(seen, rollout.asked))
                success = rollout.asked.index in seen.fulfilled
                if seen.time_s >= limit_s or (success and stop_at_success):
                    outcomes[number] = Outcome(
                        rollout, success, rollout.told.index in seen.fulfilled, seen.time_s
                    )
                    begin(place)
                else:
                    alive.append((place, seen, rollout.told))
            if not alive:
                continue
            answers = policy(
                np.stack([seen.images for _, seen, _ in alive]),
                np.stack([seen.state_deg for _, seen, _ in alive]),
                [told for *_, told in alive],
            )
            for (place, _, _), chunk in zip(alive, answers, strict=True):
                label = active[place][1].asked if labelled else None
                self._connections[place[0]].send(("act", (place[1], chunk, rows(), label)))
                sent.append(place)
        return [outcomes[number] for number in range(len(rollouts))], samples


def _labelled(seen: Observed, task: Task) -> Samples:
    assert seen.label is not None
    chunk, truth = seen.label
    return Samples(
        images=seen.images[None],
        state_deg=seen.state_deg[None],
        chunk_deg=chunk[None],
        task=np.array([task.index], np.int64),
        truth_m=truth[None],
    )
