"""The deployed backbone and the prefix model as graphs, and the backbone at every stage.

Owns: names, shapes and weights of the two graphs. Must not know what the modules compute: that is
`offline_tools.model.deployed`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from groot_int8_ros.policy.processor import ImageChain
from groot_int8_ros.policy.token_layout import TokenLayout
from groot_int8_ros.policy.types import CameraSpec
from offline_tools.export.deployed_graphs import fixed_spec
from offline_tools.export.graph import GraphInput, GraphSpec, WeightSource, build_empty
from offline_tools.export.graphs import PRECISIONS, ReferenceGraph
from offline_tools.model.configuration import ModelConfig
from offline_tools.model.deployed.backbone import (
    DEPLOYED_BACKBONE,
    BackboneCase,
    BackboneParts,
    backbone_builder,
    backbone_inputs,
)
from offline_tools.model.deployed.backbone_weights import BackboneWeights
from offline_tools.model.deployed.constants import constants
from offline_tools.model.deployed.prefix import OUTPUTS, PrefixModel, PrefixWeights


def deployed_backbone(
    config: ModelConfig,
    checkpoint: WeightSource,
    *,
    cameras: Sequence[CameraSpec],
    image_chain: ImageChain,
    layout: TokenLayout,
    precision: str,
) -> ReferenceGraph:
    """Describe the graph `backbone`: from camera frames to the live tokens' features.

    Args:
        config: Sizes of the model.
        checkpoint: Gives a tensor by its key in the released layout.
        cameras: In the processor's order, with the size of their frames. All must reach the
            network at one size, which `Preprocessor` checks.
        image_chain: Scaling and cropping of the frames.
        layout: Where the prompt's tokens stand.
        precision: `fp32` or `fp16`; the image chain is float32 in both.
    """
    case = BackboneCase(config, tuple(cameras), image_chain, layout)
    return backbone_graph(case, checkpoint, DEPLOYED_BACKBONE, precision)


def backbone_graph(
    case: BackboneCase, checkpoint: WeightSource, parts: BackboneParts, precision: str
) -> ReferenceGraph:
    """Describe a backbone of any parts; see `deployed_backbone`."""
    spec = backbone_spec(case, parts, PRECISIONS[precision])
    weights = BackboneWeights(case, checkpoint, constants(build_empty(spec)))
    return ReferenceGraph(spec, weights, precision)


def backbone_spec(case: BackboneCase, parts: BackboneParts, dtype: torch.dtype) -> GraphSpec:
    """Describe what is traced of a backbone of any parts."""
    return fixed_spec(
        backbone_builder(case, parts), backbone_inputs(case, parts), ("features",), dtype
    )


def prefix_model(
    config: ModelConfig, checkpoint: WeightSource, *, precision_of_storage: str
) -> ReferenceGraph:
    """Describe the graph `prefix`: from a prefix's token ids to what the other graphs take of it.

    It computes in float32, whatever its matrices are stored in, and is for ONNX Runtime's CPU
    alone.

    Args:
        config: Sizes of the model.
        checkpoint: Gives a tensor by its key in the released layout.
        precision_of_storage: `fp32`, or `fp16` for half the disk.
    """
    spec = GraphSpec(
        build=lambda: PrefixModel(config),
        inputs={
            "input_ids": GraphInput((1, "tokens"), torch.int64),
            "first_position": GraphInput((1,), torch.int64),
        },
        outputs=OUTPUTS,
        dtype=torch.float32,
        storage=PRECISIONS[precision_of_storage],
    )
    return ReferenceGraph(spec, PrefixWeights(config, checkpoint), precision_of_storage)
