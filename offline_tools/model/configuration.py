"""The sizes of a GR00T N1.6 model, read from a checkpoint's own files.

Owns: the frozen configuration of every part and the rules by which sparse or contradicting files
are read. Must not import torch or transformers, so that sizes can be asked for anywhere.

Three files speak. `config.json` of the checkpoint sizes the action head and may be sparse: the
reference stores only what differs from its defaults, so an absent field has the public N1.6 value
(Isaac-GR00T, gr00t/configs/model/gr00t_n1d6.py). The vision tower and the language model are sized
by the Eagle configuration, which released checkpoints do not carry: the public one
(nvidia/Eagle-Block2A-2B-v2) is the default, and an `eagle_config.json` beside the checkpoint or an
explicit path takes its place. `processor_config.json` knows the horizon that was trained.
Whatever the model here does not implement is refused by name instead of being computed wrongly.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from groot_int8_ros.errors import CheckpointError
from groot_int8_ros.policy.files import read_json

CONFIG_FILE = "config.json"
EAGLE_CONFIG_FILE = "eagle_config.json"
PROCESSOR_CONFIG_FILE = "processor_config.json"
# The weights: in one file, or the index of several.
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of the SigLIP2 vision tower; the defaults are the public N1.6 values.

    Attributes:
        hidden_size: Width of a patch's features.
        layers: Number of transformer layers.
        heads: Attention heads of a layer.
        mlp_size: Inner width of a layer's MLP.
        positions: Entries of the learned position table, a square grid.
        patch_size: Side of a square patch in pixels.
        channels: Colour channels of a frame.
        norm_eps: Epsilon of the layer norms.
    """

    hidden_size: int = 1152
    layers: int = 27
    heads: int = 16
    mlp_size: int = 4304
    positions: int = 256
    patch_size: int = 14
    channels: int = 3
    norm_eps: float = 1e-6

    @property
    def grid_side(self) -> int:
        """Side of the square grid that the position table describes."""
        return math.isqrt(self.positions)


@dataclass(frozen=True)
class LanguageConfig:
    """Sizes of the truncated Qwen3 language model; the defaults are the public N1.6 values.

    Attributes:
        hidden_size: Width of a token's features.
        layers: Layers that are kept (`select_layer` of the checkpoint).
        heads: Query heads of a layer.
        kv_heads: Key and value heads of a layer.
        head_dim: Width of one head.
        mlp_size: Inner width of a layer's MLP.
        norm_eps: Epsilon of the RMS norms.
        rope_theta: Base of the rotary frequencies.
        vocab_size: Rows of the embedding table.
        max_positions: Longest sequence the language model was made for, in tokens.
        image_token_id: Token that image features take the place of.
    """

    hidden_size: int = 2048
    layers: int = 16
    heads: int = 16
    kv_heads: int = 8
    head_dim: int = 128
    mlp_size: int = 6144
    norm_eps: float = 1e-6
    rope_theta: float = 1e6
    vocab_size: int = 151680
    max_positions: int = 40960
    image_token_id: int = 151669


@dataclass(frozen=True)
class DiTConfig:
    """Sizes of the alternate vision-language DiT; the defaults are the public N1.6 values.

    Attributes:
        layers: Number of blocks; even ones attend to the backbone, odd ones to the actions.
        heads: Attention heads of a block.
        head_dim: Width of one head.
        output_dim: Width of the output head.
        norm_eps: Epsilon of the plain norm before a block's MLP.
        text_period: `attend_text_every_n_blocks`: of this many cross-attention blocks the first
            attends to text tokens and the others to image tokens.
        cross_dim: Width of the backbone features that cross-attention reads.
    """

    layers: int = 32
    heads: int = 32
    head_dim: int = 48
    output_dim: int = 1024
    norm_eps: float = 1e-5
    text_period: int = 2
    cross_dim: int = 2048

    @property
    def width(self) -> int:
        """Width of a state or action token inside the DiT."""
        return self.heads * self.head_dim


@dataclass(frozen=True)
class ModelConfig:
    """Everything that shapes a GR00T N1.6 model.

    Attributes:
        vision: Vision tower.
        language: Language model.
        dit: Diffusion transformer.
        max_state_dim: Padded width of the state.
        max_action_dim: Padded width of an action.
        action_horizon: Action tokens the model runs: the trained horizon.
        max_embodiments: Slices of each category-specific layer.
        mlp_size: Inner width of the state encoder and the action decoder (`hidden_size`).
        max_seq_len: Rows of the action position table.
        add_position_embedding: Whether action tokens get a learned position.
        use_vlln: Whether the backbone features pass a layer norm.
        timestep_buckets: Integer time buckets of the flow.
        denoising_steps: Euler steps the checkpoint asks for.
    """

    vision: VisionConfig = VisionConfig()
    language: LanguageConfig = LanguageConfig()
    dit: DiTConfig = DiTConfig()
    max_state_dim: int = 29
    max_action_dim: int = 29
    action_horizon: int = 16
    max_embodiments: int = 32
    mlp_size: int = 1024
    max_seq_len: int = 1024
    add_position_embedding: bool = True
    use_vlln: bool = True
    timestep_buckets: int = 1000
    denoising_steps: int = 4


