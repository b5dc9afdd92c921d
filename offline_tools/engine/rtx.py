"""Parsing and building graphs with TensorRT-RTX, which needs no GPU.

Owns: the check that a real TensorRT-family parser and builder accepts a graph. Must not import
torch. TensorRT for RTX targets desktop GPUs, so what it builds does not run on a Jetson: the
engine is thrown away, and what remains is the knowledge that every operator, shape and type of
the graph is one that the family takes. Compute capability 8.6 is the nearest to the Orin's 8.7
that it offers.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from groot_int8_ros.errors import EngineError
from groot_int8_ros.policy.bundle import GraphRecord

COMPUTE_CAPABILITY = "SM86"


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
    """Parse and build one graph for compute capability 8.6.

    Args:
        graph: The `.onnx` file; its external data lie beside it.
        record: Its inputs, from the bundle's manifest.
        lengths: Length to optimise for of each varying axis, by name; each may vary from 1 to it.

    Raises:
        EngineError: TensorRT-RTX is not installed, or refuses the graph.
    """
    try:
        import tensorrt_rtx as trt
    except ImportError as error:
        raise EngineError(
            "TensorRT-RTX is not installed: pip install tensorrt-rtx-cu13 (Linux x86-64)"
        ) from error

    log = _error_log(trt)
    start = time.perf_counter()
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):
        reasons = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise EngineError(f"TensorRT-RTX cannot parse {graph}: {reasons}")
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, COMPUTE_CAPABILITY), 0)
    profile = builder.create_optimization_profile()
    varying = False
    for name, spec in record.inputs.items():
        names = [axis for axis in spec.shape if isinstance(axis, str)]
        varying = varying or bool(names)
        largest = [axis if isinstance(axis, int) else lengths[axis] for axis in spec.shape]
        smallest = [axis if isinstance(axis, int) else 1 for axis in spec.shape]
        if names:
            profile.set_shape(name, smallest, largest, largest)
    if varying:
        config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineError(f"TensorRT-RTX cannot build {graph}: {'; '.join(log.errors)}")
    return BuildCheck(
        layers=network.num_layers,
        engine_bytes=plan.nbytes,
        seconds=time.perf_counter() - start,
    )


def _error_log(trt: Any) -> Any:
    """Make a logger that keeps errors for the message and drops the rest."""

    class ErrorLog(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: object, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

    return ErrorLog()
