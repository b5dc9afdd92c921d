"""Hazards of a profile: weights that the profiler does not list, fused names, first runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from offline_tools.benchmark.profile import (
    ACTIVATION_PRODUCTS,
    KINDS,
    NORMS,
    OTHER,
    WEIGHT_PRODUCTS,
    GraphProfile,
    profile_graph,
)
from offline_tools.cli import main

# ONNX Runtime packs the first product's weight and fuses its bias and the scale of the second.
_FLOAT = """<ir_version: 8, opset_import: ["": 17]>
    graph (float[1,96,64] x, int64[1] robot) => (float[1,96,96] attention, float[1,96,16] out) {
        weighted = MatMul(x, weight)
        biased = Add(weighted, bias)
        turned = Transpose<perm = [0, 2, 1]>(biased)
        products = MatMul(biased, turned)
        scaled = Mul(products, scale)
        attention = Softmax<axis = -1>(scaled)
        own = Gather<axis = 0>(of_each_robot, robot)
        out = MatMul(biased, own)
    }"""
_INT8 = """<ir_version: 8, opset_import: ["": 17]>
    graph (float[1,96,64] x) => (float[1,96,128] out) {
        codes = QuantizeLinear(x, scale, zero)
        real = DequantizeLinear(codes, scale, zero)
        weight = DequantizeLinear(weight_codes, scale, zero)
        out = MatMul(real, weight)
    }"""


def _profiled(
    folder: Path, text: str, constants: dict[str, NDArray[Any]], *, int8_kernels: bool = False
) -> GraphProfile:
    model = onnx.parser.parse_model(text)
    for number, node in enumerate(model.graph.node):
        node.name = f"node_{number}"
    model.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in constants.items())
    onnx.save(model, folder / "graph.onnx")
    feeds = {"x": np.ones((1, 96, 64), np.float32), "robot": np.array([1])}
    taken = {value.name: feeds[value.name] for value in model.graph.input}
    return profile_graph(
        folder / "graph.onnx", "graph", [taken, taken], threads=1, int8_kernels=int8_kernels
    )


def test_packed_fused_and_gathered_weights_are_told_from_activations(tmp_path: Path) -> None:
    draw = np.random.default_rng(0).standard_normal
    constants = {
        "weight": draw((64, 128), np.float32),
        "bias": draw(128, np.float32),
        "scale": np.array(0.1, np.float32),
        "of_each_robot": draw((3, 128, 16), np.float32),
    }
    found = _profiled(tmp_path, _FLOAT, constants)
    assert found.runs == 2
    assert tuple(found.kernel_ms) == KINDS
    for kind in (WEIGHT_PRODUCTS, ACTIVATION_PRODUCTS, NORMS, OTHER):
        assert found.kernel_ms[kind] > 0, kind
    # Of the observation's two runs, however often it was answered.
    assert found.weight_gflop == pytest.approx(2e-9 * 2 * 96 * (64 * 128 + 128 * 16))


@pytest.mark.parametrize("int8_kernels", [False, True])
def test_weights_behind_dequantize_are_weights(tmp_path: Path, int8_kernels: bool) -> None:
    codes = np.random.default_rng(0).integers(-127, 128, (64, 128), dtype=np.int8)
    constants: dict[str, NDArray[Any]] = {
        "weight_codes": codes,
        "scale": np.array(0.1, np.float32),
        "zero": np.array(0, np.int8),
    }
    found = _profiled(tmp_path, _INT8, constants, int8_kernels=int8_kernels)
    assert found.kernel_ms[WEIGHT_PRODUCTS] > 0
    assert found.kernel_ms[ACTIVATION_PRODUCTS] == 0
    assert found.weight_gflop == pytest.approx(2e-9 * 2 * 96 * 64 * 128)


def test_profile_of_tensorrt_is_refused_and_sent_to_the_audit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["benchmark", "--bundle", str(tmp_path), "--engine", "tensorrt", "--profile"]
    assert main(command) != 0
    assert "groot-int8 audit --time" in capsys.readouterr().err
