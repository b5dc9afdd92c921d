"""The alternate vision-language diffusion transformer (DiT) of GR00T N1.6.

Owns: the DiT's modules and arithmetic. Must not import the rest of the package but the
configuration. Module names are chosen so that a state-dict key equals the released checkpoint's
key. Attention is spelled out in matrix products and a softmax, so that every exporter and every
quantiser sees the same plain operators.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offline_tools.model.backbone import mask_value
from offline_tools.model.configuration import DiTConfig

TIMESTEP_CHANNELS = 256
_LONGEST_PERIOD = 10000.0
# The reference hands `norm_eps` to a block's plain norm only; the other two have fixed values.
ADAPTIVE_NORM_EPS = 1e-5
OUTPUT_NORM_EPS = 1e-6


def plain_layer_norm(x: Tensor, eps: float) -> Tensor:
    """Normalise the last axis, without learned scale and shift."""
    return F.layer_norm(x, (x.shape[-1],), eps=eps)


def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Scale and shift tokens of shape (B, T, width) by vectors of shape (B, width)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class _TimestepEmbedder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(TIMESTEP_CHANNELS, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, code: Tensor) -> Tensor:
        result: Tensor = self.linear_2(F.silu(self.linear_1(code)))
        return result


def timestep_code(timestep: Tensor) -> Tensor:
    """Return the DiT's code of integer time buckets.

    It has 128 cosines, then 128 sines, of frequencies from 1 down to 1/10000, both ends included,
    and is computed in float32 because buckets reach 1000.

    Args:
        timestep: Time buckets, int64, shape (B,).

    Returns:
        The code, float32, shape (B, 256).
    """
    half = TIMESTEP_CHANNELS // 2
    index = torch.arange(half, dtype=torch.float32, device=timestep.device)
    # Multiplied before divided, as the reference does: at bucket 1000 the last bit shows.
    frequency = torch.exp(index * -math.log(_LONGEST_PERIOD) / (half - 1))
    angle = timestep.to(torch.float32).unsqueeze(1) * frequency
    return torch.cat([torch.cos(angle), torch.sin(angle)], dim=1)


class TimestepEncoder(nn.Module):
    """Embedding of the integer time bucket."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.timestep_embedder = _TimestepEmbedder(width)

    def forward(self, timestep: Tensor) -> Tensor:
        """Embed time buckets.

        Args:
            timestep: Time buckets, int64, shape (B,).

        Returns:
            Embedding, shape (B, width).
        """
        code = timestep_code(timestep)
        weight = self.timestep_embedder.linear_1.weight
        result: Tensor = self.timestep_embedder(code.to(weight.dtype))
        return result


class AdaptiveLayerNorm(nn.Module):
    """Layer norm whose scale and shift are linear in the activated time embedding."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Normalise tokens of shape (B, T, width) at times of shape (B, width)."""
        # Scale comes first here; the DiT's output head has them the other way round.
        scale, shift = self.linear(F.silu(time)).chunk(2, dim=1)
        return modulate(plain_layer_norm(x, ADAPTIVE_NORM_EPS), scale, shift)


class Attention(nn.Module):
    """Multi-head attention of tokens to themselves or to a context."""

    def __init__(self, config: DiTConfig, context_dim: int) -> None:
        super().__init__()
        self.heads = config.heads
        self.head_dim = config.head_dim
        self.to_q = nn.Linear(config.width, config.width)
        self.to_k = nn.Linear(context_dim, config.width)
        self.to_v = nn.Linear(context_dim, config.width)
        self.to_out = nn.ModuleList([nn.Linear(config.width, config.width)])

    def _split(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], -1, self.heads, self.head_dim).transpose(1, 2)

    def forward(self, x: Tensor, context: Tensor, bias: Tensor | None) -> Tensor:
        """Attend.

        Args:
            x: Tokens, shape (B, T, width).
            context: What is attended to, shape (B, S, context width).
            bias: Added to the scores, broadcastable to (B, heads, T, S), or None.

        Returns:
            Attended and projected tokens, shape (B, T, width).
        """
        # Scaling the query instead of the scores keeps the product small in half precision.
        query = self._split(self.to_q(x)) * self.head_dim**-0.5
        key = self._split(self.to_k(context))
        value = self._split(self.to_v(context))
        scores = torch.matmul(query, key.transpose(2, 3))
        if bias is not None:
            scores = scores + bias
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
        mixed = torch.matmul(weights, value).transpose(1, 2)
        result: Tensor = self.to_out[0](mixed.reshape(x.shape[0], -1, self.heads * self.head_dim))
        return result


