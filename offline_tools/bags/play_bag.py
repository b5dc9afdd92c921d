"""`groot-int8 play-bag`: publish a rosbag2 through rclpy.

Owns: the pace, `/clock` and the QoS of playback. Must not import torch, and imports rclpy only
when it runs: a robot without `ros2 bag` plays with it, and `--help` works without ROS. Messages
are published as the bytes that were recorded; nothing is converted on the way.

Times come from the monotonic clock. `/clock` follows the bag's time. With `--loop` the bag's time
jumps back to its start, as `ros2 bag play --loop` does, and `/clock` and all stamps with it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import numpy as np
from rosbags.interfaces import Qos, QosDurability, QosHistory, QosReliability, QosTime

from groot_int8_ros.errors import BagError, ConfigurationError
from groot_int8_ros.ros.field_map import message_class
from offline_tools.arguments import not_negative_float, positive_float
from offline_tools.bags.dds import LARGE_IMAGE_TRANSPORTS, TRANSPORTS_VARIABLE
from offline_tools.bags.reading import Bag, BagTopic, open_bag

_NANOSECONDS = 1_000_000_000
_DEFAULT_CLOCK_HZ = 100.0
_SUBSCRIBER_POLL_S = 0.05
# A node's subscriptions are discovered within a fraction of this of each other.
_SUBSCRIBERS_SETTLED_S = 1.0
# What is published before the receivers are discovered is lost, so playback waits that long for
# them unless told otherwise.
_DISCOVERY_S = 5.0
# Fast DDS asks reliable subscribers every 3 s what they have.
_ACKNOWLEDGE_S = 3.5
_ACKNOWLEDGE_POLL_S = 0.1
# What rmw writes for "no limit", in seconds; anything near it is no limit either.
_INFINITE_S = 9_223_372_036
_CLOCK_TOPIC = "/clock"


class RawPublisher(Protocol):
    """What playback needs of an rclpy publisher."""

    def publish(self, message: Any) -> None:
        """Send a message, or the bytes of a serialized one."""

    def get_subscription_count(self) -> int:
        """Return the number of matched subscriptions."""

    def wait_for_all_acked(self, timeout: Any) -> bool:
        """Wait until reliable subscribers have everything."""


@dataclass
class Tally:
    """What was published, for the summary.

    Attributes:
        counts: Topic to number of messages.
        late_s: How long after it was due each message was published, seconds.
    """

    counts: dict[str, int]
    late_s: list[float] = field(default_factory=list)

    def summary(self, elapsed_s: float) -> str:
        """Return the counts and the lateness as lines of text."""
        total = sum(self.counts.values())
        lines = [f"published {total} messages in {elapsed_s:.2f} s"]
        lines += [f"  {count:6d}  {topic}" for topic, count in self.counts.items()]
        if self.late_s:
            p99_ms, worst_ms = np.percentile(self.late_s, (99.0, 100.0)) * 1e3
            lines.append(f"late: p99 {p99_ms:.1f} ms, worst {worst_ms:.1f} ms")
        return "\n".join(lines)


class StopSignals:
    """Turns SIGINT and SIGTERM into a flag, and a wait that they cut short.

    Usable as a context manager, in the main thread. A handler that raised could leave a publisher
    half-way; one that sets a `threading.Event` can dead-lock with the wait that it interrupts.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        os.close(self._read_end)
        os.close(self._write_end)

    def wait_until(self, deadline_s: float) -> bool:
        """Wait for a time of `time.monotonic()`; return False at once when asked to stop."""
        while self.received is None:
            remaining_s = deadline_s - time.monotonic()
            if remaining_s <= 0.0:
                return True
            select.select([self._read_end], [], [], remaining_s)
        return False

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self.received = number
        with contextlib.suppress(BlockingIOError):
            os.write(self._write_end, b"!")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's options."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        "Stamps are those of the recording: add --clock and give the receivers use_sim_time.\n"
        "\n"
        "ROS_DOMAIN_ID, RMW_IMPLEMENTATION and the other ROS variables count as for any node.\n"
        "Fast DDS loses large raw images with its default transports; set this for player and\n"
        "receivers alike:\n"
        f'  {TRANSPORTS_VARIABLE}="{LARGE_IMAGE_TRANSPORTS}"\n'
        "\n"
        "exit codes: 0 played to the end, 130 SIGINT, 143 SIGTERM, 2 a wrong bag or option."
    )
    parser.add_argument("bag", type=Path, help="rosbag2 folder, or one .mcap or .db3 file")
    parser.add_argument(
        "--rate", type=positive_float, default=1.0, metavar="R", help="speed (default: 1)"
    )
    parser.add_argument(
        "--loop", action="store_true", help="start again at the end; time jumps back"
    )
    parser.add_argument(
        "--clock",
        type=positive_float,
        nargs="?",
        const=_DEFAULT_CLOCK_HZ,
        metavar="HZ",
        help=f"publish /clock, by default {_DEFAULT_CLOCK_HZ:g} times a second of real time",
    )
    parser.add_argument(
        "--topics", nargs="+", metavar="TOPIC", help="play only these (default: all)"
    )
    parser.add_argument(
        "--remap", nargs="+", default=[], metavar="OLD:=NEW", help="publish under another name"
    )
    parser.add_argument(
        "--start-offset",
        type=not_negative_float,
        default=0.0,
        metavar="S",
        help="begin S seconds of bag time after its start",
    )
    parser.add_argument(
        "--duration", type=positive_float, metavar="S", help="play S seconds of bag time"
    )
    parser.add_argument(
        "--wait-for-subscribers",
        type=not_negative_float,
        metavar="S",
        help="wait until each topic has a subscriber, or those that have one have not changed for "
        f"{_SUBSCRIBERS_SETTLED_S:g} s; fail after S seconds with none at all; 0 does not wait "
        f"(default: wait up to {_DISCOVERY_S:g} s, then play to nobody)",
    )


