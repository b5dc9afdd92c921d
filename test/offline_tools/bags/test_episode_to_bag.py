"""A converted episode holds what the dataset holds, and a failed conversion leaves nothing."""

from __future__ import annotations

import io
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow.parquet
import pytest
from rosbags.interfaces import ConnectionExtRosbag2
from rosbags.rosbag2 import Reader
from rosbags.typesys import Stores, get_typestore

from groot_int8_ros.errors import ConfigurationError, GrootError, OutputError
from groot_int8_ros.policy.bundle import open_bundle
from groot_int8_ros.policy.robot import joint_to_policy, load_robot
from offline_tools import cli
from offline_tools.bags import messages
from offline_tools.bags.episode_to_bag import BagOptions, convert_episode
from offline_tools.dataset.lerobot import LeRobotDataset

REPOSITORY_ROOT = Path(__file__).parents[3]
START_NS = 1_700_000_000_000_000_000
G1_FRAMES = 12

Recorded = dict[str, list[tuple[int, Any]]]


def _read(path: Path) -> Recorded:
    # Jazzy's definitions, where the bag was written with Humble's.
    typestore = get_typestore(Stores.ROS2_JAZZY)
    recorded: Recorded = {}
    with Reader(path) as reader:
        for connection, stamp_ns, data in reader.messages():
            message = typestore.deserialize_cdr(data, connection.msgtype)
            recorded.setdefault(connection.topic, []).append((stamp_ns, message))
    return recorded


def _stamp_ns(message: Any) -> int:
    return int(message.header.stamp.sec) * 1_000_000_000 + int(message.header.stamp.nanosec)


@pytest.fixture(scope="module")
def g1_frames(g1_dataset_dir: Path) -> list[Any]:
    frames = LeRobotDataset.open(g1_dataset_dir).episode(1).frames("cam_high")
    return [next(frames) for _ in range(G1_FRAMES)]


# --- what the bag holds -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("storage", "compression"),
    [("mcap", None), ("sqlite3", None), ("mcap", "png"), ("sqlite3", "jpeg")],
)
def test_real_episode_survives_the_conversion(
    g1_dataset_dir: Path, g1_frames: list[Any], tmp_path: Path, storage: Any, compression: Any
) -> None:
    output = tmp_path / "bag"
    options = BagOptions(storage=storage, compression=compression, max_frames=G1_FRAMES)
    convert_episode(g1_dataset_dir, 1, output, options)
    assert {path.suffix for path in output.iterdir()} == {
        ".yaml",
        ".mcap" if storage == "mcap" else ".db3",
    }

    rows = pyarrow.parquet.read_table(
        g1_dataset_dir / "data/chunk-000/episode_000001.parquet"
    ).to_pydict()
    stamps = [START_NS + round(value * 1e9) for value in rows["timestamp"][:G1_FRAMES]]
    names = json.loads((g1_dataset_dir / "meta/info.json").read_text())["features"]["action"]
    recorded = _read(output)
    camera_topic = "/cameras/cam_high/image_raw" + ("/compressed" if compression else "")
    assert set(recorded) == {"/joint_states", "/action_targets", "/instruction", camera_topic}

    for topic, column in (("/joint_states", "observation.state"), ("/action_targets", "action")):
        assert [stamp for stamp, _ in recorded[topic]] == stamps
        assert [_stamp_ns(message) for _, message in recorded[topic]] == stamps
        for (_, message), values in zip(recorded[topic], rows[column], strict=False):
            assert message.name == names["names"][0]
            np.testing.assert_array_equal(message.position, values)

    assert [stamp for stamp, _ in recorded[camera_topic]] == stamps
    for (_, message), stamp, frame in zip(recorded[camera_topic], stamps, g1_frames, strict=True):
        assert _stamp_ns(message) == stamp
        assert message.header.frame_id == "cam_high"
        if compression is None:
            assert (message.height, message.width, message.step) == (480, 640, 1920)
            assert message.encoding == "rgb8"
            np.testing.assert_array_equal(message.data.reshape(480, 640, 3), frame)
            continue
        assert message.format == compression
        decoded = np.asarray(PIL.Image.open(io.BytesIO(message.data.tobytes())).convert("RGB"))
        if compression == "png":
            np.testing.assert_array_equal(decoded, frame)
        else:
            error = np.abs(decoded.astype(np.int16) - frame.astype(np.int16))
            assert 0.0 < error.mean() < 2.0

    ((stamp_ns, instruction),) = recorded["/instruction"]
    assert stamp_ns == stamps[0]
    assert instruction.data == "Pick up the yellow bottle on the table."


