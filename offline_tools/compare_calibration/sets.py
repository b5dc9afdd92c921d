"""Calibration sets that are derived from one capture store: good ones of several sizes, bad ones.

Owns: which samples make up each set, and writing it as a store. Must not import torch or ROS. A
set is chosen as a recorder with that budget chooses (`capture.selection`), and a smaller one out
of the next larger one, so that more samples are the only difference.

What a bad set lacks is what recordings lack in practice: one task only, a recording that was
stopped too early, a camera in the wrong light, hardly anything. Its light is changed in the frames
that were recorded, and the policy is run on them again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from groot_int8_ros.capture.feeds import observation_of
from groot_int8_ros.capture.inference import run_on
from groot_int8_ros.capture.sample import CaptureSample
from groot_int8_ros.capture.selection import Candidate, Selector, candidate
from groot_int8_ros.capture.store import CaptureStore, CaptureWriter
from groot_int8_ros.errors import CaptureError
from groot_int8_ros.policy.policy import Policy
from groot_int8_ros.policy.processor import Processor
from groot_int8_ros.policy.types import Observation, UInt8Array

GAPS = (
    "one-instruction",
    "first-second",
    "dark-camera",
    "bright-camera",
    "covered-camera",
    "two-samples",
)

# Stamps further apart than this belong to two runs.
_PAUSE_S = 5.0
_FIRST_S = 1.0
_TINY = 2
_SMALLEST_SET = 2
# How many stops more or less light: an aperture stop is a factor of two.
_DARK_STOPS, _BRIGHT_STOPS, _COVERED_STOPS = -4.0, 3.0, -10.0
# A camera's grey levels are about the 2.2nd root of the light.
_GAMMA = 2.2


@dataclass(frozen=True)
class SampleSet:
    """One calibration set.

    Attributes:
        name: Its name, also of its folder.
        positions: Of its samples in the captured store, in the order of their stamps.
        warning: Part of the line with which the coverage report must name what the set lacks;
            empty for a set that should lack nothing.
        stops: How much more light, in stops, the first camera gets.
    """

    name: str
    positions: tuple[int, ...]
    warning: str = ""
    stops: float = 0.0


def plan_sets(
    store: CaptureStore,
    processor: Processor,
    sizes: Sequence[int],
    bad_size: int,
    gaps: Sequence[str] = GAPS,
) -> list[SampleSet]:
    """Choose the samples of every set.

    Args:
        store: Captured samples with states.
        processor: Conventions of the state.
        sizes: Sizes of the good sets.
        bad_size: Largest size of the bad ones.
        gaps: Which bad ones, of `GAPS`. One for which the store has too few samples is left out.

    Returns:
        The good sets, largest first, then the bad ones.

    Raises:
        CaptureError: The store has fewer samples than the largest size.
    """
    captured: list[Candidate] = []
    for sample in store.samples():
        features = Observation({}, sample.state, sample.instruction, sample.stamp_ns)
        captured.append(candidate(processor, features))
    order = sorted(range(len(captured)), key=lambda position: captured[position].stamp_ns)
    if len(order) < max(sizes):
        raise CaptureError(
            f"{store.folder} holds {len(order)} samples, and a set of {max(sizes)} is asked for. "
            "Record more, or name smaller --sizes."
        )
    sets: list[SampleSet] = []
    left: Sequence[int] = order
    for size in sorted(set(sizes), reverse=True):
        left = _choose(captured, left, size)
        sets.append(SampleSet(f"{size}-samples", tuple(left)))

    instructions = [captured[position].instruction for position in order]
    most = max(dict.fromkeys(instructions), key=instructions.count)
    one_task = [position for position in order if captured[position].instruction == most]
    early = _early(captured, order)
    usual = _choose(captured, order, bad_size)
    camera = f"camera {processor.cameras[0]} has images"
    bad = [
        SampleSet(
            "one-instruction",
            _choose(captured, one_task, bad_size),
            "of the bundle's instructions",
        ),
        SampleSet("first-second", _choose(captured, early, bad_size), " visited "),
        SampleSet("dark-camera", usual, f"{camera} as dark", _DARK_STOPS),
        SampleSet("bright-camera", usual, f"{camera} as bright", _BRIGHT_STOPS),
        SampleSet("covered-camera", usual, f"{camera} of nearly one colour", _COVERED_STOPS),
        SampleSet("two-samples", _choose(captured, usual, _TINY), "samples, fewer than"),
    ]
    sets += [one for one in bad if one.name in gaps and len(one.positions) >= _SMALLEST_SET]
    return sets


def write_set(policy: Policy, store: CaptureStore, one: SampleSet, folder: Path) -> CaptureStore:
    """Write a set as a store of its own.

    Args:
        policy: The float policy; runs on frames whose light was changed.
        store: What the set was planned from; with the inputs of the large graphs.
        one: The set.
        folder: A new folder.

    Raises:
        CaptureError: The light is to be changed, and the store holds no frames.
        OutputError: `folder` is occupied or cannot be written.
    """
    chosen = set(one.positions)
    with CaptureWriter(folder, store.meta) as writer:
        for position, sample in enumerate(store.samples()):
            if position in chosen:
                writer.add(_relit(policy, sample, one.stops) if one.stops else sample)
        writer.flush(len(store))
    return CaptureStore.open(folder, verify_hashes=False)


def exposed(frame: UInt8Array, stops: float) -> UInt8Array:
    """Return a frame as the camera would give it with more or less light.

    Args:
        frame: uint8, any shape.
        stops: Each doubles the light; negative ones halve it.
    """
    levels = frame.astype(np.float32) * np.float32(2.0 ** (stops / _GAMMA))
    return np.asarray(np.clip(np.rint(levels), 0.0, 255.0).astype(np.uint8))


def _choose(captured: Sequence[Candidate], positions: Sequence[int], size: int) -> tuple[int, ...]:
    """Return at most so many of the positions, as a recorder keeps them."""
    selector = Selector(size)
    for position in positions:
        selector.offer(captured[position])
    return tuple(positions[ticket] for ticket in selector.tickets)


def _early(captured: Sequence[Candidate], order: Sequence[int]) -> list[int]:
    """Return what was captured in the first second of each run."""
    found = []
    begin_ns = previous_ns = 0
    for position in order:
        stamp_ns = captured[position].stamp_ns
        if not previous_ns or stamp_ns - previous_ns > _PAUSE_S * 1e9:
            begin_ns = stamp_ns
        previous_ns = stamp_ns
        if stamp_ns - begin_ns <= _FIRST_S * 1e9:
            found.append(position)
    return found


def _relit(policy: Policy, sample: CaptureSample, stops: float) -> CaptureSample:
    observation = observation_of(sample)
    camera = policy.processor.cameras[0]
    images = {**observation.images, camera: exposed(observation.images[camera], stops)}
    return run_on(
        policy,
        replace(observation, images=images),
        sample.source,
        seed=sample.seed,
        noise=sample.noise,
        keep_images=True,
        committed=sample.committed,
    )
