"""Hazards of the generated arm: pictures that do not show its pose, motion that jumps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("av", reason="generating a dataset needs PyAV")

from groot_int8_ros.errors import ConfigurationError, OutputError
from groot_int8_ros.policy.types import Float32Array, UInt8Array
from offline_tools.cli import main
from offline_tools.dataset.lerobot import Episode, LeRobotDataset
from offline_tools.demo.arm_dataset import write_arm_dataset


@pytest.fixture(scope="module")
def episode(tiny_dataset: Path) -> Episode:
    return LeRobotDataset.open(tiny_dataset).episode(0)


def _joints(episode: Episode, what: str) -> Float32Array:
    values = getattr(episode, what)
    joined: Float32Array = np.concatenate([values["single_arm"], values["gripper"]], axis=1)
    return joined


def test_dataset_reads_back_with_its_cameras_and_joint_names(tiny_dataset: Path) -> None:
    dataset = LeRobotDataset.open(tiny_dataset)
    assert {key: (c.height, c.width) for key, c in dataset.cameras.items()} == {
        "front": (480, 640),
        "wrist": (480, 640),
    }
    assert dataset.fps == 30.0
    assert dataset.joint_names("state", "gripper") == ["gripper"]
    assert len(dataset.joint_names("action", "single_arm") or ()) == 5


def test_motion_is_smooth_and_the_state_follows_the_command(episode: Episode) -> None:
    state, action = _joints(episode, "state"), _joints(episode, "action")
    assert len(episode) == 45
    # Minimum jerk over 40 frames: its steepest frame is 15/8 of the mean one; ranges are 170
    # degrees at most.
    assert np.abs(np.diff(action, axis=0)).max() < 1.875 * 180 / 40
    assert np.abs(np.diff(action, axis=0)).max() > 0.5
    lags = [np.abs(action[: 45 - lag] - state[lag:]).mean() for lag in range(6)]
    assert int(np.argmin(lags)) == 3


def test_pictures_show_the_pose_of_their_frame(episode: Episode) -> None:
    poses = _joints(episode, "state")
    for camera in ("front", "wrist"):
        frames = list(episode.frames(camera))
        assert len(frames) == 45
        assert frames[0].dtype == np.uint8
        moved = [_difference(frames[0], frame) for frame in frames]
        turned = [float(np.abs(poses[0] - pose).max()) for pose in poses]
        # The further the arm has turned, the more of the picture has changed.
        assert np.corrcoef(moved, turned)[0, 1] > 0.5, camera


def _difference(one: UInt8Array, other: UInt8Array) -> float:
    return float(np.abs(one.astype(np.int16) - other).mean())


def test_seed_decides_the_motion_and_each_episode_has_its_own(
    episode: Episode, tmp_path: Path
) -> None:
    poses = []
    for seed in (0, 1):
        write_arm_dataset(tmp_path / str(seed), episodes=2, frames=45, seed=seed)
        dataset = LeRobotDataset.open(tmp_path / str(seed))
        poses += [_joints(dataset.episode(index), "state") for index in (0, 1)]
    np.testing.assert_array_equal(poses[0], _joints(episode, "state"))
    for index, one in enumerate(poses):
        for other in poses[:index]:
            assert np.abs(one - other).max() > 1.0


def test_output_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="cannot write"):
        write_arm_dataset(tmp_path / "file" / "dataset", episodes=1, frames=3, seed=0)


def test_command_writes_what_it_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "dataset"
    words = ["make-dataset", "--output", str(folder), "--episodes", "2", "--frames", "5"]
    assert main(words) == 0
    assert "2 episode(s) of 5 frames" in capsys.readouterr().out
    dataset = LeRobotDataset.open(folder)
    assert [len(dataset.episode(info.index)) for info in dataset.episodes] == [5, 5]


@pytest.mark.parametrize(("episodes", "frames"), [(0, 5), (1, 0)])
def test_empty_dataset_is_refused(tmp_path: Path, episodes: int, frames: int) -> None:
    with pytest.raises(ConfigurationError, match="at least one episode of at least one frame"):
        write_arm_dataset(tmp_path / "dataset", episodes=episodes, frames=frames, seed=0)
    assert list(tmp_path.iterdir()) == []


def test_more_cameras_of_another_size_show_the_arm_from_other_sides(tmp_path: Path) -> None:
    folder = tmp_path / "dataset"
    size = ["--cameras", "4", "--camera-size", "320x288"]
    assert main(["make-dataset", "--output", str(folder), "--frames", "4", *size]) == 0
    dataset = LeRobotDataset.open(folder)
    assert {(c.height, c.width) for c in dataset.cameras.values()} == {(288, 320)}
    episode = dataset.episode(0)
    frames = {key: next(iter(episode.frames(key))) for key in dataset.cameras}
    assert len(frames) == 4
    means = [frame.astype(float).mean(axis=2) for frame in frames.values()]
    differ = [(np.abs(means[a] - means[b]) > 20).mean() for a in range(4) for b in range(a)]
    assert min(differ) > 0.002


@pytest.mark.parametrize("size", ["640", "641x480", "0x0", "axb"])
def test_a_camera_size_that_no_codec_takes_is_a_usage_error(
    size: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["make-dataset", "--output", str(tmp_path / "d"), "--camera-size", size])
    assert "expected" in capsys.readouterr().err
