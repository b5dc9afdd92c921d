"""Hazards of the traced head: another result than PyTorch's, a weight stored for each step.

The golden checkpoint's head, traced once in each precision with two denoising steps, read back
from disk.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from groot_int8_ros.policy.bundle import GraphRecord
from groot_int8_ros.policy.engines.onnxruntime_engine import OnnxRuntimeEngine
from offline_tools.engine.known_faults import wrong_forms
from offline_tools.engine.rtx import check_build
from offline_tools.export.deployed_graphs import deployed_head
from offline_tools.export.graph import save, trace
from offline_tools.quantize.layers import FLOAT_PARTS, find_layers, load_graph

if TYPE_CHECKING:
    from test.offline_tools.model.deployed.conftest import HeadCase, TrueWidth

STEPS = 2

# Operators of TensorRT 8.6 that the head may use; none has a shape that depends on values.
_ALLOWED = {
    "Add", "Cast", "Concat", "LayerNormalization", "MatMul", "Mul", "Not", "Pow", "Relu",
    "Reshape", "Sigmoid", "Slice", "Softmax", "Split", "Tanh", "Transpose", "Unsqueeze", "Where",
}  # fmt: skip


@dataclass(frozen=True)
class Traced:
    path: Path
    precision: str
    case: HeadCase


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def traced(
    request: pytest.FixtureRequest, golden_case: HeadCase, tmp_path_factory: pytest.TempPathFactory
) -> Traced:
    precision: str = request.param
    graph = deployed_head(
        golden_case.config,
        golden_case.checkpoint,
        embodiment_id=golden_case.embodiment_id,
        layout=golden_case.layout(),
        denoising_steps=STEPS,
        precision=precision,
    )
    path = tmp_path_factory.mktemp(precision) / "action_head.onnx"
    save(trace(graph.spec, graph.weights), path)
    return Traced(path, precision, golden_case)


def _run(traced: Traced, committed: int = 0) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    case = traced.case
    given = case.inputs(case.layout(), committed)
    given["features"] = given["live_features"]
    half = {"features", "prefix_text_keys", "prefix_text_values"}
    engine = OnnxRuntimeEngine(traced.path, threads=1)
    return engine.run(
        {
            name: (
                given[name].half() if traced.precision == "fp16" and name in half else given[name]
            ).numpy()
            for name in engine.inputs
        }
    )["action_pred"]


def test_graph_gives_the_recorded_actions(traced: Traced) -> None:
    # Half precision: 2.5e-4 to 4.5e-4 of the largest action were seen.
    tolerance = {"fp32": 1e-4, "fp16": 5e-3}[traced.precision]
    np.testing.assert_allclose(_run(traced), traced.case.actions[STEPS], atol=tolerance)


def test_committed_rows_come_out_of_the_graph_exactly(traced: Traced) -> None:
    committed = traced.case.inputs(traced.case.layout())["committed_actions"].numpy()
    actions = _run(traced, committed=4)
    assert np.array_equal(actions[:, :4], committed[:, :4])
    assert np.abs(actions[:, 4:] - _run(traced)[:, 4:]).max() > 1e-3


def test_graph_has_the_contract_of_the_deployed_family(traced: Traced) -> None:
    model = onnx.load(traced.path, load_external_data=False)
    onnx.checker.check_model(str(traced.path), full_check=True)
    real = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16}[traced.precision]
    config, layout = traced.case.config, traced.case.layout()
    stored = (real, [2, 2, layout.prefix_length, 48])
    chunk = (TensorProto.FLOAT, [1, config.action_horizon, config.max_action_dim])
    values = {
        value.name: (
            value.type.tensor_type.elem_type,
            [axis.dim_value for axis in value.type.tensor_type.shape.dim],
        )
        for value in (*model.graph.input, *model.graph.output)
    }
    assert values == {
        "features": (real, [1, layout.live_length, config.dit.cross_dim]),
        "prefix_text_keys": stored,
        "prefix_text_values": stored,
        "prefix_mask": (TensorProto.BOOL, [layout.prefix_length]),
        "state": (TensorProto.FLOAT, [1, config.max_state_dim]),
        "noise": chunk,
        "committed_actions": chunk,
        "committed_mask": (TensorProto.BOOL, [1, config.action_horizon]),
        "action_pred": chunk,
    }
    assert {node.op_type for node in model.graph.node} <= _ALLOWED


def test_true_width_brings_no_other_operator(true_width: TrueWidth) -> None:
    # Gains of ones of the wide norms are not folded, and were an Expand once.
    graph = deployed_head(
        true_width.config,
        true_width.checkpoint,
        embodiment_id=0,
        layout=true_width.case.layout,
        denoising_steps=1,
        precision="fp16",
    )
    model = trace(graph.spec, graph.weights)
    assert {node.op_type for node in model.graph} <= _ALLOWED
    assert not list(wrong_forms(model))


def test_weight_that_every_step_uses_is_stored_once_and_its_uses_are_numbered(
    traced: Traced,
) -> None:
    layers = find_layers(load_graph(traced.path))
    assert len({layer.name for layer in layers}) == len({layer.weight for layer in layers})
    assert len(layers) == len({layer.name for layer in layers})
    for layer in layers:
        first = f"{layer.name}/MatMul"
        if layer.name in ("context.text.kv", "context.image.kv"):
            assert layer.nodes == (first,)
        else:
            further = tuple(f"{first}_{step}" for step in range(1, STEPS))
            assert layer.nodes == (first, *further), "in the order of the steps"
    # Each weight: a product, and no second copy beside it.
    model = onnx.load(traced.path, load_external_data=False)
    stored = {
        tensor.name: int(np.prod(tensor.dims))
        for tensor in model.graph.initializer
        if len(tensor.dims) == 2 and FLOAT_PARTS.isdisjoint(tensor.name.split("."))
    }
    assert sum(stored.values()) < 1.02 * sum(layer.parameters for layer in layers)


def test_keys_are_joined_as_tensorrt_8_6_computes_it_rightly(traced: Traced) -> None:
    # Seen with 8.6.1 in float32, 32 heads of 48: the text blocks' keys came out unrelated.
    model = load_graph(traced.path)
    assert any(
        (producer := value.producer()) is not None and producer.op_type == "Transpose"
        for node in model.graph
        if node.op_type == "Concat"
        for value in node.inputs
        if value is not None
    ), "keys and values, along their tokens"
    assert not list(wrong_forms(model))


def test_what_stands_around_the_blocks_stays_float32(traced: Traced) -> None:
    graph = load_graph(traced.path).graph
    around = ("state_encoder", "action_encoder", "action_decoder", "vlln")
    for name, value in graph.initializers.items():
        if name.startswith(around):
            assert str(value.dtype) == "FLOAT", name
        elif name.startswith(("transformer_blocks", "context")) and "norm" not in name:
            expected = {"fp32": "FLOAT", "fp16": "FLOAT16"}[traced.precision]
            assert str(value.dtype) == expected, name


@pytest.mark.skipif(
    subprocess.run(
        [sys.executable, "-c", "import tensorrt_rtx"], capture_output=True, check=False
    ).returncode
    != 0,
    reason="TensorRT-RTX cannot be imported: pip install tensorrt-rtx-cu13 (Linux x86-64)",
)
def test_tensorrt_takes_the_graph(traced: Traced) -> None:
    engine = OnnxRuntimeEngine(traced.path, threads=1)
    record = GraphRecord(traced.path.name, traced.precision, engine.inputs, engine.outputs)
    # The weights alone are 0.9 million.
    assert check_build(traced.path, record, {}).engine_bytes > 1_000_000
