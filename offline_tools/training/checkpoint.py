"""The trained policy as a checkpoint of the released layout.

Owns: its files. Weights are stored in float16: half the size, and closer to what was trained than
bfloat16, whose three digits are meant for ranges that these weights do not have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from groot_int8_ros.errors import CheckpointError
from groot_int8_ros.policy.files import atomic_directory
from groot_int8_ros.policy.processor import Processor, parse_processor
from offline_tools.dataset.statistics import dimension_statistics
from offline_tools.demo.checkpoint_files import (
    EMBODIMENT,
    eagle_json,
    model_json,
    processor_json,
    write_json,
)
from offline_tools.demo.small_tokenizer import IMAGE_TOKEN, write_small_tokenizer
from offline_tools.model.configuration import ModelConfig
from offline_tools.simulation.robot import JOINT_KEYS, by_key
from offline_tools.training.configuration import (
    CAMERAS,
    EMBODIMENT_ROW,
    IMAGE_CHAIN,
    MODEL,
    RELATIVE_KEYS,
    SENTENCES,
)
from offline_tools.training.samples import Samples

_EMBODIMENT_IDS = {EMBODIMENT: EMBODIMENT_ROW}
_LARGEST_FLOAT16 = float(np.finfo(np.float16).max)


def processor_files(samples: Samples) -> dict[str, Any]:
    """Return the checkpoint's processor files for the samples' statistics, by file name."""
    statistics = {
        "state": {
            key: dimension_statistics(values) for key, values in by_key(samples.state_deg).items()
        },
        "action": {
            key: dimension_statistics(values)
            for key, values in by_key(samples.chunk_deg[:, 0]).items()
        },
        "relative_action": {
            key: dimension_statistics(
                by_key(samples.chunk_deg)[key] - by_key(samples.state_deg)[key][:, None]
            )
            for key in RELATIVE_KEYS
        },
    }
    config = processor_json(
        MODEL,
        cameras=CAMERAS,
        state_keys=tuple(JOINT_KEYS),
        action_keys=tuple(JOINT_KEYS),
        relative_keys=RELATIVE_KEYS,
        shortest_image_edge=IMAGE_CHAIN.shortest_image_edge,
    )
    config["processor_kwargs"]["crop_fraction"] = IMAGE_CHAIN.crop_fraction
    return {
        "processor_config.json": config,
        "statistics.json": {EMBODIMENT: statistics},
        "embodiment_id.json": _EMBODIMENT_IDS,
    }


def processor(files: Mapping[str, Any]) -> Processor:
    """Return what the robot reads from `processor_files`."""
    return parse_processor(
        files["processor_config.json"],
        files["statistics.json"],
        files["embodiment_id.json"],
        EMBODIMENT,
    )


def tokenized_model(path: Path) -> ModelConfig:
    """Write the tokenizer and return the model's sizes with its image token.

    Args:
        path: `tokenizer.json` to write.
    """
    vocabulary = write_small_tokenizer(path, SENTENCES)
    if max(vocabulary.values()) >= MODEL.language.vocab_size:
        raise RuntimeError(f"{len(vocabulary)} tokens do not fit {MODEL.language.vocab_size}")
    return replace(MODEL, language=replace(MODEL.language, image_token_id=vocabulary[IMAGE_TOKEN]))


def write_checkpoint(
    folder: Path, weights: Mapping[str, torch.Tensor], files: Mapping[str, Any]
) -> None:
    """Write the checkpoint.

    Args:
        folder: Folder to write; replaced if it is there.
        weights: Parameters by name.
        files: As `processor_files` gives them.

    Raises:
        CheckpointError: A weight is not finite or does not fit float16.
        OutputError: The folder cannot be written.
    """
    for name, tensor in weights.items():
        if not bool((tensor.abs() < _LARGEST_FLOAT16).all()):
            raise CheckpointError(
                f"{name} is not finite or too large for float16: the training diverged. Train "
                "again with a lower learning rate."
            )
    with atomic_directory(folder) as target:
        config = tokenized_model(target / "tokenizer.json")
        write_json(target / "config.json", {**model_json(config), "torch_dtype": "float16"})
        write_json(target / "eagle_config.json", eagle_json(config))
        for name, content in files.items():
            write_json(target / name, content)
        save_file(
            {
                name: tensor.detach().to("cpu", torch.float16).contiguous()
                for name, tensor in weights.items()
            },
            target / "model.safetensors",
        )
