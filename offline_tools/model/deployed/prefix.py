"""The instruction's prefix: what the deployed graphs need of the tokens before the first image.

Owns: the model that computes it (exported as `prefix.onnx` for a robot that takes new
instructions), and its computation from a checkpoint for the bundle's bank, which holds one layer
at a time. Must not import the rest of the package but the model.

Float32 throughout: it runs once an instruction, and what it computes is read at every step. The
keys hold the rotary embedding of positions that count from `first_position`, so that a prefix of n
tokens stands at P - n to P - 1, directly before the live tokens; rotary embedding is relative, so
that is exact.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from groot_int8_ros.policy.types import Float32Array, Int64Array
from offline_tools.model.backbone import mask_value
from offline_tools.model.checkpoint import load_weights
from offline_tools.model.configuration import LanguageConfig, ModelConfig
from offline_tools.model.deployed.backbone_weights import EMBEDDING_TABLE
from offline_tools.model.deployed.constants import ConstantModule, fill_constants
from offline_tools.model.deployed.head_parts import PrefixTextKeysValues
from offline_tools.model.deployed.head_weights import HeadWeights
from offline_tools.model.deployed.language import (
    DecoderLayer,
    KeysValues,
    RMSNorm,
    Rotary,
    frequencies,
)

Read = Callable[[str], Tensor]

OUTPUTS = ("prefix_keys", "prefix_values", "prefix_text_keys", "prefix_text_values")


@dataclass(frozen=True, eq=False)
class Prefix:
    """What the deployed graphs take of one prefix of n tokens, float32.

    Attributes:
        prefix_keys: Shape (layers, kv heads, n, head width).
        prefix_values: As the keys.
        prefix_text_keys: Shape (text blocks, heads, n, head width of the DiT).
        prefix_text_values: As the keys.
    """

    prefix_keys: Float32Array
    prefix_values: Float32Array
    prefix_text_keys: Float32Array
    prefix_text_values: Float32Array


class _Positions(ConstantModule):
    """Rotary tables and the causal mask of tokens whose number varies."""

    frequencies: Tensor

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self._group = config.heads // config.kv_heads
        self.add_constant("frequencies", frequencies(config))

    def forward(self, tokens: int, first_position: Tensor) -> tuple[Rotary, Tensor]:
        index = torch.arange(tokens, device=first_position.device)
        angles = (index + first_position).to(torch.float32)[:, None] * self.frequencies
        cosines, sines = torch.cos(angles), torch.sin(angles)
        later = (index.unsqueeze(0) > index.unsqueeze(1)).to(torch.float32)
        bias = torch.cat([later * mask_value(torch.float32)] * self._group)
        rotary = (
            torch.cat([cosines, cosines], dim=1).unsqueeze(1),
            torch.cat([-sines, sines], dim=1).unsqueeze(1),
        )
        return rotary, bias


class PrefixModel(nn.Module):
    """Token ids of a prefix to what the deployed graphs take of it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        language = config.language
        self.embed_tokens = nn.Embedding(language.vocab_size, language.hidden_size)
        self.positions = _Positions(language)
        self.layers = nn.ModuleList(DecoderLayer(language) for _ in range(language.layers))
        self.norm = RMSNorm(language.hidden_size, language.norm_eps)
        self.text = PrefixTextKeysValues(config)

    def forward(self, input_ids: Tensor, first_position: Tensor) -> tuple[Tensor, ...]:
        """Compute a prefix.

        Args:
            input_ids: Token ids, int64, shape (1, n).
            first_position: Position of the first token, int64, shape (1,).

        Returns:
            The tensors of `OUTPUTS`, shaped as in `Prefix`.
        """
        rotary, bias = self.positions(input_ids.shape[1], first_position)
        x = self.embed_tokens(input_ids)
        stored: list[KeysValues] = []
        for layer in self.layers:
            x, own = layer(x, rotary, bias)
            stored.append(own)
        keys, values = (torch.cat(part) for part in zip(*stored, strict=True))
        return keys, values, *self.text(self.norm(x))


class PrefixWeights:
    """Gives the value of a `PrefixModel`'s parameter or constant by its name."""

    def __init__(self, config: ModelConfig, checkpoint: Read) -> None:
        self._checkpoint = checkpoint
        # No name of the text blocks depends on the embodiment or the number of steps.
        self._head = HeadWeights(config, checkpoint, embodiment_id=0, steps=1)
        self._frequencies = torch.from_numpy(frequencies(config.language))

    def __call__(self, name: str) -> Tensor:
        """Return a value, float32 if it is computed, else as it is stored."""
        if name == "positions.frequencies":
            return self._frequencies
        if name.startswith("text."):
            return self._head(name.removeprefix("text."))
        return self._checkpoint(f"backbone.model.language_model.model.{name}")


@torch.no_grad()
def compute_prefixes(
    config: ModelConfig, checkpoint: Read, prefix_ids: Sequence[Int64Array], room: int
) -> list[Prefix]:
    """Compute prefixes from a checkpoint with one layer of it in memory at a time.

    Args:
        config: Sizes of the model.
        checkpoint: Gives a tensor by its key in the released layout.
        prefix_ids: Token ids of each prefix, int64 (n,).
        room: P, the tokens that the graphs have room for; every prefix ends there.
    """
    weights = PrefixWeights(config, checkpoint)
    with torch.device("meta"):
        model = PrefixModel(config).eval()
    fill_constants(model)
    places = [model.positions(ids.size, torch.tensor([room - ids.size])) for ids in prefix_ids]
    # Rows of the stored table: the whole table in float32 would be the largest tensor by far.
    table = checkpoint(EMBEDDING_TABLE)
    tokens = [table[torch.from_numpy(ids)].to(torch.float32).unsqueeze(0) for ids in prefix_ids]
    del table
    stored: list[list[KeysValues]] = [[] for _ in prefix_ids]
    for number, layer in enumerate(model.layers):
        with _loaded(layer, f"layers.{number}.", weights):
            for index, (rotary, bias) in enumerate(places):
                tokens[index], own = layer(tokens[index], rotary, bias)
                stored[index].append(own)
    with _loaded(model.norm, "norm.", weights), _loaded(model.text, "text.", weights):
        texts = [model.text(model.norm(x)) for x in tokens]
    found = []
    for layers, text in zip(stored, texts, strict=True):
        keys, values = (torch.cat(part) for part in zip(*layers, strict=True))
        found.append(Prefix(*(np.ascontiguousarray(one.numpy()) for one in (keys, values, *text))))
    return found


@contextlib.contextmanager
def _loaded(module: nn.Module, prefix: str, weights: Read) -> Iterator[None]:
    """Hold a module's weights in memory for a while."""
    names = [name for name, _ in module.named_parameters()]
    load_weights(module, ((name, weights(f"{prefix}{name}")) for name in names), torch.float32)
    try:
        yield
    finally:
        module.to("meta")
