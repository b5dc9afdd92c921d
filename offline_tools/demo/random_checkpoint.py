"""A checkpoint of N1.6's layout with random weights, tiny or of true size.

Owns: configurations, statistics and weights of generated checkpoints. The released weights are
not needed to show that every step works, what it costs and how exact it is; only what the robot
then does has no meaning. Files have the names and fields that the reference implementation saves.
"""

from __future__ import annotations

import math
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from groot_int8_ros.errors import ConfigurationError
from groot_int8_ros.policy.bundle import TOKENIZER_FILE
from groot_int8_ros.policy.files import atomic_directory
from groot_int8_ros.policy.preprocess import PromptTokenizer
from groot_int8_ros.policy.processor import PUBLIC_EMBODIMENT_IDS
from groot_int8_ros.policy.types import Float32Array
from offline_tools.dataset.lerobot import Episode, LeRobotDataset
from offline_tools.dataset.statistics import dimension_statistics
from offline_tools.demo.checkpoint_files import (
    EMBODIMENT,
    eagle_json,
    model_json,
    processor_json,
    write_json,
)
from offline_tools.demo.small_tokenizer import IMAGE_TOKEN, write_small_tokenizer
from offline_tools.model.checkpoint import expected_keys
from offline_tools.model.configuration import (
    DiTConfig,
    LanguageConfig,
    ModelConfig,
    VisionConfig,
)

ACTION_HORIZON = 16

_SHARD_BYTES = 1 << 30
_SHORTEST_IMAGE_EDGE = 256

SIZES = {
    "tiny": ModelConfig(
        vision=VisionConfig(hidden_size=48, layers=2, heads=4, mlp_size=96),
        language=LanguageConfig(
            hidden_size=64,
            layers=2,
            heads=4,
            kv_heads=2,
            head_dim=16,
            mlp_size=128,
            vocab_size=512,
        ),
        dit=DiTConfig(layers=4, heads=2, head_dim=48, output_dim=64, cross_dim=64),
        mlp_size=64,
        max_seq_len=64,
        action_horizon=ACTION_HORIZON,
    ),
    # Few blocks, but wide enough that a GPU library has INT8 kernels for their products.
    "narrow": ModelConfig(
        vision=VisionConfig(hidden_size=192, layers=2, heads=4, mlp_size=384),
        language=LanguageConfig(
            hidden_size=512,
            layers=2,
            heads=4,
            kv_heads=2,
            head_dim=128,
            mlp_size=1536,
            vocab_size=512,
        ),
        dit=DiTConfig(layers=4, heads=8, head_dim=48, output_dim=256, cross_dim=512),
        mlp_size=256,
        max_seq_len=64,
        action_horizon=ACTION_HORIZON,
    ),
    "full": ModelConfig(max_state_dim=128, max_action_dim=128, action_horizon=ACTION_HORIZON),
}


