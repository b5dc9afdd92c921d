"""The audit of a graph must find the layer that should be INT8 and is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from groot_int8_ros.policy.quantization import LayerScheme, QuantizationRecord
from offline_tools.engine.verdicts import Precision
from offline_tools.quantize.graph_audit import audit_graph
from offline_tools.quantize.qdq import quantize_graph


def _record(*layers: str) -> QuantizationRecord:
    return QuantizationRecord(
        layers=dict.fromkeys(layers, LayerScheme("row")),
        scheme="row",
        source_sha256="0" * 64,
        calibration_sha256=None,
        calibration_samples=0,
        seed=0,
    )


@pytest.fixture
def quantised(two_products: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    def write(*layers: str) -> Path:
        random = np.random.RandomState(0)
        weights = [random.standard_normal((8, n)).astype(np.float16) for n in (3, 2)]
        source = two_products(*weights, np.zeros(2, np.float16))
        target = tmp_path / "int8" / "graph.onnx"
        quantize_graph(source, target, dict.fromkeys(layers, LayerScheme("row")), None)
        return target

    return write


def _edit(path: Path, change: Callable[[onnx.GraphProto], None]) -> None:
    model = onnx.load(str(path))
    change(model.graph)
    onnx.save(model, str(path))


def test_each_layer_is_judged_by_its_operands(quantised: Callable[..., Path]) -> None:
    first, second = audit_graph(quantised("first"), _record("first"))
    assert (first.layer, first.verdict, first.failed) == ("first", Precision.INT8, False)
    assert (second.layer, second.verdict, second.failed) == ("second", Precision.FLOAT, False)
    assert "weight" in second.evidence


def test_a_float_layer_that_should_be_int8_fails(quantised: Callable[..., Path]) -> None:
    verdicts = audit_graph(quantised("first"), _record("first", "second"))
    assert [v.layer for v in verdicts if v.failed] == ["second"]


def test_a_layer_that_the_graph_lacks_is_unknown_and_fails(
    quantised: Callable[..., Path],
) -> None:
    verdict = audit_graph(quantised("first"), _record("first", "third"))[-1]
    assert (verdict.layer, verdict.verdict, verdict.failed) == ("third", Precision.UNKNOWN, True)


def test_an_int8_weight_alone_is_no_int8_product(quantised: Callable[..., Path]) -> None:
    path = quantised("first")

    def bypass(graph: onnx.GraphProto) -> None:
        for node in graph.node:
            if node.name == "first/MatMul":
                quantizer = next(n for n in graph.node if n.op_type == "QuantizeLinear")
                node.input[0] = quantizer.input[0]

    _edit(path, bypass)
    first = audit_graph(path, _record("first"))[0]
    assert (first.verdict, first.failed) == (Precision.FLOAT, True)
    assert "input" in first.evidence


def test_uint8_codes_are_not_taken_for_int8(quantised: Callable[..., Path]) -> None:
    path = quantised("first")

    def unsigned(graph: onnx.GraphProto) -> None:
        for tensor in graph.initializer:
            if tensor.name.endswith("zero_point"):
                tensor.CopyFrom(onnx.numpy_helper.from_array(np.array(128, np.uint8), tensor.name))

    _edit(path, unsigned)
    assert audit_graph(path, _record("first"))[0].failed


def test_a_float_graph_asks_for_nothing(two_products: Callable[..., Path]) -> None:
    weights = [np.ones((8, n), np.float32) for n in (3, 2)]
    verdicts = audit_graph(two_products(*weights, np.zeros(2, np.float32)), None)
    assert [v.wanted for v in verdicts] == [Precision.FLOAT] * 2
    assert not any(v.failed for v in verdicts)


def test_no_float_layer_is_left_out_for_having_the_name_of_a_rotation(
    two_products: Callable[..., Path],
) -> None:
    weights = [np.ones((16, n), np.float32) for n in (16, 2)]
    path = two_products(*weights, np.zeros(2, np.float32))

    def rename(graph: onnx.GraphProto) -> None:
        graph.node[0].name = "second/input/MatMul"

    _edit(path, rename)
    assert [v.layer for v in audit_graph(path, None)] == ["second/input", "second"]
