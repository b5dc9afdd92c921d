"""Running the episodes of cells, each cell in one of a few processes.

Owns: the processes and what is written for an episode. A cell's file is written by one process at
a time, an episode a line, so an interrupted comparison goes on where it was.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from groot_int8_ros.control.seams import SeamSettings
from groot_int8_ros.policy.bundle import MANIFEST_FILE
from groot_int8_ros.policy.policy import Policy
from offline_tools.closed_loop.episode import ChunkPolicy, LoopSettings, run_episode
from offline_tools.closed_loop.results import Results, digest_of_model
from offline_tools.compare_closed_loop.judge import JudgedPolicy
from offline_tools.compare_closed_loop.plan import OWN_STEPS, Cell
from offline_tools.simulation.environment import Tabletop
from offline_tools.simulation.robot import robot_description
from offline_tools.simulation.tasks import task_of

_JUDGED_EVERY = 3
_stop: Event | None = None


@dataclass(frozen=True)
class Job:
    """A cell with what it runs.

    Attributes:
        cell: The cell.
        model: Its checkpoint or bundle.
        reference: What its answers are compared with, a bundle or a checkpoint too.
        output: Its file of results.
        episodes: Seeds from 0 on.
        seed: Seed of the noise.
    """

    cell: Cell
    model: Path
    reference: Path
    output: Path
    episodes: int
    seed: int


def run_jobs(jobs: Iterable[Job], workers: int, report: Callable[[str], None]) -> None:
    """Run the episodes that are missing.

    Args:
        jobs: In the order in which they are begun; each is begun once it is there.
        workers: Number of processes.
        report: Called with a line for each finished cell.

    Raises:
        GrootError: A model does not load, or a file holds results of something else.
    """
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=_listen, initargs=(stop,)
    ) as pool:
        try:
            running = {pool.submit(_run, job): job for job in jobs}
            for done in as_completed(running):
                successes, count = done.result()
                report(f"{running[done].cell.name}: {successes} of {count}")
        except BaseException:
            # Otherwise the cells that are running would be run to their end.
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _listen(stop: Event) -> None:
    """Begin a process: let the first one decide when to stop."""
    global _stop
    _stop = stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _run(job: Job) -> tuple[int, int]:
    return run_job(job, lambda: _stop is not None and _stop.is_set())


def run_job(job: Job, stopped: Callable[[], bool] = lambda: False) -> tuple[int, int]:
    """Run the episodes that one cell lacks.

    Args:
        job: The cell and what it runs.
        stopped: Asked before each episode whether to go on later.

    Returns:
        Successes and finished episodes.
    """
    cell = job.cell
    settings = LoopSettings(latency_s=cell.latency_s, seam=SeamSettings(cell.seam), seed=job.seed)
    setup = {
        "model": digest_of_model(job.model),
        "denoising_steps": cell.denoising_steps,
        "judged_by": digest_of_model(job.reference) if cell.judged else None,
        **asdict(settings),
    }
    job.output.parent.mkdir(parents=True, exist_ok=True)
    results = Results(job.output, setup)
    missing = [seed for seed in range(job.episodes) if seed not in results.episodes]
    if missing:
        with contextlib.ExitStack() as closing:
            policy = _load(job.model, cell.denoising_steps, closing)
            judged = None
            if cell.judged:
                reference = _load(job.reference, OWN_STEPS, closing)
                policy = judged = JudgedPolicy(policy, reference, _JUDGED_EVERY)
            simulation = Tabletop()
            closing.callback(simulation.close)
            for seed in missing:
                if stopped():
                    break
                task = task_of(seed)
                result = run_episode(simulation, policy, seed, task, task, settings)
                line: dict[str, Any] = {"seed": seed, **asdict(result)}
                results.add(line | (judged.take_errors() if judged else {}))
    counted = [one["success"] for seed, one in results.episodes.items() if seed < job.episodes]
    return sum(counted), len(counted)


def _load(model: Path, steps: int, closing: contextlib.ExitStack) -> ChunkPolicy:
    """Load a bundle, or a checkpoint into PyTorch, for one thread."""
    if (model / MANIFEST_FILE).exists():
        policy = Policy.load(model, threads=1, denoising_steps=steps)
        closing.callback(policy.close)
        return policy
    import torch

    from offline_tools.closed_loop.torch_policy import TorchPolicy

    torch.set_num_threads(1)
    return TorchPolicy(model, robot_description(), steps)
