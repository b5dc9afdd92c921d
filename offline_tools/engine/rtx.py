"""Parsing and building graphs with a library of the TensorRT family.

Owns: the check that a real parser and builder accepts a graph. Must not import torch. The engine
is thrown away; what remains is the knowledge that every operator, shape and type of the graph is
one that the family takes.

TensorRT-RTX needs no GPU to build. It targets desktop GPUs, so what it builds does not run on a
Jetson; compute capability 8.6 is the nearest to the Orin's 8.7 that it offers. TensorRT itself
builds for the GPU it finds.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from groot_int8_ros.errors import EngineError
from groot_int8_ros.policy.bundle import GraphRecord

COMPUTE_CAPABILITY = "SM86"

# Library -> what to install where it is missing.
LIBRARIES = {
    "tensorrt_rtx": "pip install tensorrt-rtx-cu13 (Linux x86-64)",
    "tensorrt": "it comes with JetPack, or as NVIDIA's wheel beside a GPU",
}


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


def check_build(
    graph: Path,
    record: GraphRecord,
    lengths: Mapping[str, int],
    library: str = "tensorrt_rtx",
) -> BuildCheck:
    """Parse and build one graph.

    Args:
        graph: The `.onnx` file; its external data lie beside it.
        record: Its inputs, from the bundle's manifest.
        lengths: Length to optimise for of each varying axis, by name; each may vary from 1 to it.
        library: One of `LIBRARIES`.

    Raises:
        EngineError: The library is not installed, or refuses the graph.
    """
    try:
        trt: Any = importlib.import_module(library)
    except ImportError as error:
        raise EngineError(f"{library} is not installed: {LIBRARIES[library]}") from error

    log = _error_log(trt)
    start = time.perf_counter()
    builder = trt.Builder(log)
    if builder is None:
        raise EngineError(f"{library} cannot build here: {'; '.join(log.errors)}")
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):
        reasons = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise EngineError(f"{library} cannot parse {graph}: {reasons}")
    config = builder.create_builder_config()
    if library == "tensorrt_rtx":
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, COMPUTE_CAPABILITY), 0)
    elif record.precision == "fp16" and hasattr(trt.BuilderFlag, "FP16"):
        config.set_flag(trt.BuilderFlag.FP16)
    profile = builder.create_optimization_profile()
    varying = {name: spec for name, spec in record.inputs.items() if spec.varies}
    for name, spec in varying.items():
        largest = [axis if isinstance(axis, int) else lengths[axis] for axis in spec.shape]
        smallest = [axis if isinstance(axis, int) else 1 for axis in spec.shape]
        profile.set_shape(name, smallest, largest, largest)
    if varying:
        config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineError(f"{library} cannot build {graph}: {'; '.join(log.errors)}")
    return BuildCheck(
        layers=network.num_layers,
        engine_bytes=plan.nbytes,
        seconds=time.perf_counter() - start,
    )


def _network_flags(trt: Any) -> int:
    # Up to TensorRT 9 an ONNX network has to ask for explicit batch; later there is nothing else.
    flag = getattr(trt.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH", None)
    major = int(trt.__version__.split(".")[0])
    return 1 << int(flag) if flag is not None and trt.__name__ == "tensorrt" and major < 10 else 0


def _error_log(trt: Any) -> Any:
    """Make a logger that keeps errors for the message and drops the rest."""

    class ErrorLog(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            # pybind11 asks for the base's own __init__; 8.6 refuses super().
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: object, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

    return ErrorLog()
