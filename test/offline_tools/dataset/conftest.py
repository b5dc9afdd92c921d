"""A small generated dataset that the dataset tests read, alter and damage."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from groot_int8_ros.policy.types import Float32Array, UInt8Array
from offline_tools.dataset.lerobot_writer import NewEpisode, write_dataset

LENGTHS = (12, 7)
STATE_JOINTS = {"arm": ("shoulder", "elbow", "wrist"), "gripper": ("finger",)}
CAMERAS = {"front": (48, 64), "wrist": (32, 32)}


def _frames(count: int, size: tuple[int, int], seed: int) -> Iterator[UInt8Array]:
    height, width = size
    for index in range(count):
        ramp = np.linspace(20, 200, width, dtype=np.float64)[None, :, None]
        shades = np.array([1.0, 0.7, 0.4]) * (1.0 - 0.03 * index) - 0.05 * seed
        yield np.broadcast_to(ramp * shades, (height, width, 3)).astype(np.uint8)


def _values(length: int, seed: int) -> dict[str, Float32Array]:
    rng = np.random.default_rng(seed)
    return {
        key: rng.normal(size=(length, len(names))).astype(np.float32)
        for key, names in STATE_JOINTS.items()
    }


def _episodes() -> list[NewEpisode]:
    return [
        NewEpisode(
            state=_values(length, seed=10 + index),
            action=_values(length, seed=20 + index),
            frames={key: _frames(length, size, index) for key, size in CAMERAS.items()},
            instructions=["pick"] * (length - 3) + ["place"] * 3,
        )
        for index, length in enumerate(LENGTHS)
    ]


@pytest.fixture
def new_episodes() -> list[NewEpisode]:
    """Two episodes of 12 and 7 frames with two cameras and an instruction that changes."""
    return _episodes()


@pytest.fixture
def generated_dataset(tmp_path: Path) -> Path:
    """The same two episodes on disk, in a folder of the test's own."""
    root = tmp_path / "generated"
    write_dataset(
        root,
        _episodes(),
        fps=10.0,
        state_joints=STATE_JOINTS,
        action_joints=STATE_JOINTS,
        cameras=CAMERAS,
        robot_type="test_arm",
        codec="libx264",
    )
    return root
