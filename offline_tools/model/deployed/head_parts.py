"""The interchangeable parts of an unrolled action head: one pair before and after each step.

Owns: the modules that a transformation puts in another's place. Must not import the rest of the
package but the model. A part that holds a checkpoint's tensor as it is keeps that tensor's name;
the others' names are those of `head_weights`.

Batches have one observation. What stands around the DiT (encoders, decoder, the flow itself) is
float32 whatever the type of the graph: it costs next to nothing and carries the actions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groot_int8_ros.policy.token_layout import TokenLayout
from offline_tools.model.action_head import CategoryActionEncoder, CategoryLinear, time_bucket
from offline_tools.model.backbone import mask_value
from offline_tools.model.configuration import DiTConfig, ModelConfig
from offline_tools.model.dit import (
    ADAPTIVE_NORM_EPS,
    OUTPUT_NORM_EPS,
    AlternateVLDiT,
    Attention,
    TimestepEncoder,
    modulate,
    plain_layer_norm,
)

# Shape and type of an input; None is the type of the graph.
InputShapes = dict[str, tuple[tuple[int, ...], torch.dtype | None]]

# What a block's attention is given behind its tokens.
Attended = tuple[Tensor | None, ...]


@contextlib.contextmanager
def float32_island() -> Iterator[None]:
    """Make the parameters created inside float32, whatever the type of the graph."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


# --- Time: which scale and shift a norm applies in a denoising step.


class ComputedNorm(nn.Module):
    """A norm whose scale and shift are linear in the activated time embedding."""

    def __init__(self, width: int, steps: int, *, is_output: bool) -> None:
        super().__init__()
        self.is_output = is_output
        self.linear = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, step: int, time: Tensor) -> Tensor:
        """Normalise tokens of shape (1, T, width) at a time of shape (1, width)."""
        first, second = self.linear(F.silu(time)).chunk(2, dim=1)
        # A block has the scale first, the output head has it second.
        scale, shift = (second, first) if self.is_output else (first, second)
        eps = OUTPUT_NORM_EPS if self.is_output else ADAPTIVE_NORM_EPS
        return modulate(plain_layer_norm(x, eps), scale, shift)


class ComputedTime(TimestepEncoder):
    """The time embedding, computed in every step."""

    norm: type[nn.Module] = ComputedNorm

    def __init__(self, config: ModelConfig, steps: int) -> None:
        super().__init__(config.dit.width)
        self.buckets = [time_bucket(k, steps, config.timestep_buckets) for k in range(steps)]

    def at(self, step: int, device: torch.device) -> Tensor:
        """Return the embedding of a step's time, shape (1, width)."""
        bucket = torch.full((1,), self.buckets[step], dtype=torch.int64, device=device)
        result: Tensor = self(bucket)
        return result


class ConstantNorm(nn.Module):
    """A norm with a constant scale and shift for each denoising step."""

    def __init__(self, width: int, steps: int, *, is_output: bool) -> None:
        super().__init__()
        self.eps = OUTPUT_NORM_EPS if is_output else ADAPTIVE_NORM_EPS
        self.gain = nn.ParameterList(torch.empty(width) for _ in range(steps))
        self.shift = nn.ParameterList(torch.empty(width) for _ in range(steps))

    def forward(self, x: Tensor, step: int, time: None) -> Tensor:
        """Normalise tokens of shape (1, T, width); `time` is not needed."""
        return F.layer_norm(x, (x.shape[-1],), self.gain[step], self.shift[step], self.eps)


class ConstantTime(nn.Module):
    """No time embedding: what depended on it is constant."""

    norm: type[nn.Module] = ConstantNorm

    def __init__(self, config: ModelConfig, steps: int) -> None:
        super().__init__()

    def at(self, step: int, device: torch.device) -> None:
        """Return nothing."""


# --- Context: what the cross-attention blocks read of the backbone's features.


