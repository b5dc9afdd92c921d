"""The JSON files of a checkpoint that this package generates or trains.

Owns: their content, with the names and fields that the reference implementation saves. Must not
import torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from offline_tools.model.configuration import ModelConfig

EMBODIMENT = "new_embodiment"


def write_json(path: Path, content: object) -> None:
    """Write a file as the reference does: indented JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def model_json(config: ModelConfig) -> dict[str, Any]:
    """Return the content of `config.json`."""
    return {
        "architectures": ["Gr00tN1d6"],
        "model_type": "Gr00tN1d6",
        "action_horizon": config.action_horizon,
        "attend_text_every_n_blocks": config.dit.text_period,
        "backbone_embedding_dim": config.language.hidden_size,
        "diffusion_model_cfg": {
            "attention_head_dim": config.dit.head_dim,
            "final_dropout": True,
            "interleave_self_attention": True,
            "norm_type": "ada_norm",
            "num_attention_heads": config.dit.heads,
            "num_layers": config.dit.layers,
            "output_dim": config.dit.output_dim,
            "positional_embeddings": None,
        },
        "hidden_size": config.mlp_size,
        "input_embedding_dim": config.dit.width,
        "max_action_dim": config.max_action_dim,
        "max_num_embodiments": config.max_embodiments,
        "max_seq_len": config.max_seq_len,
        "max_state_dim": config.max_state_dim,
        "num_inference_timesteps": config.denoising_steps,
        "num_timestep_buckets": config.timestep_buckets,
        "select_layer": config.language.layers,
        "torch_dtype": "bfloat16",
        "use_relative_action": True,
    }


def eagle_json(config: ModelConfig) -> dict[str, Any]:
    """Return the content of `eagle_config.json`: vision tower and language model."""
    vision, language = config.vision, config.language
    return {
        "model_type": "eagle_3_vl",
        "image_token_index": language.image_token_id,
        "text_config": {
            "model_type": "qwen3",
            "head_dim": language.head_dim,
            "hidden_size": language.hidden_size,
            "intermediate_size": language.mlp_size,
            "num_attention_heads": language.heads,
            "num_hidden_layers": language.layers,
            "num_key_value_heads": language.kv_heads,
            "rms_norm_eps": language.norm_eps,
            "rope_theta": language.rope_theta,
            "vocab_size": language.vocab_size,
        },
        "vision_config": {
            "model_type": "siglip2_vision_model",
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.mlp_size,
            "layer_norm_eps": vision.norm_eps,
            "num_attention_heads": vision.heads,
            "num_hidden_layers": vision.layers,
            "num_patches": vision.positions,
            "patch_size": vision.patch_size,
        },
    }


def processor_json(
    config: ModelConfig,
    *,
    cameras: Sequence[str],
    state_keys: Sequence[str],
    action_keys: Sequence[str],
    relative_keys: Sequence[str],
    shortest_image_edge: int,
) -> dict[str, Any]:
    """Return the content of `processor_config.json`.

    Args:
        config: Gives the horizon and the padded widths.
        cameras: Camera keys, in order.
        state_keys: State keys, in order.
        action_keys: Action keys, in order.
        relative_keys: Action keys that are offsets from the state of the same name.
        shortest_image_edge: Smaller side of a scaled frame in pixels.
    """
    action_configs = [
        {
            "rep": "RELATIVE" if key in relative_keys else "ABSOLUTE",
            "type": "NON_EEF",
            "format": "DEFAULT",
            "state_key": None,
        }
        for key in action_keys
    ]
    modalities: dict[str, Any] = {
        "video": {"delta_indices": [0], "modality_keys": list(cameras)},
        "state": {"delta_indices": [0], "modality_keys": list(state_keys)},
        "action": {
            "delta_indices": list(range(config.action_horizon)),
            "modality_keys": list(action_keys),
            "action_configs": action_configs,
        },
        "language": {
            "delta_indices": [0],
            "modality_keys": ["annotation.human.task_description"],
        },
    }
    return {
        "processor_class": "Gr00tN1d6Processor",
        "processor_kwargs": {
            "modality_configs": {EMBODIMENT: modalities},
            "clip_outliers": True,
            "crop_fraction": 0.95,
            "formalize_language": True,
            "max_action_dim": config.max_action_dim,
            "max_action_horizon": config.action_horizon,
            "max_state_dim": config.max_state_dim,
            "shortest_image_edge": shortest_image_edge,
            "use_albumentations": True,
            "use_percentiles": False,
            "use_relative_action": True,
        },
    }
