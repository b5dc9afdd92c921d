"""Writing generated episodes in the layout that `lerobot.py` reads.

Owns: `write_dataset`. Must not import ROS or torch. Demo and tests make their data with it, so
that they walk the same road as a recorded dataset: parquet, video, `meta`. The dataset appears
under its name when it is complete, never before.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from groot_int8_ros.errors import ConfigurationError
from groot_int8_ros.policy.files import atomic_directory
from groot_int8_ros.policy.types import Float32Array, UInt8Array
from offline_tools.dataset.statistics import dimension_statistics
from offline_tools.dataset.video import write_rgb_frames

_CHUNKS_SIZE = 1000
_DATA_PATH = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
_VIDEO_PATH = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"


@dataclass(frozen=True)
class NewEpisode:
    """One episode to write.

    Attributes:
        state: State key to values, float32, shape (T, D).
        action: Action key to values, float32, shape (T, D).
        frames: Camera key to T RGB frames, uint8, shape (height, width, 3); taken one at a time.
        instructions: One instruction for the episode, or T of them.
    """

    state: Mapping[str, Float32Array]
    action: Mapping[str, Float32Array]
    frames: Mapping[str, Iterable[UInt8Array]]
    instructions: str | Sequence[str]


def write_dataset(
    target: Path,
    episodes: Iterable[NewEpisode],
    *,
    fps: float,
    state_joints: Mapping[str, Sequence[str]],
    action_joints: Mapping[str, Sequence[str]],
    cameras: Mapping[str, tuple[int, int]],
    robot_type: str,
    codec: str = "libsvtav1",
) -> None:
    """Write a LeRobot v2.1 dataset with GR00T's `modality.json` and statistics.

    Args:
        target: The dataset's folder; replaced if it is there.
        episodes: Consumed one at a time.
        fps: Frames a second of every episode.
        state_joints: State key to the names of its dimensions, in the vector's order.
        action_joints: Action key to the names of its dimensions, likewise.
        cameras: Camera key to height and width in pixels, both even.
        robot_type: LeRobot's name for the robot.
        codec: FFmpeg encoder of the videos.

    Raises:
        ConfigurationError: An episode does not have these keys and sizes, or the encoder cannot
            write the frames.
        OutputError: The folder cannot be written; nothing is left behind.
    """
    with atomic_directory(target) as root:
        tasks: dict[str, int] = {}
        entries: list[dict[str, Any]] = []
        recorded: dict[str, list[Float32Array]] = {"observation.state": [], "action": []}
        for index, episode in enumerate(episodes):
            state = _concatenate(episode.state, state_joints, f"episode {index}, state")
            action = _concatenate(episode.action, action_joints, f"episode {index}, action")
            length = len(state)
            instructions = (
                [episode.instructions] * length
                if isinstance(episode.instructions, str)
                else list(episode.instructions)
            )
            if not (length == len(action) == len(instructions) > 0):
                raise ConfigurationError(
                    f"episode {index} has {length} states, {len(action)} actions and "
                    f"{len(instructions)} instructions; give the same number of each, at least 1."
                )
            for instruction in instructions:
                tasks.setdefault(instruction, len(tasks))
            _write_parquet(
                _made(root / _DATA_PATH.format(**_place(index))),
                state,
                action,
                fps,
                index,
                sum(entry["length"] for entry in entries),
                [tasks[instruction] for instruction in instructions],
            )
            for key, size in cameras.items():
                path = _VIDEO_PATH.format(**_place(index), video_key=_video_key(key))
                written = write_rgb_frames(
                    _made(root / path), _checked(episode.frames[key], key, size), fps, codec
                )
                if written != length:
                    raise ConfigurationError(
                        f"episode {index}, camera {key!r}: {written} frames for {length} states; "
                        "give one frame for each."
                    )
            entries.append(
                {
                    "episode_index": index,
                    "tasks": list(dict.fromkeys(instructions)),
                    "length": length,
                }
            )
            recorded["observation.state"].append(state)
            recorded["action"].append(action)
        meta = root / "meta"
        meta.mkdir()
        _write_json(
            meta / "info.json",
            _info(entries, len(tasks), fps, state_joints, action_joints, cameras, robot_type),
        )
        _write_json(meta / "modality.json", _modality(state_joints, action_joints, cameras))
        _write_json(
            meta / "stats.json",
            {
                column: dimension_statistics(np.concatenate(parts))
                for column, parts in recorded.items()
                if parts
            },
        )
        _write_json_lines(meta / "episodes.jsonl", entries)
        _write_json_lines(
            meta / "tasks.jsonl",
            [{"task_index": index, "task": task} for task, index in tasks.items()],
        )


def _place(index: int) -> dict[str, int]:
    return {"episode_chunk": index // _CHUNKS_SIZE, "episode_index": index}


def _video_key(camera_key: str) -> str:
    return f"observation.images.{camera_key}"


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _concatenate(
    values: Mapping[str, Float32Array], joints: Mapping[str, Sequence[str]], where: str
) -> Float32Array:
    parts = []
    for key, names in joints.items():
        part = np.asarray(values[key], np.float32)
        if part.ndim != 2 or part.shape[1] != len(names):
            raise ConfigurationError(
                f"{where}: key {key!r} has shape {part.shape}, but it has {len(names)} joints; "
                "give an array of shape (frames, joints)."
            )
        parts.append(part)
    return np.concatenate(parts, axis=1)


def _checked(
    frames: Iterable[UInt8Array], key: str, size: tuple[int, int]
) -> Iterator[UInt8Array]:
    for index, frame in enumerate(frames):
        if frame.shape != (*size, 3) or frame.dtype != np.uint8:
            raise ConfigurationError(
                f"camera {key!r}, frame {index}: {frame.dtype} of shape {frame.shape}; give uint8 "
                f"of shape {(*size, 3)}."
            )
        yield frame


def _write_parquet(
    path: Path,
    state: Float32Array,
    action: Float32Array,
    fps: float,
    index: int,
    first_row: int,
    task_indices: Sequence[int],
) -> None:
    length = len(state)
    rows = np.arange(length, dtype=np.int64)
    table = pa.table(
        {
            "observation.state": _vectors(state),
            "action": _vectors(action),
            "timestamp": pa.array((rows / fps).astype(np.float32)),
            "frame_index": pa.array(rows),
            "episode_index": pa.array(np.full(length, index, np.int64)),
            "index": pa.array(rows + first_row),
            "task_index": pa.array(np.asarray(task_indices, np.int64)),
        }
    )
    pa.parquet.write_table(table, path)


def _vectors(matrix: Float32Array) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(matrix.ravel()), matrix.shape[1])


def _info(
    entries: Sequence[Mapping[str, Any]],
    task_count: int,
    fps: float,
    state_joints: Mapping[str, Sequence[str]],
    action_joints: Mapping[str, Sequence[str]],
    cameras: Mapping[str, tuple[int, int]],
    robot_type: str,
) -> dict[str, Any]:
    features: dict[str, Any] = {}
    for column, joints in (("observation.state", state_joints), ("action", action_joints)):
        names = [name for group in joints.values() for name in group]
        features[column] = {"dtype": "float32", "shape": [len(names)], "names": names}
    for key, (height, width) in cameras.items():
        features[_video_key(key)] = {
            "dtype": "video",
            "shape": [height, width, 3],
            "names": ["height", "width", "channel"],
        }
    for column in ("timestamp", "frame_index", "episode_index", "index", "task_index"):
        dtype = "float32" if column == "timestamp" else "int64"
        features[column] = {"dtype": dtype, "shape": [1], "names": None}
    return {
        "codebase_version": "v2.1",
        "robot_type": robot_type,
        "total_episodes": len(entries),
        "total_frames": sum(entry["length"] for entry in entries),
        "total_tasks": task_count,
        "total_videos": len(entries) * len(cameras),
        "total_chunks": -(-len(entries) // _CHUNKS_SIZE),
        "chunks_size": _CHUNKS_SIZE,
        "fps": fps,
        "splits": {"train": f"0:{len(entries)}"},
        "data_path": _DATA_PATH,
        "video_path": _VIDEO_PATH,
        "features": features,
    }


def _modality(
    state_joints: Mapping[str, Sequence[str]],
    action_joints: Mapping[str, Sequence[str]],
    cameras: Mapping[str, tuple[int, int]],
) -> dict[str, Any]:
    return {
        "state": _spans(state_joints),
        "action": _spans(action_joints),
        "video": {key: {"original_key": _video_key(key)} for key in cameras},
        "annotation": {"human.task_description": {"original_key": "task_index"}},
    }


def _spans(joints: Mapping[str, Sequence[str]]) -> dict[str, dict[str, int]]:
    ends = list(accumulate(len(names) for names in joints.values()))
    return {
        key: {"start": end - len(names), "end": end}
        for (key, names), end in zip(joints.items(), ends, strict=True)
    }


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_json_lines(path: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
