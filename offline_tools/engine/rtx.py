"""Does TensorRT take a graph? Asked of TensorRT-RTX, which needs no GPU to build.

Owns: `check_build`. Must not import torch. It runs the code of `groot-int8 build` with another
library and throws the engine away: TensorRT-RTX is for desktop GPUs. What remains is the knowledge
that every operator, shape and type of the graph is one that the family takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from groot_int8_ros.policy.bundle import GraphRecord
from offline_tools.engine.builder import BuilderSettings, GraphBuild, build_plan
from offline_tools.engine.library import RTX, open_library
from offline_tools.engine.profiles import Lengths


@dataclass(frozen=True)
class BuildCheck:
    """What one build showed.

    Attributes:
        layers: Layers of the network that the parser made.
        engine_bytes: Size of the serialised engine.
        seconds: Wall time of parse and build.
    """

    layers: int
    engine_bytes: int
    seconds: float


def check_build(graph: Path, record: GraphRecord, lengths: Mapping[str, int]) -> BuildCheck:
    """Parse and build one graph.

    Args:
        graph: The `.onnx` file; its external data lie beside it.
        record: Its precision and inputs, from the bundle's manifest.
        lengths: Length to optimise for of each varying axis, by name; each may vary from 1 to it.

    Raises:
        EngineError: TensorRT-RTX is not installed, or refuses the graph.
    """
    axes = Lengths({name: (1, length, length) for name, length in lengths.items()})
    built = build_plan(
        GraphBuild(
            graph=graph,
            graph_precision=record.precision,
            precision=record.precision,
            inputs=record.inputs,
            profiles=axes.profiles(record.inputs),
        ),
        BuilderSettings(),
        open_library(RTX),
    )
    return BuildCheck(built.network_layers, memoryview(built.plan).nbytes, built.seconds)
