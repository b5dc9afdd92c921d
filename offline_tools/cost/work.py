"""The work of a graph: one entry for each kernel that an engine cannot do without.

Owns: `Launch`, `GraphWork`, their sums and the kinds of layers. Must not import torch or onnx: the
ways to count (from an ONNX graph, from a PyTorch module, from a configuration) all end here.

What is counted as a launch is a matrix product, a norm, a softmax or another reduction.
Element-wise work, casts and layout changes are taken to be fused into them, which every engine
library does for most of them; so the number of launches is a lower bound, the same for every
library. FLOPs are those of the matrix products, two for each multiplication and addition: the rest
is below one percent.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

ATTENTION = "attention products"
NORM = "norms"
SOFTMAX = "softmax"
REDUCTION = "row maxima"

# Kind of a layer by its name, the first that matches.
_KINDS = tuple(
    (kind, re.compile(pattern))
    for kind, pattern in (
        ("image chain", r"image_chain"),
        ("vision MLP", r"vision.*(mlp|fc\d)"),
        ("vision attention", r"vision.*(attn|qkv|_proj)"),
        ("vision embedding", r"vision"),
        ("connector", r"mlp1\."),
        ("language MLP", r"language.*mlp"),
        ("language attention", r"language"),
        ("time and AdaLN", r"norm1|timestep_encoder|proj_out_1|norm\.linear"),
        ("cross keys and values", r"context\.|cross_kv"),
        ("DiT MLP", r"transformer_blocks.*\.ff\."),
        ("DiT attention", r"transformer_blocks"),
        ("encoders, decoder", r"encoder|decoder|proj_out_2"),
    )
)
_CROSS_KEY = re.compile(r"transformer_blocks\.(\d+)\.attn1\.to_[kv]\b")

# Kinds that stay float in an INT8 graph: they carry the actions, or are no layers.
FLOAT_KINDS = frozenset({"image chain", "encoders, decoder", "other products", "time and AdaLN"})


def kind_of(layer: str) -> str:
    """Return the kind of a product with a weight, by the weight's or the layer's name."""
    cross = _CROSS_KEY.search(layer)
    if cross is not None and int(cross[1]) % 2 == 0:
        return "cross keys and values"
    return next((kind for kind, pattern in _KINDS if pattern.search(layer)), "other products")


@dataclass(frozen=True)
class Launch:
    """One kernel.

    Attributes:
        kind: Kind of layer.
        flops: Operations of a matrix product, 0 for anything else.
        weight_bytes: Bytes of the constant operand, read at every launch.
        activation_bytes: Bytes of what else is read and of what is written.
        weight: Name of the constant operand; empty if there is none.
        is_int8: Whether both operands of a product are INT8.
        input_bytes: Of the activation bytes, those that a product reads.
    """

    kind: str
    flops: int
    weight_bytes: int
    activation_bytes: int
    weight: str = ""
    is_int8: bool = False
    input_bytes: int = 0

    @property
    def bytes_moved(self) -> int:
        """Bytes that go through the memory bus if nothing is cached."""
        return self.weight_bytes + self.activation_bytes


@dataclass(frozen=True)
class GraphWork:
    """One graph's work for one observation.

    Attributes:
        name: Name of the graph.
        runs: How often an observation runs it.
        launches: Of one run, in their order.
        other_bytes: Bytes of the constants that no launch names: biases, norms, tables.
    """

    name: str
    runs: int
    launches: tuple[Launch, ...]
    other_bytes: int

    @property
    def stored_bytes(self) -> int:
        """Bytes of all constants, each once however many launches read it."""
        weights = {launch.weight: launch.weight_bytes for launch in self.launches}
        return sum(weights.values()) + self.other_bytes


@dataclass(frozen=True)
class Sums:
    """What several launches come to, for one observation.

    Attributes:
        flops: Operations of matrix products.
        int8_flops: Of these, in INT8.
        weight_bytes: Constants read, again at every launch.
        activation_bytes: Activations read and written.
        launches: Number of kernels.
    """

    flops: int = 0
    int8_flops: int = 0
    weight_bytes: int = 0
    activation_bytes: int = 0
    launches: int = 0

    @property
    def int8_share(self) -> float:
        """Share of the operations that is INT8."""
        return self.int8_flops / self.flops if self.flops else 0.0


def observation(graphs: Iterable[GraphWork]) -> list[Launch]:
    """Return all launches of one observation."""
    return [launch for graph in graphs for _ in range(graph.runs) for launch in graph.launches]


def total(launches: Iterable[Launch]) -> Sums:
    """Add launches up."""
    flops = int8 = weights = activations = count = 0
    for launch in launches:
        flops += launch.flops
        int8 += launch.flops if launch.is_int8 else 0
        weights += launch.weight_bytes
        activations += launch.activation_bytes
        count += 1
    return Sums(flops, int8, weights, activations, count)


def of_kinds(launches: Iterable[Launch]) -> dict[str, list[Launch]]:
    """Sort launches by their kind."""
    kinds: dict[str, list[Launch]] = {}
    for launch in launches:
        kinds.setdefault(launch.kind, []).append(launch)
    return kinds


def by_kind(launches: Iterable[Launch]) -> dict[str, Sums]:
    """Add launches up by their kind, the largest number of operations first."""
    sums = {kind: total(own) for kind, own in of_kinds(launches).items()}
    return dict(sorted(sums.items(), key=lambda item: -item[1].flops))


def as_int8(graph: GraphWork, float_kinds: frozenset[str] = FLOAT_KINDS) -> GraphWork:
    """Return what a half-precision graph costs with its layers in INT8.

    The weights and what these layers read take one byte instead of two; what they write stays as
    it is. That is what `count_graph` finds in a quantised graph with static scales; where the
    scales follow the input, it finds `with_row_maxima`.

    Args:
        graph: A graph in FP16.
        float_kinds: Kinds that stay float.
    """
    launches = tuple(
        replace(
            launch,
            weight_bytes=launch.weight_bytes // 2,
            activation_bytes=launch.activation_bytes - launch.input_bytes // 2,
            input_bytes=launch.input_bytes // 2,
            is_int8=True,
        )
        if launch.flops and launch.weight and launch.kind not in float_kinds
        else launch
        for launch in graph.launches
    )
    return replace(graph, launches=launches)


def with_row_maxima(graph: GraphWork) -> GraphWork:
    """Return what an INT8 graph costs whose scales follow the input, as in `row` and `auto`.

    Before each layer in INT8 a reduction reads the layer's input and writes one value for each
    row, both in float32, as `count_graph` finds it. Layers that read the same tensor share its
    maxima in a quantised graph; in the deployed graphs such layers are fused already.

    Args:
        graph: A result of `as_int8`.
    """
    launches: list[Launch] = []
    for launch in graph.launches:
        if launch.is_int8:
            # A product with a weight of one byte an element has 2 * rows * bytes operations.
            rows = launch.flops // (2 * launch.weight_bytes)
            launches.append(Launch(REDUCTION, 0, 0, 4 * (launch.input_bytes + rows)))
        launches.append(launch)
    return replace(graph, launches=tuple(launches))


def as_half(launches: Iterable[Launch]) -> list[Launch]:
    """Return what launches cost if none of them is in INT8: `as_int8` the other way round."""
    return [
        replace(
            launch,
            weight_bytes=2 * launch.weight_bytes,
            activation_bytes=launch.activation_bytes + launch.input_bytes,
            input_bytes=2 * launch.input_bytes,
            is_int8=False,
        )
        if launch.is_int8
        else launch
        for launch in launches
    ]


def unique(launches: Sequence[Launch]) -> dict[tuple[int, int, bool], int]:
    """Count launches of the same work: (flops, bytes moved, INT8) to how many."""
    counts: dict[tuple[int, int, bool], int] = {}
    for launch in launches:
        key = (launch.flops, launch.bytes_moved, launch.is_int8)
        counts[key] = counts.get(key, 0) + 1
    return counts
