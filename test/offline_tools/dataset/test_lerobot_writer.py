"""What the writer writes is read back, and a failed write leaves nothing."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from groot_int8_ros.errors import ConfigurationError
from offline_tools.dataset.lerobot import LeRobotDataset
from offline_tools.dataset.lerobot_writer import NewEpisode, write_dataset

JOINTS = {"arm": ("shoulder", "elbow", "wrist"), "gripper": ("finger",)}
CAMERAS = {"front": (48, 64), "wrist": (32, 32)}


def _write(target: Path, episodes: list[NewEpisode], **changes: Any) -> None:
    settings: dict[str, Any] = {
        "fps": 10.0,
        "state_joints": JOINTS,
        "action_joints": JOINTS,
        "cameras": CAMERAS,
        "robot_type": "test_arm",
        "codec": "libx264",
    }
    write_dataset(target, episodes, **{**settings, **changes})


@pytest.mark.parametrize("codec", ["libsvtav1", "libx264", "mpeg4"])
def test_written_episodes_are_read_back(
    tmp_path: Path, new_episodes: list[NewEpisode], codec: str
) -> None:
    kept = [
        replace(item, frames={key: list(frames) for key, frames in item.frames.items()})
        for item in new_episodes
    ]
    _write(tmp_path / "set", kept, codec=codec)
    dataset = LeRobotDataset.open(tmp_path / "set")
    assert [(item.index, item.length) for item in dataset.episodes] == [(0, 12), (1, 7)]
    assert dataset.fps == 10.0
    for index, new in enumerate(kept):
        episode = dataset.episode(index)
        assert list(episode.instructions) == list(new.instructions)
        np.testing.assert_allclose(episode.timestamps_s, np.arange(len(episode)) / 10.0, atol=1e-6)
        for key in JOINTS:
            np.testing.assert_array_equal(episode.state[key], new.state[key])
            np.testing.assert_array_equal(episode.action[key], new.action[key])
        for key, frames in new.frames.items():
            for decoded, frame in zip(episode.frames(key), frames, strict=True):
                error = np.abs(decoded.astype(np.float64) - frame)
                assert error.mean() < 6.0


def test_statistics_are_those_of_all_frames_together(
    generated_dataset: Path, new_episodes: list[NewEpisode]
) -> None:
    statistics = json.loads((generated_dataset / "meta/stats.json").read_text())
    for column, part in (("observation.state", "state"), ("action", "action")):
        values = np.concatenate(
            [
                np.concatenate([getattr(item, part)[key] for key in JOINTS], axis=1)
                for item in new_episodes
            ]
        ).astype(np.float64)
        ordered = np.sort(values, axis=0)
        got = {name: np.array(numbers) for name, numbers in statistics[column].items()}
        np.testing.assert_allclose(got["min"], ordered[0])
        np.testing.assert_allclose(got["max"], ordered[-1])
        np.testing.assert_allclose(got["mean"], values.sum(axis=0) / 19)
        np.testing.assert_allclose(got["std"] ** 2, (values**2).mean(axis=0) - got["mean"] ** 2)
        # 19 values: the 1 % quantile lies 0.18 of the way from the smallest to the next.
        np.testing.assert_allclose(got["q01"], ordered[0] + 0.18 * (ordered[1] - ordered[0]))
        np.testing.assert_allclose(got["q99"], ordered[-1] - 0.18 * (ordered[-1] - ordered[-2]))


def _lost_frame(episode: NewEpisode) -> NewEpisode:
    return replace(episode, frames={**episode.frames, "front": list(episode.frames["front"])[1:]})


def _lost_action(episode: NewEpisode) -> NewEpisode:
    return replace(episode, action={key: value[1:] for key, value in episode.action.items()})


def _wide_arm(episode: NewEpisode) -> NewEpisode:
    return replace(episode, state={**episode.state, "arm": np.zeros((12, 5), np.float32)})


def _small_frame(episode: NewEpisode) -> NewEpisode:
    frames = [np.zeros((48, 62, 3), np.uint8)] * 12
    return replace(episode, frames={**episode.frames, "front": frames})


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (_lost_frame, {}, "camera 'front': 11 frames for 12 states"),
        (_lost_action, {}, "12 states, 11 actions and 12 instructions"),
        (_wide_arm, {}, r"key 'arm' has shape \(12, 5\), but it has 3 joints"),
        (_small_frame, {}, r"camera 'front', frame 0: uint8 of shape \(48, 62, 3\)"),
        (lambda episode: episode, {"codec": "no_such_codec"}, "encoder 'no_such_codec'"),
    ],
)
def test_contradictory_episode_is_named_and_leaves_nothing(
    tmp_path: Path, new_episodes: list[NewEpisode], change: Any, settings: Any, message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        _write(tmp_path / "set", [change(new_episodes[0])], **settings)
    assert list(tmp_path.iterdir()) == []


def test_odd_frame_sides_are_an_error_the_user_can_read(tmp_path: Path) -> None:
    episode = NewEpisode(
        state={"arm": np.zeros((2, 1), np.float32)},
        action={"arm": np.zeros((2, 1), np.float32)},
        frames={"front": [np.zeros((31, 33, 3), np.uint8)] * 2},
        instructions="go",
    )
    with pytest.raises(ConfigurationError, match="even sides"):
        _write(
            tmp_path / "set",
            [episode],
            state_joints={"arm": ("a",)},
            action_joints={"arm": ("a",)},
            cameras={"front": (31, 33)},
        )
    assert list(tmp_path.iterdir()) == []


def test_full_disk_leaves_nothing(tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
import numpy as np
from groot_int8_ros.errors import OutputError
from offline_tools.dataset.lerobot_writer import NewEpisode, write_dataset
noise = np.random.default_rng(0).integers(0, 256, (20, 128, 128, 3), np.uint8)
values = {"arm": np.zeros((20, 1), np.float32)}
try:
    write_dataset(Path(sys.argv[1]), [NewEpisode(values, values, {"front": noise}, "go")],
                  fps=10.0, state_joints={"arm": ["a"]}, action_joints={"arm": ["a"]},
                  cameras={"front": (128, 128)}, robot_type="r", codec="mpeg4")
except OutputError as error:
    print("OutputError:", error)
"""

    def limit() -> None:
        # A file that may not grow fails as on a full disk, for root too.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "set")],
        preexec_fn=limit,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
        timeout=60,
        check=False,
    )
    assert "OutputError: cannot write" in done.stdout, done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []
