"""What PyTorch computes in float32 for a bundle's observations, one half of the model at a time.

Owns: running the reference for `verify`. Backbone and action head are loaded one after the other,
so that a model of true size needs the memory of its larger half.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from groot_int8_ros.policy.preprocess import ModelInputs
from groot_int8_ros.policy.types import Float32Array
from offline_tools.model.action_head import time_bucket
from offline_tools.model.checkpoint import CheckpointReader, build_empty_model, load_weights
from offline_tools.model.configuration import ModelConfig
from offline_tools.model.policy_model import GrootN16

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class HeadReference:
    """What the action head computed for one observation.

    Attributes:
        condition: `vl_embs` and `state_features`.
        steps: For each denoising step the tensors `actions`, `timestep`, `sa_embs`, `dit_output`
            and `velocity`.
        action_pred: Normalised actions, float32, shape (horizon, max_action_dim).
    """

    condition: Arrays
    steps: tuple[Arrays, ...]
    action_pred: Float32Array


@torch.no_grad()
def run_backbone(
    reader: CheckpointReader, config: ModelConfig, inputs: list[ModelInputs]
) -> list[Arrays]:
    """Return the backbone's outputs by the names of its graph, one entry an observation."""
    backbone = _load_half(reader, config, "backbone.").backbone
    results = []
    for one in inputs:
        outputs = backbone(
            torch.from_numpy(one.input_ids),
            torch.from_numpy(one.attention_mask),
            torch.from_numpy(one.pixel_values),
        )
        names = ("hidden_states", "attn_mask", "image_mask")
        results.append({n: v.numpy() for n, v in zip(names, outputs, strict=True)})
    return results


@torch.no_grad()
def run_action_head(
    reader: CheckpointReader,
    config: ModelConfig,
    features: list[Arrays],
    inputs: list[ModelInputs],
    noise: list[Float32Array],
    *,
    embodiment_id: int,
    steps: int,
) -> list[HeadReference]:
    """Return what the action head computes from given backbone features."""
    head = _load_half(reader, config, "action_head.").action_head
    row = torch.tensor([embodiment_id])
    results = []
    for feature, one, start in zip(features, inputs, noise, strict=True):
        masks = torch.from_numpy(feature["image_mask"]), torch.from_numpy(feature["attn_mask"])
        vl_embs, state_features = head.condition(
            torch.from_numpy(feature["hidden_states"]), torch.from_numpy(one.state), row
        )
        actions = torch.from_numpy(start)[None]
        records = []
        for step in range(steps):
            timestep = torch.tensor([time_bucket(step, steps, config.timestep_buckets)])
            sa_embs = head.encode_action(state_features, actions, timestep, row)
            output = head.model(sa_embs, vl_embs, timestep, *masks)
            velocity = head.decode_velocity(output, row)
            tensors = {
                "actions": actions,
                "timestep": timestep,
                "sa_embs": sa_embs,
                "dit_output": output,
                "velocity": velocity,
            }
            records.append({name: value.numpy() for name, value in tensors.items()})
            actions = actions + velocity / steps
        results.append(
            HeadReference(
                condition={
                    "vl_embs": vl_embs.numpy(),
                    "state_features": state_features.numpy(),
                },
                steps=tuple(records),
                action_pred=np.asarray(actions[0].numpy(), np.float32),
            )
        )
    return results


def _load_half(reader: CheckpointReader, config: ModelConfig, prefix: str) -> GrootN16:
    model = build_empty_model(config)
    names = [name for name, _ in model.named_parameters() if name.startswith(prefix)]
    load_weights(model, reader.tensors(names), torch.float32)
    return model
