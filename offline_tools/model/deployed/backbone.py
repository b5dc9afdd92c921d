"""The backbone as the robot runs it: camera frames and the instruction's prefix in, features out.

Owns: which parts stand in the backbone after each transformation, and the deployed one, which has
them all. Must not import the rest of the package but the model.

A transformation replaces parts, so the model before it and the model after it can be compared,
counted and traced one by one. Parameters that hold a checkpoint's tensor have its key for a name;
the values of all others are said by `backbone_weights`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from groot_int8_ros.policy.image_sizes import image_sizes
from groot_int8_ros.policy.processor import ImageChain
from groot_int8_ros.policy.token_layout import TokenLayout
from groot_int8_ros.policy.types import CameraSpec
from offline_tools.model.backbone import (
    Connector,
    LanguageModel,
    VisionTower,
    mask_value,
    pixel_unshuffle,
    place_image_features,
)
from offline_tools.model.configuration import LanguageConfig, ModelConfig
from offline_tools.model.deployed.constants import ConstantModule
from offline_tools.model.deployed.head_parts import InputShapes
from offline_tools.model.deployed.image_chain import CameraFrames
from offline_tools.model.deployed.language import (
    DecoderLayer,
    FusedDecoderLayer,
    RMSNorm,
    causal_bias,
    rotary_tables,
)
from offline_tools.model.deployed.vision import fuse_attention


@dataclass(frozen=True)
class BackboneCase:
    """What a deployed backbone is made for.

    Attributes:
        config: Sizes of the model.
        cameras: In the order in which the network sees them, with the size of their frames.
        image_chain: Scaling and cropping of the frames.
        layout: Where the prompt's tokens stand.
    """

    config: ModelConfig
    cameras: tuple[CameraSpec, ...]
    image_chain: ImageChain
    layout: TokenLayout

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width of the network's images in pixels."""
        first = self.cameras[0]
        return image_sizes(first.height, first.width, self.image_chain).network

    @property
    def patch_grid(self) -> tuple[int, int]:
        """Patch rows and columns of an image."""
        side = self.config.vision.patch_size
        return self.image_shape[0] // side, self.image_shape[1] // side


# --- Images: what the pixels come from.


