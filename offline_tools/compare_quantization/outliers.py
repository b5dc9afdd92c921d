"""Checkpoints whose activations are as hard to quantise as the real model's.

Owns: the weight edits that give a checkpoint activation outliers, and writing the edited
checkpoint. Must not import an engine or a quantiser: what makes a model hard must not depend on
what is tried on it.

A checkpoint with random weights has activations without outliers, on which every scheme does
well. A TensorRT calibration of a fine-tuned N1.6 backbone (500 samples, 4 cameras) shows two kinds
that decide which scheme works, and random weights have neither:

- *Channel outliers*: a few channels are far larger than the others in every token. Language norms
  reach 27, the input of `o_proj` 35, the input of `down_proj` 180, vision norms 20. They can be
  added without changing what the network computes: a channel is multiplied where it is produced
  and divided where it is consumed (`channel_outliers`).
- *Massive activations*: one token has values thousands of times larger than the others'. The
  input of `down_proj` in language layer 2 reaches 1.9e4 and the residual stream behind it 1e3,
  where the median layer has 4.8. They do change the function (`massive_token`), so such a model is
  compared with its own float answers.

The vision tower has outliers behind its GELU, whose two sides cannot be rescaled exactly, and in
its residual stream. They change the function too (`vision_outliers`).
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Generator, Tensor

from groot_int8_ros.errors import CheckpointError, ConfigurationError
from groot_int8_ros.policy.files import atomic_directory
from offline_tools.model.checkpoint import CheckpointReader
from offline_tools.model.configuration import (
    INDEX_FILE,
    SINGLE_FILE,
    ModelConfig,
    VisionConfig,
)

_VISION_TOWER = "backbone.model.vision_model.vision_model"
_VISION = f"{_VISION_TOWER}.encoder.layers"
_CONNECTOR = "backbone.model.mlp1"
_LANGUAGE = "backbone.model.language_model.model"
_HEAD = "action_head"

# What the calibration saw (see above), reached from weights of ordinary size.
MASSIVE_ACTIVATION = 1.9e4
MASSIVE_RESIDUAL = 1.0e3
MASSIVE_LAYER = 2
VISION_RESIDUAL = 190.0
VISION_GELU = 25.0
VISION_LAST_GELU = 77.0
VISION_LATE_NORM = 80.0
# What a channel of a norm, or a neuron behind a GELU, reaches with weights of ordinary size.
_ORDINARY_NORM = 4.0
_ORDINARY_GELU = 3.0

Edit = Callable[[Tensor], Tensor]
Edits = dict[str, list[Edit]]


@dataclass(frozen=True)
class ChannelGains:
    """How much larger an outlier channel is than the others, by where it stands.

    The defaults bring channels that reach about 4 (four standard deviations of a normalised
    value) or 1 (a mean of many values) to the calibration's magnitudes. The action head was not
    part of that calibration: its gains are taken from the backbone's. Powers of two, so that
    scaling a weight and its inverse round nothing.

    Attributes:
        vision_norm: Norms of the vision tower; the calibration saw up to 20, and more only before
            the last MLPs (`vision_outliers`).
        vision_value: Input of the vision tower's `out_proj`.
        connector_norm: Norm of the connector; seen: 19.
        language_norm: Norms of the language model; seen: up to 27.
        language_value: Input of `o_proj`; seen: up to 35.
        language_mlp: Input of `down_proj`; seen: up to 180 apart from the massive activation.
        head_context: Backbone features that cross-attention reads.
        head_norm: Adaptive norms of the DiT.
        head_value: Input of the DiT's `to_out`.
    """

    vision_norm: float = 8.0
    vision_value: float = 8.0
    connector_norm: float = 4.0
    language_norm: float = 8.0
    language_value: float = 32.0
    language_mlp: float = 64.0
    head_context: float = 8.0
    head_norm: float = 8.0
    head_value: float = 32.0


CALIBRATED_GAINS = ChannelGains()


class _Plan:
    """Collects edits by checkpoint key."""

    def __init__(self) -> None:
        self.edits: Edits = {}

    def add(self, key: str, edit: Edit) -> None:
        self.edits.setdefault(key, []).append(edit)

    def rows(self, key: str, channels: Tensor, factor: float) -> None:
        """Multiply entries of a vector, or rows of a matrix."""
        self.add(key, lambda value: _scaled(value, channels, factor, axis=0))

    def columns(self, key: str, channels: Tensor, factor: float) -> None:
        """Multiply columns of a matrix, which stand for a linear layer's inputs."""
        self.add(key, lambda value: _scaled(value, channels, factor, axis=1))


