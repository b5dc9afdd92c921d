"""Which messages a published chunk was made from.

Owns: a short history of what arrived, and the pairing of chunks with it. Must not import rclpy:
the recorder node hands messages and times in.

The policy node publishes, beside each chunk, the stamp of every message it used. A recorder in
another process receives the same messages at other moments, so it keeps the last of them and
looks them up by stream and stamp. Best-effort frames that never reached the recorder are lost to
it: such a chunk is given up and counted. The history is limited in bytes, not in time: four raw
cameras bring 100 MB a second.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from groot_int8_ros.ros.observation_buffer import Sample, Snapshot, Stream

# A message without a payload of its own still costs Python objects.
_MESSAGE_BYTES = 2048
# A frame that has not come this long after its chunk was lost.
PATIENCE_S = 2.0
_MAX_HALF_PAIRS = 100


@dataclass(frozen=True)
class Paired:
    """A chunk and what it was made from.

    Attributes:
        snapshot: The messages.
        chunk: The `trajectory_msgs/JointTrajectory`.
        seed: Of the noise.
        instruction: As the policy was given it.
        committed: What the policy node wrote of the rows that it was given, unchecked; None where
            there were none.
    """

    snapshot: Snapshot
    chunk: Any
    seed: int
    instruction: str
    committed: Any = None


class ChunkPairing:
    """Keeps recent messages and pairs chunks with them; safe to use from several threads.

    Args:
        streams: The recorder's inputs.
        history_bytes: Memory for messages.
    """

    def __init__(self, streams: Sequence[Stream], history_bytes: int) -> None:
        self._names = {stream.name for stream in streams}
        self._limit_bytes = history_bytes
        self._changed = threading.Condition()
        self._messages: OrderedDict[tuple[str, int], Sample] = OrderedDict()
        self._bytes = 0
        self._chunks: OrderedDict[int, Any] = OrderedDict()
        self._infos: OrderedDict[int, Mapping[str, Any]] = OrderedDict()
        # Chunk and info that are both there: (steady time, stamp, chunk, info).
        self._waiting: deque[tuple[float, int, Any, Mapping[str, Any]]] = deque()
        self._lost = 0
        self._foreign = ""

    @property
    def lost(self) -> int:
        """Chunks given up because a message they were made from never came."""
        with self._changed:
            return self._lost

    @property
    def foreign(self) -> str:
        """Why the newest chunk info could not be used, or nothing."""
        with self._changed:
            return self._foreign

    def seen(self, name: str, message: Any, stamp_ns: int) -> None:
        """Keep an input message.

        Args:
            name: Its stream.
            message: Kept as it is.
            stamp_ns: Its header's stamp.
        """
        size = _size(message)
        with self._changed:
            previous = self._messages.pop((name, stamp_ns), None)
            if previous is not None:
                self._bytes -= _size(previous.message)
            self._messages[name, stamp_ns] = Sample(message, stamp_ns, time.monotonic())
            self._bytes += size
            while self._bytes > self._limit_bytes:
                _, oldest = self._messages.popitem(last=False)
                self._bytes -= _size(oldest.message)
            self._changed.notify_all()

    def on_chunk(self, stamp_ns: int, chunk: Any) -> None:
        """Take a chunk."""
        with self._changed:
            self._half(self._chunks, stamp_ns, chunk)

    def on_info(self, info: Any) -> None:
        """Take what was published beside a chunk, parsed from JSON."""
        fault = self._fault(info)
        with self._changed:
            self._foreign = fault
            if not fault:
                self._half(self._infos, int(info["stamp_ns"]), info)

    def next(self, timeout_s: float) -> Paired | None:
        """Return the next chunk whose messages are all there, or None after the timeout."""
        end_s = time.monotonic() + timeout_s
        with self._changed:
            while True:
                found = self._ready()
                left_s = end_s - time.monotonic()
                if found or left_s <= 0.0:
                    return found
                self._changed.wait(left_s)

    def clear(self) -> None:
        """Forget everything because time jumped back: stamps will come again."""
        with self._changed:
            self._messages.clear()
            self._bytes = 0
            self._chunks.clear()
            self._infos.clear()
            self._waiting.clear()

    def _half(self, halves: OrderedDict[int, Any], stamp_ns: int, value: Any) -> None:
        halves[stamp_ns] = value
        if stamp_ns in self._chunks and stamp_ns in self._infos:
            chunk, info = self._chunks.pop(stamp_ns), self._infos.pop(stamp_ns)
            self._waiting.append((time.monotonic(), stamp_ns, chunk, info))
            self._changed.notify_all()
        elif len(halves) > _MAX_HALF_PAIRS:
            halves.popitem(last=False)
            self._lost += 1

    def _ready(self) -> Paired | None:
        now_s = time.monotonic()
        for _ in range(len(self._waiting)):
            arrival_s, stamp, chunk, info = self._waiting.popleft()
            places = {name: (name, one["stamp_ns"]) for name, one in info["streams"].items()}
            if all(place in self._messages for place in places.values()):
                samples = {name: self._messages[place] for name, place in places.items()}
                return Paired(
                    Snapshot(samples, stamp, epoch=0),
                    chunk,
                    info["seed"],
                    info["instruction"],
                    info["committed"],
                )
            if now_s - arrival_s < PATIENCE_S:
                self._waiting.append((arrival_s, stamp, chunk, info))
            else:
                self._lost += 1
        return None

    def _fault(self, info: Any) -> str:
        try:
            stamps = {name: one["stamp_ns"] for name, one in info["streams"].items()}
            numbers = [info["stamp_ns"], info["seed"], *stamps.values()]
            if not isinstance(info["instruction"], str) or not all(
                isinstance(number, int) for number in numbers
            ):
                return "the chunk info's entries are not of the types that a policy node writes"
            if "committed" not in info:
                return "the chunk info does not say whether rows of its chunk were committed"
        except (KeyError, TypeError, AttributeError) as error:
            return f"the chunk info is not that of a policy node: {error!r}"
        if set(stamps) != self._names:
            return (
                f"the policy node's inputs are {', '.join(sorted(stamps))}, but this node's are "
                f"{', '.join(sorted(self._names))}: it runs another bundle"
            )
        return ""


def _size(message: Any) -> int:
    return _MESSAGE_BYTES + len(getattr(message, "data", ()))