class PixelValues(nn.Module):
    """Pixels come in as the robot's own preprocessing makes them."""

    def __init__(self, case: BackboneCase) -> None:
        super().__init__()

    @staticmethod
    def inputs(case: BackboneCase) -> InputShapes:
        """Return the inputs."""
        shape = (len(case.cameras), case.config.vision.channels, *case.image_shape)
        return {"pixel_values": (shape, None)}

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return pixels in [-1, 1], shape (cameras, 3, H, W)."""
        return pixel_values


class Frames(CameraFrames):
    """Camera frames come in, and the image chain is part of the graph."""

    def __init__(self, case: BackboneCase) -> None:
        super().__init__(case.cameras, case.image_chain)

    @staticmethod
    def inputs(case: BackboneCase) -> InputShapes:
        """Return the inputs."""
        return {
            f"image_{camera.key}": ((camera.height, camera.width, 3), torch.uint8)
            for camera in case.cameras
        }


# --- Tokens: how the live tokens are embedded.


class TokenTable(nn.Module):
    """Token ids come in and are looked up; image features go to the image tokens."""

    def __init__(self, case: BackboneCase) -> None:
        super().__init__()
        language = case.config.language
        self.image_token_id = language.image_token_id
        self.embed_tokens = nn.Embedding(language.vocab_size, language.hidden_size)

    @staticmethod
    def inputs(case: BackboneCase) -> InputShapes:
        """Return the inputs."""
        return {"live_ids": ((1, case.layout.live_length), torch.int64)}

    def forward(self, image_features: Tensor, live_ids: Tensor) -> Tensor:
        """Return embeddings, shape (1, L, hidden)."""
        text = self.embed_tokens(live_ids)
        return place_image_features(text, live_ids == self.image_token_id, image_features)


class ConstantTokens(nn.Module):
    """The text among the live tokens is constant, and so are the places of the images."""

    def __init__(self, case: BackboneCase) -> None:
        super().__init__()
        self.runs = case.layout.runs
        texts = len(case.layout.text_positions)
        self.live_text = nn.Parameter(torch.empty(texts, case.config.language.hidden_size))

    @staticmethod
    def inputs(case: BackboneCase) -> InputShapes:
        """Return the inputs: none."""
        return {}

    def forward(self, image_features: Tensor) -> Tensor:
        """Return embeddings, shape (1, L, hidden)."""
        sources = {True: image_features.flatten(0, 1), False: self.live_text}
        used = {True: 0, False: 0}
        parts = []
        for is_image, start, stop in self.runs:
            first = used[is_image]
            used[is_image] = first + stop - start
            parts.append(sources[is_image][first : used[is_image]])
        return torch.cat(parts).unsqueeze(0)


# --- Prompt: which tokens the language model runs.


class WholePrompt(LanguageModel):
    """The reference: every token of the prompt, padded on the left."""

    def __init__(self, case: BackboneCase, parts: BackboneParts) -> None:
        super().__init__(case.config.language)

    @staticmethod
    def inputs(case: BackboneCase, parts: BackboneParts) -> InputShapes:
        """Return the inputs."""
        length = case.layout.prefix_length + case.layout.live_length
        return dict.fromkeys(("input_ids", "attention_mask"), ((1, length), torch.int64))

    def forward(  # type: ignore[override]  # the images are this part's first argument
        self, image_features: Tensor, input_ids: Tensor, attention_mask: Tensor
    ) -> Tensor:
        """Return features of all tokens, shape (1, P + L, hidden)."""
        text: Tensor = self.model.embed_tokens(input_ids)
        is_image = input_ids == self.config.image_token_id
        embeddings = place_image_features(text, is_image, image_features)
        return super().forward(embeddings, attention_mask)


class LivePrompt(ConstantModule):
    """The tokens from the first image on; keys and values of the prefix come in."""

    rotary_cosines: Tensor
    rotary_sines: Tensor
    causal_bias: Tensor

    def __init__(self, case: BackboneCase, parts: BackboneParts) -> None:
        super().__init__()
        language, layout = case.config.language, case.layout
        self.tokens = parts.tokens(case)
        self.model = nn.ModuleDict(
            {
                "layers": nn.ModuleList(parts.layer(language) for _ in range(language.layers)),
                "norm": RMSNorm(language.hidden_size, language.norm_eps),
            }
        )
        prefix, live = layout.prefix_length, layout.live_length
        cosines, sines = rotary_tables(language, range(prefix, prefix + live))
        self.add_constant("rotary_cosines", cosines)
        self.add_constant("rotary_sines", sines)
        bias = causal_bias(language, prefix, live, torch.get_default_dtype())
        self.add_constant("causal_bias", bias, torch.get_default_dtype())

    @staticmethod
    def inputs(case: BackboneCase, parts: BackboneParts) -> InputShapes:
        """Return the inputs."""
        stored = prefix_shape(case.config.language, case.layout.prefix_length)
        return {
            **parts.tokens.inputs(case),
            "prefix_keys": (stored, None),
            "prefix_values": (stored, None),
            "prefix_mask": ((case.layout.prefix_length,), torch.bool),
        }

    def forward(self, image_features: Tensor, *tensors: Tensor) -> Tensor:
        """Return features of the live tokens, shape (1, L, hidden).

        Args:
            image_features: Shape (cameras, tokens, hidden).
            *tensors: What the tokens take, then keys and values of the prefix, shape (layers, kv
                heads, P, head width) each, and which of its tokens are real, bool, shape (P,).
        """
        *given, keys, values, mask = tensors
        x = self.tokens(image_features, *given)
        bias = self.causal_bias + self._padding_bias(mask)
        rotary = self.rotary_cosines, self.rotary_sines
        layers = self.model["layers"]
        assert isinstance(layers, nn.ModuleList)
        for layer, before in zip(
            layers, zip(torch.split(keys, 1), torch.split(values, 1), strict=True), strict=True
        ):
            x, _ = layer(x, rotary, bias, before)
        result: Tensor = self.model["norm"](x)
        return result

    def _padding_bias(self, mask: Tensor) -> Tensor:
        bias = self.causal_bias
        padding = (~mask).to(bias.dtype) * mask_value(bias.dtype)
        live = torch.zeros(bias.shape[-1] - mask.shape[0], dtype=bias.dtype, device=bias.device)
        return torch.cat([padding, live])


def prefix_shape(config: LanguageConfig, tokens: int) -> tuple[int, int, int, int]:
    """Return the shape of a prefix's keys, and of its values."""
    return config.layers, config.kv_heads, tokens, config.head_dim