@pytest.mark.parametrize("encoding", messages.RAW_ENCODINGS)
def test_raw_encodings_hold_the_same_pixels(
    small_dataset: Path, tmp_path: Path, encoding: Any
) -> None:
    convert_episode(small_dataset, 0, tmp_path / "bag", BagOptions(encoding=encoding))
    frames = list(LeRobotDataset.open(small_dataset).episode(0).frames("front"))
    recorded = _read(tmp_path / "bag")["/cameras/front/image_raw"]
    for (_, message), frame in zip(recorded, frames, strict=True):
        assert message.encoding == encoding
        pixels = message.data.reshape(48, message.step // len(encoding[:-1]), -1)
        if encoding == "mono8":
            grey = message.data.reshape(48, message.step).astype(np.float64)
            expected = frame @ np.array([0.299, 0.587, 0.114])
            np.testing.assert_allclose(grey, expected, atol=1.0)
            continue
        channels = encoding[:-1]
        assert message.step == 64 * len(channels)
        for position, channel in enumerate(channels):
            expected = frame[..., "rgb".index(channel)] if channel != "a" else 255
            np.testing.assert_array_equal(pixels[..., position], expected)


def test_instruction_is_latched_and_repeated_only_where_it_changes(
    small_dataset: Path, tmp_path: Path
) -> None:
    convert_episode(small_dataset, 0, tmp_path / "bag", BagOptions())
    recorded = _read(tmp_path / "bag")
    assert [(stamp - START_NS, message.data) for stamp, message in recorded["/instruction"]] == [
        (0, "pick"),
        (recorded["/joint_states"][12][0] - START_NS, "place"),
    ]
    with Reader(tmp_path / "bag") as reader:
        durability = {
            connection.topic: connection.ext.offered_qos_profiles[0].durability.name
            for connection in reader.connections
            if isinstance(connection.ext, ConnectionExtRosbag2)
        }
    assert durability.pop("/instruction") == "TRANSIENT_LOCAL"
    assert set(durability.values()) == {"VOLATILE"}


def test_topic_names_and_start_time_are_the_users(small_dataset: Path, tmp_path: Path) -> None:
    options = BagOptions(
        start_time_ns=5_000_000_001,
        image_topic="/robot/{camera}",
        joint_topic="/robot/joints",
        action_topic="/robot/targets",
        instruction_topic="/robot/task",
    )
    counts = convert_episode(small_dataset, 0, tmp_path / "bag", options)
    recorded = _read(tmp_path / "bag")
    # A dot is not allowed in a ROS name.
    assert set(recorded) == {
        "/robot/front",
        "/robot/wrist_left",
        "/robot/joints",
        "/robot/targets",
        "/robot/task",
    }
    assert counts == {topic: len(items) for topic, items in recorded.items()}
    assert recorded["/robot/wrist_left"][0][1].header.frame_id == "wrist.left"
    assert recorded["/robot/joints"][0][0] == 5_000_000_001
    assert _stamp_ns(recorded["/robot/joints"][0][1]) == 5_000_000_001


ROBOT = """
action_period_s: 0.05
cameras: {}
state_joints:
  arm:
    - {name: j1, unit: degrees, sign: -1, offset: 30.0}
    - {name: j2, unit: degrees}
  gripper: [grip]
"""


def test_robot_units_are_undone_by_the_nodes_mapping(small_dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "robot.yaml").write_text(ROBOT)
    robot = load_robot(tmp_path / "robot.yaml")
    convert_episode(small_dataset, 0, tmp_path / "bag", BagOptions(), robot=robot)
    episode = LeRobotDataset.open(small_dataset).episode(0)
    recorded = _read(tmp_path / "bag")
    for topic, values in (("/joint_states", episode.state), ("/action_targets", episode.action)):
        for row, (_, message) in enumerate(recorded[topic]):
            assert message.name == ["j1", "j2", "grip"]
            first, second, grip = message.position
            assert first == pytest.approx(math.radians(30.0 - values["arm"][row, 0]))
            assert second == pytest.approx(math.radians(values["arm"][row, 1]))
            assert grip == values["gripper"][row, 0]
            back = joint_to_policy(robot.state_joints["arm"], message.position[:2])
            np.testing.assert_allclose(back, values["arm"][row], rtol=0, atol=1e-12)


def test_bag_of_a_bundle_has_the_units_that_its_node_expects(
    tiny_dataset: Path, bundle_copy: Path, tmp_path: Path
) -> None:
    manifest = bundle_copy / "manifest.json"
    content = json.loads(manifest.read_text())
    for joint in content["robot"]["state_joints"]["single_arm"]:
        joint.update(name=f"robot/{joint['name']}", unit="degrees")
    manifest.write_text(json.dumps(content))
    assert (
        cli.main(
            [
                *("episode-to-bag", "--dataset", str(tiny_dataset), "--episode", "0"),
                *("--output", str(tmp_path / "bag"), "--bundle", str(bundle_copy)),
                *("--max-frames", "3"),
            ]
        )
        == 0
    )
    robot = open_bundle(bundle_copy).manifest.robot
    values = LeRobotDataset.open(tiny_dataset).episode(0).state["single_arm"]
    for row, (_, message) in enumerate(_read(tmp_path / "bag")["/joint_states"]):
        assert message.name[: values.shape[1]] == [
            joint.name for joint in robot.state_joints["single_arm"]
        ]
        np.testing.assert_allclose(
            message.position[: values.shape[1]],
            np.radians(values[row].astype(np.float64)),
            rtol=1e-9,
        )


def test_command_line_options_reach_the_bag(
    small_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "robot.yaml").write_text(ROBOT)
    options = {
        "--dataset": small_dataset,
        "--episode": 0,
        "--output": tmp_path / "bag",
        "--storage": "sqlite3",
        "--compressed": "jpeg",
        "--jpeg-quality": 5,
        "--start-time-ns": 7_000_000_000,
        "--max-frames": 3,
        "--robot": tmp_path / "robot.yaml",
        "--instruction-key": "human.task_description",
        "--image-topic": "/eye/{camera}",
        "--joint-topic": "/joints",
        "--action-topic": "/targets",
        "--instruction-topic": "/task",
    }
    arguments = [str(part) for item in options.items() for part in item]
    assert cli.main(["episode-to-bag", *arguments]) == 0
    printed = capsys.readouterr().out
    recorded = _read(tmp_path / "bag")
    assert {topic: len(items) for topic, items in recorded.items()} == {
        "/eye/front/compressed": 3,
        "/eye/wrist_left/compressed": 3,
        "/joints": 3,
        "/targets": 3,
        "/task": 1,
    }
    for topic in recorded:
        assert topic in printed
    assert (tmp_path / "bag/bag.db3").is_file()
    assert recorded["/joints"][0][0] == 7_000_000_000
    assert recorded["/joints"][0][1].name == ["j1", "j2", "grip"]
    # A photograph of a ramp at quality 5 is far smaller than at 95.
    convert_episode(
        small_dataset, 0, tmp_path / "fine", BagOptions(compression="jpeg", max_frames=1)
    )
    fine = _read(tmp_path / "fine")["/cameras/front/image_raw/compressed"][0][1]
    assert len(recorded["/eye/front/compressed"][0][1].data) < 0.8 * len(fine.data)


def test_message_definitions_are_the_same_in_humble_and_later() -> None:
    for store in (Stores.ROS2_JAZZY, Stores.ROS2_KILTED):
        other = get_typestore(store)
        for name in (
            messages.IMAGE_TYPE,
            messages.COMPRESSED_IMAGE_TYPE,
            messages.JOINT_STATE_TYPE,
            messages.STRING_TYPE,
        ):
            assert messages.TYPESTORE.hash_rihs01(name) == other.hash_rihs01(name)


def test_same_episode_becomes_the_same_bag(small_dataset: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        convert_episode(small_dataset, 0, tmp_path / name / "bag", BagOptions())
    for path in (tmp_path / "one/bag").iterdir():
        assert path.read_bytes() == (tmp_path / "two/bag" / path.name).read_bytes()


# --- refusals ---------------------------------------------------------------------------------


def _truncate(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def _nothing(_: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("damage", "episode", "message"),
    [
        (lambda root: shutil.rmtree(root), 0, "no folder 'meta'"),
        (_nothing, 4, r"no episode 4; it has 0\."),
        (
            lambda root: _truncate(
                root / "videos/chunk-000/observation.images.front/episode_000000.mp4", 0.5
            ),
            0,
            "truncated",
        ),
        (
            lambda root: _truncate(root / "data/chunk-000/episode_000000.parquet", 0.5),
            0,
            "truncated",
        ),
    ],
)
def test_bad_dataset_is_named_on_the_command_line_and_leaves_nothing(
    small_dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    episode: int,
    message: str,
) -> None:
    copy = tmp_path / "dataset"
    shutil.copytree(small_dataset, copy)
    damage(copy)
    (tmp_path / "out").mkdir()
    arguments = ["--dataset", str(copy), "--episode", str(episode)]
    code = cli.main(["episode-to-bag", *arguments, "--output", str(tmp_path / "out/bag")])
    errors = capsys.readouterr().err
    assert code == 2
    assert re.search(message, errors), errors
    assert "Traceback" not in errors
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_topic": "/camera"}, r"gives all 2 cameras one topic"),
        ({"image_topic": "camera/{camera}"}, "'camera/front' is not an absolute ROS name"),
        ({"joint_topic": "/instruction"}, "'/instruction' is not .* that occurs once"),
        ({"jpeg_quality": 0}, "not from 1 to 100"),
        ({"max_frames": 0}, "leaves nothing to write"),
        ({"start_time_ns": -1}, "negative"),
        ({"start_time_ns": 2**62}, "after 2038"),
        ({"instruction_key": "human.mood"}, "no annotation 'human.mood'"),
    ],
)
def test_options_that_make_no_bag_are_refused(
    small_dataset: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(GrootError, match=message):
        convert_episode(small_dataset, 0, tmp_path / "bag", BagOptions(**options))
    assert list(tmp_path.iterdir()) == []


def test_robot_with_too_few_joints_is_refused(small_dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "robot.yaml").write_text(ROBOT.replace("gripper: [grip]", "hand: [grip]"))
    robot = load_robot(tmp_path / "robot.yaml")
    with pytest.raises(ConfigurationError, match=r"0 joints for the state key 'gripper'.* has 1"):
        convert_episode(small_dataset, 0, tmp_path / "bag", BagOptions(), robot=robot)


def test_one_name_for_two_joints_is_refused(small_dataset: Path, tmp_path: Path) -> None:
    copy = tmp_path / "dataset"
    shutil.copytree(small_dataset, copy)
    info = copy / "meta/info.json"
    info.write_text(info.read_text().replace('"finger"', '"elbow"'))
    with pytest.raises(ConfigurationError, match="both named 'elbow'"):
        convert_episode(copy, 0, tmp_path / "bag", BagOptions())


def test_existing_bag_is_kept_without_force_and_after_a_failure(
    small_dataset: Path, tmp_path: Path
) -> None:
    output = tmp_path / "bag"
    convert_episode(small_dataset, 0, output, BagOptions(max_frames=2))
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    with pytest.raises(OutputError, match="already holds a bag: add --force"):
        convert_episode(small_dataset, 0, output, BagOptions())
    with pytest.raises(GrootError):
        convert_episode(small_dataset, 9, output, BagOptions(), replace=True)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    convert_episode(small_dataset, 0, output, BagOptions(storage="sqlite3"), replace=True)
    assert {path.name for path in output.iterdir()} == {"bag.db3", "metadata.yaml"}
    assert len(_read(output)["/joint_states"]) == 20
    assert list(tmp_path.iterdir()) == [output]


def test_force_does_not_replace_what_is_no_bag(small_dataset: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("ten years")
    with pytest.raises(OutputError, match="exists and is not a bag"):
        convert_episode(small_dataset, 0, home, BagOptions(), replace=True)
    assert (home / "thesis.tex").read_text() == "ten years"


def test_output_that_cannot_be_made_is_named(small_dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    # Root may write anywhere, but not below a regular file and not in /proc.
    for output in (tmp_path / "file/bag", Path("/proc/bag")):
        with pytest.raises(OutputError, match=f"cannot write {output}"):
            convert_episode(small_dataset, 0, output, BagOptions())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_full_disk_is_named_and_leaves_nothing(
    small_dataset: Path, tmp_path: Path, storage: str
) -> None:
    def limit() -> None:
        # A file that may not grow fails as on a full disk, for root too.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    arguments = ["--dataset", str(small_dataset), "--episode", "0", "--storage", storage]
    command = ["episode-to-bag", *arguments, "--output", str(tmp_path / "bag")]
    done = subprocess.run(
        [sys.executable, "-m", "offline_tools.cli", *command],
        preexec_fn=limit,
        capture_output=True,
        text=True,
        cwd=REPOSITORY_ROOT,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert f"cannot write {tmp_path / 'bag'}" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_interrupt_during_conversion_leaves_nothing(g1_dataset_dir: Path, tmp_path: Path) -> None:
    arguments = ["--dataset", str(g1_dataset_dir), "--episode", "2", "--compressed", "png"]
    command = ["episode-to-bag", *arguments, "--output", str(tmp_path / "bag")]
    with subprocess.Popen(
        [sys.executable, "-m", "offline_tools.cli", *command],
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY_ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        deadline_s = time.monotonic() + 30.0
        while not any(path.stat().st_size > 1_000_000 for path in tmp_path.rglob("*.mcap")):
            assert process.poll() is None, "the conversion ended before it could be interrupted"
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []
