"""The newest message of every stream, and whether together they make an observation.

Owns: what is missing, stale, ahead, skewed or already used, and says which stream it is. Must not
import rclpy: times come in as numbers, so that tests and recordings use the same rules.

The rules. A message replaces the one before it, by order of arrival. The observation's stamp is
the newest camera stamp: actions are relative to what was seen last. Every stream's stamp must lie
within the skew of every other's, and no stream's stamp may be older than the age, measured in ROS
time, so that a bag played with `use_sim_time` is judged as the robot was. A stream may have an age
and a skew of its own; between two streams the larger of their own skews counts, so that a slow
stream can be allowed without loosening the others. An observation is used once. When time jumps
back (a bag loops, a clock is set), everything stored before is dropped: frames of two passes never
meet in one observation.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

_NANOSECONDS = 1e9

# A stamp this much older than its predecessor is another pass, not a reordered message.
BACKWARD_JUMP_S = 0.5
# A camera whose newest frame is this part of its period older than another's has one under way.
_DUE_AFTER_PERIODS = 0.75
# Frames of cameras that fire together arrive within a few milliseconds, or one was lost.
LONGEST_GATHERING_S = 0.005

MISSING = "missing"
UNSTAMPED = "unstamped"
AHEAD = "ahead"
STALE = "stale"
SKEWED = "skewed"
USED = "used"
# Given by the conversion of frames, not by the buffer, which does not look into messages.
FROZEN = "frozen"

MAX_AGE = "max_observation_age_s"
MAX_SKEW = "max_observation_skew_s"


@dataclass(frozen=True)
class Stream:
    """One input of the policy.

    Attributes:
        name: Unique name, such as `camera front`; used on diagnostics and in `chunk_info`.
        topic: Resolved topic; named in messages to the user.
        is_camera: Whether its stamp may become the observation's.
        max_age_s: Oldest stamp allowed of this stream, or None for the one of all.
        max_skew_s: Largest difference allowed to another stream's stamp, or None likewise.
        limits: Prefix of the parameters that set these two; named in messages to the user.
    """

    name: str
    topic: str
    is_camera: bool
    max_age_s: float | None = None
    max_skew_s: float | None = None
    limits: str = ""


@dataclass(frozen=True)
class Sample:
    """One stored message.

    Attributes:
        message: As it came.
        stamp_ns: The header's stamp, ROS time.
        arrival_s: Steady time of its arrival.
    """

    message: Any
    stamp_ns: int
    arrival_s: float


@dataclass(frozen=True)
class Snapshot:
    """Messages that belong together.

    Attributes:
        samples: Stream name to its message.
        stamp_ns: The newest camera stamp.
        epoch: Number of backward time jumps before it.
    """

    samples: Mapping[str, Sample]
    stamp_ns: int
    epoch: int


@dataclass(frozen=True)
class Hold:
    """Why there is no chunk.

    Attributes:
        reason: One word, for counting.
        message: What is wrong with which topic, for a person.
    """

    reason: str
    message: str


@dataclass(frozen=True)
class StreamStatus:
    """What diagnostics tell of a stream.

    Attributes:
        stream: Which.
        count: Messages since the buffer was made.
        silence_s: Steady time since the last message, or None before the first.
        stamp_ns: Stamp of the stored message, or None where none is stored.
        same_pixels_s: How long a camera's pixels have been the same, by its stamps.
        is_frozen: Whether that is longer than allowed.
        frame_id: Frame that a camera's newest message names in its header, empty if none.
        looks_like: Another camera that this frame is named after, empty if none.
    """

    stream: Stream
    count: int
    silence_s: float | None
    stamp_ns: int | None
    same_pixels_s: float = 0.0
    is_frozen: bool = False
    frame_id: str = ""
    looks_like: str = ""

    @property
    def mistake(self) -> str | None:
        """What the frame's name says against the camera, or None."""
        if not self.looks_like:
            return None
        return (
            f"{self.stream.topic} may be the camera '{self.looks_like}': its frame_id is "
            f"'{self.frame_id}'. Are two cameras swapped?"
        )


