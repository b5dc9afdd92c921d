"""Cells against their baselines: means, intervals and paired tests.

Owns: which numbers of an episode are compared and how. Must not import the simulator. A failed
episode counts with its whole time, so that failing is not quicker than succeeding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from groot_int8_ros.policy.types import BoolArray, Float64Array
from offline_tools.closed_loop.statistics import (
    holm,
    mcnemar_p,
    mean_interval,
    paired_share_interval,
    sign_flip_p,
    wilson_interval,
)
from offline_tools.compare_closed_loop.plan import Cell, Section

Episodes = Mapping[int, Mapping[str, Any]]

SUCCESS = "success"
# Measured at each episode, lower is better, and their units.
MEASURES = {
    "time_s": "s",
    "jerk_rad_s3": "rad/s³",
    "largest_step_rad": "rad",
}
ACTION_ERROR = "action_error_rad"
LARGEST_ACTION_ERROR = "largest_action_error_rad"

Interval = tuple[float, float]


@dataclass(frozen=True)
class Difference:
    """How much more a cell has than its baseline on the same scenes.

    Attributes:
        mean: Of the differences.
        interval: Its 95 % interval.
        p: Of the paired test, alone.
        corrected_p: Corrected for the number of tests in the section.
    """

    mean: float
    interval: Interval
    p: float
    corrected_p: float = 1.0

    @property
    def real(self) -> bool:
        """Whether the test says that there is a difference."""
        return self.corrected_p < 0.05


@dataclass(frozen=True)
class Row:
    """One cell of a table.

    Attributes:
        cell: The cell.
        baseline: What it is compared with; None for a baseline itself.
        episodes: Scenes that both have run.
        successes: Of these.
        success_interval: 95 % interval of the share.
        means: Measure to its mean.
        largest_step_rad: Largest of all episodes.
        action_error: Root mean square of the action error with its 95 % interval and its largest
            value, radians; None where there is none by definition.
        differences: `success` and measures to the difference to the baseline.
    """

    cell: Cell
    baseline: Cell | None
    episodes: int
    successes: int
    success_interval: Interval
    means: Mapping[str, float]
    largest_step_rad: float
    action_error: tuple[float, Interval, float] | None
    differences: Mapping[str, Difference]

    @property
    def share(self) -> float:
        """Part of the episodes that succeeded."""
        return self.successes / self.episodes


def compare_section(section: Section, results: Mapping[Cell, Episodes]) -> list[Row]:
    """Compare what has been run of a section.

    Args:
        section: What is compared with what.
        results: Cell to its finished episodes by seed; cells may be missing.

    Returns:
        A row for each cell that has episodes, in the section's order. Cells whose baseline has run
        none of their scenes are left out.
    """
    rows = []
    for cell, baseline in section.pairs:
        seeds = sorted(
            seed
            for seed in results.get(cell, {})
            if seed < section.episodes and seed in results.get(baseline, {})
        )
        if seeds:
            rows.append(
                _row(
                    cell,
                    None if cell == baseline else baseline,
                    [results[cell][seed] for seed in seeds],
                    [results[baseline][seed] for seed in seeds],
                )
            )
    return _corrected(rows)


def _row(
    cell: Cell,
    baseline: Cell | None,
    found: list[Mapping[str, Any]],
    wanted: list[Mapping[str, Any]],
) -> Row:
    success = _successes(found)
    differences: dict[str, Difference] = {}
    if baseline is not None:
        before = _successes(wanted)
        differences[SUCCESS] = Difference(
            float(success.mean() - before.mean()),
            paired_share_interval(before, success),
            mcnemar_p(before, success),
        )
        for name in MEASURES:
            values = _values(found, name) - _values(wanted, name)
            differences[name] = Difference(
                float(values.mean()), mean_interval(values), sign_flip_p(values)
            )
    action_error = None
    if all(ACTION_ERROR in episode for episode in found):
        squares = _values(found, ACTION_ERROR) ** 2
        low, high = mean_interval(squares)
        action_error = (
            float(np.sqrt(squares.mean())),
            (float(np.sqrt(low)), float(np.sqrt(high))),
            float(_values(found, LARGEST_ACTION_ERROR).max()),
        )
    return Row(
        cell=cell,
        baseline=baseline,
        episodes=len(found),
        successes=int(success.sum()),
        success_interval=wilson_interval(int(success.sum()), len(found)),
        means={name: float(_values(found, name).mean()) for name in MEASURES},
        largest_step_rad=float(_values(found, "largest_step_rad").max()),
        action_error=action_error,
        differences=differences,
    )


def _successes(episodes: list[Mapping[str, Any]]) -> BoolArray:
    return np.array([episode[SUCCESS] for episode in episodes], np.bool_)


def _values(episodes: list[Mapping[str, Any]], name: str) -> Float64Array:
    return np.array([episode[name] for episode in episodes], np.float64)


def _corrected(rows: list[Row]) -> list[Row]:
    """Correct the p values of a section for their number."""
    keys = [(index, name) for index, row in enumerate(rows) for name in row.differences]
    corrected = dict(
        zip(keys, holm([rows[index].differences[name].p for index, name in keys]), strict=True)
    )
    return [
        replace(
            row,
            differences={
                name: replace(difference, corrected_p=corrected[index, name])
                for name, difference in row.differences.items()
            },
        )
        for index, row in enumerate(rows)
    ]
