"""The INT8 graph computes what the arithmetic says, on every engine that will read it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from groot_int8_ros.errors import QuantizationError
from groot_int8_ros.policy.bundle import open_bundle
from groot_int8_ros.policy.engines.onnxruntime_engine import OnnxRuntimeEngine
from groot_int8_ros.policy.quantization import LayerScheme
from groot_int8_ros.policy.types import Float32Array
from offline_tools.engine.rtx import check_build
from offline_tools.engine.verdicts import Precision
from offline_tools.quantize import arithmetic
from offline_tools.quantize.arithmetic import hadamard
from offline_tools.quantize.graph_audit import audit_graph
from offline_tools.quantize.layers import find_layers, load_graph
from offline_tools.quantize.qdq import quantize_graph
from offline_tools.quantize.ranges import static_range
from offline_tools.quantize.statistics import GraphStatistics, collect, migration_sizes

Feeds = Callable[[], Iterator[Mapping[str, NDArray[Any]]]]

SCHEMES = (
    LayerScheme("static", "max"),
    LayerScheme("static", "entropy"),
    LayerScheme("static", "percentile"),
    LayerScheme("static", "max", 0.5),
    LayerScheme("row"),
    LayerScheme("row", None, 0.5),
    LayerScheme("row", None, None, 16),
    LayerScheme("row", None, 0.5, 8),
)
BY_NAME = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)


def _weights(dtype: type[np.floating[Any]]) -> tuple[NDArray[Any], ...]:
    random = np.random.RandomState(0)
    first, second = (random.standard_normal((16, n)).astype(dtype) for n in (5, 7))
    first[:, 3] = 0.0  # an output channel of zeros
    first[2] *= 30.0  # an input channel that stands out
    return first, second, random.standard_normal(7).astype(dtype)


def _input(dtype: type[np.floating[Any]]) -> NDArray[Any]:
    x = np.random.RandomState(1).standard_normal((9, 16))
    x[4] = 0.0  # a row of zeros, as padding is
    x[5] *= 1e-7  # a row at the bottom of half precision
    x[6, 1] = 1.9e4  # a massive activation
    x[:, 9] *= 50.0  # a channel that stands out
    return x.astype(dtype)


def _statistics(path: Path, x: NDArray[Any]) -> GraphStatistics:
    return collect(path, lambda: iter([{"x": x}]))


def _expected(
    x: NDArray[Any], weights: list[NDArray[Any]], scheme: LayerScheme, seen: GraphStatistics
) -> list[NDArray[Any]]:
    """Compute both products from the definitions, in the order of the graph's nodes."""
    rows = x.astype(np.float32)
    columns: list[NDArray[Any]] = [weight.astype(np.float32) for weight in weights]
    if scheme.migration_alpha is not None:
        weight_max = np.max([np.abs(weight).max(axis=1) for weight in columns], axis=0)
        sizes = migration_sizes([seen.inputs["x"]], scheme)
        s = arithmetic.migration_factors(sizes, weight_max, scheme.migration_alpha)
        rows, columns = rows / s, [weight * s[:, None] for weight in columns]
    if scheme.rotation is not None:
        mixing: NDArray[Any] = np.kron(
            np.eye(16 // scheme.rotation, dtype=np.float32), hadamard(scheme.rotation)
        )
        rows, columns = rows @ mixing, [mixing.T @ weight for weight in columns]
    if scheme.activation == "row":
        restored = arithmetic.row_input(rows)
    else:
        histogram = seen.inputs["x"].histogram
        assert scheme.range_method is not None
        top = (
            np.abs(rows).max()
            if scheme.migration_alpha is not None
            else static_range(histogram, scheme.range_method)
        )
        restored = arithmetic.static_input(rows, float(top) / 127)
    return [restored @ arithmetic.dequantised_weight(weight) for weight in columns]


@BY_NAME
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_graph_computes_the_schemes_definition(
    two_products: Callable[..., Path],
    tmp_path: Path,
    scheme: LayerScheme,
    dtype: type[np.floating[Any]],
) -> None:
    first, second, bias = _weights(dtype)
    x = _input(dtype)
    source, target = two_products(first, second, bias), tmp_path / "int8" / "graph.onnx"
    seen = _statistics(source, x)
    quantize_graph(source, target, {"first": scheme, "second": scheme}, seen)
    onnx.checker.check_model(str(target), full_check=True)
    engine = OnnxRuntimeEngine(target)
    found = engine.run({"x": x})
    engine.close()
    wanted = _expected(x, [first, second], scheme, seen)
    wanted[1] = wanted[1] + bias.astype(np.float32)
    for name, value in zip(("y1", "y2"), wanted, strict=True):
        assert found[name].dtype == dtype
        # Half precision has steps of 6e-8 at the bottom, where the tiny row's result is.
        scale = np.abs(value).max(axis=1, keepdims=True) + 1e-4
        error = np.abs(found[name].astype(np.float32) - value) / scale
        assert error.max() < (2e-3 if dtype is np.float16 else 1e-4)


def test_layers_that_share_input_and_scheme_share_the_quantiser(
    two_products: Callable[..., Path], tmp_path: Path
) -> None:
    source, target = two_products(*_weights(np.float16)), tmp_path / "int8" / "graph.onnx"
    quantize_graph(source, target, dict.fromkeys(("first", "second"), LayerScheme("row")), None)
    counts = [node.op_type for node in onnx.load(str(target)).graph.node]
    assert counts.count("QuantizeLinear") == 1
    assert counts.count("ReduceMax") == 1
    assert counts.count("DequantizeLinear") == 3


def test_weights_are_int8_and_a_gemm_keeps_its_axis(
    two_products: Callable[..., Path], tmp_path: Path
) -> None:
    source, target = two_products(*_weights(np.float32)), tmp_path / "int8" / "graph.onnx"
    quantize_graph(source, target, dict.fromkeys(("first", "second"), LayerScheme("row")), None)
    graph = onnx.load(str(target)).graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    axes = {
        node.input[0]: onnx.helper.get_attribute_value(node.attribute[0])
        for node in graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in stored
    }
    assert axes == {"first.weight.int8": 1, "second.weight.int8": 0}
    assert all(stored[name].data_type == onnx.TensorProto.INT8 for name in axes)
    assert not {"first.weight", "second.weight"} & set(stored)


def test_static_loses_what_a_massive_activation_hides_and_row_keeps_it(
    two_products: Callable[..., Path], tmp_path: Path
) -> None:
    first, second, bias = _weights(np.float32)
    x = _input(np.float32)
    x[:, 9] /= 50.0  # this test is not about channels
    source = two_products(first, second, bias)
    seen = _statistics(source, x)
    errors = {}
    for scheme in SCHEMES[0], SCHEMES[4]:
        target = tmp_path / scheme.name / "graph.onnx"
        quantize_graph(source, target, {"first": scheme}, seen)
        engine = OnnxRuntimeEngine(target)
        found = engine.run({"x": x})["y1"][:4]
        engine.close()
        wanted = x[:4] @ first
        errors[scheme.activation] = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    assert errors["static"] > 0.5
    assert errors["row"] < 0.05


@pytest.mark.parametrize("bundle", ["tiny_bundle", "fp16_bundle"])
@pytest.mark.parametrize(
    ("graph", "scheme"),
    [
        ("dit", LayerScheme("static", "max", 0.5)),
        ("dit", LayerScheme("row", None, 0.5, 16)),
        ("backbone", LayerScheme("row")),
    ],
    ids=["dit-static", "dit-row", "backbone-row"],
)
def test_tensorrt_rtx_builds_every_quantised_graph(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    dit_feeds: Feeds,
    bundle: str,
    graph: str,
    scheme: LayerScheme,
) -> None:
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt_rtx is not installed")
    opened = open_bundle(request.getfixturevalue(bundle))
    source = opened.graph_path(graph)
    plan = {layer.name: scheme for layer in find_layers(load_graph(source))}
    target = tmp_path / source.name
    quantize_graph(source, target, plan, collect(source, dit_feeds) if graph == "dit" else None)
    lengths = {"batch": 1, "sequence": 256, "images": 2}
    result = check_build(target, opened.manifest.graphs[graph], lengths)
    assert result.engine_bytes > 0


@BY_NAME
def test_a_weight_that_every_denoising_step_uses_is_stored_once_with_a_scale_a_step(
    unrolled: Callable[[NDArray[Any], int], Path], tmp_path: Path, scheme: LayerScheme
) -> None:
    random = np.random.RandomState(2)
    weight = np.asarray(random.standard_normal((16, 16)) / 4, np.float32)
    source, target = unrolled(weight, 3), tmp_path / "int8" / "graph.onnx"
    x = _input(np.float32)
    x[6, 1] = 1.0
    seen = _statistics(source, x)
    quantize_graph(source, target, {"step.proj": scheme}, seen)
    uses = [seen.inputs[name] for name in ("x", "x1", "x2")]
    columns: Float32Array = weight
    mixing: Float32Array = np.eye(16, dtype=np.float32)
    s: Float32Array = np.ones(16, np.float32)
    if scheme.migration_alpha is not None:
        sizes = migration_sizes(uses, scheme)
        weight_max = np.abs(weight).max(axis=1)
        s = arithmetic.migration_factors(sizes, weight_max, scheme.migration_alpha)
        columns = np.asarray(weight * s[:, None], np.float32)
    if scheme.rotation is not None:
        blocks = np.eye(16 // scheme.rotation, dtype=np.float32)
        mixing = np.asarray(np.kron(blocks, hadamard(scheme.rotation)), np.float32)
        columns = np.asarray(mixing.T @ columns, np.float32)
    restored_weight = arithmetic.dequantised_weight(columns)
    wanted: NDArray[Any] = x
    for use in uses:
        rows: Float32Array = np.asarray((wanted / s) @ mixing, np.float32)
        if scheme.activation == "row":
            restored = arithmetic.row_input(rows)
        elif scheme.migration_alpha is not None:
            restored = arithmetic.static_input(rows, float((use.channel_max / s).max()) / 127)
        else:
            assert scheme.range_method is not None
            top = static_range(use.histogram, scheme.range_method)
            restored = arithmetic.static_input(rows, top / 127)
        wanted = wanted + 3.0 * np.tanh(restored @ restored_weight)
    engine = OnnxRuntimeEngine(target)
    found = engine.run({"x": x})["y"]
    engine.close()
    assert np.abs(found - wanted).max() < 1e-3 * np.abs(wanted).max()
    graph = onnx.load(str(target)).graph
    stored = [tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.INT8]
    assert [tensor.name for tensor in stored if len(tensor.dims) == 2] == ["step.proj.weight.int8"]
    assert "step.proj.weight" not in {tensor.name for tensor in graph.initializer}
    # Dequantised once as well: ONNX Runtime holds the result of every such node in float32.
    assert [n.op_type for n in graph.node if "step.proj.weight.int8" in n.input] == [
        "DequantizeLinear"
    ]
    verdict = next(one for one in audit_graph(target, None) if one.layer == "step.proj")
    assert (verdict.layer, verdict.verdict, verdict.products) == ("step.proj", Precision.INT8, 3)


def test_a_plan_for_another_model_is_refused(
    two_products: Callable[..., Path], tmp_path: Path
) -> None:
    source = two_products(*_weights(np.float32))
    with pytest.raises(QuantizationError, match=r"third.*another model"):
        quantize_graph(source, tmp_path / "out.onnx", {"third": LayerScheme("row")}, None)
    assert not (tmp_path / "out.onnx").exists()


def test_static_without_statistics_is_refused(
    two_products: Callable[..., Path], tmp_path: Path
) -> None:
    source = two_products(*_weights(np.float32))
    with pytest.raises(QuantizationError, match="needs statistics"):
        quantize_graph(source, tmp_path / "out.onnx", {"first": SCHEMES[0]}, None)


def test_statistics_of_another_width_are_refused(
    two_products: Callable[..., Path], tmp_path: Path
) -> None:
    source = two_products(*_weights(np.float32))
    seen = _statistics(source, _input(np.float32))
    entry = seen.inputs["x"]
    narrow = replace(entry, channel_max=entry.channel_max[:8])
    with pytest.raises(QuantizationError, match=r"8 channels.*16"):
        quantize_graph(
            source, tmp_path / "o.onnx", {"first": SCHEMES[0]}, GraphStatistics({"x": narrow}, 1)
        )


def test_a_damaged_weight_is_refused(two_products: Callable[..., Path], tmp_path: Path) -> None:
    first, second, bias = _weights(np.float32)
    first[3, 2] = np.nan
    with pytest.raises(QuantizationError, match=r"weight of first holds NaN"):
        quantize_graph(
            two_products(first, second, bias), tmp_path / "o.onnx", {"first": SCHEMES[4]}, None
        )