@dataclass(frozen=True)
class _Fields:
    """One JSON object with typed access whose errors name the file and the field."""

    values: Mapping[str, Any]
    origin: str

    def size(self, name: str, default: int) -> int:
        value = self.values.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CheckpointError(
                f"{self.origin}: {name} is {value!r}, expected a positive integer. Restore the "
                "file that was saved with the checkpoint."
            )
        return value

    def number(self, name: str, default: float) -> float:
        value = self.values.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise CheckpointError(
                f"{self.origin}: {name} is {value!r}, expected a positive number. Restore the "
                "file that was saved with the checkpoint."
            )
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.values.get(name, default)
        if not isinstance(value, bool):
            raise CheckpointError(
                f"{self.origin}: {name} is {value!r}, expected true or false. Restore the file "
                "that was saved with the checkpoint."
            )
        return value

    def part(self, name: str) -> _Fields:
        value = self.values.get(name)
        if value is None:
            value = {}
        if not isinstance(value, Mapping):
            raise CheckpointError(
                f"{self.origin}: {name} is not an object. Restore the file that was saved with "
                "the checkpoint."
            )
        return _Fields(value, f"{self.origin}, {name}")

    def require(self, name: str, supported: tuple[object, ...], default: object) -> None:
        """Refuse a field whose value asks for something that is not implemented."""
        value = self.values.get(name, default)
        # 0 == False in Python; a rate of 0 and a switch that is off mean the same here.
        if value not in supported:
            wanted = " or ".join(json.dumps(item) for item in supported)
            raise CheckpointError(
                f"{self.origin}: {name} is {json.dumps(value)}; only {wanted} is implemented, as "
                "in the public N1.6 model. This checkpoint cannot be exported."
            )


def _read_json(path: Path) -> _Fields:
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read as JSON ({error}). Copy the checkpoint again."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object. Copy the checkpoint again.")
    return _Fields(content, str(path))


def _vision_config(eagle: _Fields) -> VisionConfig:
    fields = eagle.part("vision_config")
    fields.require("model_type", ("siglip2_vision_model",), "siglip2_vision_model")
    fields.require("hidden_act", ("gelu_pytorch_tanh",), "gelu_pytorch_tanh")
    fields.require("num_channels", (3,), 3)
    fields.require("use_rope", (False,), False)
    fields.require("use_windows_attn", (False,), False)
    public = VisionConfig()
    vision = VisionConfig(
        hidden_size=fields.size("hidden_size", public.hidden_size),
        layers=fields.size("num_hidden_layers", public.layers),
        heads=fields.size("num_attention_heads", public.heads),
        mlp_size=fields.size("intermediate_size", public.mlp_size),
        positions=fields.size("num_patches", public.positions),
        patch_size=fields.size("patch_size", public.patch_size),
        norm_eps=fields.number("layer_norm_eps", public.norm_eps),
    )
    if vision.grid_side**2 != vision.positions:
        raise CheckpointError(
            f"{fields.origin}: num_patches is {vision.positions}, which is no square grid of "
            "positions. Restore the Eagle configuration that the checkpoint was trained with."
        )
    if vision.hidden_size % vision.heads:
        raise CheckpointError(
            f"{fields.origin}: hidden_size {vision.hidden_size} does not divide into "
            f"{vision.heads} heads. Restore the Eagle configuration of the training."
        )
    return vision


