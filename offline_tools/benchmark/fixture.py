"""Frozen inputs of a benchmark: observations and noise in one file, so that others can repeat it.

Owns: making, writing and reading them. Must not import torch.

Generated frames are smooth random scenes with sensor noise: a model's arithmetic does not depend
on what is seen, but a JPEG-like or black frame would flatter caches and zero-skipping kernels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from groot_int8_ros.errors import ConfigurationError
from groot_int8_ros.policy.bundle import Bundle
from groot_int8_ros.policy.files import atomic_file
from groot_int8_ros.policy.npz import read_npz
from groot_int8_ros.policy.policy import draw_noise
from groot_int8_ros.policy.types import Float32Array, Observation, UInt8Array

_COARSE_CELL_PIXELS = 32
_NOISE_LEVELS = 6


@dataclass(frozen=True, eq=False)
class FrozenInputs:
    """What every contender of a benchmark answers.

    Attributes:
        observations: In the order in which they are asked.
        noise: Initial noise of each, float32 (horizon, max_action_dim).
    """

    observations: tuple[Observation, ...]
    noise: tuple[Float32Array, ...]

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.observations)

    @property
    def sha256(self) -> str:
        """Hash of all names, types, shapes and values, however they were stored."""
        digest = hashlib.sha256()
        for name, array in sorted(_arrays(self).items()):
            digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def generate_inputs(bundle: Bundle, instruction: str, count: int, seed: int) -> FrozenInputs:
    """Make up observations for a bundle's robot.

    Args:
        bundle: Gives cameras, state keys and the size of the noise.
        instruction: Asked in every observation.
        count: How many.
        seed: The same seed gives the same inputs.
    """
    manifest, processor = bundle.manifest, bundle.processor
    random = np.random.RandomState(seed)
    observations = []
    for index in range(count):
        images = {
            camera.key: _scene(random, camera.height, camera.width)
            for camera in manifest.robot.cameras
        }
        state = {
            key.key: random.standard_normal(key.dim).astype(np.float32)
            for key in processor.state_keys
        }
        observations.append(Observation(images, state, instruction, stamp_ns=index))
    shape = (manifest.action_horizon, processor.max_action_dim)
    noise = tuple(draw_noise(seed, one.stamp_ns, shape) for one in observations)
    return FrozenInputs(tuple(observations), noise)


def write_inputs(path: Path, inputs: FrozenInputs) -> None:
    """Write inputs as one `.npz` file.

    Raises:
        OutputError: The file cannot be written; nothing half-written is left.
    """
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **_arrays(inputs))  # type: ignore[arg-type]


def read_inputs(path: Path) -> FrozenInputs:
    """Read what `write_inputs` wrote.

    Raises:
        ConfigurationError: The file is missing or not such a file.
    """
    try:
        arrays = read_npz(path)
        count = int(arrays["count"])
        return FrozenInputs(
            tuple(_observation(arrays, index) for index in range(count)),
            tuple(arrays[f"{index}/noise"] for index in range(count)),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"{path} holds no inputs of a benchmark ({error}). Write some: groot-int8 benchmark "
            f"--bundle BUNDLE --write-inputs {path}"
        ) from error


def refuse_other_robot(inputs: FrozenInputs, bundle: Bundle) -> None:
    """Refuse inputs whose cameras, keys or noise do not fit a bundle.

    Raises:
        ConfigurationError: They do not fit.
    """
    manifest, processor = bundle.manifest, bundle.processor
    wanted: dict[str, tuple[int, ...]] = {
        f"camera {camera.key}": (camera.height, camera.width, 3)
        for camera in manifest.robot.cameras
    }
    wanted |= {f"state {key.key}": (key.dim,) for key in processor.state_keys}
    wanted["noise"] = (manifest.action_horizon, processor.max_action_dim)
    for one, noise in zip(inputs.observations, inputs.noise, strict=True):
        found: dict[str, tuple[int, ...]] = {
            f"camera {key}": value.shape for key, value in one.images.items()
        }
        found |= {f"state {key}": value.shape for key, value in one.state.items()}
        found["noise"] = noise.shape
        if found != wanted:
            different = sorted({name for name, _ in found.items() ^ wanted.items()})
            raise ConfigurationError(
                f"the inputs do not fit {bundle.folder}: {', '.join(different)} differ (inputs "
                f"{ {n: found.get(n) for n in different} }, bundle "
                f"{ {n: wanted.get(n) for n in different} }). Compare bundles of one robot."
            )


def instructions_of(bundles: Sequence[Bundle]) -> list[str]:
    """Return the instructions that every one of the bundles can answer at once; empty: any."""
    banks = [
        [prompt.text for prompt in bundle.manifest.prompts.instructions]
        for bundle in bundles
        if bundle.manifest.prompts is not None
    ]
    return [text for text in banks[0] if all(text in bank for bank in banks)] if banks else []


def _arrays(inputs: FrozenInputs) -> dict[str, NDArray[Any]]:
    arrays: dict[str, NDArray[Any]] = {"count": np.array(len(inputs), np.int64)}
    for index, (one, noise) in enumerate(zip(inputs.observations, inputs.noise, strict=True)):
        arrays[f"{index}/instruction"] = np.array(one.instruction)
        arrays[f"{index}/stamp_ns"] = np.array(one.stamp_ns, np.int64)
        arrays[f"{index}/noise"] = noise
        arrays |= {f"{index}/images/{key}": value for key, value in one.images.items()}
        arrays |= {f"{index}/state/{key}": value for key, value in one.state.items()}
    return arrays


def _scene(random: np.random.RandomState, height: int, width: int) -> UInt8Array:
    rows = -(-height // _COARSE_CELL_PIXELS) + 1
    columns = -(-width // _COARSE_CELL_PIXELS) + 1
    coarse = random.uniform(0, 255, (rows, columns, 3))
    y = np.linspace(0, rows - 1.001, height)
    x = np.linspace(0, columns - 1.001, width)
    top, left = y.astype(int), x.astype(int)
    down, right = (y - top)[:, None, None], (x - left)[None, :, None]
    upper = coarse[top][:, left] * (1 - right) + coarse[top][:, left + 1] * right
    lower = coarse[top + 1][:, left] * (1 - right) + coarse[top + 1][:, left + 1] * right
    smooth = upper * (1 - down) + lower * down
    noisy = smooth + random.uniform(-_NOISE_LEVELS, _NOISE_LEVELS, smooth.shape)
    scene: UInt8Array = np.clip(np.rint(noisy), 0, 255).astype(np.uint8)
    return scene


def _observation(arrays: dict[str, NDArray[Any]], index: int) -> Observation:
    def group(name: str) -> dict[str, NDArray[Any]]:
        start = f"{index}/{name}/"
        return {key[len(start) :]: value for key, value in arrays.items() if key.startswith(start)}

    return Observation(
        images=group("images"),
        state=group("state"),
        instruction=str(arrays[f"{index}/instruction"]),
        stamp_ns=int(arrays[f"{index}/stamp_ns"]),
    )