class ObservationBuffer:
    """Stores the newest message of each stream; safe to use from several threads.

    Args:
        streams: All inputs; at least one is a camera.
    """

    def __init__(self, streams: Sequence[Stream]) -> None:
        self.streams = tuple(streams)
        self._by_name = {stream.name: stream for stream in streams}
        self._changed = threading.Condition()
        self._samples: dict[str, Sample] = {}
        self._counts = dict.fromkeys(self._by_name, 0)
        self._arrivals: dict[str, float] = {}
        # Camera to the time between the stamps of its two newest frames.
        self._periods_ns: dict[str, int] = {}
        self._version = 0
        self._epoch = 0
        self._used_stamp_ns: int | None = None

    @property
    def epoch(self) -> int:
        """Number of backward time jumps so far."""
        with self._changed:
            return self._epoch

    def store(self, name: str, message: Any, stamp_ns: int) -> None:
        """Replace a stream's message.

        Args:
            name: The stream.
            message: Kept as it is, not copied.
            stamp_ns: The header's stamp.
        """
        arrival_s = time.monotonic()
        with self._changed:
            previous = self._samples.get(name)
            if previous and previous.stamp_ns - stamp_ns > BACKWARD_JUMP_S * _NANOSECONDS:
                self._drop_all()
            elif previous and stamp_ns > previous.stamp_ns and self._by_name[name].is_camera:
                self._periods_ns[name] = stamp_ns - previous.stamp_ns
            self._samples[name] = Sample(message, stamp_ns, arrival_s)
            self._counts[name] += 1
            self._arrivals[name] = arrival_s
            self._version += 1
            self._changed.notify_all()

    def clear(self) -> None:
        """Drop what is stored because time jumped back."""
        with self._changed:
            self._drop_all()

    def _drop_all(self) -> None:
        self._samples.clear()
        self._epoch += 1
        self._used_stamp_ns = None

    def wake(self) -> None:
        """End a `wait` early."""
        with self._changed:
            self._version += 1
            self._changed.notify_all()

    def wait(self, version: int, timeout_s: float) -> int:
        """Wait until a message came after `version`, or for `timeout_s`.

        Returns:
            The version now, for the next call.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._version != version, timeout_s)
            return self._version

    def wait_for_others(self, longest_s: float) -> None:
        """Wait for frames that were taken with the newest one and have not arrived yet.

        Args:
            longest_s: After the arrival of the newest frame, and of each one that was waited for,
                nothing is waited for longer than this: the others may be lost.
        """
        with self._changed:
            frames = [
                self._samples[stream.name]
                for stream in self.streams
                if stream.is_camera and stream.name in self._samples
            ]
            newest_ns = max((frame.stamp_ns for frame in frames), default=0)
            end_s = max((frame.arrival_s for frame in frames), default=0.0) + longest_s
            late = self._late(newest_ns)
            while late and (left_s := end_s - time.monotonic()) > 0.0:
                self._changed.wait(left_s)
                # Frames of the next moment count for nothing here: where one camera has died, the
                # others' would put the end off for ever.
                if (still_late := self._late(newest_ns)) != late:
                    late, end_s = still_late, time.monotonic() + longest_s

    def _late(self, moment_ns: int) -> set[str]:
        """Return the cameras whose frame of this moment has not arrived, by their periods."""
        return {
            name
            for name, period_ns in self._periods_ns.items()
            if name in self._samples
            and moment_ns - self._samples[name].stamp_ns > _DUE_AFTER_PERIODS * period_ns
        }

    def assemble(self, now_ns: int, max_age_s: float, max_skew_s: float) -> Snapshot | Hold:
        """Return an observation's messages, or why there is none.

        Args:
            now_ns: ROS time.
            max_age_s: Oldest stamp allowed, seconds before now. A stamp may be ahead of now by as
                much, for clocks arrive in steps.
            max_skew_s: Largest difference allowed between two streams' stamps. Of a stream with
                limits of its own those count.
        """
        with self._changed:
            samples, epoch, used = dict(self._samples), self._epoch, self._used_stamp_ns
        hold = self._fault(samples, now_ns, max_age_s, max_skew_s)
        if hold:
            return hold
        stamp_ns = max(
            samples[stream.name].stamp_ns for stream in self.streams if stream.is_camera
        )
        # An older one is a reordered frame: the executor would refuse its chunk.
        if used is not None and stamp_ns <= used:
            return Hold(USED, "no new camera frame since the last chunk")
        return Snapshot(samples, stamp_ns, epoch)

    def mark_used(self, snapshot: Snapshot) -> None:
        """Let no later observation have this one's stamp, or an older one."""
        with self._changed:
            if snapshot.epoch == self._epoch:
                self._used_stamp_ns = snapshot.stamp_ns

    def status(self) -> list[StreamStatus]:
        """Return what is known of each stream."""
        now_s = time.monotonic()
        with self._changed:
            return [
                StreamStatus(
                    stream=stream,
                    count=self._counts[name],
                    silence_s=now_s - self._arrivals[name] if name in self._arrivals else None,
                    stamp_ns=self._samples[name].stamp_ns if name in self._samples else None,
                )
                for name, stream in self._by_name.items()
            ]

    def _fault(
        self, samples: Mapping[str, Sample], now_ns: int, max_age_s: float, max_skew_s: float
    ) -> Hold | None:
        # All streams with the same fault are named at once; the worst kind of fault comes first.
        faults = [
            fault
            for stream in self.streams
            if (
                fault := stamp_fault(
                    stream,
                    samples[stream.name].stamp_ns if stream.name in samples else None,
                    now_ns,
                    max_age_s,
                )
            )
        ]
        for reason in (MISSING, UNSTAMPED, AHEAD, STALE):
            messages = [fault.message for fault in faults if fault.reason == reason]
            if messages:
                return Hold(reason, "; ".join(messages))
        ordered = sorted(self.streams, key=lambda stream: samples[stream.name].stamp_ns)
        skews = []
        for older, newer in combinations(ordered, 2):
            skew_s = (samples[newer.name].stamp_ns - samples[older.name].stamp_ns) / _NANOSECONDS
            limit_s, name = _skew_limit(older, newer, max_skew_s)
            if skew_s > limit_s:
                skews.append((skew_s, older, newer, limit_s, name))
        if not skews:
            return None
        skew_s, older, newer, limit_s, name = max(skews, key=lambda entry: entry[0])
        return Hold(
            SKEWED,
            f"{_named(older)} is {skew_s:.3f} s older than {_named(newer)}, more than "
            f"{name} = {limit_s:g}",
        )


