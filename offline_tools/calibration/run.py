"""Running the policy on chosen observations and storing what its graphs were given.

Owns: the order choose, run, store. Must not import torch: the policy is the bundle's, the same
code as on the robot, so what is captured is what the engines will see.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from groot_int8_ros.capture.feeds import observation_of
from groot_int8_ros.capture.inference import run_on
from groot_int8_ros.capture.sample import CaptureSample
from groot_int8_ros.capture.selection import Candidate, Selector
from groot_int8_ros.capture.store import INDEX_FILE, CaptureMeta, CaptureStore, CaptureWriter
from groot_int8_ros.errors import CaptureError, ObservationError, OutputError
from groot_int8_ros.policy.families import LARGE_GRAPHS
from groot_int8_ros.policy.files import refuse_occupied
from groot_int8_ros.policy.policy import Policy
from groot_int8_ros.policy.types import Observation

Report = Callable[[str], None]
_REPORT_EVERY_S = 10.0


@dataclass
class Skipped:
    """Observations that could not be used.

    Attributes:
        count: How many.
        first: Why the first one could not.
    """

    count: int = 0
    first: str = ""

    def note(self, source: str, error: Exception) -> None:
        """Count one."""
        if not self.count:
            self.first = f"{source}: {error}"
        self.count += 1


@dataclass(frozen=True)
class Recorded:
    """One observation of a recording, its images still unread.

    Attributes:
        source: Where it comes from, for a person.
        stamp_ns: Its stamp in nanoseconds.
        read: Returns it, or raises `ObservationError`; valid until the next one is asked for.
    """

    source: str
    stamp_ns: int
    read: Callable[[], Observation]


class Source(Protocol):
    """A recording, read twice: cheaply to choose, then with images."""

    name: str

    def candidates(self, skipped: Skipped) -> Iterator[tuple[int, Candidate]]:
        """Yield the number and the features of every usable observation, in order."""

    def observations(self, chosen: frozenset[int]) -> Iterator[Recorded]:
        """Yield the observations of the chosen numbers, in order."""


@dataclass(frozen=True)
class CaptureRun:
    """What a capture did.

    Attributes:
        store: What was written.
        offered: Usable observations in the recording.
        skipped: Those that could not be used.
    """

    store: CaptureStore
    offered: int
    skipped: Skipped = field(default_factory=Skipped)


def capture(
    policy: Policy,
    source: Source,
    output: Path,
    *,
    samples: int,
    seed: int,
    engine: str = "onnxruntime",
    keep_images: bool = False,
    resume: bool = False,
    report: Report = print,
) -> CaptureRun:
    """Choose observations of a recording, run the policy on them and store what it saw.

    Args:
        policy: The bundle's float policy.
        source: The recording.
        output: Folder of the new store.
        samples: Observations to keep at most.
        seed: Seed of the noise.
        engine: What the policy was loaded with.
        keep_images: Store camera frames beside the tensors made from them.
        resume: Go on with an unfinished store of the same recording and options.
        report: Called with a line of progress at a time.

    Raises:
        CaptureError: The recording has no usable observation.
        OutputError: `output` is occupied or cannot be written.
    """
    meta = CaptureMeta.of_bundle(policy.manifest, source.name, seed=seed, engine=engine)
    if not resume:
        # Before the recording is read for minutes.
        _refuse_occupied(output)
    chosen, offered, skipped = choose(source, samples)
    if not chosen:
        reason = f" The first: {skipped.first}" if skipped.count else ""
        raise CaptureError(
            f"{source.name} has no usable observation; {skipped.count} were skipped.{reason}"
        )
    report(f"{offered} usable observations, {len(chosen)} chosen")
    go_on = "run the command again with --resume"
    with CaptureWriter(output, meta, resume=resume, go_on=go_on) as writer:
        done = writer.sources
        not_chosen = set(done)
        progress = _Progress(len(chosen), report)
        for one in source.observations(frozenset(chosen)):
            progress.step()
            not_chosen.discard((one.source, one.stamp_ns))
            if (one.source, one.stamp_ns) in done:
                continue
            try:
                sample = run_on(policy, one.read(), one.source, seed=seed, keep_images=keep_images)
            except ObservationError as error:
                skipped.note(one.source, error)
                continue
            writer.add(sample)
        writer.flush(offered)
    if not_chosen:
        report(
            f"{output} keeps {len(not_chosen)} samples of the earlier run that are not among the "
            f"{len(chosen)} chosen now; for these alone, capture into another folder"
        )
    return CaptureRun(CaptureStore.open(output, verify_hashes=False), offered, skipped)


def _refuse_occupied(output: Path) -> None:
    if (output / INDEX_FILE).is_file():
        raise OutputError(
            f"{output} holds a capture store already: go on with an interrupted one with "
            "--resume, name another folder, or remove this one first"
        )
    refuse_occupied(output)


def choose(source: Source, samples: int) -> tuple[list[int], int, Skipped]:
    """Return the numbers of the observations to keep, how many there are, and what was skipped."""
    selector, skipped = Selector(samples), Skipped()
    kept: dict[int, int] = {}
    for number, candidate in source.candidates(skipped):
        decision = selector.offer(candidate)
        if decision.evicted is not None:
            del kept[decision.evicted]
        if decision.ticket is not None:
            kept[decision.ticket] = number
    return sorted(kept.values()), selector.offered, skipped


@dataclass(frozen=True)
class Completion:
    """What completing a store gave.

    Attributes:
        store: The new store.
        completed: Samples whose tensors were computed.
        largest_difference: Largest absolute difference between a recorded and the computed target,
            per action key, in physical units; empty where no chunk was recorded.
    """

    store: CaptureStore
    completed: int
    largest_difference: dict[str, float]


def complete(
    policy: Policy,
    captured: CaptureStore,
    output: Path,
    *,
    engine: str = "onnxruntime",
    keep_images: bool = False,
    report: Report = print,
) -> Completion:
    """Compute, with the float policy, what a live recorder could not see inside the engines.

    Observation, noise and committed rows are all that the policy depends on, so the tensors are
    those that this policy would have given on the robot, to the bit; the policy's graphs may even
    be of the other family. The chunk is computed again too; how far the
    recorded one lies from it is reported, not judged: the robot may have run other engines.

    Args:
        policy: The bundle's float policy.
        captured: Store of a recorder.
        output: Folder of the new store; `captured` stays as it is.
        engine: What the policy was loaded with.
        keep_images: Store camera frames beside the tensors made from them.
        report: Called with a line of progress at a time.

    Raises:
        CaptureError: The store is of another checkpoint, or a sample lacks its observation.
        OutputError: `output` is occupied or cannot be written.
    """
    captured.check_bundle(policy.manifest)
    origin, seed = captured.meta.origin, captured.meta.seed
    meta = CaptureMeta.of_bundle(policy.manifest, origin, seed=seed, engine=engine)
    family = policy.manifest.family
    differences: dict[str, float] = {}
    completed = 0

    def is_complete(sample: CaptureSample) -> bool:
        return captured.meta.family == family and all(
            sample.has(family, graph) for graph in LARGE_GRAPHS[family]
        )

    progress = _Progress(len(captured), report)
    go_on = "remove this folder and run the command again"
    with CaptureWriter(output, meta, go_on=go_on) as writer:
        for sample in captured.samples():
            progress.step()
            if is_complete(sample):
                writer.add(sample)
                continue
            writer.add(_completed(policy, sample, differences, keep_images=keep_images))
            completed += 1
        writer.flush(captured.index.offered)
    return Completion(CaptureStore.open(output, verify_hashes=False), completed, differences)


def _completed(
    policy: Policy, sample: CaptureSample, differences: dict[str, float], *, keep_images: bool
) -> CaptureSample:
    observation = observation_of(sample)
    if sample.noise is None:
        raise CaptureError(
            f"{sample.source}: the sample has no noise, so its tensors cannot be computed. Record "
            "it with calibration_recorder_node."
        )
    try:
        full = run_on(
            policy,
            observation,
            sample.source,
            seed=sample.seed,
            noise=sample.noise,
            keep_images=keep_images,
            committed=sample.committed,
        )
    except ObservationError as error:
        raise CaptureError(
            f"{sample.source}: {error} The bundle differs from the one that was recorded with."
        ) from error
    assert full.chunk is not None
    for key, recorded in (sample.chunk.actions if sample.chunk else {}).items():
        computed = full.chunk.actions.get(key)
        if computed is None or computed.shape != recorded.shape:
            raise CaptureError(
                f"{sample.source}: the recorded chunk of '{key}' does not have the bundle's "
                "shape. The bundle differs from the one that was recorded with."
            )
        difference = float(np.abs(computed - recorded).max())
        differences[key] = max(difference, differences.get(key, 0.0))
    return full


class _Progress:
    """Reports how far a run is, and when it will be done."""

    def __init__(self, total: int, report: Report) -> None:
        self._total = total
        self._report = report
        self._done = 0
        self._start_s = self._reported_s = time.monotonic()

    def step(self) -> None:
        now_s = time.monotonic()
        if self._done and now_s - self._reported_s >= _REPORT_EVERY_S:
            self._reported_s = now_s
            left_s = (now_s - self._start_s) / self._done * (self._total - self._done)
            self._report(f"  {self._done} of {self._total}, {left_s:.0f} s left")
        self._done += 1
