"""What an audit says about one layer, whichever way it looked.

Owns: `LayerVerdict`. Must not import torch, onnx or TensorRT: the check of an ONNX graph and the
check of a built engine both speak in these terms, and a layer that neither could read is UNKNOWN,
never a pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum


class Precision(str, Enum):
    """In what a layer's product of input and weight is computed.

    Attributes:
        INT8: 8-bit operands on both sides.
        FLOAT: Floating operands, of whichever width.
        UNKNOWN: What was looked at does not tell. As a wish it means that nothing was asked for.
    """

    INT8 = "INT8"
    FLOAT = "FLOAT"
    UNKNOWN = "UNKNOWN"


@dataclass(frozen=True)
class LayerVerdict:
    """One layer: what it should be, what it is, and how one knows.

    Attributes:
        layer: The layer's name: its first MatMul node's without the trailing `/MatMul`.
        wanted: What the bundle's manifest, or else the graph's Q/DQ nodes, ask for.
        verdict: What was found.
        evidence: The formats, node or kernel names that the verdict rests on, for a person.
        fused: Nodes of the graph that the engine computes together with the layer's product, where
            its inspector tells.
        products: Products of the graph that the layer is: several where a graph unrolls its
            denoising steps. The layer is what all of them are.
    """

    layer: str
    wanted: Precision
    verdict: Precision
    evidence: str
    fused: tuple[str, ...] = ()
    products: int = 1

    @property
    def failed(self) -> bool:
        """Whether the layer should be INT8 and is not known to be."""
        return self.wanted is Precision.INT8 and self.verdict is not Precision.INT8


def count(verdicts: Iterable[LayerVerdict]) -> dict[Precision, int]:
    """Return how many layers got each verdict, zeros included."""
    found = dict.fromkeys(Precision, 0)
    for verdict in verdicts:
        found[verdict.verdict] += 1
    return found
