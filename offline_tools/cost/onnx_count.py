"""The work of an ONNX graph, read from its nodes and shapes.

Owns: `count_graph`. Must not import torch, and reads no weight: a robot can run it. Shapes come
from ONNX's own shape inference, with the lengths of the varying axes filled in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import onnx
from onnx import shape_inference

from groot_int8_ros.errors import BundleError
from offline_tools.cost.work import (
    ATTENTION,
    NORM,
    REDUCTION,
    SOFTMAX,
    GraphWork,
    Launch,
    kind_of,
)

_PRODUCTS = ("MatMul", "Gemm", "Conv")
_OTHERS = {
    "LayerNormalization": NORM,
    "ReduceMean": NORM,
    "Softmax": SOFTMAX,
    "ReduceMax": REDUCTION,
}
# Between a quantised tensor and the product that reads it: these change no value, or one that an
# engine fuses.
_TRANSPARENT = ("Cast", "Identity", "Reshape", "Transpose", "Squeeze", "Unsqueeze")
# Behind an INT8 product, up to the Cast that ends its float32 part: fused into the product.
_FUSED = ("Mul", "Add", "Cast")
_BITS: dict[int, int] = {
    onnx.TensorProto.FLOAT: 32,
    onnx.TensorProto.FLOAT16: 16,
    onnx.TensorProto.BFLOAT16: 16,
    onnx.TensorProto.INT64: 64,
    onnx.TensorProto.INT32: 32,
    onnx.TensorProto.INT8: 8,
    onnx.TensorProto.UINT8: 8,
    onnx.TensorProto.BOOL: 8,
}


def count_graph(path: Path, name: str, runs: int, lengths: Mapping[str, int]) -> GraphWork:
    """Count a graph's work for one observation.

    Args:
        path: The `.onnx` file; its external data are not read.
        name: Name of the graph.
        runs: How often an observation runs it.
        lengths: Length of each varying axis, by its name.

    Raises:
        BundleError: The file is no ONNX graph, or a shape cannot be inferred.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:
        raise BundleError(
            f"{path} cannot be read as an ONNX graph: {error}. Export the bundle again."
        ) from error
    for value in model.graph.input:
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param in lengths:
                axis.dim_value = lengths[axis.dim_param]
    del model.graph.value_info[:]
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    model = shape_inference.infer_shapes(model, data_prop=True)
    return _Counter(model.graph, str(path)).count(name, runs)


class _Counter:
    def __init__(self, graph: onnx.GraphProto, origin: str) -> None:
        self.graph = graph
        self.origin = origin
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}
        self.producers = {name: node for node in graph.node for name in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.values = {
            value.name: value.type.tensor_type
            for value in (*graph.input, *graph.value_info, *graph.output)
        }

    def count(self, name: str, runs: int) -> GraphWork:
        launches = tuple(
            launch for node in self.graph.node if (launch := self._launch(node)) is not None
        )
        stored = sum(self._initializer_bytes(tensor) for tensor in self.initializers.values())
        named = {launch.weight: launch.weight_bytes for launch in launches}
        return GraphWork(name, runs, launches, stored - sum(named.values()))

    def _launch(self, node: onnx.NodeProto) -> Launch | None:
        if node.op_type in _PRODUCTS:
            return self._product(node)
        kind = _OTHERS.get(node.op_type)
        if kind is None or node.input[0] in self.initializers:
            return None
        return Launch(kind, 0, 0, self._bytes(node.input[0]) + self._bytes(node.output[0]))

    def _product(self, node: onnx.NodeProto) -> Launch | None:
        left, right = node.input[0], node.input[1]
        codes = [self._int8_source(operand) for operand in (left, right)]
        weight = next(
            (
                stored
                for operand, code in ((right, codes[1]), (left, codes[0]))
                if (stored := code if code is not None else operand) in self.initializers
            ),
            "",
        )
        is_int8 = all(code is not None for code in codes)
        read = 0
        for operand, code in zip((left, right), codes, strict=True):
            source = operand if code is None else code
            if source != weight:
                read += self._bytes(source)
        written = self._written(node.output[0]) if is_int8 else node.output[0]
        moved = read + self._bytes(written)
        out = self._shape(node.output[0])
        if node.op_type == "Conv":
            inner = math.prod(self._shape(right)[1:])
        else:
            transposed = node.op_type == "Gemm" and _attribute(node, "transA")
            inner = self._shape(left)[-2 if transposed else -1]
        flops = 2 * math.prod(out) * inner
        if not weight:
            return Launch(ATTENTION, flops, 0, moved, "", is_int8, read)
        kind = kind_of(f"{node.name} {weight}")
        stored = self._initializer_bytes(self.initializers[weight])
        return Launch(kind, flops, stored, moved, weight, is_int8, read)

    def _written(self, name: str) -> str:
        """Return what an INT8 product writes: the Cast of its scaled sums, or else the sums."""
        value: str = name
        while len(readers := self.readers.get(value, [])) == 1 and readers[0].op_type in _FUSED:
            value = readers[0].output[0]
            if readers[0].op_type == "Cast":
                return value
        return name

    def _int8_source(self, name: str) -> str | None:
        """Return the int8 tensor that a value is dequantised from, or None."""
        node = self.producers.get(name)
        while node is not None and node.op_type in _TRANSPARENT:
            node = self.producers.get(node.input[0])
        if node is None or node.op_type != "DequantizeLinear":
            return None
        source = node.input[0]
        return source if self._element(source) == onnx.TensorProto.INT8 else None

    def _element(self, name: str) -> int:
        if name in self.initializers:
            return int(self.initializers[name].data_type)
        return int(self.values[name].elem_type) if name in self.values else 0

    def _shape(self, name: str) -> list[int]:
        if name in self.initializers:
            return list(self.initializers[name].dims)
        declared = self.values.get(name)
        axes = declared.shape.dim if declared is not None else []
        shape = [axis.dim_value for axis in axes]
        if declared is None or not declared.HasField("shape") or not all(shape):
            raise BundleError(
                f"{self.origin}: the shape of {name} cannot be inferred. Export the bundle again."
            )
        return shape

    def _bytes(self, name: str) -> int:
        return math.prod(self._shape(name)) * _BITS[self._element(name)] // 8

    @staticmethod
    def _initializer_bytes(tensor: onnx.TensorProto) -> int:
        return int(math.prod(tensor.dims)) * _BITS.get(tensor.data_type, 32) // 8


def _attribute(node: onnx.NodeProto, name: str) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == name), 0)
