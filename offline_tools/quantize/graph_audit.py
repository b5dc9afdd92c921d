"""Which matrix products of a graph run on INT8 operands, read from the graph itself.

Owns: `audit_graph`, `audit_bundle`. Must not import torch or TensorRT. It trusts neither names nor
the rewrite that made the graph: a layer is INT8 when both operands of its product come out of a
DequantizeLinear whose codes are int8 with a zero point of zero, which is what TensorRT fuses into
an INT8 product. What an engine made of it is another question, for the engine's own audit.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
import onnx_ir as ir

from groot_int8_ros.policy.bundle import Bundle
from groot_int8_ros.policy.quantization import QuantizationRecord
from offline_tools.engine.verdicts import LayerVerdict, Precision
from offline_tools.quantize.arithmetic import hadamard, rotation_block
from offline_tools.quantize.layers import layer_name, load_graph

# Between codes and product TensorRT looks through these; they move values and change none.
_TRANSPARENT = frozenset({"Cast", "Identity", "Reshape", "Transpose", "Squeeze", "Unsqueeze"})


def audit_bundle(bundle: Bundle) -> dict[str, list[LayerVerdict]]:
    """Judge every graph of a bundle that an engine runs; see `audit_graph`."""
    return {
        name: audit_graph(bundle.graph_path(name), bundle.manifest.graphs[name].quantization)
        for name in bundle.manifest.engine_graphs
    }


def audit_graph(path: Path, record: QuantizationRecord | None) -> list[LayerVerdict]:
    """Judge every layer of a graph.

    Args:
        path: The `.onnx` file.
        record: What the manifest says about it; None for a graph that should be float.

    Returns:
        A verdict for each constant weight of products, in the order of the graph, then one for
        each layer of the record that the graph lacks. A rotation, known by its matrix, is part of
        how the layers behind it are quantised and no layer of the model.

    Raises:
        QuantizationError: The file is no ONNX graph.
    """
    wanted = set() if record is None else set(record.layers)
    verdicts = []
    for name, nodes in _products(load_graph(path)).items():
        if _is_rotation(nodes[0]):
            continue
        judged = [_judge(node) for node in nodes]
        verdict, evidence = next(
            (one for one in judged if one[0] is not Precision.INT8), judged[0]
        )
        asked = Precision.INT8 if name in wanted else Precision.FLOAT
        verdicts.append(LayerVerdict(name, asked, verdict, evidence, products=len(nodes)))
    found = {verdict.layer for verdict in verdicts}
    verdicts += [
        LayerVerdict(name, Precision.INT8, Precision.UNKNOWN, "the graph has no such layer")
        for name in sorted(wanted - found)
    ]
    return verdicts


def fewest_launches(path: Path, layers: Collection[str]) -> int:
    """Return how many kernels the products of some layers take at least.

    An engine may compute products of the same tensor in one kernel, so they are as many as there
    are tensors, before these are quantised.

    Args:
        path: The `.onnx` file.
        layers: Names, as `audit_graph` has them.
    """
    nodes = [
        node for name, own in _products(load_graph(path)).items() if name in layers for node in own
    ]
    return len({_before_quantisation(node.inputs[0]) for node in nodes})


def _products(model: ir.Model) -> dict[str, list[ir.Node]]:
    """Return the products with a constant weight by layer, in the order of the graph."""
    # By weight, operator and transposition, as `layers.find_layers` has it.
    uses: dict[tuple[str | None, str, int], list[ir.Node]] = {}
    for node in model.graph:
        if node.op_type not in ("MatMul", "Gemm") or node.name is None:
            continue
        stored = _stored(node.inputs[1])
        if node.inputs[0] is not None and stored is not None:
            key = (stored.name, node.op_type, node.attributes.get_int("transB", 0))
            uses.setdefault(key, []).append(node)
    return {layer_name(str(nodes[0].name), nodes[0].op_type): nodes for nodes in uses.values()}


def _is_rotation(product: ir.Node) -> bool:
    weight = _stored(product.inputs[1])
    if weight is None or weight.const_value is None or weight.dtype != ir.DataType.FLOAT:
        return False
    shape = weight.const_value.shape.numpy()
    length = shape[0] if shape else 0
    if shape != (length, length) or rotation_block(length) != length:
        return False
    return np.array_equal(weight.const_value.numpy(), hadamard(length))


def _before_quantisation(value: ir.Value | None) -> ir.Value | None:
    """Return the tensor that codes were made of, before scales of its rows or columns."""
    while value is not None and (node := value.producer()) is not None:
        if node.op_type not in ("DequantizeLinear", "QuantizeLinear", "Cast", "Div", "Mul"):
            break
        if node.op_type == "Mul" and _stored(node.inputs[1]) is None:
            break
        value = node.inputs[0]
    return value


def _judge(node: ir.Node) -> tuple[Precision, str]:
    activation, weight = node.inputs[0], node.inputs[1]
    assert activation is not None
    assert weight is not None
    reasons = [
        f"{operand}: {reason}"
        for operand, reason in (
            ("input", _why_not_int8(activation, constant=False)),
            ("weight", _why_not_int8(weight, constant=True)),
        )
        if reason
    ]
    if not reasons:
        return Precision.INT8, "both operands are dequantised int8"
    return Precision.FLOAT, "; ".join(reasons)


def _why_not_int8(operand: ir.Value, *, constant: bool) -> str:
    """Return what keeps an operand from being int8, or an empty text."""
    node = operand.producer()
    if node is None or node.op_type != "DequantizeLinear":
        return f"{_type(operand)} from {node.op_type if node is not None else 'a constant'}"
    codes = node.inputs[0]
    if codes is None or codes.dtype not in (None, ir.DataType.INT8):
        return f"its codes are {_type(codes)}"
    for zero in _zero_points(node):
        if zero.const_value is None:
            return "its zero point is computed at run time"
        if zero.dtype != ir.DataType.INT8:
            return f"its zero point is {_type(zero)}"
        if zero.const_value.numpy().any():
            return "its zero point is not zero"
    source = codes.producer()
    if source is None:
        # A constant says its type itself; an input without a type says nothing.
        return "" if constant and codes.dtype == ir.DataType.INT8 else "its codes are not constant"
    if source.op_type != "QuantizeLinear":
        return f"its codes come from {source.op_type}"
    if not _zero_points(source):
        return "QuantizeLinear without a zero point gives uint8"
    for zero in _zero_points(source):
        if zero.dtype != ir.DataType.INT8:
            return f"it is quantised to {_type(zero)}"
    return ""


def _zero_points(node: ir.Node) -> list[ir.Value]:
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    return [] if zero is None else [zero]


def _stored(value: ir.Value | None) -> ir.Value | None:
    """Return the initializer that a weight comes from, whatever conversions stand between."""
    while value is not None and (node := value.producer()) is not None:
        if node.op_type not in (*_TRANSPARENT, "QuantizeLinear", "DequantizeLinear"):
            return None
        value = node.inputs[0]
    return value if value is not None and value.is_initializer() else None


def _type(value: ir.Value | None) -> str:
    if value is None or value.dtype is None:
        return "of unknown type"
    return str(value.dtype.name).lower()