def channel_outliers(
    config: ModelConfig,
    *,
    gains: ChannelGains = CALIBRATED_GAINS,
    fraction: float = 0.02,
    seed: int = 0,
) -> Edits:
    """Plan channel outliers that leave the network's function as it is.

    Pairs of producer and consumer between which a channel may be scaled exactly: a norm's weight
    and the linear layers behind it; an adaptive norm's scale and shift, likewise; `v_proj` and
    `o_proj`, because attention mixes tokens and not channels; `up_proj` and `down_proj`, because
    the gate multiplies. Not possible, and so left out: the two sides of a GELU, and the
    residual stream, which norms read.

    Args:
        config: Sizes of the model.
        gains: How much larger the channels become.
        fraction: Part of the channels at each place, at least one.
        seed: Which channels.

    Returns:
        Edits for `write_edited`.
    """
    plan = _Plan()
    random = torch.Generator().manual_seed(seed)

    def pick(width: int) -> Tensor:
        count = max(1, round(fraction * width))
        return torch.randperm(width, generator=random)[:count].sort().values

    _vision_channels(plan, config, gains, pick)
    _language_channels(plan, config, gains, pick)
    _head_channels(plan, config, gains, pick)
    return plan.edits


def massive_token(config: ModelConfig, token_id: int, *, seed: int = 0) -> Edits:
    """Plan a massive activation on every occurrence of one token, for all inputs.

    One channel of the residual stream is reserved: only the token's embedding has a value there,
    nothing before layer `MASSIVE_LAYER` writes to it. In that layer's MLP one neuron reads this
    channel alone, so it is zero for all other tokens, and reaches `MASSIVE_ACTIVATION` for this
    one. Its column of `down_proj` puts `MASSIVE_RESIDUAL` into two residual channels.

    The token may be one of the constant prefix, or the delimiter in front of an image, which
    stands between live tokens.

    Args:
        config: Sizes of the model.
        token_id: The token.
        seed: Which channels and neuron.

    Returns:
        Edits for `write_edited`.

    Raises:
        ConfigurationError: The token is an image token, which has no embedding, or none at all.
    """
    language = config.language
    if token_id == language.image_token_id or not 0 <= token_id < language.vocab_size:
        raise ConfigurationError(
            f"token {token_id} cannot be made massive: image features take the place of image "
            f"tokens, and the table has {language.vocab_size} entries. Name a text token or a "
            "delimiter."
        )
    random = torch.Generator().manual_seed(seed)
    channel, high, low = torch.randperm(language.hidden_size, generator=random)[:3].tolist()
    neuron = int(torch.randint(language.mlp_size, (1,), generator=random))
    layer = min(MASSIVE_LAYER, language.layers - 1)
    # The marked channel holds 4 of 5 parts of the token's energy, so it normalises to about
    # sqrt(4 / 5 * width), whatever attention and MLPs add in between.
    normalised = math.sqrt(0.8 * language.hidden_size)
    gain = math.sqrt(MASSIVE_ACTIVATION) / normalised
    step = MASSIVE_RESIDUAL / MASSIVE_ACTIVATION

    def mark(table: Tensor) -> Tensor:
        table = table.clone()
        table[:, channel] = 0
        table[token_id, channel] = 2.0 * table[token_id].float().norm()
        return table

    def read(weight: Tensor) -> Tensor:
        weight = weight.clone()
        weight[neuron] = 0
        weight[neuron, channel] = gain
        return weight

    def write(weight: Tensor) -> Tensor:
        weight = weight.clone()
        weight[:, neuron] = 0
        weight[high, neuron], weight[low, neuron] = step, -step
        return weight

    def pass_on(weight: Tensor) -> Tensor:
        weight = weight.clone()
        weight[channel] = 1
        return weight

    plan = _Plan()
    reserved = torch.tensor([channel])
    plan.add(f"{_LANGUAGE}.embed_tokens.weight", mark)
    plan.rows(f"{_CONNECTOR}.3.weight", reserved, 0.0)
    plan.rows(f"{_CONNECTOR}.3.bias", reserved, 0.0)
    for index in range(layer):
        plan.rows(f"{_LANGUAGE}.layers.{index}.mlp.down_proj.weight", reserved, 0.0)
    for index in range(layer + 1):
        plan.rows(f"{_LANGUAGE}.layers.{index}.self_attn.o_proj.weight", reserved, 0.0)
    prefix = f"{_LANGUAGE}.layers.{layer}"
    plan.add(f"{prefix}.post_attention_layernorm.weight", pass_on)
    plan.add(f"{prefix}.mlp.gate_proj.weight", read)
    plan.add(f"{prefix}.mlp.up_proj.weight", read)
    plan.add(f"{prefix}.mlp.down_proj.weight", write)
    return plan.edits


