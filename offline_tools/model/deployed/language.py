"""Qwen3 layers that attend to keys and values computed before: the live part of a prompt.

Owns: the decoder layers with separate or fused projections, and the constant tables that a fixed
layout of tokens gives. Must not import the rest of the package but the model.

Batches have one observation. Norms and rotary embedding are float32 whatever the type of the graph
(the residual stream reaches 1e4, its square overflows half precision). Query heads that share a
key head are laid end to end, (1, kv heads, group * tokens, head width), so that no key is copied
and an attention is the plain product, mask, softmax, product that every engine knows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groot_int8_ros.policy.types import Float32Array, Float64Array
from offline_tools.model.backbone import mask_value
from offline_tools.model.configuration import LanguageConfig

# Cosines and signed sines, shape (tokens, 1, head width) each.
Rotary = tuple[Tensor, Tensor]
# Keys and values, shape (1, kv heads, tokens, head width) each.
KeysValues = tuple[Tensor, Tensor]


def frequencies(config: LanguageConfig) -> Float32Array:
    """Return the angle by which each pair of a head turns from one position to the next.

    In NumPy, because modules are also built where PyTorch computes nothing (`graph.trace`).
    """
    exponents = np.arange(0, config.head_dim, 2) / config.head_dim
    return (1.0 / config.rope_theta**exponents).astype(np.float32)


def rotary_tables(
    config: LanguageConfig, positions: Sequence[int]
) -> tuple[Float64Array, Float64Array]:
    """Return cosines and signed sines of given positions, float64 (tokens, 1, head width).

    The first half of the sines is negative: `rotate` only swaps halves.
    """
    angles = np.outer(np.asarray(positions), frequencies(config).astype(np.float64))
    cosines, sines = np.cos(angles), np.sin(angles)
    return (
        np.concatenate([cosines, cosines], axis=1)[:, None],
        np.concatenate([-sines, sines], axis=1)[:, None],
    )


def causal_bias(
    config: LanguageConfig, before: int, tokens: int, dtype: torch.dtype
) -> Float32Array:
    """Return what is added to the scores so that no token sees a later one.

    Args:
        config: Sizes of the language model.
        before: Number of tokens that stand before and are all seen.
        tokens: Number of the tokens that attend.
        dtype: Type of the scores.

    Returns:
        0 or `mask_value(dtype)`, float32 (1, 1, group * tokens, before + tokens).
    """
    later = np.triu(np.ones((tokens, tokens), np.float32), k=1) * mask_value(dtype)
    bias = np.concatenate([np.zeros((tokens, before), np.float32), later], axis=1)
    return np.tile(bias, (config.heads // config.kv_heads, 1))[None, None].astype(np.float32)


def normalized(x: Tensor, eps: float) -> Tensor:
    """Return x divided by the root of its mean square along the last axis, in float32."""
    x = x.to(torch.float32)
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Turn the pairs (i, i + half) of each head; x has shape (tokens, heads, head width)."""
    cosines, sines = rotary
    first, second = x.chunk(2, dim=-1)
    return x * cosines + torch.cat([second, first], dim=-1) * sines


class RMSNorm(nn.Module):
    """Root-mean-square norm with a gain, in the type of its input but for the mean."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis."""
        return self.weight * normalized(x, self.eps).to(x.dtype)


