"""A half-precision graph in bfloat16, for a TensorRT that keeps the types that its graph states.

Owns: the rewrite of a graph into a temporary file. Must not import torch. bfloat16 is the
reference's own arithmetic and there for comparison; NumPy has no such type, so no bundle is stored
in it and the graph's inputs and outputs stay as they are, converted just inside. What the graph
computes in float32 on purpose stays float32. A weight that was bfloat16 in the checkpoint gets its
old value back unless it is smaller than float16's normal numbers (6e-5).
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

_EXTERNAL_FROM_BYTES = 1024
_HALF, _BRAIN = ir.DataType.FLOAT16, ir.DataType.BFLOAT16


def write_as_bfloat16(graph: Path, target: Path) -> int:
    """Write a graph again with bfloat16 wherever it has float16.

    Weights are converted while the external data are written, one at a time.

    Args:
        graph: The `.onnx` file to read.
        target: The `.onnx` file to write, in another folder; its data go beside it.

    Returns:
        How many weights were converted.
    """
    model = ir.load(graph)
    converted = 0
    for value in model.graph.initializers.values():
        if value.const_value is not None and value.const_value.dtype == _HALF:
            value.const_value = _brain(value.const_value)
            value.type = ir.TensorType(_BRAIN)
            converted += 1
    outside = {*model.graph.inputs, *model.graph.outputs}
    for node in list(model.graph):
        for attribute in list(node.attributes.values()):
            if attribute.type == ir.AttributeType.INT and attribute.name == "to":
                if attribute.as_int() == _HALF:
                    node.attributes["to"] = ir.AttrInt64("to", _BRAIN)
            elif attribute.type == ir.AttributeType.TENSOR:
                tensor = attribute.as_tensor()
                if tensor.dtype == _HALF:
                    node.attributes[attribute.name] = ir.AttrTensor(attribute.name, _brain(tensor))
        for value in node.outputs:
            if value.dtype == _HALF and value not in outside:
                value.type = ir.TensorType(_BRAIN)
    for value in model.graph.inputs:
        if value.dtype == _HALF:
            _convert_input(model.graph, value)
    for index, value in enumerate(model.graph.outputs):
        if value.dtype == _HALF:
            _convert_output(model.graph, index, value)
    ir.save(
        model,
        target,
        external_data=f"{target.name}.data",
        size_threshold_bytes=_EXTERNAL_FROM_BYTES,
    )
    return converted


def _brain(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    def convert() -> ir.TensorProtocol:
        return ir.tensor(tensor.numpy().astype(_BRAIN.numpy()), dtype=_BRAIN, name=tensor.name)

    return ir.LazyTensor(
        convert, dtype=_BRAIN, shape=ir.Shape(tensor.shape.numpy()), name=tensor.name, cache=False
    )


def _convert_input(graph: ir.Graph, value: ir.Value) -> None:
    uses = list(value.uses())
    if not uses:
        return
    cast = ir.node("Cast", [value], {"to": _BRAIN}, name=f"{value.name}/as_bfloat16")
    inside = cast.outputs[0]
    inside.name, inside.shape = f"{value.name}/bfloat16", value.shape
    inside.type = ir.TensorType(_BRAIN)
    for node, position in uses:
        node.replace_input_with(position, inside)
    graph.insert_before(graph[0], cast)


def _convert_output(graph: ir.Graph, index: int, value: ir.Value) -> None:
    if value.producer() is None:
        return
    name = value.name
    value.name, value.type = f"{name}/bfloat16", ir.TensorType(_BRAIN)
    cast = ir.node("Cast", [value], {"to": _HALF}, name=f"{name}/as_float16")
    outside = cast.outputs[0]
    outside.name, outside.shape, outside.type = name, value.shape, ir.TensorType(_HALF)
    graph.append(cast)
    graph.outputs[index] = outside
