"""Rewriting a float graph into one whose chosen layers are INT8, with explicit Q/DQ nodes.

Owns: the nodes and constants of each scheme. Must not import torch, and must not decide which
layer gets which scheme.

What stands between a layer's input `x` and its consumers afterwards (K, N: channels in and out)::

    static   Cast, [Mul r], QuantizeLinear(c), DequantizeLinear(c), MatMul(DequantizeLinear(W, d)),
             [Add bias], Cast
    row      Cast, [Mul r], [Reshape, MatMul(H), Reshape], Abs, ReduceMax, Max -> a; Div(x, a),
             QuantizeLinear(1/127), DequantizeLinear(1/127), MatMul(DequantizeLinear(W, d)),
             Mul(a), [Add bias], Cast

with c a scalar, W int8, d float32 (N,), r = 1/s float32 (K,) for migration, H a small Hadamard
matrix for rotation, and a float32, one for each row. Decisions:

- Everything between the two Casts is float32, in FP16 graphs too. QuantizeLinear takes FP16 only
  from opset 19 on, which TensorRT 8.6 does not read, and FP16 is too narrow for it: the sum of K
  products of int8 exceeds 65504 before the weight's scale is applied, and TensorRT-RTX 1.7 stores
  exactly that sum in the type of the scales (seen in its layer list). The Casts are fused into
  the kernels around the product.
- Nodes that read the same activation with the same scheme share all nodes up to DequantizeLinear.
- Migration is not folded into the norm before: TensorRT fuses the multiplication into the kernel
  that quantises, and the residual stream stays as it is.
- A weight that is used several times (the unrolled denoising steps) is stored once and has one
  scheme; a static scale is that of each use's own input, and migration, which goes into the
  weight, looks at all of them. The uses share the weight's DequantizeLinear too: ONNX Runtime
  dequantises all weights before it begins, and with a node for each of four uses a true-size
  action head took 14 GB instead of 4.3.
- Weights are quantised while the external data are written, one tensor at a time.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from groot_int8_ros.errors import QuantizationError
from groot_int8_ros.policy.quantization import CACHE, LayerScheme
from groot_int8_ros.policy.types import Float32Array
from offline_tools.quantize.arithmetic import (
    SMALLEST_ROW_MAX,
    hadamard,
    input_channel_max,
    migration_factors,
    quantise,
    transformed_weight,
    weight_scales,
)
from offline_tools.quantize.layers import (
    Layer,
    as_columns,
    find_layers,
    load_graph,
    read_weight,
)
from offline_tools.quantize.ranges import DEFAULT_PERCENTILE, INT8_MAX
from offline_tools.quantize.statistics import (
    GraphStatistics,
    InputStatistics,
    migration_sizes,
)

Plan = Mapping[str, LayerScheme]

_EXTERNAL_DATA_FROM_BYTES = 1024


@dataclass(frozen=True)
class _Quantiser:
    """What the layers that share their activations and a scheme share; a scale for each use."""

    scheme: LayerScheme
    layers: tuple[Layer, ...]
    factors: Float32Array | None
    scales: tuple[float, ...]


def quantize_graph(
    source: Path,
    target: Path,
    plan: Plan,
    statistics: GraphStatistics | None,
    *,
    percentile: float = DEFAULT_PERCENTILE,
    cache_scales: Mapping[str, float] | None = None,
) -> None:
    """Write the INT8 form of a float graph.

    Args:
        source: The float graph; its external data lie beside it. Only read.
        target: The graph to write, with its external data beside it, in another folder or by
            another name.
        plan: INT8 layer to its scheme; layers that it does not name stay float.
        statistics: Of the float graph; needed by `static` and by migration.
        percentile: Of the range method of that name.
        cache_scales: Activation to scale, for the range method `cache`.

    Raises:
        QuantizationError: The plan does not fit the graph or the statistics.
    """
    model = load_graph(source)
    quantize_model(model, plan, statistics, percentile=percentile, cache_scales=cache_scales or {})
    target.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ir.save(
            model,
            target,
            external_data=f"{target.name}.data",
            size_threshold_bytes=_EXTERNAL_DATA_FROM_BYTES,
        )
    try:
        onnx.checker.check_model(str(target), full_check=False)
    except onnx.checker.ValidationError as error:
        raise RuntimeError(f"the ONNX checker refuses {target}: {error}") from error


def quantize_model(
    model: ir.Model,
    plan: Plan,
    statistics: GraphStatistics | None,
    *,
    percentile: float = DEFAULT_PERCENTILE,
    cache_scales: Mapping[str, float] | None = None,
) -> None:
    """Rewrite a float graph in place; see `quantize_graph`."""
    layers = {layer.name: layer for layer in find_layers(model)}
    unknown = sorted(set(plan) - set(layers))
    if unknown:
        raise QuantizationError(
            f"{len(unknown)} layers of the plan are not in the graph, the first is {unknown[0]}: "
            "the plan belongs to another model"
        )
    shared: dict[tuple[tuple[str, ...], LayerScheme], list[Layer]] = {}
    for name, layer in layers.items():
        if name in plan:
            shared.setdefault((layer.inputs, plan[name]), []).append(layer)
    rewriter = _Rewriter(model)
    for (activations, scheme), members in shared.items():
        if scheme.range_method == CACHE:
            scales = _cached_scales(scheme, members[0], cache_scales or {})
            quantiser = _Quantiser(scheme, tuple(members), None, scales)
        else:
            seen = statistics.of(activations) if statistics is not None else None
            quantiser = _prepare(rewriter, scheme, members, seen, percentile)
        rewriter.apply(quantiser)
    rewriter.finish()


def _cached_scales(
    scheme: LayerScheme, layer: Layer, cache_scales: Mapping[str, float]
) -> tuple[float, ...]:
    missing = [name for name in layer.inputs if name not in cache_scales]
    if missing:
        raise QuantizationError(
            f"the scheme {scheme.name} of {layer.name} needs the scale of its input {missing[0]} "
            "from a calibration cache, and none was given"
        )
    return tuple(cache_scales[name] for name in layer.inputs)


def _prepare(
    rewriter: _Rewriter,
    scheme: LayerScheme,
    layers: Sequence[Layer],
    seen: Sequence[InputStatistics] | None,
    percentile: float,
) -> _Quantiser:
    factors: Float32Array | None = None
    scales = (1.0 / INT8_MAX,) * len(layers[0].inputs)
    if scheme.activation == "static" or scheme.migration_alpha is not None:
        if seen is None:
            raise QuantizationError(
                f"the scheme {scheme.name} of {layers[0].name} needs statistics of its input, and "
                "the calibration has none: collect them for this graph and all its layers"
            )
        channels = {len(use.channel_max) for use in seen}
        if channels != {layers[0].in_channels}:
            raise QuantizationError(
                f"the statistics of {layers[0].name} have {min(channels)} channels and the layer "
                f"has {layers[0].in_channels}: they belong to another model"
            )
    if scheme.migration_alpha is not None:
        assert seen is not None
        weight_max = input_channel_max(rewriter.weight(layer) for layer in layers)
        factors = migration_factors(
            migration_sizes(seen, scheme), weight_max, scheme.migration_alpha
        )
    if scheme.activation == "static":
        assert seen is not None
        scales = tuple(use.static_scale(scheme, factors, percentile) for use in seen)
    return _Quantiser(scheme, tuple(layers), factors, scales)


class _Rewriter:
    """Adds nodes and constants to one graph."""

    def __init__(self, model: ir.Model) -> None:
        self._graph = model.graph
        self._nodes = {node.name: node for node in model.graph}
        self._order = {node.name: place for place, node in enumerate(model.graph)}
        self._values = {
            value.name: value for node in model.graph for value in node.inputs if value is not None
        }

    def weight(self, layer: Layer) -> Float32Array:
        """Read a layer's weight as float32 (K, N)."""
        return read_weight(self._graph, layer)

    def apply(self, quantiser: _Quantiser) -> None:
        """Put a quantiser behind each of its activations, and its layers' uses behind that."""
        name = quantiser.layers[0].name
        constants = _Constants(self._graph, f"{name}/input")
        weights = [self._int8_weight(layer, quantiser) for layer in quantiser.layers]
        for use, scale in enumerate(quantiser.scales):
            nodes = [layer.nodes[use] for layer in quantiser.layers]
            first = self._nodes[min(nodes, key=lambda node: self._order[node])]
            place = _Place(self._graph, first, f"{name}/input{_number(use)}")
            x = self._values[quantiser.layers[0].inputs[use]]
            dtype = x.dtype
            if dtype is None:
                raise RuntimeError(f"the activation {x.name} has no type")
            restored, row_max = self._quantised(place, x, quantiser, scale, constants)
            for layer, weight in zip(quantiser.layers, weights, strict=True):
                self._rewrite_use(layer, use, restored, row_max, weight, dtype)

    def _quantised(
        self,
        place: _Place,
        x: ir.Value,
        quantiser: _Quantiser,
        scale: float,
        constants: _Constants,
    ) -> tuple[ir.Value, ir.Value | None]:
        """Add the nodes up to DequantizeLinear; return its output and the row maxima."""
        shape = x.shape
        if x.dtype != ir.DataType.FLOAT:
            x = place.node("Cast", [x], shape, attributes={"to": int(ir.DataType.FLOAT)})
        if quantiser.factors is not None:
            reciprocal = (np.float32(1.0) / quantiser.factors).astype(np.float32)
            x = place.node("Mul", [x, constants("migration", reciprocal)], shape)
        if quantiser.scheme.rotation is not None:
            layer = quantiser.layers[0]
            x = _rotate(place, x, shape, layer, quantiser.scheme.rotation, constants)
        row_max: ir.Value | None = None
        if quantiser.scheme.activation == "row":
            column = None if shape is None else ir.Shape([*shape[:-1], 1])
            magnitude = place.node("Abs", [x], shape)
            found = place.node("ReduceMax", [magnitude], column, attributes={"axes": [-1]})
            smallest = constants("smallest", np.float32(SMALLEST_ROW_MAX))
            row_max = place.node("Max", [found, smallest], column)
            x = place.node("Div", [x, row_max], shape)
        scalar = place.constant("scale", np.float32(scale))
        zero = constants("zero_point", np.int8(0))
        quantised = place.node("QuantizeLinear", [x, scalar, zero], shape, ir.DataType.INT8)
        return place.node("DequantizeLinear", [quantised, scalar, zero], shape), row_max

    def _rewrite_use(
        self,
        layer: Layer,
        use: int,
        activation: ir.Value,
        row_max: ir.Value | None,
        weight: ir.Value,
        dtype: ir.DataType,
    ) -> None:
        node = self._nodes[layer.nodes[use]]
        output = node.outputs[0]
        shape = output.shape
        attributes = {"transB": 1} if layer.operator == "Gemm" and layer.out_axis == 0 else {}
        place = _Place(self._graph, node, f"{layer.name}{_number(use)}")
        product = place.node(
            layer.operator, [activation, weight], shape, attributes=attributes, name=None
        )
        result = product
        if row_max is not None:
            result = place.node("Mul", [result, row_max], shape)
        if layer.operator == "Gemm" and len(node.inputs) > 2 and node.inputs[2] is not None:
            result = place.node("Add", [result, self._float_bias(node.inputs[2])], shape)
        if dtype != ir.DataType.FLOAT:
            result = place.node("Cast", [result], shape, dtype, attributes={"to": int(dtype)})
        # The output keeps its name, so that a graph output stays what the manifest says.
        name = output.name
        output.replace_all_uses_with(result, replace_graph_outputs=True)
        self._graph.remove(node, safe=True)
        result.name = name
        new = product.producer()
        assert new is not None
        new.name = layer.nodes[use]
        self._nodes[layer.nodes[use]] = new
        if name is not None:
            self._values[name] = result

    def _int8_weight(self, layer: Layer, quantiser: _Quantiser) -> ir.Value:
        """Store a layer's weight in INT8 and return it dequantised, before its first use."""
        initializer = self._graph.initializers[layer.weight]
        if initializer.shape is None:
            raise RuntimeError(f"the weight {layer.weight} has no shape")
        # The rewrite removes the initializer from the graph, and its tensor is read again later.
        stored = initializer.const_value
        columns = read_weight(self._graph, layer)
        if not np.isfinite(columns).all():
            raise QuantizationError(
                f"the weight of {layer.name} holds NaN or infinity: the float bundle is damaged, "
                "export it again"
            )
        factors, rotation = quantiser.factors, quantiser.scheme.rotation
        scales = weight_scales(transformed_weight(columns, factors, rotation))

        def read() -> ir.TensorProtocol:
            assert stored is not None
            columns = transformed_weight(as_columns(stored, layer), factors, rotation)
            codes = quantise(columns, scales)
            return ir.tensor(
                np.ascontiguousarray(codes.T if layer.out_axis == 0 else codes), name=name
            )

        name = _unused(self._graph, f"{layer.weight}.int8")
        quantised = ir.Value(
            name=name,
            type=ir.TensorType(ir.DataType.INT8),
            shape=initializer.shape,
            const_value=ir.LazyTensor(
                read, dtype=ir.DataType.INT8, shape=initializer.shape, name=name, cache=False
            ),
        )
        self._graph.register_initializer(quantised)
        place = _Place(self._graph, self._nodes[layer.nodes[0]], f"{layer.name}/weight")
        return place.node(
            "DequantizeLinear",
            [quantised, place.constant("scale", scales)],
            initializer.shape,
            attributes={"axis": layer.out_axis},
        )

    def _float_bias(self, bias: ir.Value) -> ir.Value:
        if bias.dtype == ir.DataType.FLOAT:
            return bias
        if bias.const_value is None or bias.name is None:
            raise QuantizationError("a layer's bias is computed at run time, which is not handled")
        name = f"{bias.name}.float32"
        if name not in self._graph.initializers:
            value = bias.const_value.numpy().astype(np.float32)
            self._graph.register_initializer(_initializer(name, value))
        return self._graph.initializers[name]

    def finish(self) -> None:
        """Drop the float weights that nothing reads any more."""
        for name, value in list(self._graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del self._graph.initializers[name]


def _number(use: int) -> str:
    """Return what distinguishes the names of a later use, as the exporter's own do."""
    return f"_{use}" if use else ""


def _rotate(
    place: _Place,
    x: ir.Value,
    shape: ir.Shape | None,
    layer: Layer,
    block: int,
    constants: _Constants,
) -> ir.Value:
    """Mix each block of channels; see `arithmetic.rotated`."""
    if shape is None:
        raise RuntimeError(f"the input of {layer.name} has no known rank")
    if layer.in_channels % block:
        raise QuantizationError(
            f"{layer.name} has {layer.in_channels} input channels, which rotation blocks of "
            f"{block} do not divide"
        )
    count = layer.in_channels // block
    # A zero stands for the input's own length of that axis.
    leading = [0] * (len(shape) - 1)
    split = constants("blocks", np.array([*leading, count, block], np.int64))
    joined = constants("channels", np.array([*leading, layer.in_channels], np.int64))
    blocks = ir.Shape([*shape[:-1], count, block])
    x = place.node("Reshape", [x, split], blocks)
    x = place.node("MatMul", [x, constants("hadamard", hadamard(block))], blocks)
    return place.node("Reshape", [x, joined], shape, name="Reshape_back")


class _Place:
    """Where in the graph, and under which name, nodes are added."""

    def __init__(self, graph: ir.Graph, before: ir.Node, prefix: str) -> None:
        self._graph = graph
        self._before = before
        self._prefix = prefix

    def node(
        self,
        operator: str,
        inputs: Sequence[ir.Value],
        shape: ir.Shape | None,
        dtype: ir.DataType = ir.DataType.FLOAT,
        *,
        attributes: Mapping[str, Any] | None = None,
        name: str | None = "",
    ) -> ir.Value:
        """Add a node before the place and return its output.

        Args:
            operator: Its type.
            inputs: What it reads.
            shape: Of its output.
            dtype: Of its output.
            attributes: By name.
            name: Its own name behind the place's, the operator's if empty; None leaves it
                unnamed, to be named by the caller.
        """
        new = ir.node(operator, inputs=inputs, attributes=dict(attributes or {}))
        if name is not None:
            new.name = f"{self._prefix}/{name or operator}"
            new.outputs[0].name = f"{new.name}_output"
        new.outputs[0].type = ir.TensorType(dtype)
        new.outputs[0].shape = shape
        self._graph.insert_before(self._before, new)
        return new.outputs[0]

    def constant(self, name: str, value: NDArray[Any] | np.generic) -> ir.Value:
        """Add an initializer."""
        full = _unused(self._graph, f"{self._prefix}/{name}")
        constant = _initializer(full, np.asarray(value))
        self._graph.register_initializer(constant)
        return constant


class _Constants:
    """Initializers that all uses of a quantiser share, made when they are first asked for."""

    def __init__(self, graph: ir.Graph, prefix: str) -> None:
        self._graph = graph
        self._prefix = prefix
        self._made: dict[str, ir.Value] = {}

    def __call__(self, name: str, value: NDArray[Any] | np.generic) -> ir.Value:
        if name not in self._made:
            constant = _initializer(
                _unused(self._graph, f"{self._prefix}/{name}"), np.asarray(value)
            )
            self._graph.register_initializer(constant)
            self._made[name] = constant
        return self._made[name]


def _initializer(name: str, value: NDArray[Any]) -> ir.Value:
    tensor = ir.tensor(value, name=name)
    return ir.Value(
        name=name,
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape(value.shape),
        const_value=tensor,
    )


def _unused(graph: ir.Graph, name: str) -> str:
    number, candidate = 0, name
    while candidate in graph.initializers:
        number += 1
        candidate = f"{name}_{number}"
    return candidate