def _language_config(eagle: _Fields, select_layer: int) -> LanguageConfig:
    fields = eagle.part("text_config")
    fields.require("model_type", ("qwen3",), "qwen3")
    fields.require("architectures", (["Qwen3ForCausalLM"], None), None)
    fields.require("hidden_act", ("silu",), "silu")
    fields.require("rope_scaling", (None,), None)
    fields.require("use_sliding_window", (False,), False)
    fields.require("attention_bias", (False,), False)
    public = LanguageConfig()
    language = LanguageConfig(
        hidden_size=fields.size("hidden_size", public.hidden_size),
        # The reference drops layers from the end until `select_layer` are left.
        layers=min(select_layer, fields.size("num_hidden_layers", 28)),
        heads=fields.size("num_attention_heads", public.heads),
        kv_heads=fields.size("num_key_value_heads", public.kv_heads),
        head_dim=fields.size("head_dim", public.head_dim),
        mlp_size=fields.size("intermediate_size", public.mlp_size),
        norm_eps=fields.number("rms_norm_eps", public.norm_eps),
        rope_theta=fields.number("rope_theta", public.rope_theta),
        vocab_size=fields.size("vocab_size", public.vocab_size),
        max_positions=fields.size("max_position_embeddings", public.max_positions),
        image_token_id=eagle.size("image_token_index", public.image_token_id),
    )
    if language.heads % language.kv_heads or language.head_dim % 2:
        raise CheckpointError(
            f"{fields.origin}: {language.heads} query heads over {language.kv_heads} key heads of "
            f"{language.head_dim} is not a grouped attention with rotary positions. Restore the "
            "Eagle configuration of the training."
        )
    return language


def _eagle_parts(eagle: _Fields, select_layer: int) -> tuple[VisionConfig, LanguageConfig]:
    eagle.require("downsample_ratio", (0.5,), 0.5)
    eagle.require("use_pixel_shuffle", (True,), True)
    eagle.require("mlp_connector_layers", (2,), 2)
    # -1: the connector reads the vision tower's last layer.
    eagle.require("select_layer", (-1,), -1)
    eagle.require("use_backbone_lora", (0, None), 0)
    eagle.require("use_llm_lora", (0, None), 0)
    return _vision_config(eagle), _language_config(eagle, select_layer)


def _dit_config(config: _Fields, cross_dim: int) -> DiTConfig:
    public = DiTConfig(cross_dim=cross_dim)
    period = config.size("attend_text_every_n_blocks", public.text_period)
    if config.values.get("diffusion_model_cfg") is None:
        return DiTConfig(text_period=period, cross_dim=cross_dim)
    fields = config.part("diffusion_model_cfg")
    fields.require("norm_type", ("ada_norm",), "ada_norm")
    fields.require("positional_embeddings", (None,), None)
    fields.require("interleave_self_attention", (True,), True)
    fields.require("attention_bias", (True,), True)
    fields.require("activation_fn", ("gelu-approximate",), "gelu-approximate")
    fields.require("norm_elementwise_affine", (False,), False)
    # The object is the reference's default as a whole or saved as a whole: what it lacks has the
    # default of the reference's DiT class, which is not the public model's size.
    return DiTConfig(
        layers=fields.size("num_layers", 12),
        heads=fields.size("num_attention_heads", 8),
        head_dim=fields.size("attention_head_dim", 64),
        output_dim=fields.size("output_dim", 26),
        norm_eps=fields.number("norm_eps", public.norm_eps),
        text_period=period,
        cross_dim=cross_dim,
    )


def _agree(origin: str, first: tuple[str, int], second: tuple[str, int], advice: str) -> None:
    if first[1] != second[1]:
        raise CheckpointError(
            f"{origin}: {first[0]} is {first[1]} but {second[0]} is {second[1]}; the model cannot "
            f"be put together from both. {advice}"
        )


def _processor_limits(checkpoint: Path) -> _Fields | None:
    path = checkpoint / PROCESSOR_CONFIG_FILE
    if not path.exists():
        return None
    return _read_json(path).part("processor_kwargs")


def require_checkpoint(folder: Path) -> None:
    """Refuse a path that leads to no checkpoint.

    Raises:
        CheckpointError: It is no folder, or has no `config.json`.
    """
    layout = (
        f"A checkpoint is a folder with {CONFIG_FILE}, {PROCESSOR_CONFIG_FILE}, statistics.json "
        "and model.safetensors (or its shards with model.safetensors.index.json)"
    )
    if not folder.is_dir():
        what = "not a folder" if folder.exists() else "no such folder"
        raise CheckpointError(f"{what}: {folder}. {layout}; give its path.")
    if not (folder / CONFIG_FILE).is_file():
        raise CheckpointError(
            f"{folder / CONFIG_FILE} is missing. {layout}; give its path, or copy what is missing."
        )


def find_eagle_config(checkpoint: Path, eagle_config: Path | None = None) -> Path | None:
    """Return the Eagle configuration that sizes a checkpoint's backbone.

    Args:
        checkpoint: Folder of the checkpoint.
        eagle_config: A path that the user gave, or None.

    Returns:
        The user's path, else `eagle_config.json` in the checkpoint's folder, else None: the
        public sizes.
    """
    if eagle_config is not None:
        return eagle_config
    beside = checkpoint / EAGLE_CONFIG_FILE
    return beside if beside.exists() else None


