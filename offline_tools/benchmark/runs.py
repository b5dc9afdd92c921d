"""Timing several policies on the same inputs, interleaved in one process.

Owns: the order of the runs and what is computed from the times. Must not import torch.

A machine's speed drifts with its temperature, its clock and its neighbours. So the contenders
take turns, one answer each a round, in an order that rotates; each round gives one ratio, and the
median of the rounds' ratios is what is reported. Warm-up rounds are counted apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from groot_int8_ros.policy.types import ActionChunk, Float32Array, Float64Array, Observation
from offline_tools.benchmark.fixture import FrozenInputs

STAGES = ("preprocess", "backbone", "action_head", "postprocess", "total")

Answer = Callable[[Observation, Float32Array], ActionChunk]


@dataclass(frozen=True, eq=False)
class Times:
    """One contender's times.

    Attributes:
        stages_s: Stage to its wall time in each counted round, seconds, float64 (rounds,).
        warmup_s: Total of each warm-up answer, seconds, float64 (warm-up rounds,).
        answers: Normalised answer to each of the inputs, float32 (inputs, horizon, dims).
    """

    stages_s: Mapping[str, Float64Array]
    warmup_s: Float64Array
    answers: Float32Array


@dataclass(frozen=True)
class Figure:
    """What is reported of one stage of one contender.

    Attributes:
        median_ms: Median over the rounds.
        p99_ms: 99th percentile over the rounds.
        ratio: Median over the rounds of the first contender's time over this one's.
        ratio_low: 5th percentile of the same.
        ratio_high: 95th percentile of the same.
    """

    median_ms: float
    p99_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float


def run_interleaved(
    contenders: Sequence[Answer], inputs: FrozenInputs, *, rounds: int, warmup: int
) -> list[Times]:
    """Let every contender answer the same inputs in turns.

    Args:
        contenders: Each answers an observation from given noise.
        inputs: Asked one after the other, again from the first when they are used up.
        rounds: Counted rounds.
        warmup: Rounds before them.

    Returns:
        The times of each contender.
    """
    count = len(contenders)
    stages: list[dict[str, list[float]]] = [{name: [] for name in STAGES} for _ in contenders]
    warm: list[list[float]] = [[] for _ in contenders]
    answers: list[dict[int, Float32Array]] = [{} for _ in contenders]
    for number in range(warmup + rounds):
        index = number % len(inputs)
        for place in range(count):
            which = (place + number) % count
            chunk = contenders[which](inputs.observations[index], inputs.noise[index])
            answers[which].setdefault(index, chunk.action_pred.copy())
            if number < warmup:
                warm[which].append(chunk.timings_s["total"])
                continue
            for name in STAGES:
                stages[which][name].append(chunk.timings_s[name])
    return [
        Times(
            {name: np.array(values) for name, values in one.items()},
            np.array(before),
            np.stack([answer for _, answer in sorted(answered.items())]),
        )
        for one, before, answered in zip(stages, warm, answers, strict=True)
    ]


def figure(times: Times, first: Times, stage: str) -> Figure:
    """Return what is reported of one stage, against the first contender's."""
    own = times.stages_s[stage]
    # A stage that one family does not have takes no time; its ratio says nothing.
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = first.stages_s[stage] / own
    low, middle, high = np.percentile(ratios, [5, 50, 95])
    return Figure(
        median_ms=1e3 * float(np.median(own)),
        p99_ms=1e3 * float(np.percentile(own, 99)),
        ratio=float(middle),
        ratio_low=float(low),
        ratio_high=float(high),
    )


def relative_l2(found: Float32Array, wanted: Float32Array) -> float:
    """Return the norm of the difference over the norm of what is wanted."""
    difference = found.astype(np.float64) - wanted
    return float(np.linalg.norm(difference) / np.linalg.norm(wanted))
