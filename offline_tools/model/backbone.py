"""The vision-language backbone of GR00T N1.6: SigLIP2 tower, connector, truncated Qwen3.

Owns: the one forward pass that parity checks and ONNX export share, and its separate stages. Must
not import the rest of the package but the configuration: exporters and checks build on it.

Module names are chosen so that a state-dict key equals the released checkpoint's key. The forward
is written for export: no data-dependent control flow, no boolean indexing, eager attention, and
the resized position embedding can be handed in as a constant because its resampling (bilinear
with antialiasing) has no ONNX operator. The language model computes its rotary frequencies in a
float32 buffer; do not cast the whole module with `.half()`, cast its parameters.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3Model, Siglip2VisionConfig, Siglip2VisionModel

from offline_tools.model.configuration import LanguageConfig, ModelConfig, VisionConfig

MERGE = 2  # patches that the connector merges along each axis


def mask_value(dtype: torch.dtype) -> float:
    """Return what is added to the score of a position that must not be attended to.

    Half of the type's lowest number: adding a negative score to the lowest itself overflows to
    minus infinity in half precision, and a row of nothing else turns into NaN.
    """
    return torch.finfo(dtype).min / 2


def resize_positions(table: Tensor, rows: int, columns: int) -> Tensor:
    """Resize a learned position grid to an image's patch grid.

    Bilinear with half-pixel centres and antialiasing, in float32 whatever the weights' type
    (modeling_siglip2.py of transformers, `resize_positional_embeddings`).

    Args:
        table: The learned positions of a square grid, shape (side * side, hidden).
        rows: Patch rows of the image.
        columns: Patch columns of the image.

    Returns:
        The embedding in the table's type, shape (1, rows * columns, hidden).
    """
    side = math.isqrt(table.shape[0])
    grid = table.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(
        grid, size=(rows, columns), mode="bilinear", align_corners=False, antialias=True
    )
    return resized.flatten(2).transpose(1, 2).to(table.dtype)


class VisionTower(nn.Module):
    """SigLIP2 vision transformer: full attention within each image, none between images."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        # The pooling head's weights are in the checkpoint, but N1.6 reads the patch features.
        self.vision_model = Siglip2VisionModel(
            Siglip2VisionConfig(
                hidden_size=config.hidden_size,
                intermediate_size=config.mlp_size,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                num_channels=config.channels,
                num_patches=config.positions,
                patch_size=config.patch_size,
                hidden_act="gelu_pytorch_tanh",
                layer_norm_eps=config.norm_eps,
                vision_use_head=False,
            )
        )
        self.vision_model.set_attn_implementation("eager")

    def position_embedding(self, rows: int, columns: int) -> Tensor:
        """Return the learned positions of an image's patch grid; see `resize_positions`."""
        table = self.vision_model.embeddings.position_embedding.weight
        return resize_positions(table, rows, columns)

    def patch_grid(self, pixel_values: Tensor) -> tuple[int, int]:
        """Return the patch rows and columns of images of shape (N, 3, H, W)."""
        side = self.config.patch_size
        return pixel_values.shape[2] // side, pixel_values.shape[3] // side

    def embed(self, pixel_values: Tensor, position: Tensor) -> Tensor:
        """Cut images into patches and embed them.

        Args:
            pixel_values: Images in [-1, 1], shape (N, 3, H, W); H and W divide by the patch size.
            position: Resized position embedding, shape (1, rows * columns, hidden).

        Returns:
            Patch features, row by row, shape (N, rows * columns, hidden).
        """
        side = self.config.patch_size
        rows, columns = self.patch_grid(pixel_values)
        patches = pixel_values.reshape(-1, self.config.channels, rows, side, columns, side)
        # A patch vector runs over its rows, its columns, then the colours.
        patches = patches.permute(0, 2, 4, 3, 5, 1)
        patches = patches.reshape(-1, rows * columns, side * side * self.config.channels)
        projected: Tensor = self.vision_model.embeddings.patch_embedding(patches)
        return projected + position

    def encode(self, embedded: Tensor) -> Tensor:
        """Run the transformer and its final layer norm, shapes (N, patches, hidden)."""
        features = self.vision_model.encoder(embedded, attention_mask=None).last_hidden_state
        result: Tensor = self.vision_model.post_layernorm(features)
        return result

    def forward(self, pixel_values: Tensor, position: Tensor | None = None) -> Tensor:
        """Return the patch features of images.

        Args:
            pixel_values: Images in [-1, 1], shape (N, 3, H, W).
            position: As `position_embedding` gives it for this size; None computes it.

        Returns:
            Features after the final norm, row by row, shape (N, rows * columns, hidden).
        """
        if position is None:
            position = self.position_embedding(*self.patch_grid(pixel_values))
        return self.encode(self.embed(pixel_values, position))


