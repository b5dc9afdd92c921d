"""`groot-int8 episode-to-bag`: a LeRobot v2.1 episode as a rosbag2.

Owns: which topics an episode becomes and how the bag is written. Must not import rclpy or torch:
the conversion runs on any workstation. Frames are decoded, wrapped and written one at a time, and
the bag appears under its name when it is complete.

A dataset holds the policy's values (often degrees), a robot publishes radians: with `--robot`
joints get the robot's names and units, so that the node's mapping gives the dataset's values
back; with `--bundle` they are those that the bundle's node expects. Without either, names and
values are the recorded ones.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from rosbags.rosbag2 import StoragePlugin, Writer

from groot_int8_ros.errors import ConfigurationError, OutputError
from groot_int8_ros.policy.bundle import open_bundle
from groot_int8_ros.policy.files import atomic_directory, refuse_occupied
from groot_int8_ros.policy.robot import RobotDescription, load_robot, policy_to_joint
from groot_int8_ros.policy.types import Float64Array, JointSpec, UInt8Array
from groot_int8_ros.ros.topics import camera_name_in_topic
from offline_tools.bags import messages
from offline_tools.bags.messages import Compression, RawEncoding
from offline_tools.dataset.lerobot import Episode, LeRobotDataset, Modality

# Fixed, so that the same episode always becomes the same bag; far from 0, which ROS reads as "no
# time yet".
DEFAULT_START_TIME_NS = 1_700_000_000_000_000_000

# Version 9 changed how QoS is written; Humble reads up to 8, and every later release reads 8.
_METADATA_VERSION: Literal[8] = 8
_MARKER = "metadata.yaml"
_LAST_STAMP_NS = (2**31 - 1) * 1_000_000_000
_TOPIC = re.compile(r"(/[A-Za-z_][A-Za-z0-9_]*)+")


@dataclass(frozen=True)
class BagOptions:
    """How an episode is written.

    Attributes:
        storage: rosbag2 storage.
        compression: For `CompressedImage`; None writes raw images.
        encoding: Channel order of raw images.
        jpeg_quality: 1 to 100.
        start_time_ns: Stamp of the episode's time 0, nanoseconds.
        max_frames: Leave out the frames after so many; None writes all.
        image_topic: Topic of a camera, with `{camera}` for its key; compressed images add
            `/compressed`, as image transports do.
        joint_topic: Topic of the recorded joint states.
        action_topic: Topic of the recorded actions.
        instruction_topic: Topic of the instruction.
        instruction_key: Annotation to take it from; None takes the dataset's first.
    """

    storage: Literal["mcap", "sqlite3"] = "mcap"
    compression: Compression | None = None
    encoding: RawEncoding = "rgb8"
    jpeg_quality: int = 95
    start_time_ns: int = DEFAULT_START_TIME_NS
    max_frames: int | None = None
    image_topic: str = "/cameras/{camera}/image_raw"
    joint_topic: str = "/joint_states"
    action_topic: str = "/action_targets"
    instruction_topic: str = "/instruction"
    instruction_key: str | None = None


@dataclass(frozen=True)
class _Joints:
    """What one `JointState` topic carries: names, and positions of shape (T, len(names))."""

    names: tuple[str, ...]
    positions: Float64Array


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's options."""
    defaults = BagOptions()
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        "topics: one sensor_msgs/Image (or CompressedImage) per camera; recorded joint values as\n"
        "sensor_msgs/JointState; recorded actions likewise, for comparison; the instruction as a\n"
        "latched std_msgs/String, again at each change. Stamps are the start time plus the\n"
        "dataset's timestamps."
    )
    parser.add_argument("--dataset", type=Path, required=True, help="LeRobot v2.1 folder")
    parser.add_argument("--episode", type=int, required=True, metavar="N", help="its number")
    parser.add_argument("--output", type=Path, required=True, help="bag folder to write")
    parser.add_argument("--force", action="store_true", help="replace a bag that is there")
    parser.add_argument(
        "--compressed",
        choices=messages.COMPRESSIONS,
        help="write CompressedImage (png is exact, jpeg is not) instead of Image",
    )
    parser.add_argument("--jpeg-quality", type=int, default=defaults.jpeg_quality, metavar="1-100")
    parser.add_argument(
        "--encoding",
        choices=messages.RAW_ENCODINGS,
        default=defaults.encoding,
        help="channel order of raw images (default: %(default)s)",
    )
    parser.add_argument(
        "--start-time-ns",
        type=int,
        default=defaults.start_time_ns,
        metavar="NS",
        help="stamp of the episode's beginning (default: %(default)s)",
    )
    parser.add_argument("--max-frames", type=int, metavar="N", help="only the first N frames")
    parser.add_argument(
        "--storage",
        choices=["mcap", "sqlite3"],
        default=defaults.storage,
        help="rosbag2 storage (default: %(default)s)",
    )
    published = parser.add_mutually_exclusive_group()
    published.add_argument(
        "--bundle",
        type=Path,
        help="publish joint names and units as the robot of this bundle does: what a node that "
        "runs the bundle expects",
    )
    published.add_argument(
        "--robot",
        type=Path,
        metavar="YAML",
        help="likewise, from a robot description (default: the recorded names and values)",
    )
    parser.add_argument(
        "--instruction-key", metavar="KEY", help="annotation with the instruction, if several"
    )
    for option, default, text in (
        ("--image-topic", defaults.image_topic, "images, {camera} being the camera's key"),
        ("--joint-topic", defaults.joint_topic, "joint states"),
        ("--action-topic", defaults.action_topic, "recorded actions"),
        ("--instruction-topic", defaults.instruction_topic, "instruction"),
    ):
        parser.add_argument(
            option, default=default, metavar="TOPIC", help=f"{text} (default: %(default)s)"
        )


