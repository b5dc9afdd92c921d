"""The work of the reference graphs, computed from a configuration alone.

Owns: `reference_backbone`, its vision tower alone, and `reference_head`, layer by layer. Must not
import torch: a robot fits the roofline to published measurements with it, and those were made with
the reference graphs. A test holds it against what PyTorch's modules do.
"""

from __future__ import annotations

from collections.abc import Iterator

from offline_tools.cost.work import ATTENTION, NORM, SOFTMAX, GraphWork, Launch, kind_of
from offline_tools.model.configuration import ModelConfig

_HALF, _FLOAT = 2, 4
_MERGED_PATCHES = 4
_TIMESTEP_CHANNELS = 256


def _product(name: str, rows: int, inner: int, columns: int, size: int = _HALF) -> Launch:
    read, written = size * rows * inner, size * rows * columns
    return Launch(
        kind_of(name),
        2 * rows * inner * columns,
        size * inner * columns,
        read + written,
        name,
        input_bytes=read,
    )


def _norm(rows: int, width: int, size: int = _HALF) -> Launch:
    return Launch(NORM, 0, 0, 2 * size * rows * width)


def _attention(batch: int, queries: int, keys: int, width: int) -> Iterator[Launch]:
    """Yield scores, softmax and mixture; `batch` counts images and heads, `width` is a head's."""
    flops = 2 * batch * queries * keys * width
    scores = batch * queries * keys
    moved = _HALF * (batch * (queries + keys) * width + scores)
    yield Launch(ATTENTION, flops, 0, moved)
    yield Launch(SOFTMAX, 0, 0, 2 * _HALF * scores)
    yield Launch(ATTENTION, flops, 0, moved)


def _vision(config: ModelConfig, images: int, patches: int) -> Iterator[Launch]:
    vision = config.vision
    rows, width = images * patches, vision.hidden_size
    yield _product("vision.embedding", rows, vision.channels * vision.patch_size**2, width)
    for layer in range(vision.layers):
        name = f"vision.{layer}"
        yield _norm(rows, width)
        for part in ("q_proj", "k_proj", "v_proj"):
            yield _product(f"{name}.attn.{part}", rows, width, width)
        yield from _attention(images * vision.heads, patches, patches, width // vision.heads)
        yield _product(f"{name}.attn.out_proj", rows, width, width)
        yield _norm(rows, width)
        yield _product(f"{name}.mlp.fc1", rows, width, vision.mlp_size)
        yield _product(f"{name}.mlp.fc2", rows, vision.mlp_size, width)
    yield _norm(rows, width)


def _language(config: ModelConfig, tokens: int) -> Iterator[Launch]:
    language = config.language
    width, head = language.hidden_size, language.head_dim
    for layer in range(language.layers):
        name = f"language.{layer}"
        yield _norm(tokens, width)
        for part, heads in (("q", language.heads), ("k", language.kv_heads)):
            yield _product(f"{name}.attn.{part}_proj", tokens, width, heads * head)
            yield _norm(tokens * heads, head)
        yield _product(f"{name}.attn.v_proj", tokens, width, language.kv_heads * head)
        yield from _attention(language.heads, tokens, tokens, head)
        yield _product(f"{name}.attn.o_proj", tokens, language.heads * head, width)
        yield _norm(tokens, width)
        for part in ("gate", "up"):
            yield _product(f"{name}.mlp.{part}", tokens, width, language.mlp_size)
        yield _product(f"{name}.mlp.down", tokens, language.mlp_size, width)
    yield _norm(tokens, width)


def reference_vision(config: ModelConfig, images: int, image_shape: tuple[int, int]) -> GraphWork:
    """Return the vision tower's work in half precision; see `reference_backbone`."""
    side = config.vision.patch_size
    patches = (image_shape[0] // side) * (image_shape[1] // side)
    return GraphWork("vision", 1, tuple(_vision(config, images, patches)), 0)


def reference_backbone(
    config: ModelConfig, images: int, image_shape: tuple[int, int], tokens: int
) -> GraphWork:
    """Return the backbone's work in half precision.

    Args:
        config: Sizes of the model.
        images: Number of frames.
        image_shape: Height and width of a frame in pixels.
        tokens: Length of the prompt, image tokens included.
    """
    side = config.vision.patch_size
    patches = (image_shape[0] // side) * (image_shape[1] // side)
    merged = images * patches // _MERGED_PATCHES
    inner = _MERGED_PATCHES * config.vision.hidden_size
    width = config.language.hidden_size
    launches = (
        *reference_vision(config, images, image_shape).launches,
        _norm(merged, inner),
        _product("mlp1.1", merged, inner, width),
        _product("mlp1.3", merged, width, width),
        *_language(config, tokens),
    )
    return GraphWork("backbone", 1, launches, _HALF * config.language.vocab_size * width)


def reference_head(
    config: ModelConfig, tokens: int, horizon: int, steps: int, *, cached: bool = False
) -> tuple[GraphWork, ...]:
    """Return the action head's work: what runs once an observation, and once a step.

    Args:
        config: Sizes of the model.
        tokens: Length of the prompt.
        horizon: Action tokens.
        steps: Denoising steps.
        cached: Whether keys and values of the cross-attention are computed once an observation,
            as some runtimes do, and not in every step.
    """
    dit, mlp = config.dit, config.mlp_size
    width, rows = dit.width, 1 + horizon

    def cross(block: int) -> Iterator[Launch]:
        for part in "kv":
            name = f"transformer_blocks.{block}.attn1.to_{part}"
            yield _product(name, tokens, dit.cross_dim, width)

    once = [
        _norm(tokens, dit.cross_dim, _FLOAT),
        _product("state_encoder.layer1", 1, config.max_state_dim, mlp, _FLOAT),
        _product("state_encoder.layer2", 1, mlp, width, _FLOAT),
    ]
    step = [
        _product("action_encoder.W1", horizon, config.max_action_dim, width, _FLOAT),
        _product("action_encoder.W2", horizon, 2 * width, width, _FLOAT),
        _product("action_encoder.W3", horizon, width, width, _FLOAT),
        _product("timestep_encoder.linear_1", 1, _TIMESTEP_CHANNELS, width),
        _product("timestep_encoder.linear_2", 1, width, width),
    ]
    for block in range(dit.layers):
        name = f"transformer_blocks.{block}"
        step += [_product(f"{name}.norm1.linear", 1, width, 2 * width), _norm(rows, width)]
        step.append(_product(f"{name}.attn1.to_q", rows, width, width))
        if block % 2:
            step += [_product(f"{name}.attn1.to_{part}", rows, width, width) for part in "kv"]
        else:
            (once if cached else step).extend(cross(block))
        keys = rows if block % 2 else tokens
        step += _attention(dit.heads, rows, keys, dit.head_dim)
        step += [
            _product(f"{name}.attn1.to_out", rows, width, width),
            _norm(rows, width),
            _product(f"{name}.ff.net.0", rows, width, 4 * width),
            _product(f"{name}.ff.net.2", rows, 4 * width, width),
        ]
    step += [
        _product("proj_out_1", 1, width, 2 * width),
        _norm(rows, width),
        _product("proj_out_2", rows, width, dit.output_dim),
        _product("action_decoder.layer1", horizon, dit.output_dim, mlp, _FLOAT),
        _product("action_decoder.layer2", horizon, mlp, config.max_action_dim, _FLOAT),
    ]
    return (
        GraphWork("conditioner", 1, tuple(once), 0),
        GraphWork("denoising step", steps, tuple(step), 0),
    )
