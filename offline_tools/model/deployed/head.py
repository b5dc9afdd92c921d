"""The action head as the robot runs it: one graph from features to actions.

Owns: the head with its denoising loop unrolled, which parts stand in it after each transformation,
and the deployed one, which has them all. Must not import the rest of the package but the model.

A head is put together from the parts of `head_parts`. A transformation replaces parts, so the
model before it and the model after it can be compared, counted and traced one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from groot_int8_ros.policy.token_layout import TokenLayout
from offline_tools.model.action_head import CategoryMLP
from offline_tools.model.configuration import ModelConfig
from offline_tools.model.deployed.head_parts import (
    Attended,
    AttendedTokens,
    CommittedRows,
    ComputedTime,
    ConstantTime,
    FoldedActionDecoder,
    FoldedActionEncoder,
    FreeRows,
    FusedSelfAttention,
    HoistedKeysValues,
    InputShapes,
    PrefixKeysValues,
    SelfAttention,
    StepActionDecoder,
    StepActionEncoder,
    WholePrompt,
    float32_island,
)
from offline_tools.model.dit import AlternateVLDiT, FeedForward, plain_layer_norm


@dataclass(frozen=True)
class HeadParts:
    """Which part stands at each place of a head; the defaults are the network as trained.

    Attributes:
        time: Where the norms' scales and shifts come from.
        context: What the cross-attention blocks read.
        self_attention: Attention of the other blocks.
        encoder: From noisy actions to tokens.
        decoder: From tokens to an Euler step's increment.
        flow: Which rows are denoised.
    """

    time: type[ComputedTime] | type[ConstantTime] = ComputedTime
    context: type[WholePrompt] | type[AttendedTokens] = WholePrompt
    self_attention: type[SelfAttention] | type[FusedSelfAttention] = SelfAttention
    encoder: type[StepActionEncoder] | type[FoldedActionEncoder] = StepActionEncoder
    decoder: type[StepActionDecoder] | type[FoldedActionDecoder] = StepActionDecoder
    flow: type[FreeRows] | type[CommittedRows] = FreeRows


# What each transformation of an unrolled head puts in another part's place, in their order.
_REPLACEMENTS: Mapping[str, Mapping[str, Any]] = {
    "unrolled_loop": {},
    "constant_time": {"time": ConstantTime},
    "attended_tokens": {"context": AttendedTokens},
    "hoisted_cross_kv": {"context": HoistedKeysValues},
    "prefix_text_kv": {"context": PrefixKeysValues},
    "committed_rows": {"flow": CommittedRows},
    "fused_self_qkv": {"self_attention": FusedSelfAttention},
    "folded_action_encoder": {"encoder": FoldedActionEncoder},
    "folded_action_decoder": {"decoder": FoldedActionDecoder},
}


def unrolled_stages() -> dict[str, HeadParts]:
    """Return the parts of the head after each transformation from `unrolled_loop` on."""
    stages: dict[str, HeadParts] = {}
    parts = HeadParts()
    for name, changes in _REPLACEMENTS.items():
        parts = replace(parts, **changes)
        stages[name] = parts
    return stages


DEPLOYED_PARTS = list(unrolled_stages().values())[-1]


class _Block(nn.Module):
    """Norm with the step's scale and shift, attention, plain norm, MLP, with residuals."""

    def __init__(
        self, config: ModelConfig, steps: int, norm: type[nn.Module], attention: nn.Module
    ) -> None:
        super().__init__()
        self.eps = config.dit.norm_eps
        self.norm1 = norm(config.dit.width, steps, is_output=False)
        self.attn1 = attention
        self.ff = FeedForward(config.dit.width)

    def forward(self, x: Tensor, step: int, time: Tensor | None, attended: Attended) -> Tensor:
        """Run the block on tokens of shape (1, T, width)."""
        x = x + self.attn1(self.norm1(x, step, time), *attended)
        result: Tensor = x + self.ff(plain_layer_norm(x, self.eps))
        return result


class UnrolledHead(nn.Module):
    """An action head for one embodiment and one observation, all denoising steps in its graph.

    Attributes:
        steps: Number of Euler steps.
        inputs: Names, shapes and types of what `forward` takes; type None is the graph's.
    """

    def __init__(
        self, config: ModelConfig, layout: TokenLayout, steps: int, parts: HeadParts
    ) -> None:
        super().__init__()
        dit = config.dit
        self.steps = steps
        self.inputs = head_inputs(config, layout, parts)
        self._context_inputs = len(parts.context.inputs(dit, layout))
        self.dtype = torch.get_default_dtype()
        norm = parts.time.norm
        with float32_island():
            self.vlln: nn.Module = (
                nn.LayerNorm(dit.cross_dim) if config.use_vlln else nn.Identity()
            )
            self.state_encoder = CategoryMLP(
                None, config.max_state_dim, config.mlp_size, dit.width
            )
            self.action_encoder = parts.encoder(config, steps)
        self.context = parts.context(dit, layout)
        self.timestep_encoder = parts.time(config, steps)
        self.transformer_blocks = nn.ModuleList(
            _Block(
                config,
                steps,
                norm,
                parts.self_attention(dit, dit.width)
                if AlternateVLDiT.is_self_attention(index)
                else parts.context.attention(dit, dit.cross_dim),
            )
            for index in range(dit.layers)
        )
        self.action_decoder = parts.decoder(config, steps, norm)
        self.flow = parts.flow()

    def forward(self, *tensors: Tensor) -> Tensor:
        """Infer normalised actions.

        Args:
            *tensors: As `inputs` describes them: what the context reads, the state (1,
                max_state_dim), the noise (1, H, max_action_dim), what the flow reads.

        Returns:
            Normalised actions, not clipped, float32, shape (1, H, max_action_dim).
        """
        features, *masks = tensors[: self._context_inputs]
        state, noise, *committed = tensors[self._context_inputs :]
        vl_embs = self.vlln(features.to(torch.float32)).to(self.dtype)
        attended = self.context(vl_embs, *masks)
        state_token = self.state_encoder(state.unsqueeze(1))
        actions = noise
        for step in range(self.steps):
            actions = self.flow.at(actions, noise, step / self.steps, *committed)
            time = self.timestep_encoder.at(step, noise.device)
            action_tokens = self.action_encoder(actions, step)
            x = torch.cat([state_token, action_tokens], dim=1).to(self.dtype)
            for index, block in enumerate(self.transformer_blocks):
                x = block(x, step, time, attended.get(index, ()))
            actions = actions + self.action_decoder(x, step, time)
        result: Tensor = self.flow.at(actions, noise, 1.0, *committed)
        return result


def head_inputs(config: ModelConfig, layout: TokenLayout, parts: HeadParts) -> InputShapes:
    """Return names, shapes and types of what a head takes; type None is the graph's."""
    return {
        **parts.context.inputs(config.dit, layout),
        "state": ((1, config.max_state_dim), torch.float32),
        "noise": ((1, config.action_horizon, config.max_action_dim), torch.float32),
        **parts.flow.inputs(config),
    }


def head_builder(
    config: ModelConfig, layout: TokenLayout, steps: int, parts: HeadParts = DEPLOYED_PARTS
) -> Callable[[], UnrolledHead]:
    """Return what makes a head, in evaluation mode, with weights of torch's default type."""

    def build() -> UnrolledHead:
        return UnrolledHead(config, layout, steps, parts).requires_grad_(False).eval()

    return build