class KeyValueAttention(nn.Module):
    """Cross-attention to keys and values that are there already, the keys scaled."""

    def __init__(self, config: DiTConfig, context_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim = config.heads, config.head_dim
        self.to_q = nn.Linear(config.width, config.width)
        self.to_out = nn.ModuleList([nn.Linear(config.width, config.width)])

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        """Attend.

        Args:
            x: Tokens, shape (1, T, width).
            keys: Shape (1, heads, head width, S), with the factor head width ** -0.5.
            values: Shape (1, heads, S, head width).
            bias: Added to the scores, shape (1, 1, 1, S), or None.

        Returns:
            Attended and projected tokens, shape (1, T, width).
        """
        query = self.to_q(x).reshape(1, -1, self.heads, self.head_dim).transpose(1, 2)
        mixed = _mix(query, keys, values, bias)
        result: Tensor = self.to_out[0](mixed)
        return result


def _mix(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    """Return values weighted by a softmax in float32, shape (1, T, heads * head width)."""
    scores = torch.matmul(query, keys)
    if bias is not None:
        scores = scores + bias
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(values.dtype)
    return torch.matmul(weights, values).transpose(1, 2).flatten(2)


class KeysValues(nn.Module):
    """Keys and values of several blocks for the same tokens, in one product.

    The weight has the keys of all blocks, then the values of all blocks.
    """

    def __init__(self, config: DiTConfig, blocks: int) -> None:
        super().__init__()
        self.shape = (blocks, config.heads, config.head_dim)
        self.kv = nn.Linear(config.cross_dim, 2 * blocks * config.width)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Project tokens of shape (1, S, cross width).

        Returns:
            Keys and values, shape (blocks, heads, S, head width).
        """
        keys, values = (
            part.reshape(-1, *self.shape).permute(1, 2, 0, 3)
            for part in self.kv(tokens).chunk(2, dim=2)
        )
        return keys, values


def text_blocks(config: DiTConfig) -> tuple[int, ...]:
    """Return the numbers of the blocks that attend to text tokens."""
    return tuple(range(0, config.layers, 2 * config.text_period))


def image_blocks(config: DiTConfig) -> tuple[int, ...]:
    """Return the numbers of the blocks that attend to image tokens."""
    return tuple(b for b in range(0, config.layers, 2) if b not in text_blocks(config))


def _tokens_of(x: Tensor, runs: Sequence[tuple[bool, int, int]], *, image: bool) -> Tensor:
    # Slices, not a gather: no index constants, and a slice of rows is what a copy engine does.
    return torch.cat([x[:, start:stop] for is_image, start, stop in runs if is_image is image], 1)


def _prefix_bias(mask: Tensor, live_text: int, dtype: torch.dtype) -> Tensor:
    """Return what hides the prefix's padding from a text block, shape (1, 1, 1, P + live)."""
    padding = (~mask).to(dtype) * mask_value(dtype)
    live = torch.zeros(live_text, dtype=dtype, device=mask.device)
    return torch.cat([padding, live])[None, None, None]


class WholePrompt(nn.Module):
    """Every block projects every token and masks those that it must not see."""

    attention: type[nn.Module] = Attention

    def __init__(self, config: DiTConfig, layout: TokenLayout) -> None:
        super().__init__()
        self.config = config

    @staticmethod
    def inputs(config: DiTConfig, layout: TokenLayout) -> InputShapes:
        """Return the inputs, features first."""
        length = layout.prefix_length + layout.live_length
        return {
            "features": ((1, length, config.cross_dim), None),
            "image_mask": ((1, length), torch.bool),
            "backbone_attention_mask": ((1, length), torch.bool),
        }

    def forward(
        self, vl_embs: Tensor, image_mask: Tensor, backbone_attention_mask: Tensor
    ) -> dict[int, Attended]:
        """Return what each cross-attention block is given, by the block's number.

        Args:
            vl_embs: Features after `vlln`, shape (1, S, cross width).
            image_mask: Which tokens are image tokens, bool, shape (1, S).
            backbone_attention_mask: Which tokens are real, bool, shape (1, S).
        """
        text, image = AlternateVLDiT.attention_biases(
            image_mask, backbone_attention_mask, vl_embs.dtype
        )
        given: dict[int, Attended] = {}
        given.update(dict.fromkeys(text_blocks(self.config), (vl_embs, text)))
        given.update(dict.fromkeys(image_blocks(self.config), (vl_embs, image)))
        return given


class AttendedTokens(nn.Module):
    """Every block projects the tokens of its kind, whose places are constant."""

    attention: type[nn.Module] = Attention

    def __init__(self, config: DiTConfig, layout: TokenLayout) -> None:
        super().__init__()
        self.config, self.layout = config, layout
        # Computed here and not in `forward`: compilers do not trace NumPy.
        self.runs, self.live_text = layout.runs, len(layout.text_positions)

    @staticmethod
    def inputs(config: DiTConfig, layout: TokenLayout) -> InputShapes:
        """Return the inputs, features first."""
        length = layout.prefix_length + layout.live_length
        return {
            "features": ((1, length, config.cross_dim), None),
            "prefix_mask": ((layout.prefix_length,), torch.bool),
        }

    def _attended(self, vl_embs: Tensor, prefix_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return text tokens, image tokens and the text tokens' bias."""
        prefix = self.layout.prefix_length
        runs = [
            (False, 0, prefix),
            *((is_image, prefix + a, prefix + b) for is_image, a, b in self.runs),
        ]
        return (
            _tokens_of(vl_embs, runs, image=False),
            _tokens_of(vl_embs, runs, image=True),
            _prefix_bias(prefix_mask, self.live_text, vl_embs.dtype),
        )

    def forward(self, vl_embs: Tensor, prefix_mask: Tensor) -> dict[int, Attended]:
        """Return what each cross-attention block is given, by the block's number.

        Args:
            vl_embs: Features after `vlln`, shape (1, P + L, cross width).
            prefix_mask: Which tokens of the prefix are real, bool, shape (P,).
        """
        text, image, bias = self._attended(vl_embs, prefix_mask)
        given: dict[int, Attended] = {}
        given.update(dict.fromkeys(text_blocks(self.config), (text, bias)))
        given.update(dict.fromkeys(image_blocks(self.config), (image, None)))
        return given


class HoistedKeysValues(AttendedTokens):
    """Keys and values of all blocks of a kind are computed together, once an observation."""

    attention: type[nn.Module] = KeyValueAttention

    def __init__(self, config: DiTConfig, layout: TokenLayout) -> None:
        super().__init__(config, layout)
        self.text = KeysValues(config, len(text_blocks(config)))
        images = len(image_blocks(config))
        self.image = KeysValues(config, images) if images else None

    def forward(self, vl_embs: Tensor, prefix_mask: Tensor) -> dict[int, Attended]:
        """Return what each cross-attention block is given; see `AttendedTokens.forward`."""
        text, image, bias = self._attended(vl_embs, prefix_mask)
        keys, values = self.text(text)
        return self._given(keys, values, bias, image)

    def _given(
        self, keys: Tensor, values: Tensor, bias: Tensor, image: Tensor
    ) -> dict[int, Attended]:
        given = self._by_block(text_blocks(self.config), keys, values, bias)
        if self.image is not None:
            image_keys, image_values = self.image(image)
            given |= self._by_block(image_blocks(self.config), image_keys, image_values, None)
        return given

    def _by_block(
        self, blocks: tuple[int, ...], keys: Tensor, values: Tensor, bias: Tensor | None
    ) -> dict[int, Attended]:
        # Once here, instead of on every query or on the scores: a product stays small as well.
        scaled = keys.transpose(2, 3) * self.config.head_dim**-0.5
        return {
            block: (key, value, bias)
            for block, key, value in zip(
                blocks, torch.split(scaled, 1), torch.split(values, 1), strict=True
            )
        }


class PrefixKeysValues(HoistedKeysValues):
    """The text blocks' keys and values of the prefix come in, with the live tokens' features."""

    @staticmethod
    def inputs(config: DiTConfig, layout: TokenLayout) -> InputShapes:
        """Return the inputs, features first."""
        blocks, prefix = len(text_blocks(config)), layout.prefix_length
        stored = ((blocks, config.heads, prefix, config.head_dim), None)
        return {
            "features": ((1, layout.live_length, config.cross_dim), None),
            "prefix_text_keys": stored,
            "prefix_text_values": stored,
            "prefix_mask": ((prefix,), torch.bool),
        }

    def forward(  # type: ignore[override]  # another contract is the point of this part
        self,
        vl_embs: Tensor,
        prefix_text_keys: Tensor,
        prefix_text_values: Tensor,
        prefix_mask: Tensor,
    ) -> dict[int, Attended]:
        """Return what each cross-attention block is given, by the block's number.

        Args:
            vl_embs: Features of the live tokens after `vlln`, shape (1, L, cross width).
            prefix_text_keys: Shape (text blocks, heads, P, head width), as `PrefixTextKeysValues`
                gives them, padded on the left.
            prefix_text_values: As the keys.
            prefix_mask: Which tokens of the prefix are real, bool, shape (P,).
        """
        keys, values = self.text(_tokens_of(vl_embs, self.runs, image=False))
        # Transposed only afterwards: TensorRT 8.6 computes transposed keys that are concatenated
        # along their last axis wrongly (docs/verification.md).
        return self._given(
            torch.cat([prefix_text_keys, keys], dim=2),
            torch.cat([prefix_text_values, values], dim=2),
            _prefix_bias(prefix_mask, self.live_text, vl_embs.dtype),
            _tokens_of(vl_embs, self.runs, image=True),
        )


class PrefixTextKeysValues(nn.Module):
    """What the prompt bank stores for the action head: computed once an instruction.

    Its parameters are named as in a head with `PrefixKeysValues`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.vlln: nn.Module = (
            nn.LayerNorm(config.dit.cross_dim) if config.use_vlln else nn.Identity()
        )
        self.context = nn.ModuleDict(
            {"text": KeysValues(config.dit, len(text_blocks(config.dit)))}
        )

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Project the backbone's features of prefix tokens, shape (1, tokens, cross width).

        Returns:
            Keys and values, shape (text blocks, heads, tokens, head width), the keys not scaled.
        """
        result: tuple[Tensor, Tensor] = self.context["text"](self.vlln(features))
        return result


# --- Self-attention.


class SelfAttention(Attention):
    """Three products for query, key and value."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # attends to itself
        """Attend, shapes (1, T, width)."""
        return super().forward(x, x, None)


class FusedSelfAttention(nn.Module):
    """One product for query, key and value; the query's rows have the factor d ** -0.5."""

    def __init__(self, config: DiTConfig, context_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim = config.heads, config.head_dim
        self.to_qkv = nn.Linear(config.width, 3 * config.width)
        self.to_out = nn.ModuleList([nn.Linear(config.width, config.width)])

    def forward(self, x: Tensor) -> Tensor:
        """Attend, shapes (1, T, width)."""
        joined = self.to_qkv(x).reshape(-1, 3, self.heads, self.head_dim).permute(1, 2, 0, 3)
        query, key, value = joined.split(1)
        result: Tensor = self.to_out[0](_mix(query, key.transpose(2, 3), value, None))
        return result


# --- Encoder of the noisy actions.


class StepActionEncoder(CategoryActionEncoder):
    """The action encoder as trained; the time code is computed in every step."""

    def __init__(self, config: ModelConfig, steps: int) -> None:
        super().__init__(None, config.max_action_dim, config.dit.width)
        self.buckets = [time_bucket(k, steps, config.timestep_buckets) for k in range(steps)]
        self.position_embedding = (
            nn.Embedding(config.max_seq_len, config.dit.width)
            if config.add_position_embedding
            else None
        )

    def forward(self, actions: Tensor, step: int) -> Tensor:  # type: ignore[override]
        """Embed actions of shape (1, H, max_action_dim) to tokens (1, H, width)."""
        bucket = torch.full((1,), self.buckets[step], dtype=torch.int64, device=actions.device)
        tokens = super().forward(actions, bucket)
        if self.position_embedding is not None:
            tokens = tokens + self.position_embedding.weight[: tokens.shape[1]]
        return tokens


class FoldedActionEncoder(nn.Module):
    """Two products; a row for each step stands for the time code and the biases before it.

    W1 and the half of W2 that reads it have nothing between them, so they are one matrix; the
    other half of W2 reads the time code alone, so its product is a constant row.
    """

    def __init__(self, config: ModelConfig, steps: int) -> None:
        super().__init__()
        width = config.dit.width
        self.W12 = nn.Parameter(torch.empty(config.max_action_dim, width))
        self.row = nn.ParameterList(torch.empty(width) for _ in range(steps))
        self.W3 = nn.Parameter(torch.empty(width, width))
        self.positions = nn.Parameter(torch.empty(config.action_horizon, width))

    def forward(self, actions: Tensor, step: int) -> Tensor:
        """Embed actions of shape (1, H, max_action_dim) to tokens (1, H, width)."""
        inner = F.silu(torch.matmul(actions, self.W12) + self.row[step])
        return torch.matmul(inner, self.W3) + self.positions


# --- Decoder: from the DiT's tokens to what an Euler step adds to the actions.


class StepActionDecoder(nn.Module):
    """The DiT's output head and the action decoder as trained, on all tokens."""

    def __init__(self, config: ModelConfig, steps: int, norm: type[nn.Module]) -> None:
        super().__init__()
        width, output = config.dit.width, config.dit.output_dim
        self.steps = steps
        self.norm = norm(width, steps, is_output=True)
        self.proj_out_2 = nn.Linear(width, output)
        with float32_island():
            self.layer1 = CategoryLinear(None, output, config.mlp_size)
            self.layer2 = CategoryLinear(None, config.mlp_size, config.max_action_dim)

    def forward(self, x: Tensor, step: int, time: Any) -> Tensor:
        """Return the increment (1, H, max_action_dim) for tokens (1, 1 + H, width)."""
        output = self.proj_out_2(self.norm(x, step, time)).to(torch.float32)
        velocity: Tensor = self.layer2(F.relu(self.layer1(output)))
        return velocity[:, 1:] * (1.0 / self.steps)


class FoldedActionDecoder(nn.Module):
    """Two products on the action tokens alone, the step's length in the second.

    `proj_out_2` and `layer1` have nothing between them, so they are one matrix.
    """

    def __init__(self, config: ModelConfig, steps: int, norm: type[nn.Module]) -> None:
        super().__init__()
        width = config.dit.width
        with float32_island():
            self.norm = norm(width, steps, is_output=True)
            self.inner = CategoryLinear(None, width, config.mlp_size)
            self.outer = CategoryLinear(None, config.mlp_size, config.max_action_dim)

    def forward(self, x: Tensor, step: int, time: Any) -> Tensor:
        """Return the increment (1, H, max_action_dim) for tokens (1, 1 + H, width)."""
        normed = self.norm(x[:, 1:].to(torch.float32), step, time)
        result: Tensor = self.outer(F.relu(self.inner(normed)))
        return result


# --- Flow: which rows of the actions are free.


class FreeRows(nn.Module):
    """Every row is denoised."""

    @staticmethod
    def inputs(config: ModelConfig) -> InputShapes:
        """Return the inputs."""
        return {}

    def at(self, actions: Tensor, noise: Tensor, time: float) -> Tensor:
        """Return the actions as they are."""
        return actions


class CommittedRows(nn.Module):
    """Committed rows are held on the straight road from their noise to their value.

    Row i at time t is (1 - t) noise + t committed, which the model sees in training as the noisy
    action of that time. So the free rows are denoised beside rows that go where the robot goes.
    """

    @staticmethod
    def inputs(config: ModelConfig) -> InputShapes:
        """Return the inputs."""
        horizon = config.action_horizon
        return {
            "committed_actions": ((1, horizon, config.max_action_dim), torch.float32),
            "committed_mask": ((1, horizon), torch.bool),
        }

    def at(
        self, actions: Tensor, noise: Tensor, time: float, committed: Tensor, mask: Tensor
    ) -> Tensor:
        """Return the actions with the committed rows put where they are at a time in [0, 1].

        Args:
            actions: Shape (1, H, max_action_dim).
            noise: Start of the flow, of the same shape.
            time: 0 is noise, 1 is the end.
            committed: Normalised actions, of the same shape.
            mask: Which rows are committed, bool, shape (1, H).
        """
        if time == 0.0:
            return actions
        held = committed if time == 1.0 else (1.0 - time) * noise + time * committed
        return torch.where(mask.unsqueeze(2), held, actions)