def run(args: argparse.Namespace) -> int:
    """Convert one episode and print what the bag holds."""
    counts = convert_episode(
        args.dataset,
        args.episode,
        args.output,
        BagOptions(
            storage=args.storage,
            compression=args.compressed,
            encoding=args.encoding,
            jpeg_quality=args.jpeg_quality,
            start_time_ns=args.start_time_ns,
            max_frames=args.max_frames,
            image_topic=args.image_topic,
            joint_topic=args.joint_topic,
            action_topic=args.action_topic,
            instruction_topic=args.instruction_topic,
            instruction_key=args.instruction_key,
        ),
        robot=_robot(args),
        replace=args.force,
    )
    size = sum(path.stat().st_size for path in args.output.iterdir())
    print(f"{args.output}: {args.storage}, {size / 1e6:.1f} MB")
    for topic, count in counts.items():
        print(f"  {count:6d}  {topic}")
    return 0


def _robot(args: argparse.Namespace) -> RobotDescription | None:
    if args.bundle:
        # The manifest alone is used, so the graphs need not be read through.
        return open_bundle(args.bundle, verify_hashes=False).manifest.robot
    return load_robot(args.robot) if args.robot else None


def convert_episode(
    dataset_path: Path,
    episode_index: int,
    output: Path,
    options: BagOptions,
    *,
    robot: RobotDescription | None = None,
    replace: bool = False,
) -> dict[str, int]:
    """Write one episode of a LeRobot dataset as a rosbag2.

    Args:
        dataset_path: The dataset's folder.
        episode_index: Number of the episode.
        output: Bag folder to make.
        options: How to write it.
        robot: Joint names and units to publish; None publishes the recorded ones.
        replace: Replace a bag that is at `output`.

    Returns:
        Topic to number of messages.

    Raises:
        ConfigurationError: An option is out of range, or `robot` does not fit the dataset.
        DatasetError: The dataset or the episode cannot be read.
        OutputError: `output` is there already or cannot be written; nothing is left behind.
    """
    _check_options(options)
    refuse_occupied(output, marker=_MARKER, what="a bag", replace=replace)
    dataset = LeRobotDataset.open(dataset_path)
    episode = dataset.episode(episode_index, options.instruction_key)
    image_topics = _image_topics(dataset, options)
    joints = {
        options.joint_topic: _joints(dataset, "state", episode, robot),
        options.action_topic: _joints(dataset, "action", episode, robot),
    }
    topics = [*image_topics.values(), *joints, options.instruction_topic]
    for topic in topics:
        if not _TOPIC.fullmatch(topic) or topics.count(topic) > 1:
            raise ConfigurationError(
                f"the topic {topic!r} is not an absolute ROS name that occurs once; choose "
                "others, such as /cameras/front/image_raw."
            )
    if options.start_time_ns + int(episode.timestamps_s[-1] * 1e9) > _LAST_STAMP_NS:
        raise ConfigurationError(
            f"start time {options.start_time_ns} ns puts the episode after 2038, where a ROS "
            "stamp ends; choose an earlier one."
        )
    with atomic_directory(output) as temporary, _storage_errors(output):
        # rosbags names the file after its folder, which it makes itself; write one level down
        # under the final name and move up.
        inner = temporary / output.absolute().name
        counts = _write(inner, episode, image_topics, joints, options)
        for path in inner.iterdir():
            path.rename(temporary / path.name)
        inner.rmdir()
    return counts


