"""What a run's commands look like: dead time, jumps at seams, jerk, error and lag.

Owns: the figures. Must not import torch or ROS. Joints are scaled to a range of motion of 1, so
figures are parts of a joint's range.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from groot_int8_ros.control.types import NANOSECONDS, Float64Array
from offline_tools.evaluate.action_metrics import jerk
from offline_tools.replay.simulation import Road, Run

_LONGEST_LAG_S = 2.0


@dataclass(frozen=True)
class Figures:
    """One road over all motions.

    Attributes:
        road: Which, or `recording` for the motions themselves.
        dead_s: Time without a row to execute, after the first chunk, seconds.
        dead_share: The same as a part of the time after the first chunk.
        seam_jump_mean: At a seam, the largest change over the joints from one control period's
            motion to the next, as a part of the joint's range; mean over the seams between two
            chunks.
        seam_jump_max: The same of the worst of these.
        resume_jump_max: The same where a chunk ended a hold.
        jerk_ratio: Root mean square jerk of the commands over that of the recording.
        error_rms: Root mean square difference from the recording at the same time, as a part of
            the joints' ranges.
        lag_s: Shift of the recording that fits the commands best, seconds.
        chunks: Chunks that were taken.
        late_chunks: See `Run`.
        prefix_mismatches: See `Run`.
        rows_skipped: See `Run`.
    """

    road: str
    dead_s: float
    dead_share: float
    seam_jump_mean: float
    seam_jump_max: float
    resume_jump_max: float
    jerk_ratio: float
    error_rms: float
    lag_s: float
    chunks: int
    late_chunks: int
    prefix_mismatches: int
    rows_skipped: float


def figures(road: Road, runs: Sequence[Run]) -> Figures:
    """Return the figures of one road over all motions.

    Args:
        road: Which.
        runs: One for each motion; what came before its first chunk does not count.
    """
    parts = [_after_first_chunk(run) for run in runs]
    periods_s = [float(np.diff(run.times_ns[:2])[0]) / NANOSECONDS for run in runs]
    dead = np.concatenate([run.dead for run in parts])
    jumps = np.concatenate([seam_jumps(run, after_hold=False) for run in parts])
    resumes = np.concatenate([seam_jumps(run, after_hold=True) for run in parts])
    square = [np.mean((run.commands - run.recorded) ** 2) for run in parts]
    lags = [lag_s(run, period_s) for run, period_s in zip(parts, periods_s, strict=True)]
    return Figures(
        road=road,
        dead_s=float(sum(r.dead.sum() * p for r, p in zip(parts, periods_s, strict=True))),
        dead_share=float(dead.mean()),
        seam_jump_mean=float(jumps.mean()) if jumps.size else 0.0,
        seam_jump_max=float(jumps.max(initial=0.0)),
        resume_jump_max=float(resumes.max(initial=0.0)),
        jerk_ratio=_rms_jerk([(r.times_ns, r.commands) for r in parts])
        / _rms_jerk([(r.times_ns, r.recorded) for r in parts]),
        error_rms=float(np.sqrt(np.mean(square))),
        lag_s=float(np.mean(lags)),
        chunks=sum(len(run.seams) for run in runs),
        late_chunks=sum(run.late_chunks for run in runs),
        prefix_mismatches=sum(run.prefix_mismatches for run in runs),
        rows_skipped=float(np.mean([run.rows_skipped for run in runs])),
    )


def recording(runs: Sequence[Run]) -> Figures:
    """Return the figures of the recording itself, at every control period: what is natural."""
    parts = [_after_first_chunk(run) for run in runs]
    changes = np.concatenate([_changes(run.recorded) for run in parts])
    return Figures(
        road="recording",
        dead_s=0.0,
        dead_share=0.0,
        seam_jump_mean=float(changes.mean()),
        seam_jump_max=float(changes.max()),
        resume_jump_max=0.0,
        jerk_ratio=1.0,
        error_rms=0.0,
        lag_s=0.0,
        chunks=0,
        late_chunks=0,
        prefix_mismatches=0,
        rows_skipped=0.0,
    )


def seam_jumps(run: Run, *, after_hold: bool) -> Float64Array:
    """Return the jumps of seams, without the first one; see `Figures`.

    Args:
        run: Its commands.
        after_hold: Whether to look at the chunks that ended a hold, or at the others.
    """
    changed = _changes(run.commands)
    # changed[k] is about commands k, k + 1 and k + 2; a chunk taken at command i shows there.
    found = [
        changed[seam - 2 : seam].max()
        for seam in run.seams[1:]
        if 2 <= seam <= len(changed) and run.dead[seam - 1] == after_hold
    ]
    return np.array(found, np.float64)


def lag_s(run: Run, period_s: float) -> float:
    """Return by how much the recording has to be delayed to fit the commands best, seconds."""
    longest = min(round(_LONGEST_LAG_S / period_s), len(run.commands) - 2)
    errors = [
        float(np.mean((run.commands[shift:] - run.recorded[: len(run.recorded) - shift]) ** 2))
        for shift in range(longest + 1)
    ]
    return int(np.argmin(errors)) * period_s


def _changes(values: Float64Array) -> Float64Array:
    """Return how the motion changes from a period to the next, worst joint, shape (N - 2,)."""
    return np.asarray(np.abs(np.diff(values, 2, axis=0)).max(axis=1))


def _after_first_chunk(run: Run) -> Run:
    start = run.seams[0] if run.seams else 0
    return Run(
        times_ns=run.times_ns[start:],
        commands=run.commands[start:],
        recorded=run.recorded[start:],
        dead=run.dead[start:],
        seams=tuple(seam - start for seam in run.seams),
        late_chunks=run.late_chunks,
        prefix_mismatches=run.prefix_mismatches,
        rows_skipped=run.rows_skipped,
    )


def _rms_jerk(pieces: Sequence[tuple[np.ndarray, Float64Array]]) -> float:
    squares = [
        jerk(values, (times - times[0]) / NANOSECONDS).ravel() ** 2 for times, values in pieces
    ]
    return float(np.sqrt(np.mean(np.concatenate(squares))))
