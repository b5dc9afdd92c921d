"""Observations for a comparison, and what the float policy computes for them.

Owns: drawing observations from a dataset or from a seed, and running a policy over them while its
graphs' inputs are kept. Must not import a quantiser. Everything stays in memory: a comparison
takes tens of observations; a calibration of a robot's policy uses the capture store instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from groot_int8_ros.capture.inference import with_graph_inputs
from groot_int8_ros.capture.sample import CaptureSample
from groot_int8_ros.errors import ConfigurationError
from groot_int8_ros.policy.bundle import Bundle
from groot_int8_ros.policy.families import DEPLOYED, LARGE_GRAPHS
from groot_int8_ros.policy.policy import Policy, draw_noise
from groot_int8_ros.policy.types import Float32Array, Observation, UInt8Array
from offline_tools.dataset.lerobot import LeRobotDataset

Feeds = list[dict[str, NDArray[Any]]]

# One for all: ONNX Runtime's histograms take samples of one length only.
GENERATED_INSTRUCTION = "pick up the red cube and place it in the green bowl"


@dataclass(frozen=True)
class Answers:
    """What a policy computed for observations.

    Attributes:
        observations: What was answered.
        states: Normalised states, float32 (1, max_state_dim), one for each observation.
        noise: Start of the flow, one for each observation.
        action_pred: Normalised actions, float32 (horizon, max_action_dim), one for each.
        feeds: Graph to the inputs of each of its runs, in order; batch 1.
    """

    observations: tuple[Observation, ...]
    states: tuple[Float32Array, ...]
    noise: tuple[Float32Array, ...]
    action_pred: tuple[Float32Array, ...]
    feeds: Mapping[str, Feeds]


def answer(policy: Policy, observations: Sequence[Observation], seed: int) -> Answers:
    """Run a policy over observations and keep its answers and its graphs' inputs.

    Values that are not finite are kept too: a scheme that gives them has to show in the table.

    Args:
        policy: The policy.
        observations: What to answer; their stamps choose the noise.
        seed: Of the noise.
    """
    feeds: dict[str, Feeds] = {name: [] for name in LARGE_GRAPHS[policy.manifest.family]}

    def keep(graph: str, given: Mapping[str, NDArray[Any]]) -> None:
        if graph in feeds:
            feeds[graph].append(dict(given))

    graphs: Any = policy.graphs
    states, noises, predictions = [], [], []
    with policy.observed(keep):
        for observation in observations:
            one = graphs.preprocess(observation)
            noise = draw_noise(seed, observation.stamp_ns, policy.noise_shape)
            states.append(one.state)
            noises.append(noise)
            predictions.append(graphs.actions(one, graphs.features(one), noise))
    return Answers(tuple(observations), tuple(states), tuple(noises), tuple(predictions), feeds)


def capture_samples(answers: Answers, family: str, seed: int) -> Iterator[CaptureSample]:
    """Give answers the form in which a calibration stores them.

    Args:
        answers: What a policy computed.
        family: Of its graphs.
        seed: That its noise was drawn with.
    """
    count = len(answers.observations)
    for index, observation in enumerate(answers.observations):
        sample = CaptureSample(
            instruction=observation.instruction,
            stamp_ns=observation.stamp_ns,
            source=f"observation {index}",
            state=observation.state,
            noise=answers.noise[index],
            seed=seed,
            images=observation.images if family == DEPLOYED else None,
            normalised_state=answers.states[index][0],
        )
        yield with_graph_inputs(
            sample,
            family,
            {
                name: feeds[index * len(feeds) // count : (index + 1) * len(feeds) // count]
                for name, feeds in answers.feeds.items()
            },
        )


def generated_observations(bundle: Bundle, count: int, seed: int) -> list[Observation]:
    """Draw observations that differ as a robot's do within a task: in scene, light and pose.

    Images are sums of random fields of several scales with random contrast and brightness. White
    noise would not do: the image chain averages it to the same grey every time.

    Args:
        bundle: Gives cameras and state keys with their ranges.
        count: How many.
        seed: Other seeds give other observations.
    """
    random = np.random.RandomState(seed)
    observations = []
    for index in range(count):
        images = {
            camera.key: _scene(random, camera.height, camera.width)
            for camera in bundle.manifest.robot.cameras
        }
        state: dict[str, Float32Array] = {}
        for key in bundle.processor.state_keys:
            if key.low is not None and key.high is not None:
                drawn = random.uniform(key.low, key.high)
            else:
                drawn = random.standard_normal(key.dim)
            state[key.key] = np.asarray(drawn, np.float32)
        observations.append(
            Observation(
                images=images,
                state=state,
                instruction=GENERATED_INSTRUCTION,
                # Noise depends on seed and stamp: no two sets may share a stamp.
                stamp_ns=seed * 1_000_003 + index,
            )
        )
    return observations


def recorded_observations(
    bundle: Bundle, dataset: Path, counts: tuple[int, ...]
) -> tuple[list[Observation], ...]:
    """Take sets of different frames of a dataset, each spread over all of it.

    Args:
        bundle: Gives the cameras.
        dataset: LeRobot dataset of the same robot.
        counts: Size of each set.

    Returns:
        A list for each count.

    Raises:
        ConfigurationError: The dataset has too few frames.
        DatasetError: It cannot be read.
    """
    opened = LeRobotDataset.open(dataset)
    lengths = [info.length for info in opened.episodes]
    total, wanted = sum(lengths), sum(counts)
    if total < wanted:
        raise ConfigurationError(
            f"{dataset} has {total} frames, and {wanted} different ones are needed: ask for fewer "
            "samples or give a longer recording"
        )
    rows = np.linspace(0, total - 1, wanted).round().astype(int)
    # Neighbouring frames go to different sets, so that each set sees the whole recording.
    owner = np.repeat(np.arange(len(counts)), counts)
    order = np.argsort((np.concatenate([(np.arange(n) + 0.5) / n for n in counts])), kind="stable")
    sets: tuple[list[Observation], ...] = tuple([] for _ in counts)
    owners = dict(zip(rows.tolist(), owner[order].tolist(), strict=True))
    start = 0
    for info, length in zip(opened.episodes, lengths, strict=True):
        inside = {row - start for row in owners if start <= row < start + length}
        if inside:
            for frame, observation in _frames(bundle, opened, info.index, inside):
                sets[owners[start + frame]].append(observation)
        start += length
    return sets


def _frames(
    bundle: Bundle, dataset: LeRobotDataset, episode: int, wanted: set[int]
) -> Iterator[tuple[int, Observation]]:
    recorded = dataset.episode(episode)
    cameras = [camera.key for camera in bundle.manifest.robot.cameras]
    streams = [recorded.frames(key) for key in cameras]
    for index, frames in enumerate(zip(*streams, strict=True)):
        if index in wanted:
            yield (
                index,
                Observation(
                    images=dict(zip(cameras, frames, strict=True)),
                    state={key: values[index] for key, values in recorded.state.items()},
                    instruction=recorded.instructions[index],
                    stamp_ns=episode * 1_000_003 + index,
                ),
            )


def _scene(random: np.random.RandomState, height: int, width: int) -> UInt8Array:
    scene = np.zeros((height, width, 3), np.float32)
    for cells in (2, 5, 12, 40):
        field = random.standard_normal((cells, cells, 3)).astype(np.float32)
        resized = cv2.resize(field, (width, height), interpolation=cv2.INTER_CUBIC)
        scene += np.asarray(resized, np.float32) / np.float32(cells**0.5)
    contrast, brightness = random.uniform(20, 90), random.uniform(60, 190)
    image: UInt8Array = np.clip(scene * contrast + brightness, 0, 255).astype(np.uint8)
    return image
