"""Hazards of tracing: weights held instead of streamed, operators that old parsers lack."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from groot_int8_ros.errors import ExportError
from groot_int8_ros.policy.engines.onnxruntime_engine import OnnxRuntimeEngine
from offline_tools.export.graph import (
    OPSET,
    GraphInput,
    GraphSpec,
    lower_opset,
    name_nodes,
    save,
    trace,
    transpose_weights_once,
)

WIDTH = 48


class _Layers(nn.Module):
    """Two layers that share nothing, a norm, and a mean over a varying axis."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, 2 * WIDTH)
        self.second = nn.Linear(2 * WIDTH, WIDTH, bias=False)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        halves = torch.split(self.first(x), WIDTH, dim=-1)
        y: Tensor = self.norm(x + self.second(torch.cat([halves[1], halves[0]], dim=-1)))
        return y - y.mean(dim=1, keepdim=True)


def _spec(dtype: torch.dtype = torch.float32) -> GraphSpec:
    return GraphSpec(
        _Layers, {"x": GraphInput(("batch", "sequence", WIDTH), dtype)}, ("y",), dtype
    )


def _weights() -> dict[str, Tensor]:
    torch.manual_seed(3)
    return {name: value.detach().bfloat16() for name, value in _Layers().named_parameters()}


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return _weights()


