"""INT8 weights in the form that TensorRT 8.6 takes: float, with a Q→DQ pair behind them.

Owns: the rewrite of a graph into a temporary file. Must not import torch. A bundle stores an INT8
layer's weight as an int8 initializer with a DequantizeLinear, which newer versions fold; 8.6 fails
on it (`convertMyelinWeightsToFp32`). Quantising `code * scale` with the same scale gives the code
again, bit for bit, so the rewritten graph computes the same. Of a weight that several products use
(unrolled denoising steps) each gets a DequantizeLinear of its own: that is the form that 8.6 was
seen to turn into INT8 products.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from groot_int8_ros.errors import EngineError

_EXTERNAL_FROM_BYTES = 1024


def has_stored_int8_weights(graph: Path) -> bool:
    """Whether a graph dequantises int8 initializers."""
    return bool(_dequantised_initializers(ir.load(graph)))


def write_with_float_weights(graph: Path, target: Path) -> int:
    """Write a graph again with each stored int8 weight as float weight, Q and DQ.

    Weights are converted while the external data are written, one at a time.

    Args:
        graph: The `.onnx` file to read.
        target: The `.onnx` file to write, in another folder; its data go beside it.

    Returns:
        How many weights were rewritten.

    Raises:
        EngineError: A weight has no scale that is stored in the graph.
    """
    model = ir.load(graph)
    found = _dequantised_initializers(model)
    rewritten: dict[str, ir.Value] = {}
    for node in found:
        codes = node.inputs[0]
        if codes is None or codes.name is None:
            raise RuntimeError(f"{node.name}: a DequantizeLinear without an input")
        if codes.name not in rewritten:
            rewritten[codes.name] = _quantised_again(model.graph, node, codes)
        quantised = rewritten[codes.name]
        # 8.6 reads a zero point whether there is one or not; without one a Q gives uint8 besides.
        zero = _producer(quantised).inputs[2]
        scale = node.inputs[1]
        node.resize_inputs(3)
        node.replace_input_with(0, quantised)
        node.replace_input_with(1, scale)
        node.replace_input_with(2, zero)
        _one_for_each_use(model.graph, node)
    for name in rewritten:
        del model.graph.initializers[name]
    ir.save(
        model,
        target,
        external_data=f"{target.name}.data",
        size_threshold_bytes=_EXTERNAL_FROM_BYTES,
    )
    return len(rewritten)


def _dequantised_initializers(model: ir.Model) -> list[ir.Node]:
    return [
        node
        for node in model.graph
        if node.op_type == "DequantizeLinear"
        and node.inputs[0] is not None
        and node.inputs[0].is_initializer()
        and node.inputs[0].dtype == ir.DataType.INT8
    ]


def _one_for_each_use(graph: ir.Graph, node: ir.Node) -> None:
    shared = node.outputs[0]
    for number, use in enumerate(tuple(shared.uses())[1:], start=1):
        copy = ir.node(
            node.op_type, node.inputs, attributes=node.attributes, name=f"{node.name}/{number}"
        )
        output = copy.outputs[0]
        output.name, output.shape, output.type = (
            f"{shared.name}/{number}",
            shared.shape,
            shared.type,
        )
        graph.insert_after(node, copy)
        use.node.replace_input_with(use.idx, output)


def _quantised_again(graph: ir.Graph, node: ir.Node, codes: ir.Value) -> ir.Value:
    scale = node.inputs[1]
    stored, scales = codes.const_value, None if scale is None else scale.const_value
    if stored is None or scale is None or scales is None or scale.dtype is None:
        raise EngineError(
            f"the INT8 weight {codes.name} has no stored scale; quantise the bundle again"
        )
    axis = node.attributes.get_int("axis", 1)

    def read() -> ir.TensorProtocol:
        values = _dequantise(stored.numpy(), scales.numpy(), axis)
        return ir.tensor(values.astype(scales.numpy().dtype, copy=False))

    name = f"{codes.name}/float"
    weight = ir.Value(
        name=name,
        shape=codes.shape,
        type=ir.TensorType(scale.dtype),
        const_value=ir.LazyTensor(
            read, dtype=scale.dtype, shape=ir.Shape(stored.numpy().shape), name=name, cache=False
        ),
    )
    graph.initializers[name] = weight
    zeros = np.zeros(scales.numpy().shape, np.int8)
    zero = ir.Value(
        name=f"{codes.name}/zero_point",
        shape=ir.Shape(zeros.shape),
        type=ir.TensorType(ir.DataType.INT8),
        const_value=ir.tensor(zeros),
    )
    graph.initializers[str(zero.name)] = zero
    quantise = ir.node(
        "QuantizeLinear",
        [weight, scale, zero],
        attributes={"axis": axis},
        name=f"{codes.name}/QuantizeLinear",
    )
    output = quantise.outputs[0]
    output.name = f"{codes.name}/quantised"
    output.shape, output.type = codes.shape, ir.TensorType(ir.DataType.INT8)
    graph.insert_before(node, quantise)
    return output


def _producer(value: ir.Value) -> ir.Node:
    node = value.producer()
    if node is None:
        raise RuntimeError(f"{value.name} has no producer")
    return node


def _dequantise(codes: NDArray[np.int8], scales: NDArray[np.floating], axis: int) -> NDArray:  # type: ignore[type-arg]
    shape = [1] * codes.ndim
    if scales.ndim:
        shape[axis] = -1
    return codes.astype(np.float32) * scales.astype(np.float32).reshape(shape)
