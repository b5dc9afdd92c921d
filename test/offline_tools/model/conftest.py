"""A tiny N1.6 checkpoint in the released layout, written afresh for each test."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from offline_tools.model.checkpoint import expected_keys
from offline_tools.model.configuration import load_model_config

IMAGE_TOKEN = 60

CONFIG: dict[str, Any] = {
    "model_type": "Gr00tN1d6",
    "select_layer": 2,
    "backbone_embedding_dim": 16,
    "hidden_size": 8,
    "input_embedding_dim": 24,
    "max_state_dim": 7,
    "max_action_dim": 6,
    "action_horizon": 5,
    "max_num_embodiments": 3,
    "max_seq_len": 32,
    "diffusion_model_cfg": {
        "num_layers": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "output_dim": 8,
        "norm_type": "ada_norm",
        "positional_embeddings": None,
        "interleave_self_attention": True,
        "dropout": 0.2,
        "final_dropout": True,
    },
}

EAGLE: dict[str, Any] = {
    "image_token_index": IMAGE_TOKEN,
    "text_config": {
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "intermediate_size": 20,
        "vocab_size": 64,
    },
    "vision_config": {
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 12,
        "num_patches": 16,
    },
}


@pytest.fixture(autouse=True)
def _few_threads() -> None:
    torch.set_num_threads(2)


@dataclass
class TinyCheckpoint:
    """A checkpoint folder and what is in it."""

    directory: Path
    weights: dict[str, Tensor]

    def write_config(self, **changes: Any) -> None:
        (self.directory / "config.json").write_text(json.dumps({**CONFIG, **changes}))

    def write_eagle(self, **changes: Any) -> None:
        (self.directory / "eagle_config.json").write_text(json.dumps({**EAGLE, **changes}))

    def write_weights(self) -> None:
        save_file(self.weights, str(self.directory / "model.safetensors"))

    def write_shards(self, count: int) -> None:
        """Write the weights as the released layout splits them, with an index."""
        (self.directory / "model.safetensors").unlink(missing_ok=True)
        names = sorted(self.weights)
        weight_map = {}
        for shard in range(count):
            file = f"model-{shard + 1:05d}-of-{count:05d}.safetensors"
            part = {name: self.weights[name] for name in names[shard::count]}
            save_file(part, str(self.directory / file))
            weight_map.update(dict.fromkeys(part, file))
        index = {"metadata": {}, "weight_map": weight_map}
        (self.directory / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture
def tiny(tmp_path: Path) -> TinyCheckpoint:
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    checkpoint = TinyCheckpoint(directory, {})
    checkpoint.write_config()
    checkpoint.write_eagle()
    config, _ = load_model_config(directory)
    generator = torch.Generator().manual_seed(7)
    checkpoint.weights = {
        key: (0.3 * torch.randn(shape, generator=generator)).to(torch.bfloat16)
        for key, shape in expected_keys(config).items()
    }
    checkpoint.write_weights()
    return checkpoint
