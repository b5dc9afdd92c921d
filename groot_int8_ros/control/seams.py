"""What is commanded where one chunk follows another.

Owns: `SeamSettings` and `Plan`, the function of time that some chunks make together. Must not
import ROS or the policy.

The choices:

- `switch`: the newest chunk, from its arrival on.
- `linear_blend`: from the old chunk to the newest over `blend_s`, each at its own value for the
  time. A chunk that arrives during a blend is blended to from what is commanded.
- `temporal_ensemble`: the mean of all chunks that have a row for the time, the k-th oldest with
  weight `exp(-decay * k)` (Zhao et al. 2023, "Learning Fine-Grained Bimanual Manipulation with
  Low-Cost Hardware", algorithm 2).
- `rtc`: real-time chunking (Black et al. 2025, "Real-Time Execution of Action Chunking Flow
  Policies", with the prefix frozen as input): the policy was told what will have been executed by
  the time its answer is there (`commitment.py`) and continues from it, so the newest chunk holds
  at once. One whose prefix is not what was committed, because the policy does not support it or
  was slower than expected, is blended to as by `linear_blend`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from groot_int8_ros.control.chunks import Rows
from groot_int8_ros.control.types import NANOSECONDS, Float64Array
from groot_int8_ros.errors import ConfigurationError

SeamKind = Literal["switch", "linear_blend", "temporal_ensemble", "rtc"]
SEAM_KINDS: tuple[SeamKind, ...] = get_args(SeamKind)

# Chunks that a plan remembers: a blend among more could not be told from one among these.
_MOST_CHUNKS = 16


@dataclass(frozen=True)
class SeamSettings:
    """How chunks follow each other.

    Attributes:
        kind: See the module.
        blend_s: Time of a blend, seconds (`linear_blend`, and `rtc` where a prefix does not fit).
        ensemble_decay: Decay of the ensemble's weights from one chunk to the next newer one;
            positive trusts old chunks more, negative new ones.
        rtc_tolerance: Largest difference, in joint units, between a new chunk and what is
            executed at the seam that counts as a prefix that was kept.

    Raises:
        ConfigurationError: A value lies outside its range.
    """

    kind: SeamKind = "linear_blend"
    blend_s: float = 0.2
    ensemble_decay: float = 0.01
    rtc_tolerance: float = 0.02

    def __post_init__(self) -> None:
        if self.kind not in SEAM_KINDS:
            raise ConfigurationError(
                f"'{self.kind}' is no choice for the seam; choose one of {', '.join(SEAM_KINDS)}"
            )
        for name in ("blend_s", "rtc_tolerance"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ConfigurationError(f"seam: {name} must be a finite number, 0 or more")
        if not math.isfinite(self.ensemble_decay):
            raise ConfigurationError("seam: ensemble_decay must be a finite number")


@dataclass(frozen=True)
class _Joined:
    rows: Rows
    since_ns: int
    blend_s: float


class Plan:
    """What some joints are to do as a function of time, made of the chunks that arrived.

    Args:
        settings: How chunks follow each other.
    """

    def __init__(self, settings: SeamSettings) -> None:
        self._settings = settings
        self._chunks: list[_Joined] = []

    def clear(self) -> None:
        """Forget all chunks."""
        self._chunks.clear()

    @property
    def newest(self) -> Rows | None:
        """The chunk that arrived last."""
        return self._chunks[-1].rows if self._chunks else None

    def add(self, rows: Rows, now_ns: int) -> float:
        """Let a chunk follow.

        Args:
            rows: Its columns for these joints.
            now_ns: The time of the seam.

        Returns:
            The seam's jump: the largest difference, over the joints, between the new chunk and
            what was planned for that time; 0 where nothing was.
        """
        planned = self.at(now_ns)
        jump = 0.0 if planned is None else float(np.abs(rows.at(now_ns) - planned).max())
        kind, blend_s = self._settings.kind, self._settings.blend_s
        if kind in ("switch", "temporal_ensemble") or (
            kind == "rtc" and jump <= self._settings.rtc_tolerance
        ):
            blend_s = 0.0
        if planned is None:
            # There is nothing to blend from, and what is remembered is over.
            self._chunks.clear()
        self._chunks.append(_Joined(rows, now_ns, blend_s))
        self._chunks = [*self._needed(now_ns)][-_MOST_CHUNKS:]
        return jump

    def at(self, now_ns: int) -> Float64Array | None:
        """Return the target for a time, float64, shape (J,), or None where no row is left."""
        return self._value(now_ns, now_ns)

    def before(self, now_ns: int, dt_s: float) -> Float64Array | None:
        """Return where the target for `now_ns` came from, `dt_s` earlier.

        The difference to `at` over `dt_s` is the target's velocity. A seam in between is not part
        of it: what the new chunk said for the earlier time counts, not what was commanded.
        """
        return self._value(now_ns - round(dt_s * NANOSECONDS), now_ns)

    def _value(self, row_ns: int, seam_ns: int) -> Float64Array | None:
        """Return the target of the rows for one time with the chunks of another, not earlier."""
        if self._settings.kind == "temporal_ensemble":
            return self._ensemble(row_ns, seam_ns)
        if not self._chunks or seam_ns > self._chunks[-1].rows.last_ns:
            return None
        value: Float64Array | None = None
        for joined in self._chunks:
            weight = _weight(joined, row_ns, seam_ns)
            if weight <= 0.0 and value is not None:
                continue
            own = joined.rows.at(row_ns)
            value = own if value is None else value + weight * (own - value)
        return value

    def _ensemble(self, row_ns: int, seam_ns: int) -> Float64Array | None:
        chosen = [
            joined.rows
            for joined in self._chunks
            if joined.rows.first_ns <= seam_ns <= joined.rows.last_ns
        ]
        newest = self.newest
        if not chosen and newest is not None and seam_ns < newest.first_ns:
            # Until its first row is due, a chunk begins where it begins.
            chosen = [newest]
        if not chosen:
            return None
        values = [rows.at(row_ns) for rows in chosen]
        exponents = -self._settings.ensemble_decay * np.arange(len(values))
        weights = np.exp(exponents - exponents.max())
        return np.average(np.stack(values), axis=0, weights=weights)

    def _needed(self, now_ns: int) -> list[_Joined]:
        """Return the chunks that can still matter at this time or later."""
        if self._settings.kind == "temporal_ensemble":
            return [joined for joined in self._chunks if joined.rows.last_ns >= now_ns]
        for index in reversed(range(len(self._chunks))):
            joined = self._chunks[index]
            # Kept a second longer than the blend: commitments also ask for the recent past.
            if joined.since_ns + round((joined.blend_s + 1.0) * NANOSECONDS) <= now_ns:
                return self._chunks[index:]
        return self._chunks


def _weight(joined: _Joined, row_ns: int, seam_ns: int) -> float:
    """Return how far the blend to a chunk has come, 0 to 1."""
    if joined.since_ns > seam_ns:
        return 0.0
    elapsed_s = max(0.0, (row_ns - joined.since_ns) / NANOSECONDS)
    return 1.0 if elapsed_s >= joined.blend_s else elapsed_s / joined.blend_s
