"""The layers of an exported graph that can be INT8, and which of them share an input.

Owns: `Layer`, how it is found, and which layers a user's patterns name. Must not import torch.

A layer is a weight and the `MatMul` or `Gemm` nodes whose second operand it is; the exporter names
the first of them after it. A graph that unrolls its denoising steps uses each weight once a step:
that is one layer with several uses, for the weight is stored once and has one scheme. Products of
two activations (attention logits, attention times values) are none, so they stay float, as do
norms, softmax and residuals, which are no products at all; and so do `FLOAT_PARTS`.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from groot_int8_ros.errors import QuantizationError
from groot_int8_ros.policy.types import Float32Array

FLOAT_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)

# What a deployed graph computes in float32 whatever its type, as parts of its nodes' names: pixels
# before they are rounded, and what carries state and actions themselves.
FLOAT_PARTS = frozenset({"image_chain", "state_encoder", "action_encoder", "action_decoder"})


@dataclass(frozen=True)
class Layer:
    """A constant weight and the matrix products with it.

    Attributes:
        name: Name of the layer: its first node's without the trailing operator.
        nodes: Names of the nodes, one a use, in the order in which they run.
        operator: `MatMul` or `Gemm`.
        inputs: Name of the activation that is multiplied, one a use.
        weight: Name of the initializer.
        in_channels: Length of the axis that is summed over.
        out_channels: Length of the other axis of the weight.
        out_axis: Which axis of the stored weight that is: 1 for `MatMul`, 0 for a `Gemm` whose
            weight is stored transposed.
    """

    name: str
    nodes: tuple[str, ...]
    operator: str
    inputs: tuple[str, ...]
    weight: str
    in_channels: int
    out_channels: int
    out_axis: int

    @property
    def parameters(self) -> int:
        """Elements of the weight."""
        return self.in_channels * self.out_channels


def load_graph(path: Path) -> ir.Model:
    """Read a graph; its weights stay in their file until they are asked for.

    Raises:
        QuantizationError: The file is no ONNX graph.
    """
    try:
        return ir.load(path)
    except Exception as error:
        raise QuantizationError(
            f"{path} cannot be read as an ONNX graph: {error}. Export the bundle again."
        ) from error


def find_layers(model: ir.Model) -> list[Layer]:
    """Return a graph's layers in the order in which they first run."""
    found: dict[tuple[str, str, int], Layer] = {}
    for node in model.graph:
        use = as_layer(node)
        if use is not None:
            key = (use.weight, use.operator, use.out_axis)
            first = found.get(key)
            found[key] = (
                use
                if first is None
                else replace(
                    first, nodes=first.nodes + use.nodes, inputs=first.inputs + use.inputs
                )
            )
    return list(found.values())


def as_layer(node: ir.Node) -> Layer | None:
    """Return a node as a layer of one use, or None if it is no product with a float weight."""
    if node.op_type not in ("MatMul", "Gemm") or node.name is None:
        return None
    if not FLOAT_PARTS.isdisjoint(node.name.replace("/", ".").split(".")):
        return None
    activation, weight = node.inputs[0], node.inputs[1]
    if activation is None or weight is None or activation.name is None or weight.name is None:
        return None
    if not weight.is_initializer() or activation.is_initializer():
        return None
    if weight.dtype not in FLOAT_TYPES or weight.shape is None or len(weight.shape) != 2:
        return None
    first, second = weight.shape.numpy()
    transposed = node.op_type == "Gemm" and _whole(node, "transB", 0) == 1
    if node.op_type == "Gemm" and not _is_plain_gemm(node):
        return None
    return Layer(
        name=layer_name(node.name, node.op_type),
        nodes=(node.name,),
        operator=node.op_type,
        inputs=(activation.name,),
        weight=weight.name,
        in_channels=second if transposed else first,
        out_channels=first if transposed else second,
        out_axis=0 if transposed else 1,
    )


def layer_name(node: str, operator: str) -> str:
    """Return the layer that the node of its first use is named after."""
    return node.removesuffix(f"/{operator}")


def groups(layers: Iterable[Layer]) -> dict[tuple[str, ...], list[Layer]]:
    """Return the layers by the activations that they read, which they can quantise together."""
    found: dict[tuple[str, ...], list[Layer]] = {}
    for layer in layers:
        found.setdefault(layer.inputs, []).append(layer)
    return found


def select(layers: Sequence[Layer], patterns: Sequence[str], where: str) -> list[Layer]:
    """Return the layers whose names match a pattern.

    Args:
        layers: What there is.
        patterns: Shell patterns such as `*.mlp.*`; a leading `!` takes layers out again. They
            apply in their order; if the first one takes out, all layers are in before it.
        where: Where the layers are, for the message.

    Raises:
        QuantizationError: A pattern matches nothing.
    """
    chosen = {layer.name for layer in layers} if not patterns or patterns[0][:1] == "!" else set()
    for pattern in patterns:
        takes_out = pattern.startswith("!")
        matching = set(fnmatch.filter((layer.name for layer in layers), pattern[takes_out:]))
        if not matching:
            example = layers[len(layers) // 2].name if layers else "(there is none)"
            raise QuantizationError(
                f"the pattern {pattern!r} matches no layer of {where}; a layer's name looks like "
                f"{example}"
            )
        chosen = chosen - matching if takes_out else chosen | matching
    return [layer for layer in layers if layer.name in chosen]


def read_weight(graph: ir.Graph, layer: Layer) -> Float32Array:
    """Read a layer's weight from its file.

    Returns:
        A copy, float32 (in_channels, out_channels) however it is stored.
    """
    stored = graph.initializers[layer.weight].const_value
    if stored is None:
        raise RuntimeError(f"the weight {layer.weight} has no value")
    return as_columns(stored, layer)


def as_columns(stored: ir.TensorProtocol, layer: Layer) -> Float32Array:
    """Return a layer's stored weight as float32 (in_channels, out_channels)."""
    result: Float32Array = _transposed_if(stored.numpy(), layer.out_axis == 0).astype(np.float32)
    if isinstance(stored, ir.ExternalTensor):
        # Pages that stay mapped count as the process's memory.
        stored.release()
    return result


def _transposed_if(value: NDArray[Any], condition: bool) -> NDArray[Any]:
    return value.T if condition else value


def _whole(node: ir.Node, name: str, default: int) -> int:
    return node.attributes[name].as_int() if name in node.attributes else default


def _is_plain_gemm(node: ir.Node) -> bool:
    factors = [
        node.attributes[name].as_float() if name in node.attributes else 1.0
        for name in ("alpha", "beta")
    ]
    return factors == [1.0, 1.0] and _whole(node, "transA", 0) == 0
