"""What both nodes count, compared.

Owns: the counts that are taken from `/diagnostics`, and what must hold between them. Must not
import ROS. Whether a chunk was lost is judged by two counts that know nothing of each other: how
many the policy node published, and how many the executor accepted or refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

_REFUSED = "refused: chunk: "
_HOLDS = "holds: "


@dataclass(frozen=True)
class Ledger:
    """Counts of both nodes at one moment.

    Attributes:
        published: Chunks that the policy node published.
        accepted: Chunks that the executor took.
        refused: Chunks that it did not take, by reason.
        steps: Control steps of the executor.
        misses: Of these, those that came late.
        executor_holds: By channel and reason.
        policy_holds: By reason.
    """

    published: int
    accepted: int
    refused: Mapping[str, int] = field(default_factory=dict)
    steps: int = 0
    misses: int = 0
    executor_holds: Mapping[str, int] = field(default_factory=dict)
    policy_holds: Mapping[str, int] = field(default_factory=dict)

    @property
    def lost(self) -> int:
        """Chunks that were published and that the executor knows nothing of; both stand still."""
        return self.published - self.accepted - sum(self.refused.values())


def read_ledger(statuses: Mapping[str, Mapping[str, str]]) -> Ledger:
    """Return the counts of a set of statuses.

    Args:
        statuses: Name of a status on `/diagnostics` to its values, of both nodes.

    Raises:
        KeyError: One of the statuses or values is missing.
    """
    inference = statuses["policy_node: inference"]
    executor = statuses["chunk_executor: executor"]
    return Ledger(
        published=int(inference["chunks"]),
        accepted=int(statuses["chunk_executor: chunks"]["chunks"]),
        refused=_with(executor, _REFUSED),
        steps=int(executor["steps"]),
        misses=int(executor["deadline misses"]),
        executor_holds=_with(executor, _HOLDS),
        policy_holds=_with(inference, _HOLDS),
    )


def since(now: Mapping[str, int], before: Mapping[str, int]) -> dict[str, int]:
    """Return what was counted between two moments, where it is anything."""
    counts = {name: count - before.get(name, 0) for name, count in now.items()}
    return {name: count for name, count in counts.items() if count}


def _with(values: Mapping[str, str], prefix: str) -> dict[str, int]:
    return {
        name.removeprefix(prefix): int(value)
        for name, value in values.items()
        if name.startswith(prefix)
    }
