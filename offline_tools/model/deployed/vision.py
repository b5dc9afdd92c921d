"""Attention of the vision tower with one product for query, key and value.

Owns: the module that takes the place of the tower's own attention. Must not import the rest of the
package but the model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from offline_tools.model.backbone import VisionTower
from offline_tools.model.configuration import VisionConfig


class FusedVisionAttention(nn.Module):
    """Full attention within each image; the query's rows have the factor d ** -0.5."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.head_dim = config.hidden_size // config.heads
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, hidden_states: Tensor, attention_mask: None = None, **_: object
    ) -> tuple[Tensor, None]:
        """Attend; the signature is that of the module whose place this takes.

        Args:
            hidden_states: Patch features, shape (N, patches, hidden).
            attention_mask: Nothing: every patch sees its whole image.

        Returns:
            Attended and projected features of the same shape, and no attention weights.
        """
        images, patches, _width = hidden_states.shape
        # The product itself is split, on its last axis: TensorRT 8.6 computes a split of the
        # reshaped and transposed product, with its bias, wrongly (docs/verification.md).
        query, key, value = (
            part.reshape(images, patches, self.heads, self.head_dim).transpose(1, 2)
            for part in self.qkv_proj(hidden_states).chunk(3, dim=2)
        )
        scores = torch.matmul(query, key.transpose(2, 3))
        weights = torch.softmax(scores, dim=-1)
        mixed = torch.matmul(weights, value).transpose(1, 2)
        projected: Tensor = self.out_proj(mixed.reshape(images, patches, -1))
        return projected, None


def fuse_attention(tower: VisionTower) -> None:
    """Put `FusedVisionAttention` in the place of every attention of a vision tower."""
    for layer in tower.vision_model.encoder.layers:
        layer.self_attn = FusedVisionAttention(tower.config)
