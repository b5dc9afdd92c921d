"""Graphs that TensorRT 8.6 was seen to compute wrongly, and that it therefore does not get.

Owns: the two forms and the builder level, and how they are found in a graph. Must not import
torch. What was seen, and how, is in `docs/verification.md`; graphs are exported without either
form, so only bundles that were exported before have them. Whether later versions have these
faults is not known: they are not refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir

from groot_int8_ros.errors import EngineError
from groot_int8_ros.policy.families import REFERENCE

_SPLITS = frozenset({"Split", "Slice", "Gather"})
# They move values and compute nothing, so a product that went through them is the product still.
_MOVES = frozenset({"Cast", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
_PRODUCTS = frozenset({"Gemm", "MatMul"})
_SPLIT_RANK = 5
_TRANSPOSED_RANK = 4


def wrong_forms(model: ir.Model) -> Iterator[str]:
    """Yield what TensorRT 8.6 computes wrongly in a graph, with the name of the node.

    - Query, key and value that are split from a fused product, its bias added, after it was
      reshaped to five axes, transposed or not.
    - A concatenation along the last axis of a value that a Transpose of four axes gives.

    Args:
        model: The graph, with the shapes of its values; the exporter writes them.
    """
    for node in model.graph:
        if node.op_type in _SPLITS and _is_reshaped_product(node.inputs[0]):
            yield (
                f"{node.name} ({node.op_type}) splits a product with bias that was reshaped to "
                f"{_SPLIT_RANK} axes"
            )
        elif _joins_transposed(node):
            yield f"{node.name} (Concat) joins transposed values along their last axis"


def refuse_known_faults(
    bundle: Path, graph: Path, *, family: str, quantization: str, level: int | None
) -> None:
    """Refuse what TensorRT 8.6 would build a wrong engine of.

    Args:
        bundle: The bundle, for the message.
        graph: The `.onnx` file.
        family: The bundle's.
        quantization: `none`, `qdq` or `calibrator`.
        level: The builder level; TensorRT's default, which is above 0, if None.

    Raises:
        EngineError: The graph or the level is one of the known ones; the message names the node
            and says what to do instead.
    """
    if family == REFERENCE and quantization == "qdq" and level == 0:
        raise EngineError(
            f"TensorRT 8.6 was seen to build INT8 reference graphs wrongly at builder level 0, so "
            f"{graph} is not built: use --builder-level 1 or more"
        )
    form = next(wrong_forms(ir.load(graph)), None)
    if form is None:
        return
    again = f"groot-int8 export --checkpoint CHECKPOINT --bundle {bundle} --force"
    if quantization == "qdq":
        again = "groot-int8 export its float bundle, then groot-int8 quantize"
    raise EngineError(
        f"TensorRT 8.6 computes a form in {graph} wrongly: {form}. Graphs are exported without it "
        f"now: export the bundle again ({again})"
    )


def _is_reshaped_product(value: ir.Value | None) -> bool:
    if _rank(value) != _SPLIT_RANK:
        return False
    total = _before_moves(value)
    if total is None:
        return False
    if total.op_type == "Gemm":
        return len(total.inputs) > 2 and total.inputs[2] is not None
    return total.op_type == "Add" and any(_is_product(operand) for operand in total.inputs)


def _is_product(value: ir.Value | None) -> bool:
    """Whether a value is a product; that of an INT8 layer may be scaled afterwards."""
    node = _before_moves(value)
    if node is not None and node.op_type == "Mul":
        return any(_is_product(operand) for operand in node.inputs)
    return node is not None and node.op_type in _PRODUCTS


def _joins_transposed(node: ir.Node) -> bool:
    rank = _rank(node.outputs[0])
    if node.op_type != "Concat" or rank is None:
        return False
    is_last = node.attributes["axis"].as_int() % rank == rank - 1
    return is_last and any(_is_transposed(value) for value in node.inputs)


def _is_transposed(value: ir.Value | None) -> bool:
    node = None if value is None else value.producer()
    while node is not None and node.op_type in ("Cast", "Identity"):
        value = node.inputs[0]
        node = None if value is None else value.producer()
    return node is not None and node.op_type == "Transpose" and _rank(value) == _TRANSPOSED_RANK


def _before_moves(value: ir.Value | None) -> ir.Node | None:
    node = None if value is None else value.producer()
    while node is not None and node.op_type in _MOVES:
        moved = node.inputs[0]
        node = None if moved is None else moved.producer()
    return node


def _rank(value: ir.Value | None) -> int | None:
    return None if value is None or value.shape is None else len(value.shape)