def pixel_unshuffle(features: Tensor, rows: int, columns: int) -> Tensor:
    """Merge 2 x 2 patches into one vector, index channel * 4 + row * 2 + column.

    Args:
        features: Patch features, shape (N, rows * columns, C).
        rows: Patch rows, even.
        columns: Patch columns, even.

    Returns:
        Merged features, row by row, shape (N, rows / 2 * columns / 2, 4 C).
    """
    channels = features.shape[-1]
    half_rows, half_columns = rows // MERGE, columns // MERGE
    grid = features.reshape(-1, half_rows, MERGE, half_columns, MERGE, channels)
    grid = grid.permute(0, 1, 3, 5, 2, 4)
    return grid.reshape(-1, half_rows * half_columns, channels * MERGE * MERGE)


class Connector(nn.Sequential):
    """The MLP from merged patch features to the language model's width."""

    def __init__(self, config: ModelConfig) -> None:
        merged = config.vision.hidden_size * MERGE * MERGE
        width = config.language.hidden_size
        super().__init__(
            nn.LayerNorm(merged), nn.Linear(merged, width), nn.GELU(), nn.Linear(width, width)
        )


def place_image_features(text: Tensor, is_image: Tensor, image_features: Tensor) -> Tensor:
    """Put image features where the image tokens stand.

    Args:
        text: Token embeddings, shape (B, S, width).
        is_image: Which tokens are image tokens, bool, shape (B, S). They must be as many as there
            are image features.
        image_features: Features in image order, shape (..., width).

    Returns:
        Embeddings, shape (B, S, width).
    """
    # The k-th image token of the batch takes the k-th feature.
    order = torch.cumsum(is_image.reshape(-1).to(torch.int64), dim=0) - 1
    features = image_features.reshape(-1, text.shape[-1])
    placed = features.index_select(0, order.clamp(min=0)).reshape(text.shape)
    return torch.where(is_image.unsqueeze(-1), placed, text)


class LanguageModel(nn.Module):
    """The first `select_layer` layers of Qwen3 and its final norm, without a language head."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Qwen3Model(
            Qwen3Config(
                vocab_size=config.vocab_size,
                hidden_size=config.hidden_size,
                intermediate_size=config.mlp_size,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                num_key_value_heads=config.kv_heads,
                head_dim=config.head_dim,
                hidden_act="silu",
                max_position_embeddings=config.max_positions,
                rms_norm_eps=config.norm_eps,
                rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
                use_sliding_window=False,
                attention_bias=False,
                use_cache=False,
            )
        )
        self.model.set_attn_implementation("eager")

    def restore_buffers(self) -> None:
        """Compute the rotary frequencies afresh, in float32 and on a real device.

        They are no part of a checkpoint, so a model that was made on the meta device lacks them.
        """
        with torch.device("cpu"):
            self.model.rotary_emb = type(self.model.rotary_emb)(config=self.model.config)

    def attention_bias(self, attention_mask: Tensor, dtype: torch.dtype) -> Tensor:
        """Build the additive mask: each token sees itself and valid tokens before it.

        Args:
            attention_mask: 1 for a real token and 0 for padding, int64, shape (B, S).
            dtype: Type of the scores that the mask is added to.

        Returns:
            0 where attention is allowed, `mask_value(dtype)` elsewhere, shape (B, 1, S, S).
        """
        index = torch.arange(attention_mask.shape[1], device=attention_mask.device)
        causal = index.unsqueeze(0) <= index.unsqueeze(1)
        allowed = causal.unsqueeze(0) & (attention_mask == 1).unsqueeze(1)
        return (~allowed).to(dtype).unsqueeze(1) * mask_value(dtype)

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the features of embedded tokens.

        Args:
            inputs_embeds: Token embeddings with image features in place, shape (B, S, hidden).
            attention_mask: 1 for a real token and 0 for padding, int64, shape (B, S).

        Returns:
            Features after the final RMS norm, shape (B, S, hidden). Positions count from the
            sequence's start, padding included, as the reference does.
        """
        positions = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
        # A mapping by layer type is taken as it is: Qwen3Model then builds no mask of its own.
        bias = self.attention_bias(attention_mask, inputs_embeds.dtype)
        result: Tensor = self.model(
            inputs_embeds=inputs_embeds,
            attention_mask={"full_attention": bias},
            position_ids=positions.unsqueeze(0),
            use_cache=False,
        ).last_hidden_state
        return result


