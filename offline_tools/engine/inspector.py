"""Reading what TensorRT's engine inspector says about an engine, and judging each layer by it.

Owns: the inspector's JSON, and the verdicts INT8, FLOAT and UNKNOWN. Must not import torch or
TensorRT: it works on recorded text, so what it concludes is tested on inspections of real engines.

An engine's layer says which of the graph's nodes went into it (`Metadata` where the version writes
it, else the layer's own name), the formats of its inputs and outputs, and the name of its kernel.
A layer is INT8 when the product's own operands are: a kernel whose name says so, or int8 inputs of
a layer that is a product. Neither an int8 output (that is only where the next layer starts) nor
being part of a fused region proves anything: regions that TensorRT compiles as a whole (Myelin's
`ForeignNode`) are opaque to the inspector of 8.6, and every node in them is UNKNOWN.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from groot_int8_ros.errors import EngineError
from offline_tools.engine.verdicts import LayerVerdict, Precision

_METADATA_NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
# The node of a layer's product; later uses of the same weight have a number behind it.
_PRODUCT_NODE = re.compile(r"(.+)/(?:MatMul|Gemm)(?:_[0-9]+)?")

# Names of kernels as TensorRT 8.6 to 10 and cuBLAS write them: i8816 is a tensor core's int8
# product and s32 its sum, `imma` and `igemm` say so in words; `hmma`, h16816, f16f16 and sgemm are
# the floating ones.
_INT8_KERNEL = re.compile(
    r"(?<![a-z])(i8i8|int8|imma|igemm|i8816|i16832|i64x\d+x\d+|s8s8|s32_tn|ampere_int8)|_i8_|"
    r"(?<![a-z])i8(f32|i32)",
    re.IGNORECASE,
)
_FLOAT_KERNEL = re.compile(
    r"hmma|h16816|h884|h1688|f16f16|bf16|fp16|f32f32|fp32|sgemm|hgemm|s1688gemm|s16816gemm|tf32|"
    r"h64x\d+",
    re.IGNORECASE,
)
_INT8_FORMAT = re.compile(r"int8", re.IGNORECASE)
_FLOAT_FORMAT = re.compile(r"fp32|fp16|bf16|float|half", re.IGNORECASE)
_OPAQUE = re.compile(r"ForeignNode|myelin", re.IGNORECASE)
# Myelin computes a product with one row as a multiplication and a sum in a generated kernel.
_PRODUCT_KERNEL = re.compile(r"gemm|gemv|smallN|mha|__myl\w*MulSum", re.IGNORECASE)
# A product whose sum is split is two launches: the parts, then this one, which adds them up.
_SUM_OF_PARTS = re.compile(r"_execute_split_k_kernel")
_FUSED_ATTENTION = re.compile(r"mha", re.IGNORECASE)
_NO_ARITHMETIC = frozenset({"Reformat", "MyelinReformat", "NoOp", "Shape", "Constant"})
_PRODUCT_LAYER = re.compile(r"gemm|matrix.?mul|matmul|convolution|fully.?connected", re.IGNORECASE)


@dataclass(frozen=True)
class EngineLayer:
    """One layer of an engine.

    Attributes:
        name: As TensorRT named it.
        kind: TensorRT's type of layer, such as `Gemm`, `Myelin` or `Reformat`.
        input_formats: Format of each input, such as `Int8 NC/32HW32`.
        output_formats: Of each output.
        kernel: Name of the chosen kernel, empty if unknown.
        nodes: Names of the graph's nodes that went into it, where the inspector says so.
    """

    name: str
    kind: str
    input_formats: tuple[str, ...]
    output_formats: tuple[str, ...]
    kernel: str
    nodes: tuple[str, ...]

    @property
    def is_opaque(self) -> bool:
        """Whether it is a region that was compiled as a whole, whose inside is not told."""
        if self.kind in _NO_ARITHMETIC or self.kernel:
            return False
        return bool(_OPAQUE.search(self.kind)) or "ForeignNode" in self.name

    @property
    def precision(self) -> Precision:
        """In what its product is computed, if that can be told."""
        if self.is_opaque:
            return Precision.UNKNOWN
        if _INT8_KERNEL.search(self.kernel):
            return Precision.INT8
        if _FLOAT_KERNEL.search(self.kernel):
            return Precision.FLOAT
        # Formats of an engine with varying shapes may read "N/A": they tell nothing.
        if any(_INT8_FORMAT.search(text) for text in self.input_formats):
            return Precision.INT8 if _PRODUCT_LAYER.search(self.kind) else Precision.UNKNOWN
        if self.input_formats and all(map(_FLOAT_FORMAT.search, self.input_formats)):
            return Precision.FLOAT
        return Precision.UNKNOWN

    def evidence(self) -> str:
        """Return what the verdict rests on."""
        if self.is_opaque:
            return f"inside {self.name[:60]}, which the inspector does not open"
        formats = " and ".join(self.input_formats[:2]) or "formats unknown"
        return f"{self.kind}: {formats}; kernel {self.kernel or 'unknown'}"


@dataclass(frozen=True)
class _Inside:
    """What is known about layers inside regions that the inspector does not open.

    Attributes:
        int8: Verdict on those that should be INT8; None if unknown.
        floating: Verdict on the others; None if unknown.
        reason: What it rests on.
    """

    int8: Precision | None
    floating: Precision | None
    reason: str

    def verdict(self, name: str, asked: Precision, where: str) -> LayerVerdict:
        known = self.int8 if asked is Precision.INT8 else self.floating
        evidence = f"{where}; {self.reason}" if self.reason else where
        return LayerVerdict(name, asked, known or Precision.UNKNOWN, evidence)


def parse_inspection(text: str, source: str) -> list[EngineLayer]:
    """Read an inspection.

    Args:
        text: What `EngineInspector.get_engine_information(JSON)` returned.
        source: Where it comes from, for the message.

    Raises:
        EngineError: It is no such JSON, or the engine was built without detailed verbosity.
    """
    try:
        # 8.6 writes commas that no JSON allows, and generated code with tabs inside its strings.
        content = json.loads(re.sub(r",(\s*[\]}])", r"\1", text), strict=False)
        records = content["Layers"]
    except (ValueError, KeyError, TypeError) as error:
        raise EngineError(f"{source} is no inspection of an engine: {error}") from error
    if any(not isinstance(record, dict) for record in records):
        raise EngineError(
            f"{source} names its layers and says no more: the engine was built without detailed "
            "profiling verbosity. Build it again with groot-int8 build"
        )
    return [_layer(record) for record in records]


def judge(
    layers: Sequence[EngineLayer],
    wanted: Mapping[str, Precision],
    ran: Sequence[str] = (),
    float_products: int = 0,
    int8_launches: int = 1,
    products: Mapping[str, int] | None = None,
) -> list[LayerVerdict]:
    """Say of each layer of the graph what the engine made of it.

    Args:
        layers: The engine's layers.
        wanted: Layer of the graph to what it should be.
        ran: Names of the kernels that one run of the engine launched, from a profiler. They decide
            about regions that the inspector does not open, where they can: if no int8 product
            ran, no layer inside is INT8; if as many floating ones ran as the graph has anyway, and
            int8 ones for all others, none of them is a layer that should be INT8. Fewer of either
            is a list that lacks some, or a kernel of unknown name. (Attention products are taken
            to run one a kernel, and two in a fused `mha` kernel.)
        float_products: Products of the graph of which INT8 is not asked: those of two
            activations, float layers, and rotations.
        int8_launches: Launches that the products of which INT8 is asked take at least.
        products: Layer to how many products of the graph it is, where they are several.

    Returns:
        A verdict for each of `wanted`, in its order.
    """
    by_layer: dict[str, dict[str, list[EngineLayer]]] = {}
    for layer in layers:
        for node in layer.nodes:
            # A conversion in front of a product carries the node's name too and decides nothing.
            if layer.kind not in _NO_ARITHMETIC and (name := _layer_of(node)) is not None:
                by_layer.setdefault(name, {}).setdefault(node, []).append(layer)
    inside = _judge_opaque(ran, float_products, int8_launches)
    regions = [layer for layer in layers if layer.is_opaque]
    return [
        _judge(
            name,
            asked,
            list(by_layer.get(name, {}).values()),
            (products or {}).get(name, 1),
            regions,
            inside,
        )
        for name, asked in wanted.items()
    ]


def _layer_of(node: str) -> str | None:
    """Return the layer that a product's node belongs to; None for any other node."""
    product = _PRODUCT_NODE.fullmatch(node)
    return None if product is None else product[1]