def run(args: argparse.Namespace) -> int:
    """Play the bag; return 0, or 128 plus the signal that ended it."""
    with open_bag(args.bag) as bag:
        topics = bag.select(args.topics)
        if args.clock is not None:
            topics = _without_clock(topics)
        renamed = _parse_remaps(args.remap, topics, bag)
        window = _window(bag, args.start_offset, args.duration)
        classes = {topic.name: _message_class(topic, bag) for topic in topics}
        with StopSignals() as stop, _ros_node() as node:
            publishers: dict[str, RawPublisher] = {
                topic.name: _create_publisher(
                    node, classes[topic.name], renamed.get(topic.name, topic.name), topic
                )
                for topic in topics
            }
            clock = _ClockPublisher(node, args.clock) if args.clock is not None else None
            _wait_for_subscribers(publishers, args.wait_for_subscribers, stop)
            tally = Tally(dict.fromkeys(publishers, 0))
            print(
                f"playing {len(publishers)} topics of {args.bag}, "
                f"{(window[1] - window[0]) / 1e9:.2f} s at rate {args.rate:g}"
                + (", looping" if args.loop else ""),
                flush=True,
            )
            started_s = time.monotonic()
            while stop.received is None:
                _play_once(bag, window, publishers, clock, args.rate, stop, tally)
                if not args.loop:
                    break
            elapsed_s = time.monotonic() - started_s
            _wait_for_acknowledgement(publishers, stop)
            print(tally.summary(elapsed_s), flush=True)
            return 0 if stop.received is None else 128 + stop.received


class _ClockPublisher:
    """Publishes `/clock` for given bag times."""

    def __init__(self, node: Any, frequency_hz: float) -> None:
        from rclpy.qos import QoSProfile, ReliabilityPolicy
        from rosgraph_msgs.msg import Clock

        self.period_s = 1.0 / frequency_hz
        self._message = Clock()
        self._publisher = node.create_publisher(
            Clock, _CLOCK_TOPIC, QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
        )

    def publish(self, bag_ns: int) -> None:
        self._message.clock.sec, self._message.clock.nanosec = divmod(bag_ns, _NANOSECONDS)
        self._publisher.publish(self._message)