def _write(
    path: Path,
    episode: Episode,
    image_topics: Mapping[str, str],
    joints: Mapping[str, _Joints],
    options: BagOptions,
) -> dict[str, int]:
    length = min(len(episode), options.max_frames or len(episode))
    counts: dict[str, int] = {}
    image_type = messages.COMPRESSED_IMAGE_TYPE if options.compression else messages.IMAGE_TYPE
    with contextlib.ExitStack() as stack:
        frames: dict[str, Iterator[UInt8Array]] = {
            key: stack.enter_context(contextlib.closing(cast("Any", episode.frames(key))))
            for key in image_topics
        }
        plugin = StoragePlugin.MCAP if options.storage == "mcap" else StoragePlugin.SQLITE3
        writer = stack.enter_context(
            Writer(path, version=_METADATA_VERSION, storage_plugin=plugin)
        )
        connections = {
            topic: writer.add_connection(
                topic,
                type_name,
                typestore=messages.TYPESTORE,
                offered_qos_profiles=[messages.recorded_qos(depth=depth, latched=latched)],
            )
            for topic, type_name, depth, latched in (
                (options.instruction_topic, messages.STRING_TYPE, 1, True),
                *((topic, messages.JOINT_STATE_TYPE, 10, False) for topic in joints),
                *((topic, image_type, 10, False) for topic in image_topics.values()),
            )
        }

        def write(topic: str, stamp_ns: int, data: memoryview) -> None:
            writer.write(connections[topic], stamp_ns, data)
            counts[topic] = counts.get(topic, 0) + 1

        for row in range(length):
            stamp_ns = options.start_time_ns + round(float(episode.timestamps_s[row]) * 1e9)
            instruction = episode.instructions[row]
            if row == 0 or instruction != episode.instructions[row - 1]:
                write(options.instruction_topic, stamp_ns, messages.string(instruction))
            for topic, group in joints.items():
                data = messages.joint_state(group.names, group.positions[row], stamp_ns)
                write(topic, stamp_ns, data)
            for key, topic in image_topics.items():
                write(topic, stamp_ns, _image(next(frames[key]), key, stamp_ns, options))
        if length == len(episode):
            # A video with frames left over does not belong to these rows; asking for one more
            # frame lets the reader find out.
            for iterator in frames.values():
                next(iterator, None)
    return counts


def _image(frame: UInt8Array, key: str, stamp_ns: int, options: BagOptions) -> memoryview:
    if options.compression is None:
        return messages.image(frame, options.encoding, key, stamp_ns)
    return messages.compressed_image(
        frame, options.compression, options.jpeg_quality, key, stamp_ns
    )


def _check_options(options: BagOptions) -> None:
    if not 1 <= options.jpeg_quality <= 100:
        raise ConfigurationError(f"--jpeg-quality {options.jpeg_quality} is not from 1 to 100.")
    if options.max_frames is not None and options.max_frames < 1:
        raise ConfigurationError(f"--max-frames {options.max_frames} leaves nothing to write.")
    if options.start_time_ns < 0:
        raise ConfigurationError(
            f"--start-time-ns {options.start_time_ns} is negative; ROS stamps start at 0."
        )


def _image_topics(dataset: LeRobotDataset, options: BagOptions) -> dict[str, str]:
    suffix = "/compressed" if options.compression else ""
    if len(dataset.cameras) > 1 and "{camera}" not in options.image_topic:
        raise ConfigurationError(
            f"--image-topic {options.image_topic!r} gives all {len(dataset.cameras)} cameras one "
            "topic; put {camera} into it."
        )
    return {
        key: options.image_topic.replace("{camera}", camera_name_in_topic(key)) + suffix
        for key in dataset.cameras
    }


def _joints(
    dataset: LeRobotDataset,
    modality: Modality,
    episode: Episode,
    robot: RobotDescription | None,
) -> _Joints:
    values = episode.state if modality == "state" else episode.action
    columns: dict[str, Float64Array] = {}
    for key, matrix in values.items():
        if robot is None:
            names: Sequence[str] = dataset.joint_names_or_default(modality, key)
            positions = matrix.astype(np.float64)
        else:
            specs = _joint_specs(robot, modality, key, matrix.shape[1])
            names = [spec.name for spec in specs]
            positions = policy_to_joint(specs, matrix.astype(np.float64))
        for name, column in zip(names, positions.T, strict=True):
            if name in columns and not np.array_equal(columns[name], column, equal_nan=True):
                raise ConfigurationError(
                    f"two {modality} dimensions with different values are both named {name!r}, "
                    "and a JointState holds a name once; give each its own name with --robot."
                )
            columns[name] = column
    if not columns:
        return _Joints((), np.zeros((len(episode), 0)))
    return _Joints(tuple(columns), np.stack(list(columns.values()), axis=1))


def _joint_specs(
    robot: RobotDescription, modality: Modality, key: str, dim: int
) -> tuple[JointSpec, ...]:
    specs = robot.state_joints.get(key, ())
    if modality == "action":
        specs = robot.action_joints.get(key, specs)
    if len(specs) != dim:
        raise ConfigurationError(
            f"the robot description has {len(specs)} joints for the {modality} key {key!r}, the "
            f"dataset has {dim}; list one joint for each under {modality}_joints."
        )
    return specs


@contextlib.contextmanager
def _storage_errors(output: Path) -> Iterator[None]:
    # SQLite reports a full disk as its own exception; `atomic_directory` explains OSError only.
    try:
        yield
    except sqlite3.Error as error:
        raise OutputError(
            f"cannot write {output}: {error}. Nothing was left behind; free space or choose a "
            "folder that is writable, then run the command again."
        ) from error