def _judge(
    name: str,
    asked: Precision,
    uses: Sequence[Sequence[EngineLayer]],
    products: int,
    regions: Sequence[EngineLayer],
    inside: _Inside,
) -> LayerVerdict:
    """Judge a layer by the engine's layers that each of its products went into."""
    judged = [_judge_use(name, asked, candidates, inside) for candidates in uses]
    if len(uses) < products and regions:
        # A region is named by its first and last node alone; what is nowhere else is in one.
        where = f"inside {regions[0].name[:50]} or the like, which the inspector does not open"
        judged.append(inside.verdict(name, asked, where))
    elif len(uses) < products:
        what = "it" if products == 1 else f"{products - len(uses)} of its {products} products"
        evidence = f"no layer of the engine names {what}"
        judged.append(LayerVerdict(name, asked, Precision.UNKNOWN, evidence))
    # Unrolled steps are one layer: it is INT8 if all of them are.
    return next((one for one in judged if one.verdict is not Precision.INT8), judged[0])


def _judge_use(
    name: str, asked: Precision, candidates: Sequence[EngineLayer], inside: _Inside
) -> LayerVerdict:
    evidence = "; ".join(dict.fromkeys(layer.evidence() for layer in candidates))
    if all(layer.is_opaque for layer in candidates):
        return inside.verdict(name, asked, evidence)
    found = {layer.precision for layer in candidates}
    precision = found.pop() if len(found) == 1 else _product_precision(candidates)
    nodes = dict.fromkeys(node for layer in candidates for node in layer.nodes)
    fused = tuple(node for node in nodes if _layer_of(node) != name)
    return LayerVerdict(name, asked, precision, evidence, fused)


