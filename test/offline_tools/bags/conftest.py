"""A small generated episode with two cameras, and DDS domains of the tests' own."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from groot_int8_ros.policy.types import UInt8Array
from offline_tools.dataset.lerobot_writer import NewEpisode, write_dataset

FRAMES = 20
JOINTS = {"arm": ("shoulder", "elbow"), "gripper": ("finger",)}

_domain_offsets = itertools.count()


def _images(size: tuple[int, int]) -> Iterator[UInt8Array]:
    height, width = size
    ramp = np.linspace(10, 240, width)[None, :, None] * np.array([1.0, 0.6, 0.3])
    for index in range(FRAMES):
        yield np.roll(np.broadcast_to(ramp, (height, width, 3)), 2 * index, 1).astype(np.uint8)


@pytest.fixture(scope="session")
def small_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One episode of 20 frames at 20 Hz, its instruction changing at frame 12."""
    root = tmp_path_factory.mktemp("small") / "dataset"
    rng = np.random.default_rng(7)
    values = {
        name: {
            key: rng.uniform(-90, 90, (FRAMES, len(names))).astype(np.float32)
            for key, names in JOINTS.items()
        }
        for name in ("state", "action")
    }
    write_dataset(
        root,
        [
            NewEpisode(
                state=values["state"],
                action=values["action"],
                frames={"front": _images((48, 64)), "wrist.left": _images((32, 32))},
                instructions=["pick"] * 12 + ["place"] * 8,
            )
        ],
        fps=20.0,
        state_joints=JOINTS,
        action_joints=JOINTS,
        cameras={"front": (48, 64), "wrist.left": (32, 32)},
        robot_type="test_arm",
        codec="libx264",
    )
    return root


@pytest.fixture
def ros_environment() -> dict[str, str]:
    """The environment of processes that talk to each other and to nobody else."""
    domain = 1 + (os.getpid() * 7 + next(_domain_offsets)) % 99
    return {
        **os.environ,
        "ROS_DOMAIN_ID": str(domain),
        "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST",
        "ROS_LOCALHOST_ONLY": "1",
        "PYTHONUNBUFFERED": "1",
    }
