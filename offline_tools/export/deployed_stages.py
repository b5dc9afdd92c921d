"""The model after each transformation as graphs that can be traced: what the cost table counts.

Owns: the graphs of every stage from the reference implementation to the deployed graphs, and how
often an observation runs each. Must not count or time anything itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from groot_int8_ros.policy.token_layout import TokenLayout
from offline_tools.export.deployed_backbone import backbone_spec
from offline_tools.export.deployed_graphs import fixed_spec, head_spec
from offline_tools.export.graph import GraphInput, GraphSpec
from offline_tools.export.graphs import PRECISIONS, reference_graphs
from offline_tools.model.action_head import ActionDecoder, ActionEncoder, Conditioner
from offline_tools.model.configuration import ModelConfig
from offline_tools.model.deployed.backbone import BackboneCase, backbone_parts
from offline_tools.model.deployed.head import unrolled_stages
from offline_tools.model.deployed.head_parts import InputShapes
from offline_tools.model.dit import AlternateVLDiT

REFERENCE = "reference"


@dataclass(frozen=True)
class StageGraph:
    """One graph of a stage.

    Attributes:
        name: What it computes.
        spec: What is traced.
        runs: How often one observation runs it.
    """

    name: str
    spec: GraphSpec
    runs: int


def head_stages(
    config: ModelConfig, layout: TokenLayout, steps: int, precision: str
) -> dict[str, tuple[StageGraph, ...]]:
    """Return the action head before and after each transformation, in their order.

    Args:
        config: Sizes of the model.
        layout: Where the prompt's tokens stand.
        steps: Number of Euler steps.
        precision: `fp32` or `fp16`, for the DiT; what stands around it is float32.

    Returns:
        Graphs by the name of the transformation that led to them; the first is `REFERENCE`.
    """
    dtype = PRECISIONS[precision]
    stages = {
        REFERENCE: _separate_graphs(config, layout, steps, dtype, sliced=False),
        "embodiment_slice": _separate_graphs(config, layout, steps, dtype, sliced=True),
    }
    for name, parts in unrolled_stages().items():
        spec = head_spec(config, layout, steps, parts, dtype)
        stages[name] = (StageGraph("action_head", spec, 1),)
    return stages


def backbone_stages(case: BackboneCase, precision: str) -> dict[str, tuple[StageGraph, ...]]:
    """Return the backbone before and after each transformation, in their order.

    Args:
        case: What it is made for.
        precision: `fp32` or `fp16`; the image chain is float32 in both.

    Returns:
        Graphs by the name of the transformation that led to them; the first is `REFERENCE`.
    """
    spec = reference_graphs(
        case.config,
        _no_weights,
        embodiment_id=0,
        image_shape=case.image_shape,
        precision=precision,
    )["backbone"].spec
    lengths = {
        "batch": 1,
        "images": len(case.cameras),
        "sequence": case.layout.prefix_length + case.layout.live_length,
    }
    inputs = {
        name: GraphInput(tuple(lengths.get(str(axis), axis) for axis in value.shape), value.dtype)
        for name, value in spec.inputs.items()
    }
    reference = StageGraph("backbone", replace(spec, inputs=inputs), 1)
    stages: dict[str, tuple[StageGraph, ...]] = {REFERENCE: (reference,)}
    for name, parts in backbone_parts().items():
        spec = backbone_spec(case, parts, PRECISIONS[precision])
        stages[name] = (StageGraph("backbone", spec, 1),)
    return stages


def _no_weights(key: str) -> Tensor:
    raise RuntimeError(f"a stage is counted without weights, and {key} was asked for")


def _separate_graphs(
    config: ModelConfig, layout: TokenLayout, steps: int, dtype: torch.dtype, *, sliced: bool
) -> tuple[StageGraph, ...]:
    """Return the reference family's graphs for one observation and one length of prompt."""
    dit, float32 = config.dit, torch.float32
    length = layout.prefix_length + layout.live_length
    tokens = (1, 1 + config.action_horizon)
    embodiments = None if sliced else config.max_embodiments
    row: InputShapes = {} if sliced else {"embodiment_id": ((1,), torch.int64)}
    timestep: InputShapes = {"timestep": ((1,), torch.int64)}
    masks: InputShapes = {
        "image_mask": ((1, length), torch.bool),
        "backbone_attention_mask": ((1, length), torch.bool),
    }

    conditioner = fixed_spec(
        lambda: Conditioner(config, embodiments),
        {
            "hidden_states": ((1, length, dit.cross_dim), float32),
            "state": ((1, config.max_state_dim), float32),
            **row,
        },
        ("vl_embs", "state_features"),
        float32,
    )
    encoder = fixed_spec(
        lambda: ActionEncoder(config, embodiments),
        {
            "state_features": ((1, 1, dit.width), float32),
            "actions": ((1, config.action_horizon, config.max_action_dim), float32),
            **timestep,
            **row,
        },
        ("sa_embs",),
        float32,
    )
    transformer = fixed_spec(
        lambda: AlternateVLDiT(dit),
        {
            "sa_embs": ((*tokens, dit.width), dtype),
            "vl_embs": ((1, length, dit.cross_dim), dtype),
            **timestep,
            **masks,
        },
        ("output",),
        dtype,
    )
    decoder = fixed_spec(
        lambda: ActionDecoder(config, embodiments),
        {"dit_output": ((*tokens, dit.output_dim), float32), **row},
        ("velocity",),
        float32,
    )
    return (
        StageGraph("conditioner", conditioner, 1),
        StageGraph("action_encoder", encoder, steps),
        StageGraph("dit", transformer, steps),
        StageGraph("action_decoder", decoder, steps),
    )
