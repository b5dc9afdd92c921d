"""Encoding: what it must not do to the process around it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from groot_int8_ros.policy.types import UInt8Array
from offline_tools.dataset.video import write_rgb_frames


def test_encoding_starts_no_real_time_threads_and_leaves_none(tmp_path: Path) -> None:
    # SVT-AV1 starts them only where it may, which is as root: elsewhere this shows nothing.
    before = os.sched_getscheduler(0)
    policies: set[int] = set()

    def frames() -> Iterator[UInt8Array]:
        for _ in range(3):
            yield np.zeros((64, 64, 3), np.uint8)
            policies.update(os.sched_getscheduler(thread) for thread in _threads())

    write_rgb_frames(tmp_path / "video.mp4", frames(), 10.0, "libsvtav1")
    assert policies == {before}
    assert {os.sched_getscheduler(thread) for thread in _threads()} == {before}


def _threads() -> list[int]:
    return [int(folder.name) for folder in Path("/proc/self/task").iterdir()]
