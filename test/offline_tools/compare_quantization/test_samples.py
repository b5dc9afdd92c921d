"""Hazards of the samples: judging on what was calibrated on, grey images, lost order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from groot_int8_ros.capture.sample import check_sample
from groot_int8_ros.errors import ConfigurationError
from groot_int8_ros.policy.bundle import open_bundle
from groot_int8_ros.policy.families import REFERENCE
from groot_int8_ros.policy.policy import Policy
from offline_tools.compare_quantization.samples import (
    answer,
    capture_samples,
    generated_observations,
    recorded_observations,
)


def test_sets_of_other_seeds_share_neither_image_nor_noise(tiny_bundle: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    first, second = (generated_observations(bundle, 3, seed) for seed in (0, 1))
    again = generated_observations(bundle, 3, 0)
    assert not {one.stamp_ns for one in first} & {one.stamp_ns for one in second}
    camera = bundle.manifest.robot.cameras[0].key
    for one, same in zip(first, again, strict=True):
        assert np.array_equal(one.images[camera], same.images[camera])
        assert all(not np.array_equal(one.images[camera], x.images[camera]) for x in second)


def test_generated_scenes_do_not_average_to_one_grey(tiny_bundle: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    camera = bundle.manifest.robot.cameras[0].key
    for observation in generated_observations(bundle, 4, 0):
        image = observation.images[camera].astype(np.float32)
        blocks = image[: image.shape[0] // 32 * 32, : image.shape[1] // 32 * 32]
        blocks = blocks.reshape(blocks.shape[0] // 32, 32, -1, 32, 3).mean(axis=(1, 3))
        assert blocks.std() > 5.0


def test_recorded_sets_are_disjoint_and_spread(tiny_bundle: Path, tiny_dataset: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    calibration, evaluation = recorded_observations(bundle, tiny_dataset, (6, 3))
    frames = [[one.stamp_ns for one in found] for found in (calibration, evaluation)]
    assert [len(found) for found in frames] == [6, 3]
    assert not set(frames[0]) & set(frames[1])
    # The dataset has 45 frames: each set reaches into both halves.
    for found in frames:
        assert min(found) < 22 < max(found)


def test_a_dataset_that_is_too_short_is_refused(tiny_bundle: Path, tiny_dataset: Path) -> None:
    with pytest.raises(ConfigurationError, match="45 frames"):
        recorded_observations(open_bundle(tiny_bundle), tiny_dataset, (40, 6))


def test_captured_samples_are_the_graphs_inputs(tiny_bundle: Path) -> None:
    policy = Policy.load(tiny_bundle, threads=1, verify_hashes=False)
    answers = answer(policy, generated_observations(open_bundle(tiny_bundle), 2, 0), seed=3)
    steps = policy.manifest.denoising_steps
    policy.close()
    assert len(answers.feeds["dit"]) == 2 * steps
    for index, sample in enumerate(capture_samples(answers, REFERENCE, 3)):
        check_sample(sample)
        assert sample.dit is not None
        runs = answers.feeds["dit"][index * steps : (index + 1) * steps]
        assert sample.dit.timestep.tolist() == [run["timestep"].item() for run in runs]
        assert np.array_equal(sample.dit.sa_embs[-1], runs[-1]["sa_embs"][0])