class _GeluProjection(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, inner)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """Two-layer MLP with four times the width inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # Index 1 is the training's dropout in the released layout.
        self.net = nn.Sequential(
            _GeluProjection(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens, shape (B, T, width) to the same."""
        result: Tensor = self.net(x)
        return result


class Block(nn.Module):
    """One transformer block: adaptive norm, attention, plain norm, MLP, with residuals."""

    def __init__(self, config: DiTConfig, context_dim: int) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.norm1 = AdaptiveLayerNorm(config.width)
        self.attn1 = Attention(config, context_dim)
        self.ff = FeedForward(config.width)

    def forward(
        self, x: Tensor, time: Tensor, context: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """Run the block.

        Args:
            x: State and action tokens, shape (B, T, width).
            time: Time embedding, shape (B, width).
            context: Backbone features, shape (B, S, context width), or None: self-attention.
            bias: Added to the attention scores, shape (B, 1, 1, S), or None.

        Returns:
            Tokens, shape (B, T, width).
        """
        normed = self.norm1(x, time)
        x = x + self.attn1(normed, normed if context is None else context, bias)
        result: Tensor = x + self.ff(plain_layer_norm(x, self.eps))
        return result


class AlternateVLDiT(nn.Module):
    """DiT whose even blocks attend to the backbone, to text and image tokens in turn."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.timestep_encoder = TimestepEncoder(config.width)
        self.transformer_blocks = nn.ModuleList(
            Block(config, config.width if self.is_self_attention(index) else config.cross_dim)
            for index in range(config.layers)
        )
        self.proj_out_1 = nn.Linear(config.width, 2 * config.width)
        self.proj_out_2 = nn.Linear(config.width, config.output_dim)

    @staticmethod
    def is_self_attention(index: int) -> bool:
        """Whether a block attends to the state and action tokens."""
        return index % 2 == 1

    def attends_to_text(self, index: int) -> bool:
        """Whether a cross-attention block attends to the text tokens, not the image tokens."""
        return index % (2 * self.config.text_period) == 0

    @staticmethod
    def attention_biases(
        image_mask: Tensor, backbone_attention_mask: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Return what is added to the scores over text and over image tokens.

        Args:
            image_mask: Which backbone tokens are image tokens, bool, shape (B, S).
            backbone_attention_mask: Which backbone tokens are real, bool, shape (B, S).
            dtype: Type of the scores.

        Returns:
            Biases of the blocks that attend to text and to image tokens, shape (B, 1, 1, S).
        """
        is_text = ~image_mask & backbone_attention_mask
        is_image = image_mask & backbone_attention_mask
        text_bias = (~is_text).to(dtype)[:, None, None, :] * mask_value(dtype)
        image_bias = (~is_image).to(dtype)[:, None, None, :] * mask_value(dtype)
        return text_bias, image_bias

    def run_block(
        self, index: int, x: Tensor, time: Tensor, vl_embs: Tensor, biases: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Run one block.

        Args:
            index: Number of the block.
            x: State and action tokens, shape (B, T, width).
            time: Time embedding, shape (B, width).
            vl_embs: Layer-normed backbone features, shape (B, S, cross width).
            biases: As `attention_biases` gives them.

        Returns:
            Tokens, shape (B, T, width).
        """
        block = self.transformer_blocks[index]
        if self.is_self_attention(index):
            result: Tensor = block(x, time, None, None)
        else:
            result = block(x, time, vl_embs, biases[0 if self.attends_to_text(index) else 1])
        return result

    def forward(
        self,
        sa_embs: Tensor,
        vl_embs: Tensor,
        timestep: Tensor,
        image_mask: Tensor,
        backbone_attention_mask: Tensor,
    ) -> Tensor:
        """Run the DiT once.

        Args:
            sa_embs: State token, then action tokens, shape (B, T, width).
            vl_embs: Layer-normed backbone features, shape (B, S, cross width).
            timestep: Time buckets, int64, shape (B,).
            image_mask: Which backbone tokens are image tokens, bool, shape (B, S).
            backbone_attention_mask: Which backbone tokens are real, bool, shape (B, S).

        Returns:
            Output features of all tokens, shape (B, T, output width).
        """
        time = self.timestep_encoder(timestep)
        biases = self.attention_biases(image_mask, backbone_attention_mask, sa_embs.dtype)
        x = sa_embs
        for index in range(len(self.transformer_blocks)):
            x = self.run_block(index, x, time, vl_embs, biases)

        shift, scale = self.proj_out_1(F.silu(time)).chunk(2, dim=1)
        result: Tensor = self.proj_out_2(
            modulate(plain_layer_norm(x, OUTPUT_NORM_EPS), scale, shift)
        )
        return result