class Attention(nn.Module):
    """Grouped attention with a product each for query, key and value."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.config = config
        self.add_projections()
        self.o_proj = nn.Linear(config.heads * config.head_dim, config.hidden_size, bias=False)

    def add_projections(self) -> None:
        """Make the layers that `project` uses."""
        config = self.config
        for name, heads in (("q", config.heads), ("k", config.kv_heads), ("v", config.kv_heads)):
            projection = nn.Linear(config.hidden_size, heads * config.head_dim, bias=False)
            self.add_module(f"{name}_proj", projection)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def project(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """Return query (with the factor head width ** -0.5), key and value.

        Args:
            x: Normed tokens, shape (1, T, hidden).
            rotary: Of the tokens' positions.

        Returns:
            Shapes (T, heads, head width), (T, kv heads, head width) twice.
        """
        query, key, value = (
            self.get_submodule(f"{name}_proj")(x).reshape(x.shape[1], -1, self.config.head_dim)
            for name in "qkv"
        )
        query = rotate(self.q_norm(query).to(torch.float32), rotary) * self.config.head_dim**-0.5
        key = rotate(self.k_norm(key).to(torch.float32), rotary)
        return query.to(x.dtype), key.to(x.dtype), value

    def forward(
        self, x: Tensor, rotary: Rotary, bias: Tensor, before: KeysValues | None
    ) -> tuple[Tensor, KeysValues]:
        """Attend to the tokens before and to the tokens themselves.

        Args:
            x: Normed tokens, shape (1, T, hidden).
            rotary: Of the tokens' positions.
            bias: Added to the scores, shape (1, 1, group * T, all tokens).
            before: Keys and values of the tokens before, or None.

        Returns:
            Attended and projected tokens, shape (1, T, hidden); keys and values of the tokens.
        """
        config = self.config
        query, key, value = self.project(x, rotary)
        query = query.reshape(
            -1, config.kv_heads, config.heads // config.kv_heads, config.head_dim
        )
        query = query.permute(1, 2, 0, 3).flatten(1, 2).unsqueeze(0)
        own = key.transpose(0, 1).unsqueeze(0), value.transpose(0, 1).unsqueeze(0)
        keys, values = (
            own
            if before is None
            else (torch.cat([old, new], dim=2) for old, new in zip(before, own, strict=True))
        )
        scores = torch.matmul(query, keys.transpose(2, 3)) + bias
        weights = torch.softmax(scores, dim=-1)
        mixed = torch.matmul(weights, values)
        mixed = mixed.reshape(config.heads, -1, config.head_dim).transpose(0, 1)
        projected: Tensor = self.o_proj(mixed.reshape(1, -1, config.heads * config.head_dim))
        return projected, own


class FusedAttention(Attention):
    """One product for query, key and value, one norm for query and key.

    The norm's gain has a row for each head, the query's with the factor head width ** -0.5.
    """

    def add_projections(self) -> None:
        """Make the layers that `project` uses."""
        config = self.config
        joined = config.heads + config.kv_heads
        outputs = (joined + config.kv_heads) * config.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, outputs, bias=False)
        self.qk_gain = nn.Parameter(torch.empty(joined, config.head_dim, dtype=torch.float32))

    def project(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """Return query, key and value; see `Attention.project`."""
        config = self.config
        heads = config.heads, config.kv_heads
        joined = self.qkv_proj(x).reshape(x.shape[1], -1, config.head_dim)
        query_key, value = torch.split(joined, [sum(heads), config.kv_heads], dim=1)
        query_key = normalized(query_key, config.norm_eps) * self.qk_gain
        query, key = torch.split(rotate(query_key, rotary).to(x.dtype), list(heads), dim=1)
        return query, key, value


class GatedMLP(nn.Module):
    """SiLU-gated MLP with a product each for gate and input."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.mlp_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.mlp_size, bias=False)
        self.down_proj = nn.Linear(config.mlp_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens, shape (1, T, hidden)."""
        result: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return result


class FusedGatedMLP(nn.Module):
    """SiLU-gated MLP with one product for gate and input."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.mlp_size, bias=False)
        self.down_proj = nn.Linear(config.mlp_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens, shape (1, T, hidden)."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        result: Tensor = self.down_proj(F.silu(gate) * up)
        return result


class DecoderLayer(nn.Module):
    """One layer: norm, attention, norm, MLP, with residuals."""

    attention: type[Attention] = Attention
    feed_forward: type[GatedMLP] | type[FusedGatedMLP] = GatedMLP

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = self.attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = self.feed_forward(config)

    def forward(
        self, x: Tensor, rotary: Rotary, bias: Tensor, before: KeysValues | None = None
    ) -> tuple[Tensor, KeysValues]:
        """Run the layer; arguments and results as those of `Attention.forward`."""
        attended, own = self.self_attn(self.input_layernorm(x), rotary, bias, before)
        x = x + attended
        result: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return result, own


class FusedDecoderLayer(DecoderLayer):
    """A layer with fused projections."""

    attention = FusedAttention
    feed_forward = FusedGatedMLP
