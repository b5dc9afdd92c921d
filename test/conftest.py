"""Fixtures and settings that every test shares.

Owns: where recorded reference data is looked for, and the environment that keeps tests from
leaving this machine. Tests import nothing from here; they take fixtures by name.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY_ROOT = Path(__file__).resolve().parent.parent

SHARED_DATA_VARIABLE = "GROOT_SHARED_DATA"

# Set before any test imports rclpy or transformers, and inherited by the processes they start:
# neither DDS discovery nor a model hub may be reached from a test.
os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def repository_root() -> Path:
    """The folder that holds setup.py. Tests read it and never write into it."""
    return REPOSITORY_ROOT


@pytest.fixture(scope="session")
def shared_data_dir() -> Path:
    """The folder with recorded reference data, which is not part of the repository.

    It is `$GROOT_SHARED_DATA`, or the folder `shared` beside the repository. Where neither is
    there the test is skipped; a variable that names a missing folder is a mistake and fails.
    """
    named = os.environ.get(SHARED_DATA_VARIABLE)
    if named:
        folder = Path(named).expanduser().resolve()
        if not folder.is_dir():
            pytest.fail(f"{SHARED_DATA_VARIABLE} names {folder}, which is not a folder")
        return folder
    folder = REPOSITORY_ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(
            f"no reference data: {SHARED_DATA_VARIABLE} is not set and there is no folder "
            "'shared' beside the repository"
        )
    return folder


def _folder_in(shared: Path, relative: str) -> Path:
    folder = shared / relative
    if not folder.is_dir():
        pytest.skip(f"no {relative} in the reference data folder {shared}")
    return folder


@pytest.fixture(scope="session")
def golden_dir(shared_data_dir: Path) -> Path:
    """The golden vectors: a tiny checkpoint, its inputs and every intermediate tensor."""
    return _folder_in(shared_data_dir, "golden")


@pytest.fixture(scope="session")
def g1_dataset_dir(shared_data_dir: Path) -> Path:
    """Three real episodes of a Unitree G1 as a LeRobot v2.1 dataset."""
    return _folder_in(shared_data_dir, "data/g1_pick_bottle")
