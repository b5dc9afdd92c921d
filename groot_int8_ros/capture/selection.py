"""Which observations of a run to keep when there are more than the budget.

Owns: `Selector` and the distance between two observations. Must not import ROS or an engine.

A calibration set has to cover what the robot meets; the first N observations of a run cover its
beginning. The selector keeps a set whose smallest mutual distance is as large as it can make it:
farthest-point selection (Gonzalez, "Clustering to minimize the maximum intercluster distance",
1985), which covers a set within twice the best possible radius. That needs all points at once. For
a run that is still going on, the same goal is met one observation at a time, as the incremental
clustering of Charikar et al. (1997) does: a new observation is kept if it is farther from every
kept one than the two closest kept ones are from each other; of those two, the one that is nearer
to the rest goes. So the smallest mutual distance never falls, and a budget of k is always used
whole. Their factor of 8 is not guaranteed in return, for it costs up to half of the budget; in the
tests the radius stays within 1.6 times that of farthest-point selection on wandering arms, and
within three times where time alone tells observations apart. A new observation takes O(k) steps,
the memory is O(k), and nothing is drawn at random: the same run gives the same set.

An observation's distance from another has three parts, added as squares:

- state: root mean square of the difference over the normalised dimensions, which run from -1 to 1
- time: the difference over the run's length so far, at most 1. The length is rounded up to a power
  of two, so that distances change seldom, and a pause or a jump of the clock counts as one second.
- instruction: 1 if they differ

A looped bag therefore adds nothing: what comes again lies at distance 0 from what is kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from groot_int8_ros.policy.preprocess import normalize_state
from groot_int8_ros.policy.processor import Processor
from groot_int8_ros.policy.types import Float32Array, Float64Array, Observation

_NANOSECONDS = 1e9
# A longer step between two observations is a pause, not part of the run.
_LONGEST_STEP_S = 1.0
_SHORTEST_RUN_S = 1.0


@dataclass(frozen=True, eq=False)
class Candidate:
    """What the choice depends on.

    Attributes:
        stamp_ns: The observation's stamp in nanoseconds.
        state: Normalised state without padding, float32 (D,).
        instruction: As it was given.
    """

    stamp_ns: int
    state: Float32Array
    instruction: str


@dataclass(frozen=True)
class Decision:
    """What becomes of an offered observation.

    Attributes:
        ticket: Number of the observation if it is kept, else None. Numbers count the offers.
        evicted: Ticket of the kept observation whose place it takes, if it takes one.
    """

    ticket: int | None
    evicted: int | None = None


def candidate(processor: Processor, observation: Observation) -> Candidate:
    """Return what the choice depends on; the observation's images are not looked at.

    Raises:
        ObservationError: The state is incomplete or not finite.
    """
    used = sum(key.encoded_dim for key in processor.state_keys)
    state = normalize_state(processor, observation.state)[0, :used]
    return Candidate(observation.stamp_ns, state, observation.instruction)


class Selector:
    """Chooses among observations that come one after the other."""

    def __init__(self, budget: int) -> None:
        """Begin without any.

        Args:
            budget: Observations to keep at most, at least 1.
        """
        if budget < 1:
            raise ValueError(f"the budget must be at least 1, not {budget}")
        self._budget = budget
        self.offered = 0
        # One row for each kept observation, in the order in which they were kept.
        self._tickets: list[int] = []
        self._states: Float64Array = np.zeros((0, 0))
        self._stamps_s: Float64Array = np.zeros(0)
        self._instructions: list[str] = []
        # Distance to the nearest other kept observation, and which row that is.
        self._nearest: Float64Array = np.zeros(0)
        self._nearest_row = np.zeros(0, np.int64)
        self._origin_ns: int | None = None
        self._previous_s = 0.0
        self._elapsed_s = 0.0
        self._span_s = _SHORTEST_RUN_S

    @property
    def tickets(self) -> list[int]:
        """Tickets of the kept observations, oldest first."""
        return list(self._tickets)

    def offer(self, new: Candidate) -> Decision:
        """Decide on the next observation of the run."""
        ticket = self.offered
        self.offered += 1
        stamp_s = self._advance(new.stamp_ns)
        distances = self._distances(new.state, stamp_s, new.instruction)
        closest = float(distances.min(initial=math.inf))
        if closest == 0.0:
            return Decision(None)
        if len(self._tickets) < self._budget:
            self._insert(new, stamp_s, ticket, distances)
            return Decision(ticket)
        if self._budget == 1 or closest <= float(self._nearest.min()):
            return Decision(None)
        row = self._row_to_drop()
        evicted = self._tickets[row]
        self._remove(row)
        self._insert(new, stamp_s, ticket, np.delete(distances, row))
        return Decision(ticket, evicted)

    def withdraw(self, ticket: int) -> None:
        """Forget a kept observation that turned out to be unusable; the next one may be kept."""
        self._remove(self._tickets.index(ticket))

    def _advance(self, stamp_ns: int) -> float:
        if self._origin_ns is None:
            self._origin_ns = stamp_ns
        # Seconds since the first observation keep their precision as floats; stamps would not.
        stamp_s = (stamp_ns - self._origin_ns) / _NANOSECONDS
        self._elapsed_s += min(max(stamp_s - self._previous_s, 0.0), _LONGEST_STEP_S)
        self._previous_s = stamp_s
        if self._elapsed_s > self._span_s:
            self._span_s = 2.0 ** math.ceil(math.log2(self._elapsed_s))
            for row in range(len(self._tickets)):
                self._find_nearest(row)
        return stamp_s

    def _distances(self, state: Float32Array, stamp_s: float, instruction: str) -> Float64Array:
        """Return the distance to every kept observation."""
        if not self._tickets:
            return np.zeros(0)
        difference = self._states - state.astype(np.float64)
        squares = np.mean(difference**2, axis=1) if state.size else np.zeros(len(self._tickets))
        squares += np.minimum(np.abs(self._stamps_s - stamp_s) / self._span_s, 1.0) ** 2
        squares += np.array([other != instruction for other in self._instructions], np.float64)
        found: Float64Array = np.sqrt(squares)
        return found

    def _find_nearest(self, row: int) -> None:
        distances = self._distances(
            self._states[row], float(self._stamps_s[row]), self._instructions[row]
        )
        distances[row] = math.inf
        self._nearest_row[row] = int(distances.argmin())
        self._nearest[row] = float(distances.min())

    def _row_to_drop(self) -> int:
        first = int(self._nearest.argmin())
        second = int(self._nearest_row[first])
        # Both are nearest to each other; the one with a nearer third neighbour is missed less.
        thirds = []
        for row, partner in ((first, second), (second, first)):
            distances = self._distances(
                self._states[row], float(self._stamps_s[row]), self._instructions[row]
            )
            distances[[row, partner]] = math.inf
            thirds.append(float(distances.min()))
        if thirds[0] == thirds[1]:
            return max(first, second)
        return first if thirds[0] < thirds[1] else second

    def _remove(self, row: int) -> None:
        orphans = np.flatnonzero(self._nearest_row == row)
        del self._tickets[row], self._instructions[row]
        self._states = np.delete(self._states, row, axis=0)
        self._stamps_s = np.delete(self._stamps_s, row)
        self._nearest = np.delete(self._nearest, row)
        self._nearest_row = np.delete(self._nearest_row, row)
        self._nearest_row[self._nearest_row > row] -= 1
        for orphan in orphans[orphans != row]:
            self._find_nearest(int(orphan) - (int(orphan) > row))

    def _insert(
        self, new: Candidate, stamp_s: float, ticket: int, distances: Float64Array
    ) -> None:
        row = len(self._tickets)
        nearer = distances < self._nearest
        self._nearest[nearer] = distances[nearer]
        self._nearest_row[nearer] = row
        self._tickets.append(ticket)
        self._instructions.append(new.instruction)
        state = new.state.astype(np.float64)[None]
        self._states = np.concatenate([self._states, state]) if row else state
        self._stamps_s = np.append(self._stamps_s, stamp_s)
        self._nearest = np.append(self._nearest, distances.min(initial=math.inf))
        self._nearest_row = np.append(self._nearest_row, distances.argmin() if row else 0)
