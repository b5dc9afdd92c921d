"""How much each scheme costs each layer, measured on the layer alone.

Owns: the local errors. Must not import onnx's runtime or torch: a layer is a product of two
matrices, and NumPy computes what the Q/DQ graph would (`arithmetic`).

Layers that read the same activation are judged together, as they share its quantiser; where their
weights are used several times, on the rows of all uses, each quantised as its own use is. The
error of a scheme is the root mean square over rows of |y' - y| / |y|, where y is what all the
layers make of a row. Every token counts the same: the norms behind the layers rescale each token,
so a massive token must not hide what happened to the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from groot_int8_ros.policy.quantization import SAMPLED_RANGE_METHODS, LayerScheme
from groot_int8_ros.policy.types import Float32Array, Float64Array
from offline_tools.quantize import arithmetic
from offline_tools.quantize.layers import Layer, groups, load_graph, read_weight
from offline_tools.quantize.ranges import DEFAULT_PERCENTILE
from offline_tools.quantize.statistics import (
    GraphStatistics,
    InputStatistics,
    migration_sizes,
)

MIGRATION_ALPHAS = (0.25, 0.5, 0.75)

# Migration's strength, whether it starts from shares of rows, and the rotation.
_Change = tuple[float | None, bool, int | None]


def candidate_schemes(
    channels: int, alphas: Iterable[float] = MIGRATION_ALPHAS
) -> tuple[LayerScheme, ...]:
    """Return every scheme that the search may choose for a layer.

    Args:
        channels: Input channels of the layer.
        alphas: Strengths of migration.
    """
    alphas = tuple(alphas)
    rotations = {None, arithmetic.rotation_block(channels)}
    return (
        *(LayerScheme("static", method) for method in SAMPLED_RANGE_METHODS),
        *(LayerScheme("static", "max", alpha) for alpha in alphas),
        *(
            LayerScheme("row", None, alpha, rotation)
            for rotation in rotations
            for alpha in (None, *alphas)
        ),
    )


@dataclass(frozen=True)
class Group:
    """Layers that read one activation, and what each scheme does to them.

    Attributes:
        graph: Name of the graph.
        layers: The layers.
        errors: Scheme to local error; see the module.
    """

    graph: str
    layers: tuple[Layer, ...]
    errors: Mapping[LayerScheme, float]

    @property
    def name(self) -> str:
        """The first layer's name, which is also the quantiser's."""
        return self.layers[0].name

    @property
    def parameters(self) -> int:
        """Elements of the layers' weights."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def best(self) -> LayerScheme:
        """The scheme with the smallest error."""
        return min(self.errors, key=lambda scheme: self.errors[scheme])


def measure(
    graph: str,
    path: Path,
    layers: Sequence[Layer],
    statistics: GraphStatistics,
    schemes: Sequence[LayerScheme] | None = None,
    percentile: float = DEFAULT_PERCENTILE,
) -> list[Group]:
    """Measure schemes on each group of a graph's layers.

    Args:
        graph: Name of the graph, for the groups.
        path: The float graph.
        layers: Those that may become INT8.
        statistics: Of these layers' inputs.
        schemes: What to measure; `candidate_schemes` if None.
        percentile: Of the range method of that name.
    """
    model = load_graph(path)
    return [
        Group(
            graph,
            tuple(members),
            _errors(
                lambda layer: read_weight(model.graph, layer),
                members,
                [statistics.inputs[name] for name in dict.fromkeys(activations)],
                candidate_schemes(members[0].in_channels) if schemes is None else schemes,
                percentile,
            ),
        )
        for activations, members in groups(layers).items()
    ]


def _errors(
    weight_of: Callable[[Layer], Float32Array],
    layers: Sequence[Layer],
    uses: Sequence[InputStatistics],
    schemes: Sequence[LayerScheme],
    percentile: float,
) -> dict[LayerScheme, float]:
    weight_max = arithmetic.input_channel_max(weight_of(layer) for layer in layers)
    # Schemes that change the weight alike share its quantised form.
    alike: dict[_Change, list[LayerScheme]] = {}
    for scheme in schemes:
        per_row = scheme.activation == "row" and scheme.migration_alpha is not None
        change = (scheme.migration_alpha, per_row, scheme.rotation)
        alike.setdefault(change, []).append(scheme)
    factors: dict[_Change, Float32Array | None] = {}
    for change, members in alike.items():
        alpha = change[0]
        factors[change] = (
            None
            if alpha is None
            else arithmetic.migration_factors(migration_sizes(uses, members[0]), weight_max, alpha)
        )
    inputs = {
        scheme: np.concatenate(
            [_quantised_rows(scheme, use, factors[change], percentile) for use in uses]
        )
        for change, members in alike.items()
        for scheme in members
    }
    rows = np.concatenate([use.rows for use in uses])
    size: Float64Array = np.zeros(len(rows))
    gaps = {scheme: np.zeros(len(rows)) for scheme in schemes}
    for layer in layers:
        weight = weight_of(layer)
        exact = rows @ weight
        size += _squares(exact)
        for change, members in alike.items():
            changed = arithmetic.transformed_weight(weight, factors[change], change[2])
            restored = arithmetic.dequantised_weight(changed)
            for scheme in members:
                gaps[scheme] += _squares(inputs[scheme] @ restored - exact)
    live = size > 0.0
    if not live.any():
        # Nothing ever comes out of these layers; every scheme keeps it so.
        return dict.fromkeys(schemes, 0.0)
    return {
        scheme: float(np.sqrt(np.mean(gap[live] / size[live]))) for scheme, gap in gaps.items()
    }


def _quantised_rows(
    scheme: LayerScheme,
    seen: InputStatistics,
    factors: Float32Array | None,
    percentile: float,
) -> Float32Array:
    rows = seen.rows if factors is None else seen.rows / factors
    if scheme.rotation is not None:
        rows = arithmetic.rotated(rows, scheme.rotation)
    if scheme.activation == "row":
        return arithmetic.row_input(rows)
    return arithmetic.static_input(rows, seen.static_scale(scheme, factors, percentile))


def _squares(values: Float32Array) -> Float64Array:
    squares: Float64Array = np.einsum("ij,ij->i", values, values, dtype=np.float64)
    return squares
