"""The whole GR00T N1.6 network: backbone and action head.

Owns: `GrootN16` and its inputs. Must not import the rest of the package but the model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from offline_tools.model.action_head import ActionHead
from offline_tools.model.backbone import Backbone
from offline_tools.model.configuration import ModelConfig


@dataclass(frozen=True)
class ModelInputs:
    """One batch of preprocessed observations of one embodiment.

    Attributes:
        input_ids: Token ids, int64, shape (B, S).
        attention_mask: 1 for a real token and 0 for padding, int64, shape (B, S).
        pixel_values: All images of the batch in order, in [-1, 1], shape (N, 3, H, W).
        state: Normalised and padded state, shape (B, max_state_dim).
        embodiment_id: Row of the category-specific weights.
    """

    input_ids: Tensor
    attention_mask: Tensor
    pixel_values: Tensor
    state: Tensor
    embodiment_id: int


class GrootN16(nn.Module):
    """GR00T N1.6; its state-dict keys are the released checkpoint's keys."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config)
        self.action_head = ActionHead(config)

    @torch.no_grad()
    def get_action(self, inputs: ModelInputs, noise: Tensor, steps: int) -> Tensor:
        """Infer normalised actions.

        Args:
            inputs: The preprocessed observations.
            noise: Start of the flow, shape (B, action_horizon, max_action_dim).
            steps: Number of Euler steps.

        Returns:
            Normalised actions, not clipped, shape (B, action_horizon, max_action_dim).
        """
        features, valid, image = self.backbone(
            inputs.input_ids, inputs.attention_mask, inputs.pixel_values
        )
        rows = torch.full(
            (noise.shape[0],), inputs.embodiment_id, dtype=torch.int64, device=noise.device
        )
        vl_embs, state_features = self.action_head.condition(features, inputs.state, rows)
        return self.action_head.denoise(vl_embs, state_features, noise, image, valid, rows, steps)