def _judge_opaque(ran: Sequence[str], float_products: int, int8_launches: int) -> _Inside:
    """Say what the kernels of a whole run tell about a region that is not opened."""
    launched = set(ran)
    ran = [
        name
        for name in ran
        if not _SUM_OF_PARTS.search(name)
        or _SUM_OF_PARTS.sub("_execute_kernel", name) not in launched
    ]
    int8 = sum(bool(_INT8_KERNEL.search(name)) for name in ran)
    floating = sum(
        2 if _FUSED_ATTENTION.search(name) else 1
        for name in ran
        if _PRODUCT_KERNEL.search(name) and not _INT8_KERNEL.search(name)
    )
    if not int8 and not floating:
        return _Inside(None, None, "" if not ran else "no product among the kernels that ran")
    reason = (
        f"{int8} int8 and {floating} floating products ran, and the graph has {float_products} "
        f"that should be floating and needs {int8_launches} launches or more for the others"
    )
    if not int8:
        return _Inside(Precision.FLOAT, Precision.FLOAT, reason)
    if floating == float_products and int8 >= int8_launches:
        return _Inside(Precision.INT8, Precision.FLOAT if floating else None, reason)
    return _Inside(None, None, reason)


def _product_precision(candidates: Iterable[EngineLayer]) -> Precision:
    """Decide among several layers that name one node by those that are products themselves."""
    found = {
        layer.precision
        for layer in candidates
        if _PRODUCT_LAYER.search(layer.kind) or _PRODUCT_LAYER.search(layer.kernel)
    }
    return found.pop() if len(found) == 1 else Precision.UNKNOWN


def read_kernels(text: str) -> list[str]:
    """Read the kernels of a run out of what a profiler wrote.

    Args:
        text: The CSV of Nsight Compute (`ncu --csv`) or of Nsight Systems (`nsys stats --report
            cuda_gpu_trace --format csv`), or one kernel a line.

    Returns:
        One name for each launch.
    """
    lines = text.splitlines()
    for start, line in enumerate(lines):
        header = next(csv.reader([line]), [])
        for column in ("Kernel Name", "Name"):
            if column in header:
                rows = csv.DictReader(lines[start:])
                return [row[column] for row in rows if row.get(column)]
    return [line.strip() for line in lines if line.strip()]


def _layer(record: Mapping[str, Any]) -> EngineLayer:
    name = str(record.get("Name", ""))
    metadata = str(record.get("Metadata", ""))
    nodes = tuple(dict.fromkeys(_METADATA_NODE.findall(metadata)))
    kernel = str(record.get("TacticName", ""))
    return EngineLayer(
        name=name,
        kind=str(record.get("LayerType", "")),
        input_formats=_formats(record.get("Inputs")),
        output_formats=_formats(record.get("Outputs")),
        kernel=kernel,
        nodes=nodes or tuple(part.strip() for part in re.split(r" \+ |,", name.strip("{}"))),
    )


def _formats(tensors: object) -> tuple[str, ...]:
    if not isinstance(tensors, list):
        return ()
    return tuple(
        str(tensor.get("Format/Datatype", tensor.get("Format", ""))) for tensor in tensors
    )
