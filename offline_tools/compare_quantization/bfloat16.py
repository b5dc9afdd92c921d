"""The yardstick: what running the whole network in bfloat16 costs, without any INT8.

Owns: the bfloat16 run in PyTorch. The reference policy is deployed so: weights, inputs, noise and
the language model's rotary frequencies are cast to bfloat16 (public Isaac-GR00T code, commit
e29d8fc). A quantisation that stays below this error costs less than what users accept already.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from groot_int8_ros.policy.preprocess import ModelInputs
from groot_int8_ros.policy.types import Float32Array
from offline_tools.model.checkpoint import load_model
from offline_tools.model.policy_model import ModelInputs as TorchInputs


@torch.no_grad()
def bfloat16_actions(
    checkpoint: Path,
    eagle_config: Path | None,
    inputs: Sequence[ModelInputs],
    noise: Sequence[Float32Array],
    *,
    embodiment_id: int,
    denoising_steps: int,
) -> tuple[Float32Array, ...]:
    """Answer observations in bfloat16 on the CPU.

    Args:
        checkpoint: The checkpoint.
        eagle_config: Sizes of vision tower and language model; see `load_model`.
        inputs: The observations, preprocessed.
        noise: Start of the flow, one for each.
        embodiment_id: Row of the category-specific weights.
        denoising_steps: Euler steps.

    Returns:
        Normalised actions, float32 (horizon, max_action_dim), one for each observation.
    """
    model, _, _ = load_model(checkpoint, eagle_config, torch.bfloat16)
    rotary = model.backbone.language.model.rotary_emb
    frequencies = rotary.get_buffer("inv_freq")
    frequencies.copy_(frequencies.to(torch.bfloat16))
    results = []
    for one, drawn in zip(inputs, noise, strict=True):
        given = TorchInputs(
            input_ids=torch.from_numpy(one.input_ids),
            attention_mask=torch.from_numpy(one.attention_mask),
            pixel_values=torch.from_numpy(one.pixel_values).to(torch.bfloat16),
            state=torch.from_numpy(one.state).to(torch.bfloat16),
            embodiment_id=embodiment_id,
        )
        start = torch.from_numpy(drawn)[None].to(torch.bfloat16)
        actions = model.get_action(given, start, denoising_steps)
        results.append(np.asarray(actions[0].float().numpy(), np.float32))
    return tuple(results)