def _play_once(
    bag: Bag,
    window: tuple[int, int],
    publishers: Mapping[str, RawPublisher],
    clock: _ClockPublisher | None,
    rate: float,
    stop: StopSignals,
    tally: Tally,
) -> None:
    """Publish the window's messages, each at its time, and `/clock` in between."""
    start_ns, end_ns = window
    zero_s = time.monotonic()
    next_tick_s = zero_s

    def wait_until(bag_ns: int) -> bool:
        nonlocal next_tick_s
        due_s = zero_s + (bag_ns - start_ns) / _NANOSECONDS / rate
        while clock is not None and next_tick_s <= due_s:
            if not stop.wait_until(next_tick_s):
                return False
            now_s = time.monotonic()
            clock.publish(start_ns + round((now_s - zero_s) * rate * _NANOSECONDS))
            # A late tick is sent once; the missed ones would all carry the same time.
            next_tick_s += clock.period_s * max(1, int((now_s - next_tick_s) // clock.period_s))
        return stop.wait_until(due_s)

    for topic, stamp_ns, data in bag.messages(list(publishers), start_ns, end_ns + 1):
        if not wait_until(stamp_ns):
            return
        publishers[topic].publish(data)
        tally.counts[topic] += 1
        due_s = zero_s + (stamp_ns - start_ns) / _NANOSECONDS / rate
        tally.late_s.append(time.monotonic() - due_s)
    wait_until(end_ns)


def _without_clock(topics: Sequence[BagTopic]) -> list[BagTopic]:
    # Two sources of time would make every receiver's clock jump.
    others = [topic for topic in topics if topic.name != _CLOCK_TOPIC]
    if not others:
        raise BagError("--clock leaves nothing to play but the bag's own /clock; leave it out.")
    return others


def _window(bag: Bag, offset_s: float, duration_s: float | None) -> tuple[int, int]:
    """Return the first and last stamp to play, nanoseconds."""
    start_ns = bag.start_ns + round(offset_s * _NANOSECONDS)
    if start_ns > bag.end_ns:
        raise BagError(
            f"--start-offset {offset_s:g} is past the end of the bag, which is "
            f"{(bag.end_ns - bag.start_ns) / 1e9:.3f} s long; choose a smaller one."
        )
    if duration_s is None:
        return start_ns, bag.end_ns
    return start_ns, min(bag.end_ns, start_ns + round(duration_s * _NANOSECONDS))


def _parse_remaps(rules: Sequence[str], topics: Sequence[BagTopic], bag: Bag) -> dict[str, str]:
    played = {topic.name for topic in topics}
    renamed: dict[str, str] = {}
    for rule in rules:
        old, separator, new = rule.partition(":=")
        if not separator or not old or not new:
            raise ConfigurationError(f"--remap {rule!r} is not of the form OLD:=NEW.")
        if old not in played:
            raise BagError(
                f"--remap {rule!r}: {old} is not played. The bag has:\n{bag.listing()}\n"
                "Name topics from this list."
            )
        renamed[old] = new
    return renamed


def _message_class(topic: BagTopic, bag: Bag) -> Any:
    try:
        # Which also sees to it that a bag cannot have any other module imported.
        return message_class(topic.type_name)
    except ConfigurationError as error:
        raise BagError(
            f"{topic.name} has the message type {topic.type_name}, which cannot be played: "
            f"{error}; install the package {topic.type_name.split('/')[0]}, or choose other "
            f"topics with --topics. The bag has:\n{bag.listing()}"
        ) from error


def _create_publisher(node: Any, message_class: Any, name: str, topic: BagTopic) -> RawPublisher:
    from rclpy.exceptions import InvalidTopicNameException

    profile = _qos_profile(topic.offered_qos[0] if topic.offered_qos else None)
    try:
        publisher: RawPublisher = node.create_publisher(message_class, name, profile)
    except InvalidTopicNameException as error:
        raise ConfigurationError(
            f"{name!r} is not a valid topic name ({error}); correct --remap."
        ) from error
    return publisher


def _qos_profile(recorded: Qos | None) -> Any:
    """Return the recorded profile for rclpy; what was not recorded takes ROS's defaults."""
    from rclpy.duration import Duration
    from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy

    profile = QoSProfile(depth=10)
    if recorded is None:
        return profile
    if recorded.history is QosHistory.KEEP_ALL:
        profile.history = HistoryPolicy.KEEP_ALL
    elif recorded.depth > 0:
        profile.depth = recorded.depth
    if recorded.reliability is QosReliability.BEST_EFFORT:
        profile.reliability = ReliabilityPolicy.BEST_EFFORT
    if recorded.durability is QosDurability.TRANSIENT_LOCAL:
        profile.durability = DurabilityPolicy.TRANSIENT_LOCAL

    def limited(limit: QosTime) -> bool:
        return limit.sec < _INFINITE_S and limit.sec + limit.nsec > 0

    if limited(recorded.deadline):
        profile.deadline = Duration(
            seconds=recorded.deadline.sec, nanoseconds=recorded.deadline.nsec
        )
    if limited(recorded.lifespan):
        profile.lifespan = Duration(
            seconds=recorded.lifespan.sec, nanoseconds=recorded.lifespan.nsec
        )
    return profile


@contextlib.contextmanager
def _ros_node() -> Iterator[Any]:
    """Give a node in a context of its own, which leaves signals to `StopSignals`."""
    import rclpy
    from rclpy.signals import SignalHandlerOptions

    context = rclpy.Context()
    rclpy.init(args=[], context=context, signal_handler_options=SignalHandlerOptions.NO)
    try:
        # Nothing spins this node, so a parameter service would never answer.
        node = rclpy.create_node(
            f"groot_int8_play_bag_{os.getpid()}",
            context=context,
            start_parameter_services=False,
            enable_rosout=False,
        )
        try:
            yield node
        finally:
            node.destroy_node()
    finally:
        context.try_shutdown()


def _wait_for_subscribers(
    publishers: Mapping[str, RawPublisher], asked_s: float | None, stop: StopSignals
) -> None:
    """Wait until whoever listens has been discovered; `asked_s` is what the user asked for."""
    limit_s = _DISCOVERY_S if asked_s is None else asked_s
    if limit_s == 0.0:
        return
    deadline_s = time.monotonic() + limit_s
    counts: dict[str, int] = {}
    changed_s = time.monotonic()
    while True:
        now_s = time.monotonic()
        current = {name: item.get_subscription_count() for name, item in publishers.items()}
        if current != counts:
            counts, changed_s = current, now_s
        without = [name for name, count in counts.items() if not count]
        settled = len(without) < len(counts) and now_s - changed_s >= _SUBSCRIBERS_SETTLED_S
        if not without or settled or now_s >= deadline_s:
            break
        if not stop.wait_until(now_s + _SUBSCRIBER_POLL_S):
            return
    if len(without) == len(counts) and asked_s is not None:
        raise BagError(
            f"nobody subscribed to any of {', '.join(counts)} within {limit_s:g} s; start the "
            "receiving node first, and give it the same ROS_DOMAIN_ID."
        )
    if without:
        print(f"no subscriber: {', '.join(without)}", file=sys.stderr, flush=True)


def _wait_for_acknowledgement(publishers: Mapping[str, RawPublisher], stop: StopSignals) -> None:
    # A reliable publisher that is destroyed takes what was not delivered yet with it.
    from rclpy.duration import Duration

    deadline_s = time.monotonic() + _ACKNOWLEDGE_S
    poll = Duration(nanoseconds=round(_ACKNOWLEDGE_POLL_S * _NANOSECONDS))
    for publisher in publishers.values():
        while stop.received is None and time.monotonic() < deadline_s:
            if publisher.wait_for_all_acked(poll):
                break