def rotary_frequencies(config: LanguageConfig) -> Tensor:
    """Return the rotary frequencies of a language model, float32 (head width / 2,)."""
    with torch.device("meta"):
        language = LanguageModel(config)
    language.restore_buffers()
    frequencies: Tensor = language.model.rotary_emb.inv_freq
    return frequencies


class Backbone(nn.Module):
    """Images and a prompt in, one feature vector for each token out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.image_token_id = config.language.image_token_id
        self.model = nn.ModuleDict(
            {
                "vision_model": VisionTower(config.vision),
                "mlp1": Connector(config),
                "language_model": LanguageModel(config.language),
            }
        )

    @property
    def vision(self) -> VisionTower:
        """The vision tower."""
        module = self.model["vision_model"]
        assert isinstance(module, VisionTower)
        return module

    @property
    def connector(self) -> nn.Module:
        """The MLP from merged patch features to the language model's width."""
        return self.model["mlp1"]

    @property
    def language(self) -> LanguageModel:
        """The language model."""
        module = self.model["language_model"]
        assert isinstance(module, LanguageModel)
        return module

    def image_features(self, pixel_values: Tensor, position: Tensor | None = None) -> Tensor:
        """Return one feature vector for each image token.

        Args:
            pixel_values: Images in [-1, 1], shape (N, 3, H, W); H and W divide by twice the
                patch size.
            position: Resized position embedding; None computes it.

        Returns:
            Features in image order, shape (N, tokens per image, language width).
        """
        rows, columns = self.vision.patch_grid(pixel_values)
        features = pixel_unshuffle(self.vision(pixel_values, position), rows, columns)
        result: Tensor = self.connector(features)
        return result

    def embed(self, input_ids: Tensor, image_features: Tensor) -> Tensor:
        """Embed tokens and put the image features where the image tokens stand.

        Args:
            input_ids: Token ids, int64, shape (B, S). The batch's image tokens must be as many
                as there are image features.
            image_features: Features in image order, shape (..., language width).

        Returns:
            Embeddings, shape (B, S, language width).
        """
        text: Tensor = self.language.model.embed_tokens(input_ids)
        return place_image_features(text, input_ids == self.image_token_id, image_features)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor,
        position: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run the backbone.

        Args:
            input_ids: Token ids, int64, shape (B, S).
            attention_mask: 1 for a real token and 0 for padding, int64, shape (B, S).
            pixel_values: All images of the batch in order, in [-1, 1], shape (N, 3, H, W).
            position: Resized position embedding of the vision tower, shape
                (1, patches, vision width); None computes it.

        Returns:
            Features after the language model's final norm, shape (B, S, width); which tokens are
            real, bool, shape (B, S); which are image tokens, bool, shape (B, S).
        """
        embeddings = self.embed(input_ids, self.image_features(pixel_values, position))
        features = self.language(embeddings, attention_mask)
        return features, attention_mask == 1, input_ids == self.image_token_id