# --- The whole.


@dataclass(frozen=True)
class BackboneParts:
    """Which part stands at each place; the defaults are the network as trained.

    Attributes:
        images: Where the pixels come from.
        prompt: Which tokens the language model runs.
        tokens: How they are embedded, of a `LivePrompt`.
        layer: Its decoder layers.
        fused_vision: Whether the vision tower has one product for query, key and value.
    """

    images: type[PixelValues] | type[Frames] = PixelValues
    prompt: type[WholePrompt] | type[LivePrompt] = WholePrompt
    tokens: type[TokenTable] | type[ConstantTokens] = TokenTable
    layer: type[DecoderLayer] = DecoderLayer
    fused_vision: bool = False


# What each transformation puts in another part's place, in their order.
_REPLACEMENTS: Mapping[str, Mapping[str, Any]] = {
    "fixed_shapes": {},
    "image_chain": {"images": Frames},
    "prompt_prefix": {"prompt": LivePrompt},
    "constant_embeddings": {"tokens": ConstantTokens},
    "fused_vision_qkv": {"fused_vision": True},
    "fused_language_projections": {"layer": FusedDecoderLayer},
}


def backbone_parts() -> dict[str, BackboneParts]:
    """Return the parts of the backbone after each transformation."""
    stages: dict[str, BackboneParts] = {}
    parts = BackboneParts()
    for name, changes in _REPLACEMENTS.items():
        parts = replace(parts, **changes)
        stages[name] = parts
    return stages


DEPLOYED_BACKBONE = list(backbone_parts().values())[-1]


class PartsBackbone(nn.Module):
    """A backbone for one observation, put together from parts."""

    def __init__(self, case: BackboneCase, parts: BackboneParts) -> None:
        super().__init__()
        vision = case.config.vision
        self.grid = case.patch_grid
        self._image_inputs = len(parts.images.inputs(case))
        self.image_chain = parts.images(case)
        tower = VisionTower(vision)
        if parts.fused_vision:
            fuse_attention(tower)
        self.backbone = nn.Module()
        self.backbone.model = nn.ModuleDict(
            {
                "vision_model": tower,
                "mlp1": Connector(case.config),
                "language_model": parts.prompt(case, parts),
            }
        )
        rows, columns = self.grid
        self.vision_position = nn.Parameter(torch.empty(1, rows * columns, vision.hidden_size))

    def forward(self, *tensors: Tensor) -> Tensor:
        """Return features of the tokens, shape (1, tokens, hidden).

        Args:
            *tensors: As `backbone_inputs` describes them.
        """
        model = self.backbone.model
        assert isinstance(model, nn.ModuleDict)
        pixels = self.image_chain(*tensors[: self._image_inputs])
        patches = model["vision_model"](
            pixels.to(self.vision_position.dtype), self.vision_position
        )
        image_features = model["mlp1"](pixel_unshuffle(patches, *self.grid))
        result: Tensor = model["language_model"](image_features, *tensors[self._image_inputs :])
        return result


def backbone_inputs(case: BackboneCase, parts: BackboneParts) -> InputShapes:
    """Return names, shapes and types of what a backbone takes; type None is the graph's."""
    return {**parts.images.inputs(case), **parts.prompt.inputs(case, parts)}


def backbone_builder(
    case: BackboneCase, parts: BackboneParts = DEPLOYED_BACKBONE
) -> Callable[[], PartsBackbone]:
    """Return what makes a backbone, in evaluation mode, with weights of torch's default type."""

    def build() -> PartsBackbone:
        return PartsBackbone(case, parts).requires_grad_(False).eval()

    return build
