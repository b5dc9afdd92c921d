"""Where the weights of a backbone of any parts lie: read, joined, folded or computed.

Owns: the value of each parameter of `PartsBackbone` and of the prefix model's language part by its
name, computed when it is asked for. Must not import the rest of the package but the model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from offline_tools.model.backbone import resize_positions, rotary_frequencies
from offline_tools.model.deployed.backbone import BackboneCase

Read = Callable[[str], Tensor]

_VISION = "backbone.model.vision_model.vision_model"
_LANGUAGE = "backbone.model.language_model.model"
_POSITION_TABLE = f"{_VISION}.embeddings.position_embedding.weight"
EMBEDDING_TABLE = f"{_LANGUAGE}.embed_tokens.weight"

_QKV = re.compile(r"(.+\.self_attn)\.qkv_proj\.(weight|bias)")
_GAIN = re.compile(r"(.+\.self_attn)\.qk_gain")
_GATE_UP = re.compile(r"(.+\.mlp)\.gate_up_proj\.weight")


class BackboneWeights:
    """Gives the value of a backbone's parameter or constant by its name.

    Attributes:
        case: What the backbone is made for.
        checkpoint: Gives a tensor by its key in the released layout.
        constants: Values of the module's constants by their names.
    """

    def __init__(
        self, case: BackboneCase, checkpoint: Read, constants: Mapping[str, Tensor]
    ) -> None:
        self.case = case
        self.checkpoint = checkpoint
        self.constants = constants

    def __call__(self, name: str) -> Tensor:
        """Return a value, float32 if it is computed, else as it is stored."""
        if name in self.constants:
            return self.constants[name]
        if name == "vision_position":
            return resize_positions(
                self.checkpoint(_POSITION_TABLE).float(), *self.case.patch_grid
            )
        if name.endswith(".rotary_emb.inv_freq"):
            return rotary_frequencies(self.case.config.language)
        if name.endswith(".tokens.embed_tokens.weight"):
            return self.checkpoint(EMBEDDING_TABLE)
        if name.endswith(".tokens.live_text"):
            return self._live_text()
        if match := _QKV.fullmatch(name):
            return self._qkv(match[1], match[2])
        if match := _GAIN.fullmatch(name):
            return self._gain(match[1])
        if match := _GATE_UP.fullmatch(name):
            return torch.cat(
                [self.checkpoint(f"{match[1]}.{part}_proj.weight") for part in ("gate", "up")]
            )
        return self.checkpoint(name)

    def _live_text(self) -> Tensor:
        layout = self.case.layout
        ids = [layout.live_ids[place] for place in layout.text_positions]
        return self.checkpoint(EMBEDDING_TABLE)[ids]

    def _qkv(self, attention: str, leaf: str) -> Tensor:
        query, key, value = (self.checkpoint(f"{attention}.{part}_proj.{leaf}") for part in "qkv")
        if attention.startswith(_VISION):
            vision = self.case.config.vision
            query = query.float() * (vision.hidden_size // vision.heads) ** -0.5
        # The language model's factor is in the norm behind the product.
        return torch.cat([query, key.to(query.dtype), value.to(query.dtype)])

    def _gain(self, attention: str) -> Tensor:
        language = self.case.config.language
        query, key = (
            self.checkpoint(f"{attention}.{part}_norm.weight").float() for part in ("q", "k")
        )
        return torch.cat(
            [
                (query * language.head_dim**-0.5).expand(language.heads, -1),
                key.expand(language.kv_heads, -1),
            ]
        )