def _skew_limit(one: Stream, other: Stream, max_skew_s: float) -> tuple[float, str]:
    # The limit of two streams, and the name of the parameter that sets it.
    own = [
        (stream.max_skew_s, f"{stream.limits}.max_skew_s")
        for stream in (one, other)
        if stream.max_skew_s is not None
    ]
    return max(own, default=(max_skew_s, MAX_SKEW))


def _named(stream: Stream) -> str:
    return f"{stream.name} ({stream.topic})"


def stamp_fault(
    stream: Stream, stamp_ns: int | None, now_ns: int, max_age_s: float
) -> Hold | None:
    """Judge one stream by itself.

    Args:
        stream: Which.
        stamp_ns: Stamp of its stored message, or None where none is stored.
        now_ns: ROS time.
        max_age_s: See `ObservationBuffer.assemble`.

    Returns:
        What is wrong with it, or None.
    """
    if stamp_ns is None:
        return Hold(MISSING, f"no message from {_named(stream)}")
    if stamp_ns == 0:
        return Hold(
            UNSTAMPED, f"{_named(stream)} has no stamp in its header, so its age is unknown"
        )
    if now_ns == 0:
        return Hold(AHEAD, "ROS time is zero: use_sim_time is set but nothing came on /clock")
    limit_s, name = max_age_s, MAX_AGE
    if stream.max_age_s is not None:
        limit_s, name = stream.max_age_s, f"{stream.limits}.max_age_s"
    age_s = (now_ns - stamp_ns) / _NANOSECONDS
    if age_s < -limit_s:
        return Hold(
            AHEAD,
            f"{_named(stream)} is stamped {-age_s:.3f} s in the future: use_sim_time may be set "
            "wrongly, or the machines' clocks differ",
        )
    if age_s > limit_s:
        return Hold(
            STALE, f"{_named(stream)} is {age_s:.3f} s old, more than {name} = {limit_s:g}"
        )
    return None
