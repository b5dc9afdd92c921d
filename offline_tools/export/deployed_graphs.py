"""The deployed graphs of a bundle: which module each is traced from and where its weights lie.

Owns: names, shapes and weights of the graphs that the robot runs. Must not know what the modules
compute: that is `offline_tools.model.deployed`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from groot_int8_ros.policy.token_layout import TokenLayout
from offline_tools.export.graph import GraphInput, GraphSpec, WeightSource
from offline_tools.export.graphs import PRECISIONS, ReferenceGraph
from offline_tools.model.configuration import ModelConfig
from offline_tools.model.deployed.head import DEPLOYED_PARTS, HeadParts, head_builder, head_inputs
from offline_tools.model.deployed.head_parts import InputShapes
from offline_tools.model.deployed.head_weights import HeadWeights


def deployed_head(
    config: ModelConfig,
    checkpoint: WeightSource,
    *,
    embodiment_id: int,
    layout: TokenLayout,
    denoising_steps: int,
    precision: str,
) -> ReferenceGraph:
    """Describe the graph `action_head`: from the backbone's features to actions.

    Args:
        config: Sizes of the model.
        checkpoint: Gives a tensor by its key in the released layout.
        embodiment_id: Row of the category-specific weights.
        layout: Where the prompt's tokens stand.
        denoising_steps: Euler steps that are unrolled in the graph.
        precision: `fp32` or `fp16`, for the DiT; what stands around it is float32.
    """
    return ReferenceGraph(
        head_spec(config, layout, denoising_steps, DEPLOYED_PARTS, PRECISIONS[precision]),
        HeadWeights(config, checkpoint, embodiment_id, denoising_steps),
        precision,
    )


def head_spec(
    config: ModelConfig, layout: TokenLayout, steps: int, parts: HeadParts, dtype: torch.dtype
) -> GraphSpec:
    """Describe an unrolled action head of any parts."""
    return fixed_spec(
        head_builder(config, layout, steps, parts),
        head_inputs(config, layout, parts),
        ("action_pred",),
        dtype,
    )


def fixed_spec(
    build: Callable[[], nn.Module],
    inputs: InputShapes,
    outputs: tuple[str, ...],
    dtype: torch.dtype,
) -> GraphSpec:
    """Describe a graph without varying axes; an input's type None is the graph's."""
    given: Mapping[str, GraphInput] = {
        name: GraphInput(shape, own or dtype) for name, (shape, own) in inputs.items()
    }
    return GraphSpec(build, given, outputs, dtype)
