"""Playback over real DDS reaches another process whole and on time, and ends when told to."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rosbags.rosbag2 import Reader, StoragePlugin, Writer
from rosbags.typesys import get_types_from_msg

from groot_int8_ros.errors import BagError
from offline_tools import cli
from offline_tools.bags.episode_to_bag import BagOptions, convert_episode
from offline_tools.bags.messages import TYPESTORE
from offline_tools.bags.reading import open_bag
from offline_tools.dataset.lerobot import LeRobotDataset

REPOSITORY_ROOT = Path(__file__).parents[3]
LISTENER = Path(__file__).with_name("listener.py")
START_NS = 1_700_000_000_000_000_000
# Stamps of 20 frames at 20 Hz.
LENGTH_S = 0.95

needs_ros = pytest.mark.skipif(
    importlib.util.find_spec("rclpy") is None, reason="rclpy is not installed"
)


@pytest.fixture(scope="module")
def prefix() -> str:
    # Topics that no other process on this machine uses, whatever its domain is.
    return f"/p{os.getpid()}"


@pytest.fixture(scope="module", params=["mcap", "sqlite3"])
def bag(
    request: pytest.FixtureRequest,
    small_dataset: Path,
    prefix: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    storage: Any = request.param
    output: Path = tmp_path_factory.mktemp("bags") / storage
    options = BagOptions(
        storage=storage,
        image_topic=prefix + "/{camera}",
        joint_topic=prefix + "/joints",
        action_topic=prefix + "/targets",
        instruction_topic=prefix + "/instruction",
    )
    convert_episode(small_dataset, 0, output, options)
    return output


@pytest.fixture(scope="module")
def mcap_bag(small_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("bags") / "bag"
    convert_episode(small_dataset, 0, output, BagOptions())
    return output


def _player(bag: Path, environment: dict[str, str], *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "offline_tools.cli", "play-bag", str(bag), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY_ROOT,
        env=environment,
    )


@contextlib.contextmanager
def _listener(
    output: Path, environment: dict[str, str], *topics: str
) -> Iterator[list[dict[str, Any]]]:
    """Listen during the block; the yielded list is filled at its end."""
    received: list[dict[str, Any]] = []
    with subprocess.Popen(
        [sys.executable, str(LISTENER), str(output), *topics],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield received
        finally:
            process.terminate()
            process.wait(timeout=60)
    received.extend(json.loads(line) for line in output.read_text().splitlines())


def _wait_until_heard(received: Path, topic: str, count: int) -> None:
    end_s = time.monotonic() + 60.0
    while received.read_text().count(topic) < count:
        assert time.monotonic() < end_s
        time.sleep(0.05)


def _of(received: list[dict[str, Any]], topic: str) -> list[dict[str, Any]]:
    return [entry for entry in received if entry["topic"] == topic]


def _pace(clock: list[dict[str, Any]]) -> float:
    """Return how much faster than the listener's time the ticks' own passes."""
    first, last = clock[0], clock[-1]
    passed_s = last["received_s"] - first["received_s"]
    return (last["stamp_ns"] - first["stamp_ns"]) / 1e9 / passed_s if passed_s else 0.0


@needs_ros
def test_every_message_arrives_whole_and_at_four_times_the_pace(
    bag: Path, prefix: str, small_dataset: Path, ros_environment: dict[str, str], tmp_path: Path
) -> None:
    def play() -> tuple[list[dict[str, Any]], str, str]:
        with _listener(
            tmp_path / "received",
            ros_environment,
            f"{prefix}/front=sensor_msgs/msg/Image",
            f"{prefix}/joints=sensor_msgs/msg/JointState",
            f"{prefix}/instruction=std_msgs/msg/String",
            "/clock=rosgraph_msgs/msg/Clock",
        ) as received:
            player = _player(
                bag,
                ros_environment,
                *("--rate", "4", "--clock", "200", "--wait-for-subscribers", "20"),
            )
            output, errors = player.communicate(timeout=60)
        assert player.returncode == 0, errors
        return received, output, errors

    received, output, errors = play()
    # Two topics have no subscriber; the player says so instead of waiting for ever.
    assert f"no subscriber: {prefix}/targets, {prefix}/wrist_left" in errors

    episode = LeRobotDataset.open(small_dataset).episode(0)
    stamps = [START_NS + round(value * 1e9) for value in episode.timestamps_s]
    images, joints = _of(received, f"{prefix}/front"), _of(received, f"{prefix}/joints")
    assert [entry["stamp_ns"] for entry in images] == stamps
    assert [entry["stamp_ns"] for entry in joints] == stamps
    assert [entry["crc"] for entry in images] == [
        zlib.crc32(frame.tobytes()) for frame in episode.frames("front")
    ]
    np.testing.assert_array_equal(
        [entry["position"] for entry in joints],
        np.concatenate(list(episode.state.values()), axis=1),
    )
    texts = [entry["text"] for entry in _of(received, f"{prefix}/instruction")]
    assert texts == ["pick", "place"]

    # A busy machine may be late, but never ahead.
    assert joints[-1]["received_s"] - joints[0]["received_s"] >= LENGTH_S / 4 * 0.9
    clock = _of(received, "/clock")
    assert np.all(np.diff([entry["stamp_ns"] for entry in clock]) > 0)
    # 200 Hz over 0.24 s of real time is 48 ticks; a late tick is sent once.
    assert len(clock) <= 50
    assert clock[0]["stamp_ns"] >= START_NS
    # Bag time passes at the rate of playback, not at the recorded one. A busy machine spoils the
    # measure now and then, a wrong rate does so every time.
    paces = [_pace(clock)]
    while paces[-1] != pytest.approx(4.0, rel=0.5):
        assert len(paces) < 10, paces
        paces.append(_pace(_of(play()[0], "/clock")))

    assert "published 82 messages" in output
    assert f"20  {prefix}/joints" in output
    assert "late: p99" in output


@needs_ros
def test_without_options_the_first_message_waits_until_the_listener_is_found(
    mcap_bag: Path, ros_environment: dict[str, str], small_dataset: Path, tmp_path: Path
) -> None:
    with _listener(
        tmp_path / "received",
        ros_environment,
        "/joint_states=sensor_msgs/msg/JointState",
        "/instruction=std_msgs/msg/String",
    ) as received:
        player = _player(mcap_bag, ros_environment)
        _, errors = player.communicate(timeout=60)
    assert player.returncode == 0, errors
    timestamps = LeRobotDataset.open(small_dataset).episode(0).timestamps_s
    assert [entry["stamp_ns"] for entry in _of(received, "/joint_states")] == [
        START_NS + round(value * 1e9) for value in timestamps
    ]
    assert [entry["text"] for entry in _of(received, "/instruction")] == ["pick", "place"]


@needs_ros
def test_without_options_and_without_a_listener_the_bag_is_played_all_the_same(
    mcap_bag: Path, ros_environment: dict[str, str]
) -> None:
    player = _player(mcap_bag, ros_environment, "--topics", "/joint_states", "--rate", "10")
    output, errors = player.communicate(timeout=60)
    assert player.returncode == 0, errors
    assert "no subscriber: /joint_states" in errors
    assert "published 20 messages" in output


@needs_ros
def test_loop_jumps_back_until_a_signal_ends_it(
    mcap_bag: Path, prefix: str, ros_environment: dict[str, str], tmp_path: Path
) -> None:
    with _listener(
        tmp_path / "received",
        ros_environment,
        f"{prefix}/elsewhere=sensor_msgs/msg/JointState",
        "/clock=rosgraph_msgs/msg/Clock",
    ) as received:
        player = _player(
            mcap_bag,
            ros_environment,
            *("--topics", "/joint_states", "--remap", f"/joint_states:={prefix}/elsewhere"),
            *("--rate", "4", "--loop", "--clock", "--start-offset", "0.2", "--duration", "0.5"),
            *("--wait-for-subscribers", "20"),
        )
        assert player.stdout is not None
        assert "looping" in player.stdout.readline()
        # Three laps of eleven, whatever a busy machine makes of the pace.
        _wait_until_heard(tmp_path / "received", "elsewhere", 33)
        player.send_signal(signal.SIGTERM)
        output, errors = player.communicate(timeout=20)
    assert player.returncode == 143
    assert "Traceback" not in errors
    assert "published" in output

    offsets_s = [
        (entry["stamp_ns"] - START_NS) / 1e9 for entry in _of(received, f"{prefix}/elsewhere")
    ]
    lap = [round(0.2 + 0.05 * row, 6) for row in range(11)]
    assert len(offsets_s) > 2 * len(lap)
    expected = (lap * 1000)[: len(offsets_s)]
    np.testing.assert_allclose(offsets_s, expected, atol=1e-6)
    clock = np.array([entry["stamp_ns"] for entry in _of(received, "/clock")])
    assert np.sum(np.diff(clock) < 0) >= 2


@needs_ros
def test_interrupt_ends_a_wait_at_once_and_without_a_traceback(
    mcap_bag: Path, ros_environment: dict[str, str], tmp_path: Path
) -> None:
    heard = tmp_path / "received"
    with _listener(heard, ros_environment, "/joint_states=sensor_msgs/msg/JointState"):
        # At this rate the second message is due after 50 s.
        player = _player(
            mcap_bag,
            ros_environment,
            *("--topics", "/joint_states", "--rate", "0.001", "--wait-for-subscribers", "20"),
        )
        assert player.stdout is not None
        assert "playing" in player.stdout.readline()
        _wait_until_heard(heard, "/joint_states", 1)
        asked_s = time.monotonic()
        player.send_signal(signal.SIGINT)
        output, errors = player.communicate(timeout=20)
        assert time.monotonic() - asked_s < 20.0
    assert player.returncode == 130
    assert errors == ""
    assert "1  /joint_states" in output


@needs_ros
def test_waiting_in_vain_for_subscribers_is_an_error(
    mcap_bag: Path, ros_environment: dict[str, str]
) -> None:
    player = _player(mcap_bag, ros_environment, "--wait-for-subscribers", "0.3")
    _, errors = player.communicate(timeout=30)
    assert player.returncode == 2
    assert "nobody subscribed to any of /action_targets" in errors


@needs_ros
def test_a_node_that_asks_for_a_best_effort_recording_gets_no_promise_of_more(
    tmp_path: Path, ros_environment: dict[str, str], prefix: str
) -> None:
    """A recording made with best effort must not match a subscriber that wants reliable."""
    from offline_tools.bags import messages

    topic = f"{prefix}/best_effort"
    with Writer(tmp_path / "bag", version=8, storage_plugin=StoragePlugin.MCAP) as writer:
        recorded = messages.recorded_qos(depth=1)
        connection = writer.add_connection(
            topic,
            messages.JOINT_STATE_TYPE,
            typestore=TYPESTORE,
            offered_qos_profiles=[
                recorded._replace(reliability=type(recorded.reliability).BEST_EFFORT)
            ],
        )
        for row in range(5):
            stamp_ns = START_NS + row * 10_000_000
            data = messages.joint_state(["a"], np.array([float(row)]), stamp_ns)
            writer.write(connection, stamp_ns, data)
    with _listener(
        tmp_path / "received", ros_environment, f"{topic}=sensor_msgs/msg/JointState"
    ) as received:
        player = _player(tmp_path / "bag", ros_environment, "--wait-for-subscribers", "1.5")
        _, errors = player.communicate(timeout=30)
    assert player.returncode == 2
    assert "nobody subscribed" in errors
    assert received == []


# --- bags and options that cannot be played ---------------------------------------------------


@needs_ros
@pytest.mark.parametrize(
    ("options", "messages"),
    [
        (["--topics", "/nothing"], ["no messages on /nothing", "/joint_states  sensor_msgs"]),
        (["--remap", "/nothing:=/x"], ["/nothing is not played", "/instruction  std_msgs"]),
        (["--remap", "/joint_states"], ["not of the form OLD:=NEW"]),
        (["--remap", "/joint_states:=/a b"], ["'/a b' is not a valid topic name"]),
        (["--start-offset", "100"], ["past the end of the bag, which is 0.950 s long"]),
    ],
)
def test_options_that_do_not_fit_the_bag_list_what_it_has(
    mcap_bag: Path, capsys: pytest.CaptureFixture[str], options: list[str], messages: list[str]
) -> None:
    assert cli.main(["play-bag", str(mcap_bag), *options]) == 2
    errors = capsys.readouterr().err
    for message in messages:
        assert message in errors


@pytest.mark.parametrize("options", [["--rate", "0"], ["--rate", "nan"], ["--clock", "-1"]])
def test_senseless_numbers_are_refused(mcap_bag: Path, options: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["play-bag", str(mcap_bag), *options])
    assert stopped.value.code == 2


@needs_ros
def test_message_type_that_is_not_installed_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from rosbags.typesys import Stores, get_typestore

    typestore = get_typestore(Stores.ROS2_HUMBLE)
    typestore.register(get_types_from_msg("float64 force", "acme_msgs/msg/Grip"))
    with Writer(tmp_path / "bag", version=8) as writer:
        connection = writer.add_connection("/grip", "acme_msgs/msg/Grip", typestore=typestore)
        grip = typestore.types["acme_msgs/msg/Grip"](force=1.0)
        data = typestore.serialize_cdr(grip, "acme_msgs/msg/Grip")
        writer.write(connection, START_NS, data)
    assert cli.main(["play-bag", str(tmp_path / "bag")]) == 2
    errors = capsys.readouterr().err
    assert "/grip has the message type acme_msgs/msg/Grip" in errors
    assert "install the package acme_msgs" in errors


def _damaged(bag: Path, target: Path, how: str) -> Path:
    shutil.copytree(bag, target)
    data = next(path for path in target.iterdir() if path.suffix in {".mcap", ".db3"})
    content = data.read_bytes()
    if how == "cut":
        data.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        data.write_bytes(b"")
    elif how == "garbage":
        data.write_bytes(bytes(range(256)) * 40)
    elif how == "no file":
        data.unlink()
    elif how == "no metadata":
        (target / "metadata.yaml").unlink()
    elif how == "half metadata":
        path = target / "metadata.yaml"
        path.write_bytes(path.read_bytes()[:200])
    return target


@pytest.mark.parametrize(
    "how", ["cut", "empty", "garbage", "no file", "no metadata", "half metadata"]
)
def test_damaged_bag_is_an_error_that_names_it(bag: Path, tmp_path: Path, how: str) -> None:
    damaged = _damaged(bag, tmp_path / "damaged", how)
    with pytest.raises(BagError) as caught, open_bag(damaged) as opened:
        for _ in opened.messages([topic.name for topic in opened.select(None)]):
            pass
    assert str(damaged) in str(caught.value)


def test_missing_bag_and_bag_without_messages_are_named(tmp_path: Path) -> None:
    with pytest.raises(BagError, match="there is no bag at"), open_bag(tmp_path / "none"):
        pass
    with Writer(tmp_path / "empty", version=8) as writer:
        writer.add_connection("/a", "std_msgs/msg/String", typestore=TYPESTORE)
    with open_bag(tmp_path / "empty") as opened, pytest.raises(BagError, match="no messages"):
        opened.select(None)


def test_single_storage_file_is_read_without_its_folder(bag: Path) -> None:
    path = next(item for item in bag.iterdir() if item.suffix in {".mcap", ".db3"})
    with open_bag(path) as opened, Reader(bag) as reader:
        assert (opened.start_ns, opened.end_ns) == (reader.start_time, reader.end_time - 1)
        names = [topic.name for topic in opened.select(None)]
        assert sum(1 for _ in opened.messages(names)) == reader.message_count == 82
