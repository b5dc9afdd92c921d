"""How far a computed array is from a recorded one, and the table that says so.

Owns: the rules of comparison, the results and their table. Must not import torch or the model:
it judges arrays, whoever computed them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

RELATIVE_TOLERANCE = 1e-4
IMAGE_LEVELS = 1
IMAGE_EXACT_FRACTION = 0.999


class Rule(Enum):
    """What a boundary has to keep."""

    RELATIVE = f"relative error ‖a−b‖₂/‖b‖₂ at most {RELATIVE_TOLERANCE:g}"
    EXACT = "equal"
    IMAGE = (
        f"off by {IMAGE_LEVELS} level at most and equal on {IMAGE_EXACT_FRACTION:.1%} of pixels"
    )


@dataclass(frozen=True)
class Result:
    """One comparison.

    Attributes:
        recording: File of the recorded array, without its ending.
        boundary: What was compared.
        source: What the computation was fed with.
        rule: What it has to keep.
        passed: Whether it keeps it.
        max_abs: Largest absolute error, NaN where none can be computed.
        relative: ‖a−b‖₂/‖b‖₂, NaN where none can be computed.
        remark: Shown behind the numbers.
    """

    recording: str
    boundary: str
    source: str
    rule: Rule
    passed: bool
    max_abs: float
    relative: float
    remark: str = ""


def _is_number(array: NDArray[Any]) -> bool:
    return array.dtype.kind in "biuf"


def compare(
    recording: str, boundary: str, source: str, rule: Rule, actual: Any, expected: Any
) -> Result:
    """Compare a computed with a recorded array.

    Args:
        recording: File of the recorded array.
        boundary: Its name.
        source: What the computation was fed with.
        rule: What the boundary has to keep.
        actual: Computed array.
        expected: Recorded array.

    Returns:
        The result; arrays of different shapes and values that are not finite fail.
    """
    computed, recorded = np.asarray(actual), np.asarray(expected)

    def result(
        passed: bool, max_abs: float = np.nan, relative: float = np.nan, remark: str = ""
    ) -> Result:
        return Result(recording, boundary, source, rule, passed, max_abs, relative, remark)

    if computed.shape != recorded.shape:
        return result(False, remark=f"shape {computed.shape}, recorded {recorded.shape}")
    if not (_is_number(computed) and _is_number(recorded)):
        equal = bool(np.array_equal(computed, recorded))
        return result(equal, remark="" if equal else "texts differ")
    first, second = computed.astype(np.float64), recorded.astype(np.float64)
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        return result(False, remark="not finite")
    error = np.abs(first - second)
    max_abs = float(error.max(initial=0.0))
    scale = float(np.linalg.norm(second))
    size = float(np.linalg.norm(error))
    # Where nothing but zeros was recorded, any error at all is infinitely large.
    relative = size / scale if scale else (np.inf if size else 0.0)
    if rule is Rule.RELATIVE:
        return result(relative <= RELATIVE_TOLERANCE, max_abs, relative)
    different = int(np.count_nonzero(error))
    if rule is Rule.EXACT:
        remark = f"{different} of {error.size} differ" if different else ""
        return result(not different, max_abs, relative, remark)
    exact = 1.0 - different / error.size if error.size else 1.0
    return result(
        max_abs <= IMAGE_LEVELS and exact >= IMAGE_EXACT_FRACTION,
        max_abs,
        relative,
        f"{exact:.3%} equal",
    )


@dataclass
class Report:
    """All comparisons of a run, and what could not be compared.

    Attributes:
        results: The comparisons.
        notes: What was recorded but not compared, or expected but not recorded.
    """

    results: list[Result] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(
        self, recording: str, boundary: str, source: str, rule: Rule, actual: Any, expected: Any
    ) -> None:
        """Compare and keep the result; arguments as in `compare`."""
        self.results.append(compare(recording, boundary, source, rule, actual, expected))

    def fail(self, recording: str, boundary: str, source: str, reason: str) -> None:
        """Keep a boundary that could not be computed."""
        self.results.append(
            Result(recording, boundary, source, Rule.RELATIVE, False, np.nan, np.nan, reason)
        )

    def note(self, text: str) -> None:
        """Keep something that the reader has to know."""
        self.notes.append(text)

    @property
    def failures(self) -> list[Result]:
        """The comparisons that did not keep their rule."""
        return [result for result in self.results if not result.passed]

    def table(self) -> str:
        """Return all comparisons as an aligned table, the notes and a summary."""
        head = ("recording", "boundary", "fed with", "max abs", "relative", "verdict")
        rows = [head, *map(_row, self.results)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
        lines = [_line(row, widths) for row in rows]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join([*lines, self._summary()])

    def _summary(self) -> str:
        failures = self.failures
        measured = [r for r in self.results if r.rule is Rule.RELATIVE and r.passed]
        worst = max(measured, key=lambda result: result.relative, default=None)
        lines = [
            f"{len(self.results)} comparisons, {len(failures)} failed"
            + (
                f"; largest relative error kept {worst.relative:.1e} "
                f"({worst.recording} {worst.boundary})"
                if worst is not None
                else ""
            )
        ]
        for rule in dict.fromkeys(result.rule for result in failures):
            names = ", ".join(
                f"{result.recording} {result.boundary}"
                for result in failures
                if result.rule is rule
            )
            lines.append(f"FAILED, has to be {rule.value}: {names}")
        return "\n".join(lines)


def _row(result: Result) -> tuple[str, ...]:
    verdict = "ok" if result.passed else "FAILED"
    return (
        result.recording,
        result.boundary,
        result.source,
        "-" if np.isnan(result.max_abs) else f"{result.max_abs:.2e}",
        "-" if np.isnan(result.relative) else f"{result.relative:.2e}",
        f"{verdict} ({result.remark})" if result.remark else verdict,
    )


def _line(row: Iterable[str], widths: list[int]) -> str:
    return "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
