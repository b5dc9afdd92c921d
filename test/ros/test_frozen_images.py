"""A camera that repeats its picture for ever is noticed, one that repeats each frame is not."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from groot_int8_ros.policy.types import UInt8Array
from groot_int8_ros.ros.frozen_images import FrozenImageWatch

PERIOD_NS = 33_333_333


def noise(seed: int) -> UInt8Array:
    random = np.random.default_rng(seed)
    return random.integers(100, 104, (48, 64, 3), dtype=np.uint8)


def longest_s(frames: list[UInt8Array], period_ns: int = PERIOD_NS) -> float:
    watch = FrozenImageWatch()
    longest = 0.0
    for number, frame in enumerate(frames):
        watch.see(frame, number * period_ns)
        longest = max(longest, watch.same_pixels_s)
    return longest


def test_time_of_the_same_pixels_is_counted_in_stamps_and_ends_with_a_new_picture() -> None:
    watch = FrozenImageWatch()
    watch.see(noise(0), 0)
    for number in range(1, 31):
        watch.see(noise(1), number * PERIOD_NS)
    assert watch.same_pixels_s == pytest.approx(29 * PERIOD_NS / 1e9)
    watch.see(noise(2), 31 * PERIOD_NS)
    assert watch.same_pixels_s == 0.0


@pytest.mark.parametrize("repeats", [2, 3])
def test_driver_that_publishes_each_frame_several_times_is_not_frozen(repeats: int) -> None:
    frames = [noise(number // repeats) for number in range(60)]
    assert longest_s(frames) <= (repeats - 1) * PERIOD_NS / 1e9


def test_two_looks_at_one_repeated_frame_are_no_evidence_however_far_apart() -> None:
    # After a long hold the worker may meet both copies of a frame, and stamps need not be even.
    assert longest_s([noise(1), noise(1)], period_ns=60_000_000_000) == 0.0


def test_noise_of_a_sensor_before_a_still_scene_is_change_enough() -> None:
    frames = []
    for number in range(30):
        frame = np.full((480, 640, 3), 90, np.uint8)
        frame[8 * (number % 60), number, 0] += 1
        frames.append(frame)
    assert longest_s(frames) == 0.0


def test_the_same_message_read_twice_is_one_frame() -> None:
    watch = FrozenImageWatch()
    for stamp in (0, 0, 0, 1, 1, 1):
        watch.see(noise(0), stamp * 10_000_000_000)
    assert watch.same_pixels_s == 0.0


def test_next_pass_of_a_bag_begins_anew() -> None:
    watch = FrozenImageWatch()
    for stamp in (10, 11, 12, 13):
        watch.see(noise(0), stamp * 1_000_000_000)
    assert watch.same_pixels_s == 3.0
    for stamp in (5, 6):
        watch.see(noise(0), stamp * 1_000_000_000)
    assert watch.same_pixels_s == 0.0


def test_real_recordings_that_repeat_every_frame_stay_far_below_the_limit(
    g1_dataset_dir: Path,
) -> None:
    pytest.importorskip("av", reason="the recording is AV1, which only PyAV decodes")
    from offline_tools.dataset.lerobot import LeRobotDataset

    dataset = LeRobotDataset.open(g1_dataset_dir)
    (camera,) = dataset.cameras
    frames = [
        frame for frame, _ in zip(dataset.episode(0).frames(camera), range(90), strict=False)
    ]
    # This one does repeat frames, or the test would show nothing.
    assert any(np.array_equal(one, two) for one, two in pairwise(frames))
    assert longest_s(frames) < 0.1