def load_model_config(
    checkpoint: Path, eagle_config: Path | None = None
) -> tuple[ModelConfig, tuple[str, ...]]:
    """Read the sizes of the model that a checkpoint holds.

    Args:
        checkpoint: Folder with `config.json` and, where the horizon has to be known, the
            processor's `processor_config.json`.
        eagle_config: Eagle configuration that sizes vision tower and language model; if None, the
            one beside the checkpoint, else the public sizes.

    Returns:
        The configuration and notes: decisions that the user should see.

    Raises:
        CheckpointError: A file is missing or damaged, two files contradict each other, or one
            asks for something that is not implemented.
    """
    notes: list[str] = []
    require_checkpoint(checkpoint)
    config = _read_json(checkpoint / CONFIG_FILE)
    config.require("model_type", ("Gr00tN1d6",), "Gr00tN1d6")
    config.require("use_alternate_vl_dit", (True,), True)
    config.require("reproject_vision", (False,), False)

    path = find_eagle_config(checkpoint, eagle_config)
    if path is None:
        eagle = _Fields({}, "the public Eagle configuration")
        notes.append(
            f"no {EAGLE_CONFIG_FILE} was given or found: vision tower and language model have "
            "the public N1.6 sizes"
        )
    else:
        if not path.is_file():
            raise CheckpointError(
                f"{path} is {'a folder' if path.is_dir() else 'missing'}. --eagle-config takes "
                "the JSON file of the training's Eagle model (config.json in its folder, with "
                f"vision_config and text_config); without the option {EAGLE_CONFIG_FILE} in the "
                "checkpoint's folder is read, if it is there."
            )
        eagle = _read_json(path)
    vision, language = _eagle_parts(eagle, config.size("select_layer", 16))

    cross_dim = config.size("backbone_embedding_dim", 2048)
    dit = _dit_config(config, cross_dim)
    mlp_size = config.size("hidden_size", 1024)
    _agree(
        config.origin,
        ("backbone_embedding_dim", cross_dim),
        (f"the language model's hidden_size in {eagle.origin}", language.hidden_size),
        "Pass --eagle-config with the Eagle configuration that the checkpoint was trained with.",
    )
    restore = "Restore the config.json that was saved with the checkpoint."
    _agree(
        config.origin,
        ("input_embedding_dim", config.size("input_embedding_dim", 1536)),
        ("num_attention_heads x attention_head_dim of the DiT", dit.width),
        restore,
    )
    _agree(
        config.origin,
        ("hidden_size", mlp_size),
        ("output_dim of the DiT", dit.output_dim),
        restore,
    )

    result = ModelConfig(
        vision=vision,
        language=language,
        dit=dit,
        max_state_dim=config.size("max_state_dim", 29),
        max_action_dim=config.size("max_action_dim", 29),
        action_horizon=config.size("action_horizon", 16),
        max_embodiments=config.size("max_num_embodiments", 32),
        mlp_size=mlp_size,
        max_seq_len=config.size("max_seq_len", 1024),
        add_position_embedding=config.flag("add_pos_embed", True),
        use_vlln=config.flag("use_vlln", True),
        timestep_buckets=config.size("num_timestep_buckets", 1000),
        denoising_steps=config.size("num_inference_timesteps", 4),
    )
    result, more = _with_processor(result, checkpoint, config.origin)
    if result.add_position_embedding and result.action_horizon > result.max_seq_len:
        raise CheckpointError(
            f"{config.origin}: action_horizon {result.action_horizon} is longer than the "
            f"{result.max_seq_len} learned positions (max_seq_len). {restore}"
        )
    return result, (*notes, *more)


def _with_processor(
    config: ModelConfig, checkpoint: Path, origin: str
) -> tuple[ModelConfig, tuple[str, ...]]:
    """Let the processor's files correct the horizon and check the padded widths."""
    limits = _processor_limits(checkpoint)
    if limits is None:
        return config, ()
    for name, value in (
        ("max_state_dim", config.max_state_dim),
        ("max_action_dim", config.max_action_dim),
    ):
        _agree(
            f"{origin} and {limits.origin}",
            (f"{name} of the model", value),
            (f"{name} of the processor", limits.size(name, 29)),
            "Use the two files that were saved together.",
        )
    trained = limits.size("max_action_horizon", config.action_horizon)
    if trained >= config.action_horizon:
        return config, ()
    # A fine-tune can keep the base model's action_horizon in config.json although it trained
    # with fewer action tokens; the surplus tokens would be untrained and disturb the others.
    note = (
        f"{trained} action tokens are run, as in training (max_action_horizon in "
        f"{PROCESSOR_CONFIG_FILE}), and not the {config.action_horizon} of action_horizon in "
        f"{CONFIG_FILE}; the reference code runs all {config.action_horizon}: its actions differ"
    )
    return replace(config, action_horizon=trained), (note,)
