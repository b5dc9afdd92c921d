"""The weights of an unrolled head by their name in it, computed from a checkpoint's tensors.

Owns: which tensors a parameter of `head.UnrolledHead` is read, joined or folded from. Must not
import the rest of the package but the model. Everything is computed in float32 when it is asked
for, so at most a few of the checkpoint's tensors are in memory at a time, at any size of model.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from offline_tools.model.action_head import embodiment_row, time_bucket, time_code
from offline_tools.model.configuration import ModelConfig
from offline_tools.model.deployed.head_parts import image_blocks, text_blocks
from offline_tools.model.dit import timestep_code

Read = Callable[[str], Tensor]

_NORM = re.compile(r"(.+)\.(gain|shift)\.(\d+)")
_FUSED = re.compile(r"(transformer_blocks\.\d+\.attn1)\.to_qkv\.(weight|bias)")
_CONTEXT = re.compile(r"context\.(text|image)\.kv\.(weight|bias)")
_ROW = re.compile(r"action_encoder\.row\.(\d+)")

# Parameters that stand elsewhere in the checkpoint.
_MOVED = (
    ("action_decoder.norm.linear.", "model.proj_out_1."),
    ("action_decoder.proj_out_2.", "model.proj_out_2."),
    ("action_encoder.position_embedding.", "position_embedding."),
    ("timestep_encoder.", "model.timestep_encoder."),
    ("transformer_blocks.", "model.transformer_blocks."),
)


class HeadWeights:
    """Gives the parameters of an unrolled head, of whatever parts it is made.

    Args:
        config: Sizes of the model.
        checkpoint: Gives a tensor by its key in the released layout.
        embodiment_id: Row of the category-specific weights.
        steps: Number of Euler steps.
    """

    def __init__(
        self, config: ModelConfig, checkpoint: Read, embodiment_id: int, steps: int
    ) -> None:
        self._config = config
        self._checkpoint = checkpoint
        self._embodiment_id = embodiment_id
        self._steps = steps
        # A few rows of the model's width: reading a norm's linear again for each costs more.
        self._norms: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._times: Tensor | None = None
        self._folded: dict[str, Callable[[], Tensor]] = {
            "action_encoder.W12": self._encoder_matrix,
            "action_encoder.W3": lambda: self._read("action_encoder.W3.W"),
            "action_encoder.positions": self._positions,
            "action_decoder.inner.W": self._decoder_matrix,
            "action_decoder.inner.b": self._decoder_bias,
            "action_decoder.outer.W": lambda: self._read("action_decoder.layer2.W") / steps,
            "action_decoder.outer.b": lambda: self._read("action_decoder.layer2.b") / steps,
        }

    def __call__(self, name: str) -> Tensor:
        """Return a parameter's value, float32 if it is computed, else as it is stored."""
        if name in self._folded:
            return self._folded[name]()
        if match := _NORM.fullmatch(name):
            gain, shift = self._norm(match[1])[int(match[3])]
            return gain if match[2] == "gain" else shift
        if match := _FUSED.fullmatch(name):
            return self._fused(f"model.{match[1]}", match[2])
        if match := _CONTEXT.fullmatch(name):
            return self._context(match[1], match[2])
        if match := _ROW.fullmatch(name):
            return self._encoder_row(int(match[1]))
        for prefix, moved in _MOVED:
            if name.startswith(prefix):
                name = moved + name.removeprefix(prefix)
                break
        return self._stored(name)

    def _stored(self, key: str) -> Tensor:
        return embodiment_row(key, self._checkpoint(f"action_head.{key}"), self._embodiment_id)

    def _read(self, key: str) -> Tensor:
        return self._stored(key).float()

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self._read(f"{name}.weight"), self._read(f"{name}.bias"))

    def _buckets(self) -> Tensor:
        buckets = self._config.timestep_buckets
        return torch.tensor([time_bucket(k, self._steps, buckets) for k in range(self._steps)])

    def _activated_times(self) -> Tensor:
        """Return the activated time embedding of every step, shape (steps, width)."""
        if self._times is None:
            name = "model.timestep_encoder.timestep_embedder"
            inner = F.silu(self._linear(f"{name}.linear_1", timestep_code(self._buckets())))
            self._times = F.silu(self._linear(f"{name}.linear_2", inner))
        return self._times

    def _norm(self, name: str) -> list[tuple[Tensor, Tensor]]:
        """Return what a norm multiplies by and adds in each step."""
        if name not in self._norms:
            is_output = name == "action_decoder.norm"
            linear = "model.proj_out_1" if is_output else f"model.{name}.linear"
            first, second = self._linear(linear, self._activated_times()).chunk(2, dim=1)
            # A block has the scale first, the output head has it second.
            scale, shift = (second, first) if is_output else (first, second)
            self._norms[name] = list(zip(1 + scale, shift, strict=True))
        return self._norms[name]

    def _fused(self, attention: str, kind: str) -> Tensor:
        query, key, value = (self._read(f"{attention}.to_{part}.{kind}") for part in "qkv")
        return torch.cat([query * self._config.dit.head_dim**-0.5, key, value])

    def _context(self, kind: str, leaf: str) -> Tensor:
        dit = self._config.dit
        blocks = text_blocks(dit) if kind == "text" else image_blocks(dit)
        # Nothing is computed, so the largest weight of the head keeps the type it is stored in.
        return torch.cat(
            [
                self._stored(f"model.transformer_blocks.{block}.attn1.to_{part}.{leaf}")
                for part in "kv"
                for block in blocks
            ]
        )

    def _encoder_halves(self) -> tuple[Tensor, Tensor]:
        """Return the rows of W2 that read the embedded action, and those of the time code."""
        width = self._config.dit.width
        whole = self._read("action_encoder.W2.W")
        return whole[:width], whole[width:]

    def _encoder_matrix(self) -> Tensor:
        return self._read("action_encoder.W1.W") @ self._encoder_halves()[0]

    def _encoder_row(self, step: int) -> Tensor:
        of_action, of_time = self._encoder_halves()
        code = time_code(self._buckets()[step : step + 1], self._config.dit.width)[0]
        return (
            self._read("action_encoder.W1.b") @ of_action
            + code @ of_time
            + self._read("action_encoder.W2.b")
        )

    def _positions(self) -> Tensor:
        bias = self._read("action_encoder.W3.b")
        horizon = self._config.action_horizon
        if not self._config.add_position_embedding:
            return bias.repeat(horizon, 1)
        return self._read("position_embedding.weight")[:horizon] + bias

    def _decoder_matrix(self) -> Tensor:
        # `proj_out_2` is stored output by input, the category-specific layer input by output.
        projection = self._read("model.proj_out_2.weight").T
        return projection @ self._read("action_decoder.layer1.W")

    def _decoder_bias(self) -> Tensor:
        projected = self._read("model.proj_out_2.bias") @ self._read("action_decoder.layer1.W")
        return projected + self._read("action_decoder.layer1.b")
