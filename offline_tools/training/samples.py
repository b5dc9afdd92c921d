"""What the policy is trained on, as arrays: pictures, joints, the chunk that follows, the truth.

Owns: `Samples` and the step from an episode to it. Must not import torch. Pictures are stored as
the network sees them, made by the robot's own image chain, so that no second one exists.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

from groot_int8_ros.policy.preprocess import evaluation_image, network_image
from groot_int8_ros.policy.types import Float32Array, Int64Array, UInt8Array
from offline_tools.simulation.demonstrations import Demonstration, chunks
from offline_tools.training.configuration import CAMERAS, HORIZON, IMAGE_CHAIN


@dataclass(frozen=True)
class Samples:
    """N observations and what the expert would do from each.

    Attributes:
        images: Network images, uint8, shape (N, cameras, height, width, 3).
        state_deg: Measured joints, degrees, float32, shape (N, 6).
        chunk_deg: The expert's targets from now on, degrees, float32, shape (N, HORIZON, 6).
        task: Index in `TASKS`, int64, shape (N,).
        truth_m: x, y, z of the cubes, then x, y of the plates, metres, float32, shape (N, 13).
    """

    images: UInt8Array
    state_deg: Float32Array
    chunk_deg: Float32Array
    task: Int64Array
    truth_m: Float32Array

    def __len__(self) -> int:
        return len(self.task)


def joined(parts: Sequence[Samples]) -> Samples:
    """Return the samples of several parts, in order."""
    return Samples(
        *(
            np.concatenate([getattr(part, field.name) for part in parts])
            for field in fields(Samples)
        )
    )


def network_images(frames: Mapping[str, UInt8Array]) -> UInt8Array:
    """Run the image chain on one frame of each camera, (cameras, height, width, 3)."""
    return np.stack(
        [network_image(evaluation_image(frames[camera], IMAGE_CHAIN)) for camera in CAMERAS]
    )


def truth_vector(cubes_m: Float32Array, plates_m: Float32Array) -> Float32Array:
    """Flatten places of shape (..., 3, 3) and (..., 2, 3) to `Samples.truth_m`."""
    lead = cubes_m.shape[:-2]
    return np.concatenate(
        [cubes_m.reshape(*lead, -1), plates_m[..., :2].reshape(*lead, -1)], axis=-1
    ).astype(np.float32)


def episode_samples(episode: Demonstration, images: Sequence[UInt8Array]) -> Samples:
    """Return one sample for each row of an episode.

    Args:
        episode: The episode.
        images: `network_images` of each row.
    """
    return Samples(
        images=np.stack(images),
        state_deg=episode.state_deg,
        chunk_deg=chunks(episode.action_deg, HORIZON),
        task=np.full(len(images), episode.task.index, np.int64),
        truth_m=truth_vector(episode.cubes_m, episode.plates_m),
    )