def vision_outliers(config: ModelConfig, *, fraction: float = 0.02, seed: int = 0) -> Edits:
    """Plan what the calibration saw in the vision tower that no exact rescaling can reach.

    - Behind the GELU, the input of `fc2`: 23.5 in layer 9 of 27 (1 to 2 in its neighbours), up to
      25 in the last quarter of the layers, 77 in the last one. Here rows of `fc1` are larger in a
      few neurons, and `fc2` reads them by as much less: their GELU turns into a ramp.
    - The norm before the late `fc1` reaches 85. This alone would leave the function as it is.
    - The residual stream: 165 from layer 9 on, 190 at the end. Here it is on the patches of one
      corner, `VISION_RESIDUAL` up in one channel and down in another, from the embedding on.

    A calibration has one range a tensor and does not say how many patches reach it. In every patch
    is the harder case behind the GELU, for a scale a row too. In the residual stream it would be
    no case at all, because the norms would divide all else by it: few patches then, as other
    vision transformers have it (Darcet et al., arXiv 2309.16588).

    Args:
        config: Sizes of the model.
        fraction: Part of the channels at each place, at least one.
        seed: Which channels.

    Returns:
        Edits for `write_edited`.
    """
    vision = config.vision
    plan = _Plan()
    random = torch.Generator().manual_seed(seed)

    def pick(width: int) -> Tensor:
        return torch.randperm(width, generator=random)[: max(1, round(fraction * width))]

    _mark_corner(plan, vision, random)
    late = range(vision.layers - max(1, vision.layers // 4), vision.layers)
    for index in sorted({vision.layers // 3, *late}):
        layer = f"{_VISION}.{index}"
        fc1, fc2 = f"{layer}.mlp.fc1", f"{layer}.mlp.fc2.weight"
        if index in late:
            gain = VISION_LATE_NORM / _ORDINARY_NORM
            channels = pick(vision.hidden_size)
            _norm_to_linear(plan, f"{layer}.layer_norm2", [f"{fc1}.weight"], channels, gain)
        reached = VISION_LAST_GELU if index == vision.layers - 1 else VISION_GELU
        channels = pick(vision.mlp_size)
        for leaf in ("weight", "bias"):
            plan.rows(f"{fc1}.{leaf}", channels, reached / _ORDINARY_GELU)
        plan.columns(fc2, channels, _ORDINARY_GELU / reached)
    return plan.edits


def write_edited(checkpoint: Path, output: Path, edits: Mapping[str, list[Edit]]) -> None:
    """Write a copy of a checkpoint with edited weights, one shard in memory at a time.

    Args:
        checkpoint: The checkpoint; left as it is.
        output: Folder to write; replaced if it exists.
        edits: Edits by key, applied in order.

    Raises:
        CheckpointError: The checkpoint is damaged, or lacks a tensor that is to be edited.
        OutputError: The folder cannot be written.
    """
    reader = CheckpointReader(checkpoint)
    missing = [key for key in edits if key not in reader]
    if missing:
        raise CheckpointError(
            f"{checkpoint} has no {missing[0]}: its configuration names another model than its "
            "weights. Use the config.json (and eagle_config.json) that belong to these weights."
        )
    weights = {file.name for file in reader.files} | {SINGLE_FILE, INDEX_FILE}
    with atomic_directory(output) as folder:
        for path in sorted(checkpoint.iterdir()):
            if path.is_file() and path.name not in weights:
                shutil.copyfile(path, folder / path.name)
        for file in reader.files:
            keys = [key for key in reader.keys if reader.file(key) == file]
            save_file(
                {key: _edited(reader.tensor(key), edits.get(key, [])) for key in keys},
                folder / file.name,
            )
        if reader.files[0].name != SINGLE_FILE:
            _write_index(folder / INDEX_FILE, reader)


def _write_index(path: Path, reader: CheckpointReader) -> None:
    weight_map = {key: reader.file(key).name for key in reader.keys}
    content = {"metadata": {}, "weight_map": weight_map}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _edited(tensor: Tensor, edits: list[Edit]) -> Tensor:
    for edit in edits:
        tensor = edit(tensor)
    return tensor.contiguous()


def _scaled(value: Tensor, channels: Tensor, factor: float, axis: int) -> Tensor:
    value = value.clone()
    value.index_copy_(axis, channels, value.index_select(axis, channels) * factor)
    return value


def _vision_channels(
    plan: _Plan, config: ModelConfig, gains: ChannelGains, pick: Callable[[int], Tensor]
) -> None:
    width = config.vision.hidden_size
    for index in range(config.vision.layers):
        layer = f"{_VISION}.{index}"
        attention = f"{layer}.self_attn"
        inputs = [f"{attention}.{name}.weight" for name in ("q_proj", "k_proj", "v_proj")]
        _norm_to_linear(plan, f"{layer}.layer_norm1", inputs, pick(width), gains.vision_norm)
        inputs = [f"{layer}.mlp.fc1.weight"]
        _norm_to_linear(plan, f"{layer}.layer_norm2", inputs, pick(width), gains.vision_norm)
        channels = pick(width)
        for leaf in ("weight", "bias"):
            plan.rows(f"{attention}.v_proj.{leaf}", channels, gains.vision_value)
        plan.columns(f"{attention}.out_proj.weight", channels, 1 / gains.vision_value)
    _norm_to_linear(
        plan,
        f"{_CONNECTOR}.0",
        [f"{_CONNECTOR}.1.weight"],
        pick(4 * width),
        gains.connector_norm,
    )


def _mark_corner(plan: _Plan, vision: VisionConfig, random: Generator) -> None:
    """Give the patches of the upper left corner two residual channels of opposite value."""
    high, low = torch.randperm(vision.hidden_size, generator=random)[:2].tolist()

    def mark(table: Tensor) -> Tensor:
        # A block: the table is resized to the image's patches, which would wash out one position.
        side, edge = vision.grid_side, vision.grid_side // 4
        table = table.clone()
        table[:, [high, low]] = 0
        corner = table.view(side, side, -1)[:edge, :edge]
        corner[..., high], corner[..., low] = VISION_RESIDUAL, -VISION_RESIDUAL
        return table

    embeddings = f"{_VISION_TOWER}.embeddings"
    plan.add(f"{embeddings}.position_embedding.weight", mark)
    for leaf in ("weight", "bias"):
        plan.rows(f"{embeddings}.patch_embedding.{leaf}", torch.tensor([high, low]), 0.0)


def _language_channels(
    plan: _Plan, config: ModelConfig, gains: ChannelGains, pick: Callable[[int], Tensor]
) -> None:
    language = config.language
    for index in range(language.layers):
        layer = f"{_LANGUAGE}.layers.{index}"
        attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
        for norm, consumers in (
            ("input_layernorm", [f"{attention}.{name}_proj.weight" for name in "qkv"]),
            ("post_attention_layernorm", [f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight"]),
        ):
            channels = pick(language.hidden_size)
            plan.rows(f"{layer}.{norm}.weight", channels, gains.language_norm)
            for key in consumers:
                plan.columns(key, channels, 1 / gains.language_norm)
        channels = pick(language.kv_heads * language.head_dim)
        plan.rows(f"{attention}.v_proj.weight", channels, gains.language_value)
        # Each value head is read by a group of query heads, whose outputs stand side by side.
        group = language.heads // language.kv_heads
        head, lane = channels // language.head_dim, channels % language.head_dim
        readers = (head[:, None] * group + torch.arange(group)) * language.head_dim
        outputs = (readers + lane[:, None]).flatten()
        plan.columns(f"{attention}.o_proj.weight", outputs, 1 / gains.language_value)
        channels = pick(language.mlp_size)
        plan.rows(f"{mlp}.up_proj.weight", channels, gains.language_mlp)
        plan.columns(f"{mlp}.down_proj.weight", channels, 1 / gains.language_mlp)


def _head_channels(
    plan: _Plan, config: ModelConfig, gains: ChannelGains, pick: Callable[[int], Tensor]
) -> None:
    width = config.dit.width
    blocks = [f"{_HEAD}.model.transformer_blocks.{index}" for index in range(config.dit.layers)]
    cross = blocks[::2]
    if config.use_vlln:
        readers = [f"{block}.attn1.{name}.weight" for block in cross for name in ("to_k", "to_v")]
        channels = pick(config.dit.cross_dim)
        _norm_to_linear(plan, f"{_HEAD}.vlln", readers, channels, gains.head_context)
    for index, block in enumerate(blocks):
        channels = pick(width)
        projections = ("to_q",) if index % 2 == 0 else ("to_q", "to_k", "to_v")
        _adaptive_norm(
            plan, f"{block}.norm1.linear", channels, gains.head_norm, first_is_scale=True
        )
        for name in projections:
            plan.columns(f"{block}.attn1.{name}.weight", channels, 1 / gains.head_norm)
        channels = pick(width)
        for leaf in ("weight", "bias"):
            plan.rows(f"{block}.attn1.to_v.{leaf}", channels, gains.head_value)
        plan.columns(f"{block}.attn1.to_out.0.weight", channels, 1 / gains.head_value)
    channels = pick(width)
    _adaptive_norm(
        plan, f"{_HEAD}.model.proj_out_1", channels, gains.head_norm, first_is_scale=False
    )
    plan.columns(f"{_HEAD}.model.proj_out_2.weight", channels, 1 / gains.head_norm)


def _norm_to_linear(
    plan: _Plan, norm: str, consumers: list[str], channels: Tensor, gain: float
) -> None:
    for leaf in ("weight", "bias"):
        plan.rows(f"{norm}.{leaf}", channels, gain)
    for key in consumers:
        plan.columns(key, channels, 1 / gain)


def _adaptive_norm(
    plan: _Plan, linear: str, channels: Tensor, gain: float, *, first_is_scale: bool
) -> None:
    """Scale channels of x * (1 + scale) + shift, where one linear layer gives scale and shift.

    gain * (1 + scale) = 1 + (gain * scale + gain - 1): the bias takes gain - 1 more. That sum
    does not fit bfloat16, so the layer is stored in float32.
    """

    def both(value: Tensor) -> tuple[Tensor, Tensor]:
        rows = value.shape[0] // 2
        return channels, channels + rows

    def multiply(value: Tensor) -> Tensor:
        return _scaled(value.float(), torch.cat(both(value)), gain, axis=0)

    def lift(bias: Tensor) -> Tensor:
        lifted = multiply(bias)
        lifted[both(bias)[0 if first_is_scale else 1]] += gain - 1
        return lifted

    plan.add(f"{linear}.weight", multiply)
    plan.add(f"{linear}.bias", lift)
