"""What a bundle is verified on: observations of a dataset, or of seeded noise.

Owns: taking and making them. Must not import torch.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from groot_int8_ros.errors import DatasetError
from groot_int8_ros.policy.bundle import Bundle
from groot_int8_ros.policy.types import Float32Array, Observation
from offline_tools.arguments import not_negative_int, positive_int


def add_observation_options(parser: argparse.ArgumentParser, *, samples: int) -> None:
    """Add the options that `chosen_observations` reads.

    Args:
        parser: Of a subcommand.
        samples: Default number of observations.
    """
    add = parser.add_argument
    add("--dataset", type=Path, help="LeRobot dataset to take observations from (default: noise)")
    add("--episode", type=not_negative_int, default=0, help="default: %(default)s")
    add(
        "--samples",
        type=positive_int,
        default=samples,
        help="observations to compare (default: %(default)s)",
    )


def chosen_observations(bundle: Bundle, args: argparse.Namespace) -> tuple[list[Observation], str]:
    """Return the observations that a subcommand's options ask for, and what they are.

    Raises:
        DatasetError: The dataset lacks a camera of the bundle, or cannot be read.
    """
    if args.dataset:
        found = recorded_observations(bundle, args.dataset, args.episode, args.samples)
        return found, args.dataset.name
    return generated_observations(bundle, args.samples), "generated noise"


def recorded_observations(
    bundle: Bundle, dataset: Path, episode: int, samples: int
) -> list[Observation]:
    """Return observations of an episode, spread over it.

    Args:
        bundle: Its robot sees through some cameras.
        dataset: LeRobot dataset.
        episode: Which of its episodes.
        samples: How many.

    Raises:
        DatasetError: The dataset lacks a camera of the bundle, or cannot be read.
    """
    from offline_tools.dataset.lerobot import LeRobotDataset  # not needed for generated ones

    recorded = LeRobotDataset.open(dataset).episode(episode)
    cameras = [camera.key for camera in bundle.manifest.robot.cameras]
    if not set(cameras) <= set(recorded.videos):
        raise DatasetError(
            f"the bundle sees through the cameras {', '.join(cameras)}, but {dataset} has "
            f"{', '.join(recorded.videos) or 'none'}: name the dataset that the policy was "
            "trained on, or leave out --dataset"
        )
    wanted = {round(i * (len(recorded) - 1) / max(samples - 1, 1)) for i in range(samples)}
    # The range comes first, so that no frame behind the last wanted one is decoded.
    streams = [recorded.frames(key) for key in cameras]
    rows = zip(range(max(wanted) + 1), *streams, strict=False)
    return [
        Observation(
            images=dict(zip(cameras, frames, strict=True)),
            state={key: values[index] for key, values in recorded.state.items()},
            instruction=recorded.instructions[index],
            stamp_ns=index,
        )
        for index, *frames in rows
        if index in wanted
    ]


def generated_observations(bundle: Bundle, count: int) -> list[Observation]:
    """Return observations of seeded noise, for a bundle without a dataset at hand."""
    return [_noise_observation(bundle, np.random.RandomState(index)) for index in range(count)]


def _noise_observation(bundle: Bundle, random: np.random.RandomState) -> Observation:
    images = {
        camera.key: random.randint(0, 256, (camera.height, camera.width, 3)).astype(np.uint8)
        for camera in bundle.manifest.robot.cameras
    }
    state: dict[str, Float32Array] = {}
    for key in bundle.processor.state_keys:
        if key.low is not None and key.high is not None:
            state[key.key] = random.uniform(key.low, key.high).astype(np.float32)
        else:
            state[key.key] = random.standard_normal(key.dim).astype(np.float32)
    prompts = bundle.manifest.prompts
    known = [record.text for record in prompts.instructions] if prompts else []
    return Observation(
        images=images, state=state, instruction=known[0] if known else "pick up the cube"
    )
