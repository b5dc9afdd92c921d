"""The quantisation schemes that are compared, under one signature.

Owns: names, order and how each scheme's graphs are written from the same float graphs, the same
layers and the same calibration samples. Must not judge them.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

from groot_int8_ros.capture.store import CaptureMeta, CaptureWriter
from groot_int8_ros.policy.bundle import Bundle
from groot_int8_ros.policy.families import LARGE_GRAPHS
from groot_int8_ros.policy.quantization import CACHE, LayerScheme
from offline_tools.compare_quantization import baselines
from offline_tools.compare_quantization.samples import (
    Answers,
    Feeds,
    capture_samples,
)
from offline_tools.quantize.arithmetic import rotation_block
from offline_tools.quantize.int8_bundle import (
    AUTO,
    DEFAULT_ALPHA,
    FIXED_SCHEMES,
    QuantizeOptions,
    quantize_bundle,
)
from offline_tools.quantize.layers import Layer, find_layers, load_graph
from offline_tools.quantize.qdq import quantize_graph
from offline_tools.quantize.statistics import GraphStatistics, collect

# Their input is the time embedding alone: a deployed graph holds their outputs as constants, so
# in reference graphs they are float in every scheme. ModelOpt leaves them out by itself.
_CONSTANT_LAYERS = ("timestep_encoder.*", "*.norm1.linear", "proj_out_1")


@dataclass(frozen=True)
class FloatGraph:
    """One float graph and what schemes need to quantise it.

    Attributes:
        path: The `.onnx` file.
        feeds: The calibration samples.
        seed: Of what a scheme draws.
    """

    path: Path
    feeds: Feeds
    seed: int

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """The layers that every scheme quantises, in the order in which they run."""
        return tuple(
            layer
            for layer in find_layers(load_graph(self.path))
            if not any(fnmatch.fnmatchcase(layer.name, pattern) for pattern in _CONSTANT_LAYERS)
        )

    @cached_property
    def statistics(self) -> GraphStatistics:
        """What the calibration samples look like at each layer's input."""
        return collect(self.path, lambda: iter(self.feeds), self.layers, seed=self.seed)

    @cached_property
    def outputs(self) -> Mapping[str, tuple[str, ...]]:
        """Layer to the names of its output tensors, one a use."""
        nodes = {node.name: node for node in load_graph(self.path).graph}
        return {
            layer.name: tuple(str(nodes[node].outputs[0].name) for node in layer.nodes)
            for layer in self.layers
        }


@dataclass(frozen=True)
class Calibrated:
    """A float bundle with its calibration samples.

    Attributes:
        bundle: The float bundle.
        answers: The float policy's answers to the calibration observations.
        budget: Relative L2 of the actions that `auto` may cost.
        seed: Of noise and of what a scheme draws.
    """

    bundle: Bundle
    answers: Answers
    budget: float
    seed: int

    @cached_property
    def graphs(self) -> Mapping[str, FloatGraph]:
        """The graphs to quantise, by name."""
        return {
            name: FloatGraph(self.bundle.graph_path(name), self.answers.feeds[name], self.seed)
            for name in LARGE_GRAPHS[self.bundle.manifest.family]
        }


# Writes the quantised graphs into a folder and returns their paths by the graph's name.
Scheme = Callable[[Calibrated, Path], dict[str, Path]]


def _own(
    scheme: LayerScheme, calibrated: Calibrated, folder: Path, rotated: bool = False
) -> dict[str, Path]:
    targets = {}
    for name, graph in calibrated.graphs.items():
        targets[name] = folder / graph.path.name
        needs = scheme.activation == "static" or scheme.migration_alpha is not None
        quantize_graph(
            graph.path,
            targets[name],
            {layer.name: _rotated(scheme, layer) if rotated else scheme for layer in graph.layers},
            graph.statistics if needs else None,
        )
    return targets


def _rotated(scheme: LayerScheme, layer: Layer) -> LayerScheme:
    return replace(scheme, rotation=rotation_block(layer.in_channels))


def _baseline(
    tool: Callable[[Path, Path, Feeds, list[str], str], None],
    method: str,
    calibrated: Calibrated,
    folder: Path,
) -> dict[str, Path]:
    targets = {}
    for name, graph in calibrated.graphs.items():
        targets[name] = folder / graph.path.name
        nodes = [node for layer in graph.layers for node in layer.nodes]
        tool(graph.path, targets[name], graph.feeds, nodes, method)
    return targets


def _auto(calibrated: Calibrated, folder: Path) -> dict[str, Path]:
    """Take the user's road: a capture store, then `groot-int8 quantize --scheme auto`."""
    bundle, store, output = calibrated.bundle, folder / "store", folder / "bundle"
    meta = CaptureMeta.of_bundle(
        bundle.manifest, "compare-quantization", seed=calibrated.seed, engine="onnxruntime"
    )
    with CaptureWriter(store, meta) as writer:
        family = bundle.manifest.family
        for sample in capture_samples(calibrated.answers, family, calibrated.seed):
            writer.add(sample)
    names = [
        layer.name
        for name in calibrated.graphs
        for layer in find_layers(load_graph(bundle.graph_path(name)))
    ]
    left_out = [p for p in _CONSTANT_LAYERS if fnmatch.filter(names, p)]
    result = quantize_bundle(
        QuantizeOptions(
            bundle=bundle.folder,
            calibration=store,
            output=output,
            scheme=AUTO,
            layers=tuple(f"!{pattern}" for pattern in left_out),
            budget=calibrated.budget,
            seed=calibrated.seed,
            threads=1,
        ),
        lambda _line: None,
    )
    return {
        name: output / record.file
        for name, record in result.manifest.graphs.items()
        if record.quantization is not None
    }


# Under the names that `groot-int8 quantize --scheme` knows, and two that it tries in `auto` only.
# Scales from TensorRT's own calibration need a GPU.
OWN_SCHEMES: dict[str, Scheme] = {
    **{
        name: partial(_own, scheme)
        for name, scheme in FIXED_SCHEMES.items()
        if scheme.range_method != CACHE
    },
    "row-rotated": partial(_own, LayerScheme("row"), rotated=True),
    "row-smooth-rotated": partial(_own, LayerScheme("row", None, DEFAULT_ALPHA), rotated=True),
    AUTO: _auto,
}

ORT_SCHEMES: dict[str, Scheme] = {
    f"onnxruntime-{method}": partial(_baseline, baselines.quantize_with_onnxruntime, method)
    for method in baselines.ORT_METHODS
}

MODELOPT_SCHEMES: dict[str, Scheme] = {
    f"modelopt-{method}": partial(_baseline, baselines.quantize_with_modelopt, method)
    for method in baselines.MODELOPT_METHODS
}

SCHEMES: dict[str, Scheme] = {**OWN_SCHEMES, **ORT_SCHEMES, **MODELOPT_SCHEMES}
