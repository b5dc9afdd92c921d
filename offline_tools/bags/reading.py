"""Reading rosbag2 recordings, with errors that say what is wrong with them.

Owns: `open_bag`. Must not import rclpy: bags are read on machines without ROS.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from rosbags.interfaces import Connection, ConnectionExtRosbag2, Qos
from rosbags.rosbag2 import Reader

from groot_int8_ros.errors import BagError


@dataclass(frozen=True)
class BagTopic:
    """One topic of a bag.

    Attributes:
        name: Topic name.
        type_name: Message type, such as `sensor_msgs/msg/Image`.
        message_count: Messages in the bag.
        offered_qos: What each recorded publisher offered; may be empty.
    """

    name: str
    type_name: str
    message_count: int
    offered_qos: tuple[Qos, ...]


class Bag:
    """An open rosbag2; see `open_bag`."""

    def __init__(self, path: Path, reader: Reader) -> None:
        self._path = path
        self._reader = reader
        self._connections: dict[str, list[Connection]] = {}
        for connection in reader.connections:
            self._connections.setdefault(connection.topic, []).append(connection)
        self.topics: Mapping[str, BagTopic] = {
            name: _topic(name, connections)
            for name, connections in sorted(self._connections.items())
        }

    @property
    def start_ns(self) -> int:
        """Stamp of the earliest message, nanoseconds."""
        return int(self._reader.start_time)

    @property
    def end_ns(self) -> int:
        """Stamp of the latest message, nanoseconds."""
        return int(self._reader.end_time) - 1

    def select(self, names: Sequence[str] | None) -> list[BagTopic]:
        """Return topics by name, or all that have messages.

        Args:
            names: Topics that must be there with at least one message; None for all.

        Raises:
            BagError: A topic is not in the bag or empty, or nothing is left.
        """
        filled = [topic for topic in self.topics.values() if topic.message_count]
        if names is None:
            if not filled:
                raise BagError(f"{self._path} holds no messages; record or convert it again.")
            return filled
        by_name = {topic.name: topic for topic in filled}
        missing = [name for name in names if name not in by_name]
        if missing:
            raise BagError(
                f"{self._path} has no messages on {', '.join(missing)}. It has:\n{self.listing()}"
                "\nName topics from this list."
            )
        return [by_name[name] for name in dict.fromkeys(names)]

    def listing(self) -> str:
        """Return the bag's topics with types and counts, one a line."""
        return "\n".join(
            f"  {topic.name}  {topic.type_name}  {topic.message_count} messages"
            for topic in self.topics.values()
        )

    def messages(
        self, names: Collection[str], start_ns: int | None = None, stop_ns: int | None = None
    ) -> Iterator[tuple[str, int, bytes]]:
        """Read messages in the order of their stamps.

        Args:
            names: Topics of the bag, at least one.
            start_ns: First stamp to read, nanoseconds; None for all.
            stop_ns: Stamp to stop before, likewise.

        Yields:
            Topic, stamp in nanoseconds, message in CDR.

        Raises:
            BagError: The bag is damaged.
        """
        connections = [item for name in names for item in self._connections[name]]
        with _naming_damage(self._path):
            for connection, stamp_ns, data in self._reader.messages(
                connections, start=start_ns, stop=stop_ns
            ):
                yield connection.topic, stamp_ns, data


@contextlib.contextmanager
def open_bag(path: Path) -> Iterator[Bag]:
    """Open a rosbag2 folder, or one `.mcap` or `.db3` file of it.

    Args:
        path: The recording.

    Yields:
        The open bag.

    Raises:
        BagError: There is no bag, its format is unknown, or it is damaged.
    """
    if not path.exists():
        raise BagError(f"there is no bag at {path}; name a rosbag2 folder, an .mcap or a .db3.")
    if path.is_dir() and not (path / "metadata.yaml").is_file():
        raise BagError(
            f"{path} has no metadata.yaml, so it is not a whole rosbag2; name the bag's own "
            "folder, or one of its .mcap or .db3 files if the recording was cut off."
        )
    with contextlib.ExitStack() as stack:
        with _naming_damage(path):
            bag = Bag(path, stack.enter_context(Reader(path)))
        yield bag


@contextlib.contextmanager
def _naming_damage(path: Path) -> Iterator[None]:
    # A damaged file can make rosbags raise anything from struct.error to a decompressor's own
    # exception; only rosbags runs inside this block.
    try:
        yield
    except Exception as error:
        raise BagError(
            f"{path} cannot be read as a rosbag2 ({type(error).__name__}: {error}); it is "
            "damaged or cut off: copy, record or convert it again."
        ) from error


def _topic(name: str, connections: Sequence[Connection]) -> BagTopic:
    extensions = [cast("ConnectionExtRosbag2", connection.ext) for connection in connections]
    return BagTopic(
        name=name,
        type_name=connections[0].msgtype,
        message_count=sum(connection.msgcount for connection in connections),
        offered_qos=tuple(qos for item in extensions for qos in item.offered_qos_profiles),
    )
