"""The reference graphs of a bundle: which module each is traced from and where its weights lie.

Owns: names, shapes and weights of the five graphs. The tensor contracts of `backbone` and `dit`
are those that the community's GR00T N1.6 exporters use (Isaac-GR00T, scripts/deployment), so a
bundle's graphs drop into other runtimes; `conditioner`, `action_encoder` and `action_decoder` hold
what stands around the DiT, for one embodiment, always in float32: they cost next to nothing and
carry the actions themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from offline_tools.export.graph import GraphInput, GraphSpec, WeightSource
from offline_tools.model.action_head import (
    ActionDecoder,
    ActionEncoder,
    Conditioner,
    embodiment_row,
)
from offline_tools.model.backbone import Backbone, resize_positions, rotary_frequencies
from offline_tools.model.configuration import ModelConfig
from offline_tools.model.dit import AlternateVLDiT

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16}

POSITION_TABLE = "backbone.model.vision_model.vision_model.embeddings.position_embedding.weight"

_POSITION = "vision_position"


@dataclass(frozen=True)
class ReferenceGraph:
    """One graph to be exported.

    Attributes:
        spec: What is traced.
        weights: Gives each parameter's value, read from the checkpoint when asked.
        precision: `fp32` or `fp16`.
    """

    spec: GraphSpec
    weights: WeightSource
    precision: str


class _BackboneGraph(nn.Module):
    """The backbone with the position embedding of one image size as a weight."""

    def __init__(self, config: ModelConfig, patches: int) -> None:
        super().__init__()
        self.backbone = Backbone(config)
        self.vision_position = nn.Parameter(torch.empty(1, patches, config.vision.hidden_size))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        result: tuple[Tensor, Tensor, Tensor] = self.backbone(
            input_ids, attention_mask, pixel_values, self.vision_position
        )
        return result


def reference_graphs(
    config: ModelConfig,
    checkpoint: WeightSource,
    *,
    embodiment_id: int,
    image_shape: tuple[int, int],
    precision: str,
) -> dict[str, ReferenceGraph]:
    """Describe the five graphs of a bundle, by the names of `families.GRAPH_FILES`.

    Args:
        config: Sizes of the model.
        checkpoint: Gives a tensor by its key in the released layout.
        embodiment_id: Row of the category-specific weights that the small graphs take.
        image_shape: Height and width of the network's images in pixels.
        precision: `fp32` or `fp16`, for the backbone and the DiT.
    """
    dtype = PRECISIONS[precision]
    head = _head_weights(checkpoint, embodiment_id)
    width, tokens = config.dit.width, 1 + config.action_horizon

    def small(
        build: Callable[[], nn.Module], inputs: dict[str, GraphInput], outputs: tuple[str, ...]
    ) -> ReferenceGraph:
        return ReferenceGraph(GraphSpec(build, inputs, outputs, torch.float32), head, "fp32")

    def real(*shape: int | str, dtype: torch.dtype = torch.float32) -> GraphInput:
        return GraphInput(shape, dtype)

    return {
        "backbone": _backbone_graph(config, checkpoint, image_shape, precision),
        "conditioner": small(
            lambda: Conditioner(config),
            {
                "hidden_states": real("batch", "sequence", config.dit.cross_dim),
                "state": real("batch", config.max_state_dim),
            },
            ("vl_embs", "state_features"),
        ),
        "action_encoder": small(
            lambda: ActionEncoder(config),
            {
                "state_features": real("batch", 1, width),
                "actions": real("batch", config.action_horizon, config.max_action_dim),
                "timestep": real("batch", dtype=torch.int64),
            },
            ("sa_embs",),
        ),
        "dit": ReferenceGraph(
            GraphSpec(
                lambda: AlternateVLDiT(config.dit),
                {
                    "sa_embs": real("batch", tokens, width, dtype=dtype),
                    "vl_embs": real("batch", "sequence", config.dit.cross_dim, dtype=dtype),
                    "timestep": real("batch", dtype=torch.int64),
                    "image_mask": real("batch", "sequence", dtype=torch.bool),
                    "backbone_attention_mask": real("batch", "sequence", dtype=torch.bool),
                },
                ("output",),
                dtype,
            ),
            lambda name: checkpoint(f"action_head.model.{name}"),
            precision,
        ),
        "action_decoder": small(
            lambda: ActionDecoder(config),
            {"dit_output": real("batch", tokens, config.dit.output_dim)},
            ("velocity",),
        ),
    }


def _backbone_graph(
    config: ModelConfig, checkpoint: WeightSource, image_shape: tuple[int, int], precision: str
) -> ReferenceGraph:
    dtype = PRECISIONS[precision]
    height, width = image_shape
    rows, columns = height // config.vision.patch_size, width // config.vision.patch_size

    def weights(name: str) -> Tensor:
        if name == _POSITION:
            return resize_positions(checkpoint(POSITION_TABLE).float(), rows, columns)
        if name.endswith(".rotary_emb.inv_freq"):
            return rotary_frequencies(config.language)
        return checkpoint(name)

    spec = GraphSpec(
        build=lambda: _BackboneGraph(config, rows * columns),
        inputs={
            "input_ids": GraphInput(("batch", "sequence"), torch.int64),
            "attention_mask": GraphInput(("batch", "sequence"), torch.int64),
            "pixel_values": GraphInput(("images", config.vision.channels, height, width), dtype),
        },
        outputs=("hidden_states", "attn_mask", "image_mask"),
        dtype=dtype,
    )
    return ReferenceGraph(spec, weights, precision)


def _head_weights(checkpoint: WeightSource, embodiment_id: int) -> WeightSource:
    def weights(name: str) -> Tensor:
        return embodiment_row(name, checkpoint(f"action_head.{name}"), embodiment_id)

    return weights