def write_random_checkpoint(
    folder: Path,
    dataset: LeRobotDataset,
    *,
    size: str = "tiny",
    horizon: int = ACTION_HORIZON,
    seed: int = 0,
    absolute_keys: tuple[str, ...] = (),
    tokenizer: Path | None = None,
) -> None:
    """Write a checkpoint for a dataset's robot, with random weights, and its tokenizer.

    The statistics are the dataset's own, so that decoded actions have its units and ranges.

    Args:
        folder: Folder to write; replaced if it exists.
        dataset: Gives cameras, keys and statistics.
        size: `tiny`, `narrow` (few blocks that a GPU takes for real ones), or `full` for the
            public sizes (6.6 GB).
        horizon: Actions of a chunk.
        seed: Seed of the weights.
        absolute_keys: Action keys that are absolute targets; the others are relative to the state
            of the same name, if there is one.
        tokenizer: `tokenizer.json` to take; a small one is generated if None.

    Raises:
        ProcessorError: The tokenizer is missing, damaged or of another model.
        ConfigurationError: A key given does not exist, the robot has too many joints, or the
            horizon is longer than the model's position table.
        OutputError: The folder cannot be written.
    """
    unknown = sorted(set(absolute_keys) - set(dataset.action_keys))
    if unknown:
        raise ConfigurationError(
            f"the dataset has no action key {unknown[0]!r}; it has "
            f"{', '.join(dataset.action_keys)}"
        )
    longest = SIZES[size].max_seq_len
    if horizon > longest:
        raise ConfigurationError(
            f"a horizon of {horizon} needs as many positions, and size {size} has {longest}"
        )
    with atomic_directory(folder) as target:
        if tokenizer is None:
            write_small_tokenizer(target / TOKENIZER_FILE)
        else:
            PromptTokenizer.from_file(tokenizer)
            shutil.copyfile(tokenizer, target / TOKENIZER_FILE)
        vocabulary = Tokenizer.from_file(str(target / TOKENIZER_FILE)).get_vocab()
        language = SIZES[size].language
        config = replace(
            SIZES[size],
            language=replace(
                language,
                vocab_size=max(language.vocab_size, 1 + max(vocabulary.values())),
                image_token_id=vocabulary[IMAGE_TOKEN],
            ),
            action_horizon=horizon,
        )
        relative = tuple(
            key
            for key in dataset.action_keys
            if key not in absolute_keys and key in dataset.state_keys
        )
        write_json(target / "config.json", model_json(config))
        write_json(target / "eagle_config.json", eagle_json(config))
        write_json(
            target / "processor_config.json",
            processor_json(
                config,
                cameras=tuple(dataset.cameras),
                state_keys=tuple(dataset.state_keys),
                action_keys=tuple(dataset.action_keys),
                relative_keys=relative,
                shortest_image_edge=_SHORTEST_IMAGE_EDGE,
            ),
        )
        write_json(
            target / "statistics.json", {EMBODIMENT: _statistics(dataset, relative, horizon)}
        )
        write_json(target / "embodiment_id.json", dict(PUBLIC_EMBODIMENT_IDS))
        _write_weights(target, config, seed)


def _statistics(
    dataset: LeRobotDataset, relative: tuple[str, ...], horizon: int
) -> dict[str, Any]:
    episodes = [dataset.episode(info.index) for info in dataset.episodes]
    return {
        "state": {
            key: dimension_statistics(np.concatenate([episode.state[key] for episode in episodes]))
            for key in dataset.state_keys
        },
        "action": {
            key: dimension_statistics(
                np.concatenate([episode.action[key] for episode in episodes])
            )
            for key in dataset.action_keys
        },
        "relative_action": {
            key: dimension_statistics(
                np.concatenate([_relative_chunks(episode, key, horizon) for episode in episodes])
            )
            for key in relative
        },
    }


def _relative_chunks(episode: Episode, key: str, horizon: int) -> Float32Array:
    """Return every chunk of an episode as offsets from its first state, (T, horizon, D)."""
    action, state = episode.action[key], episode.state[key]
    rows = np.arange(len(action))[:, None] + np.arange(horizon)
    chunks: Float32Array = action[np.minimum(rows, len(action) - 1)] - state[:, None]
    return chunks


def _write_weights(folder: Path, config: ModelConfig, seed: int) -> None:
    shards = list(_shards(expected_keys(config)))
    if len(shards) == 1:
        save_file(_draw(shards[0], seed), folder / "model.safetensors")
        return
    weight_map = {}
    for number, shapes in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(_draw(shapes, seed), folder / name)
        weight_map.update(dict.fromkeys(shapes, name))
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def _shards(shapes: dict[str, tuple[int, ...]]) -> Iterator[dict[str, tuple[int, ...]]]:
    shard: dict[str, tuple[int, ...]] = {}
    size = 0
    for key, shape in shapes.items():
        tensor_bytes = 2 * math.prod(shape)
        if shard and size + tensor_bytes > _SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[key] = shape
        size += tensor_bytes
    yield shard


def _draw(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    return {key: _weight(key, shape, seed) for key, shape in shapes.items()}


def _weight(key: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    leaf = key.rsplit(".", 1)[1]
    if leaf in ("bias", "b"):
        return torch.zeros(shape, dtype=torch.bfloat16)
    if len(shape) == 1:  # every one-dimensional weight belongs to a norm
        return torch.ones(shape, dtype=torch.bfloat16)
    # Each key has a generator of its own, so that a layer's weights do not depend on the others.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {key}".encode()))
    fan_in = shape[-2] if leaf == "W" else shape[-1]
    scale = 1.0 if "embed" in key.rsplit(".", 2)[1] else 1.0 / math.sqrt(fan_in)
    drawn = torch.randn(shape, generator=generator, dtype=torch.float32)
    return drawn.mul_(scale).to(torch.bfloat16)
