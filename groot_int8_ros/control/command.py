"""What the executor says: its command, and what it has counted.

Owns: `Command` and `Counters`. Must not import ROS or the policy.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from groot_int8_ros.control.chunks import Refusal
from groot_int8_ros.control.types import Float64Array

Mode = Literal["off", "stopping", "estop", "holding", "ramping", "running"]


@dataclass(frozen=True)
class ChannelCommand:
    """What one channel is commanded.

    Attributes:
        name: Of the channel.
        values: Positions, or velocities where that is the channel's interface, float64, shape
            (J,).
        rates: Their rate of change, unit/s, float64, shape (J,).
        hold: Why the channel holds, or None while it executes chunks.
        ramping: Whether it goes slowly to a first command that is far away.
        resting: Whether this is a hold that has come to rest: positions stay, velocities are 0.
        tracking_error: How far each joint stands from the commands of the last second, float64,
            shape (J,); zeros for velocities.
        astray: Joints that do not follow: their error is above the channel's tolerance.
    """

    name: str
    values: Float64Array
    rates: Float64Array
    hold: Refusal | None
    ramping: bool
    resting: bool
    tracking_error: Float64Array
    astray: tuple[str, ...] = ()


@dataclass(frozen=True)
class Command:
    """One control period's command.

    Attributes:
        mode: What the executor is doing.
        channels: One for each channel; none where nothing may be published.
    """

    mode: Mode
    channels: tuple[ChannelCommand, ...] = ()

    @property
    def resting(self) -> bool:
        """Whether nothing moves: every channel holds and has come to rest."""
        return all(channel.resting for channel in self.channels)


@dataclass
class Counters:
    """What has happened since the executor was made.

    Attributes:
        steps: Control periods.
        deadline_misses: Steps that came late.
        chunks: Chunks that were taken.
        late_chunks: Those of them that came after the rows before them had run out.
        underruns: Times that a channel ran out of rows.
        rows_skipped: Rows of taken chunks that were due before their arrival.
        rows_skipped_last: The same of the newest chunk.
        clock_jumps: Jumps of ROS time.
        prefix_mismatches: Chunks that did not begin as committed (seam `rtc`).
        seam_jump_last: Jump of the newest seam, in joint units.
        seam_jump_max: Largest jump of a seam.
        clamps: "channel: limit" to steps in which it kept a joint from its target.
        refusals: Reason to chunks, joint states and enablings that were refused.
        holds: "channel: reason" to times that the channel began to hold for it.
        estops: Emergency stops.
        astray: "channel: joint" to times that the joint began not to follow.
    """

    steps: int = 0
    deadline_misses: int = 0
    chunks: int = 0
    late_chunks: int = 0
    underruns: int = 0
    rows_skipped: int = 0
    rows_skipped_last: int = 0
    clock_jumps: int = 0
    prefix_mismatches: int = 0
    seam_jump_last: float = 0.0
    seam_jump_max: float = 0.0
    clamps: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    holds: Counter[str] = field(default_factory=Counter)
    estops: int = 0
    astray: Counter[str] = field(default_factory=Counter)
