"""What a soak has shown, and whether it is good enough.

Owns: `Outcome`, its table and its verdict. Must not import ROS.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from offline_tools.soak.ledger import Ledger, since
from offline_tools.soak.samples import Sample, Series, series

# In a shorter time the noise of the resident memory is a slope of many megabytes an hour.
JUDGED_S = 600.0
BURST_SHARE = 0.2
_MEGABYTE = 1e6


@dataclass(frozen=True)
class Outcome:
    """What a run gave.

    Attributes:
        samples: Node to its readings, from enabling on.
        warm_up_s: Readings before this time do not count.
        begin: Counts when the robot was enabled.
        end: Counts before it was disabled.
        final: Counts when the policy node had stopped and both stood still.
        worst_second: Deadlines missed and control steps between two statuses of the executor,
            of the two with the largest share missed.
        received: Stream to the share of its messages that the policy node got.
        stages_ms: Mean and longest time from observation to chunk.
        exit_codes: Node to its exit code after SIGTERM.
    """

    samples: Mapping[str, list[Sample]]
    warm_up_s: float
    begin: Ledger
    end: Ledger
    final: Ledger
    worst_second: tuple[int, int]
    received: Mapping[str, float] = field(default_factory=dict)
    stages_ms: tuple[str, str] = ("", "")
    exit_codes: Mapping[str, int] = field(default_factory=dict)

    def series(self) -> dict[str, Series]:
        """Return what each node's readings say once it was warm."""
        return {
            name: series(
                [one for one in samples if one.time_s - samples[0].time_s >= self.warm_up_s]
            )
            for name, samples in self.samples.items()
        }


def faults(outcome: Outcome, max_growth_mb_per_h: float) -> Iterator[str]:
    """Yield what is not right.

    Args:
        outcome: Of a run.
        max_growth_mb_per_h: Slope of the resident memory above which it is not flat.
    """
    for name, found in outcome.series().items():
        growth = found.growth_bytes_per_h / _MEGABYTE
        if found.seconds >= JUDGED_S and growth > max_growth_mb_per_h:
            yield (
                f"the memory of {name} grows by {growth:.1f} MB/h, more than "
                f"{max_growth_mb_per_h:g}"
            )
        for what, (first, last) in (("threads", found.threads), ("open files", found.files)):
            if last > first:
                yield f"{name} has {last} {what}, {first} after warm-up"
    final = outcome.final
    if final.lost:
        yield (
            f"{final.lost} chunks lost: {final.published} published, {final.accepted} accepted, "
            f"{sum(final.refused.values())} refused"
        )
    if final.accepted <= outcome.begin.accepted:
        yield "the executor has accepted no chunk, so nothing is shown"
    misses, steps = outcome.worst_second
    if misses > BURST_SHARE * steps:
        yield (
            f"{misses} of {steps} deadlines missed within about a second, more than "
            f"{BURST_SHARE:.0%}: the executor does not get the processor in time"
        )
    for name, code in outcome.exit_codes.items():
        if code != 0:
            yield f"{name} ended with exit code {code} on SIGTERM"


def lines(outcome: Outcome) -> Iterator[str]:
    """Yield the lines of the table."""
    yield "| process | RSS warm | at the end | most | slope | threads | open files | cores |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, found in outcome.series().items():
        judged = "" if found.seconds >= JUDGED_S else " (too short to judge)"
        yield (
            f"| {name} | {found.first_bytes / _MEGABYTE:.1f} MB "
            f"| {found.last_bytes / _MEGABYTE:.1f} MB | {found.most_bytes / _MEGABYTE:.1f} MB "
            f"| {found.growth_bytes_per_h / _MEGABYTE:+.1f} MB/h{judged} "
            f"| {found.threads[0]} → {found.threads[1]} | {found.files[0]} → {found.files[1]} "
            f"| {found.cores:.2f} |"
        )
    begin, end, final = outcome.begin, outcome.end, outcome.final
    steps, misses = end.steps - begin.steps, end.misses - begin.misses
    yield ""
    yield "| what | count |"
    yield "|---|---|"
    for stream, share in outcome.received.items():
        yield f"| received of {stream} | {share:.1%} |"
    mean, longest = outcome.stages_ms
    yield f"| inference, mean and longest | {mean} ms, {longest} ms |"
    yield f"| chunks published by the policy node | {final.published} |"
    yield f"| chunks accepted by the executor | {final.accepted} |"
    yield f"| chunks refused by it | {_counts(final.refused)} |"
    yield f"| chunks lost between them | {final.lost} |"
    yield f"| control steps | {steps} |"
    yield f"| deadlines missed | {misses} ({misses / max(steps, 1):.2%}) |"
    yield f"| most of them within a second | {outcome.worst_second[0]} |"
    yield f"| holds of the executor | {_counts(since(end.executor_holds, begin.executor_holds))} |"
    yield f"| holds of the policy node | {_counts(since(end.policy_holds, begin.policy_holds))} |"
    codes = ", ".join(f"{name} {code}" for name, code in outcome.exit_codes.items())
    yield f"| exit codes on SIGTERM | {codes} |"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items())) or "none"