def test_traced_graph_computes_what_the_module_computes(
    weights: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "graph.onnx"
    save(trace(_spec(), weights.__getitem__), path)
    module = _Layers()
    module.load_state_dict({name: value.float() for name, value in weights.items()})
    engine = OnnxRuntimeEngine(path, threads=1)
    for batch, sequence in ((1, 1), (3, 5)):
        x = torch.randn(batch, sequence, WIDTH)
        with torch.no_grad():
            expected = module(x).numpy()
        np.testing.assert_allclose(engine.run({"x": x.numpy()})["y"], expected, atol=1e-5)


class _WideNorm(nn.Module):
    """A norm without gain, of a width that the optimizer leaves to be computed in every run."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (x.shape[-1],), eps=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gain_of_a_wide_norm_that_has_none_is_a_constant(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    path = tmp_path / "graph.onnx"
    spec = GraphSpec(_WideNorm, {"x": GraphInput((1, 3, 1536), dtype)}, ("y",), dtype)
    no_weights: dict[str, Tensor] = {}
    save(trace(spec, no_weights.__getitem__), path)
    nodes = onnx.load(path).graph.node
    assert "LayerNormalization" in {node.op_type for node in nodes}
    assert not [node for node in nodes if node.op_type in ("Expand", "Shape")]
    x = torch.randn(1, 3, 1536)
    found = OnnxRuntimeEngine(path, threads=1).run({"x": x.to(dtype).numpy()})["y"]
    np.testing.assert_allclose(found, _WideNorm()(x).numpy(), atol=1e-2)


def test_weights_are_read_when_written_and_never_held_together(tmp_path: Path) -> None:
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    read: list[str] = []
    most = 0

    def source(name: str) -> Tensor:
        nonlocal most
        gc.collect()
        tensor = _weights()[name].clone()
        alive.add(tensor)
        read.append(name)
        most = max(most, len(alive))
        return tensor

    model = trace(_spec(), source)
    # Small tables may be folded into the graph, but no matrix is read before it is written.
    assert {name for name in read if name.split(".")[0] in ("first", "second")} <= {"first.bias"}
    read.clear()
    save(model, tmp_path / "graph.onnx")
    matrices = [name for name in read if name in ("first.weight", "second.weight")]
    assert sorted(matrices) == ["first.weight", "second.weight"]
    assert most <= 2


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (1e6, torch.float16, "second.weight has values that float16 cannot hold; export with"),
        (float("nan"), torch.float16, "second.weight holds NaN or infinity: the checkpoint is"),
        (float("nan"), torch.float32, "second.weight holds NaN or infinity: the checkpoint is"),
        (float("inf"), torch.float32, "second.weight holds NaN or infinity: the checkpoint is"),
    ],
)
def test_weight_that_the_type_cannot_hold_is_refused_by_name(
    weights: dict[str, Tensor], tmp_path: Path, value: float, dtype: torch.dtype, message: str
) -> None:
    broken = weights["second.weight"].clone()
    broken[3, 5] = value
    model = trace(_spec(dtype), {**weights, "second.weight": broken}.__getitem__)
    with pytest.raises(ExportError, match=message):
        save(model, tmp_path / "graph.onnx")


def _model(
    nodes: list[onnx.NodeProto], initializers: dict[str, np.ndarray[Any, Any]], output_rank: int
) -> ir.Model:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * output_rank)],
        [numpy_helper.from_array(value, name) for name, value in initializers.items()],
    )
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    return ir.serde.deserialize_model(helper.make_model(graph, opset_imports=imports))


def test_transposes_of_one_weight_become_one_weight_for_each_permutation(tmp_path: Path) -> None:
    random = np.random.RandomState(0)
    matrix = random.standard_normal((3, 4)).astype(np.float32)
    cube = random.standard_normal((2, 3, 4)).astype(np.float32)
    node = helper.make_node
    model = _model(
        [
            node("Transpose", ["layer.weight"], ["a"], perm=[1, 0]),
            node("Transpose", ["layer.weight"], ["b"], perm=[1, 0]),
            node("Transpose", ["cube"], ["c"], perm=[0, 2, 1]),
            node("Transpose", ["cube"], ["d"], perm=[2, 1, 0]),
            node("MatMul", ["x", "a"], ["xa"]),
            node("MatMul", ["x", "b"], ["xb"]),
            node("MatMul", ["x", "c"], ["xc"]),
            node("ReduceSum", ["d"], ["sum"], keepdims=0),
            node("ReduceMax", ["d"], ["d2"], keepdims=0),
            node("Add", ["xa", "xb"], ["ab"]),
            node("Add", ["ab", "xc"], ["abc"]),
            node("Add", ["abc", "sum"], ["abcs"]),
            node("Add", ["abcs", "d2"], ["y"]),
        ],
        {"layer.weight": matrix, "cube": cube},
        output_rank=3,
    )
    transpose_weights_once(model)
    name_nodes(model)
    assert not [n for n in model.graph if n.op_type == "Transpose"]
    assert sorted(model.graph.initializers) == [
        "cube.transposed_0_2_1",
        "cube.transposed_2_1_0",
        "layer.weight.transposed",
    ]
    products = [n.name for n in model.graph if n.op_type == "MatMul"]
    assert products[:2] == ["layer/MatMul", "layer/MatMul_1"]
    assert len(set(products)) == len(products)
    ir.save(model, tmp_path / "graph.onnx")
    x = random.standard_normal((5, 4)).astype(np.float32)
    found = OnnxRuntimeEngine(tmp_path / "graph.onnx", threads=1).run({"x": x})["y"]
    product = 2 * x @ matrix.T + x @ cube.transpose(0, 2, 1)
    np.testing.assert_allclose(found, product + cube.sum() + cube.max(), atol=1e-4)


def test_reductions_and_splits_are_written_as_opset_17_has_them(tmp_path: Path) -> None:
    node = helper.make_node
    model = _model(
        [
            node("Split", ["x"], ["left", "right"], axis=1, num_outputs=2),
            node("ReduceMean", ["left", "axes"], ["mean"], keepdims=1),
            node("Sub", ["right", "mean"], ["y"]),
        ],
        {"axes": np.array([1], np.int64)},
        output_rank=2,
    )
    lower_opset(model)
    ir.save(model, tmp_path / "graph.onnx")
    written = onnx.load(tmp_path / "graph.onnx")
    assert [(i.domain, i.version) for i in written.opset_import] == [("", OPSET)]
    onnx.checker.check_model(written, full_check=True)
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    found = OnnxRuntimeEngine(tmp_path / "graph.onnx", threads=1).run({"x": x})["y"]
    np.testing.assert_allclose(found, x[:, 2:] - x[:, :2].mean(axis=1, keepdims=True))


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        (
            [helper.make_node("Mish", ["x"], ["y"])],
            "the graph needs Mish of opset 18, and TensorRT 8.6 reads 17",
        ),
        (
            [helper.make_node("Gelu", ["x"], ["y"], domain="com.microsoft")],
            r"the graph uses com\.microsoft\.Gelu, which is not ONNX",
        ),
        (
            [
                helper.make_node("Shape", ["x"], ["axes"], start=0, end=1),
                helper.make_node("ReduceMean", ["x", "axes"], ["y"]),
            ],
            "ReduceMean has axes that are computed at run time",
        ),
    ],
)
def test_operator_that_the_opset_lacks_is_refused_by_name(
    nodes: list[onnx.NodeProto], message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        lower_opset(_model(nodes, {}, output_rank=2))
