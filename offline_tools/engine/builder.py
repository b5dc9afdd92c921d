"""From one ONNX graph to one serialised engine, with whichever TensorRT is here.

Owns: parsing, the builder's configuration and what a failed build says. Must not import torch.
Which file the engine becomes and what stands beside it is `engines`' business; what differs
between versions is `library`'s.

Types. Where a TensorRT can be strongly typed (10 and later), every layer keeps the type that the
graph states. 8.6 cannot: it gets the FP16 flag, and constraints to float32 that are read from the
graph: on each layer that it computes in float32 on purpose (the RMSNorm's square reaches 2.6e8 in
the real model, far over FP16's 65504) but for normalisation layers. Asking for another precision
than the graph's is possible for the comparison: BF16 from an FP16 graph whose types are exchanged
(`bfloat16_form`), and any from an FP32 graph with weak typing. Of that only the image chain is
held; beyond that accuracy is the user's to judge.
"""

from __future__ import annotations

import resource
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from groot_int8_ros.errors import CalibrationError, EngineError
from groot_int8_ros.policy.engines.base import TensorSpec
from groot_int8_ros.policy.engines.cuda import Cuda
from groot_int8_ros.policy.engines.tensorrt_engine import make_logger
from groot_int8_ros.policy.files import atomic_file
from offline_tools.engine.calibrator import (
    CalibrationBatches,
    CalibrationResult,
    make_entropy_calibrator,
)
from offline_tools.engine.library import Library
from offline_tools.engine.progress import heartbeat, make_progress_monitor

Shape = tuple[int, ...]
Profile = tuple[Shape, Shape, Shape]

MEGABYTE = 1 << 20
# The nearest to the Orin's 8.7 that TensorRT-RTX, which builds without a GPU, has to offer.
RTX_COMPUTE_CAPABILITY = "SM86"
WEIGHT_FORMS = ("auto", "int8", "float-pair")


@dataclass(frozen=True)
class BuilderSettings:
    """How hard and in how much memory TensorRT searches.

    Attributes:
        workspace_mb: Scratch memory that a kernel may take, in MiB; TensorRT's default (the whole
            device memory) if None.
        tactic_mb: Device memory that trying out kernels may take, in MiB; unlimited if None.
        level: Builder optimisation level, 0 to 5; TensorRT's default (3) if None.
        library_tactics: Whether kernels of cuBLAS and cuDNN may be used, where there are some.
        weight_form: One of `WEIGHT_FORMS`: how INT8 weights are handed over; `auto` goes by the
            version.
    """

    workspace_mb: int | None = None
    tactic_mb: int | None = None
    level: int | None = None
    library_tactics: bool = True
    weight_form: str = "auto"


@dataclass(frozen=True)
class Calibration:
    """What an implicit INT8 build is calibrated with.

    Attributes:
        batches: The samples, or None beside a cache.
        cache: Content of a cache that was checked to belong to the graph, or None.
    """

    batches: CalibrationBatches | None
    cache: bytes | None


@dataclass(frozen=True)
class GraphBuild:
    """One graph to be built.

    Attributes:
        graph: The `.onnx` file; its external data lie beside it.
        graph_precision: Precision of the graph as the bundle's manifest has it.
        precision: What is asked for: `fp32`, `fp16`, `bf16` or `int8`.
        inputs: The graph's inputs.
        profiles: Smallest, best and largest shape of each input that varies.
        calibration: Given for implicit INT8 alone: for a float graph, where there are calibrators.
    """

    graph: Path
    graph_precision: str
    precision: str
    inputs: Mapping[str, TensorSpec]
    profiles: Mapping[str, Profile]
    calibration: Calibration | None = None


@dataclass(frozen=True)
class BuiltPlan:
    """What a build gave.

    Attributes:
        plan: The serialised engine, which may be written as bytes.
        network_layers: Layers of the network that the parser made.
        flags: What the builder was configured with, for a person.
        seconds: Wall time of parse and build.
        peak_memory_bytes: Peak resident memory of this process so far.
        timing_cache: Measured kernels, for the next build; None where there are none.
        calibration: What happened inside the calibrator, if there was one.
    """

    plan: Any
    network_layers: int
    flags: tuple[str, ...]
    seconds: float
    peak_memory_bytes: int
    timing_cache: bytes | None
    calibration: CalibrationResult | None

    def write(self, path: Path) -> None:
        """Write the engine atomically."""
        with atomic_file(path) as temporary, temporary.open("wb") as stream:
            stream.write(memoryview(self.plan))


def build_plan(
    build: GraphBuild,
    settings: BuilderSettings,
    library: Library,
    *,
    timing_cache: bytes | None = None,
    show_progress: bool = False,
) -> BuiltPlan:
    """Parse and build one graph.

    Args:
        build: What to build.
        settings: How.
        library: With which TensorRT.
        timing_cache: What an earlier build returned as such.
        show_progress: Draw a bar, or print a line now and then, on stderr.

    Raises:
        EngineError: TensorRT refuses the graph, or cannot do what is asked.
        CalibrationError: Calibration went wrong or did not see every sample.
    """
    strong = _choose_typing(build, library)
    trt = library.trt
    log = make_logger(trt)
    start = time.perf_counter()
    with ExitStack() as stack:
        builder = trt.Builder(log)
        if not builder:
            raise EngineError(
                f"{library.name} cannot build here: {_reasons(log)}. It needs an NVIDIA GPU"
            )
        network = builder.create_network(library.network_flags(strongly_typed=strong))
        flags = [f"{library.name} {library.version}", "strongly typed" if strong else "weak types"]
        graph = _graph_in_form(build, settings, library, stack, flags)
        parser = trt.OnnxParser(network, log)
        if not parser.parse_from_file(str(graph)):
            reasons = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
            raise EngineError(
                f"{library.name} {library.version} cannot parse {build.graph}: {reasons}"
            )
        config = builder.create_builder_config()
        flags += _configure(config, settings, library)
        if not strong:
            flags += configure_precision(config, network, build, library)
        varying = _fix_shapes(network, build.profiles)
        profile = _profile(builder, varying)
        if profile is not None:
            config.add_optimization_profile(profile)
        result: CalibrationResult | None = None
        if build.calibration is not None:
            calibrator, result = _calibrate(builder, config, network, build, varying, library)
            config.int8_calibrator = calibrator
        if timing_cache is not None and not library.is_rtx:
            flags += use_timing_cache(config, timing_cache)
        plan = _build(builder, network, config, library, build.graph.stem, show_progress)
        if result is not None and build.calibration is not None:
            result.check(build.calibration.batches)
        if plan is None:
            raise EngineError(
                f"{library.name} {library.version} cannot build {build.graph}: {_reasons(log)}"
            )
        return BuiltPlan(
            plan=plan,
            network_layers=network.num_layers,
            flags=tuple(flags),
            seconds=time.perf_counter() - start,
            peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            timing_cache=_timing_cache(config, library),
            calibration=result,
        )


def _choose_typing(build: GraphBuild, library: Library) -> bool:
    """Return whether the network is strongly typed; refuse what this TensorRT cannot do."""
    where = f"{library.name} {library.version}"
    if build.calibration is not None:
        return False
    if build.precision == build.graph_precision:
        return library.strongly_typed
    if build.precision == "int8":
        raise EngineError(
            f"{build.graph} is a float graph: quantise the bundle first (groot-int8 quantize), or "
            "build with --quantization calibrator"
        )
    if build.precision == "bf16":
        if not library.has_bfloat16:
            raise EngineError(f"{where} has no BF16: build with --precision fp16 or fp32")
        if build.graph_precision == "fp16":
            return True
    # NumPy has no bfloat16, so no bundle is exported in it: such engines are made of FP16 graphs.
    export = "fp16" if build.precision == "bf16" else build.precision
    if not library.weakly_typed:
        raise EngineError(
            f"{where} keeps the graph's own types, and {build.graph.name} is "
            f"{build.graph_precision}, from which no {build.precision} engine is made: export the "
            f"bundle with --precision {export}"
        )
    if build.graph_precision != "fp32":
        raise EngineError(
            f"{build.graph.name} is {build.graph_precision} and cannot become {build.precision}: "
            f"export the bundle with --precision {export}"
        )
    return False


def _graph_in_form(
    build: GraphBuild,
    settings: BuilderSettings,
    library: Library,
    stack: ExitStack,
    flags: list[str],
) -> Path:
    """Return the file to parse: the graph itself, or a form of it that this build needs."""
    if build.precision == "bf16" and build.graph_precision == "fp16":
        from offline_tools.engine.bfloat16_form import write_as_bfloat16  # needs onnx

        target = _temporary(build.graph, stack)
        flags.append(f"{write_as_bfloat16(build.graph, target)} FP16 weights as BF16")
        return target
    stored = library.stores_int8_weights
    pairs = not stored if settings.weight_form == "auto" else settings.weight_form == "float-pair"
    if build.graph_precision != "int8" or not pairs:
        return build.graph
    from offline_tools.engine.weight_form import write_with_float_weights  # needs onnx

    target = _temporary(build.graph, stack)
    count = write_with_float_weights(build.graph, target)
    flags.append(f"{count} INT8 weights as float with Q and DQ")
    return target


def _temporary(graph: Path, stack: ExitStack) -> Path:
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="groot-int8-"))
    return Path(folder) / graph.name


def _configure(config: Any, settings: BuilderSettings, library: Library) -> list[str]:
    trt = library.trt
    flags = []
    # The engine inspector names kernels only in an engine that was built with this.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    # TF32 has FP16's mantissa: a graph that is float32 on purpose would not be.
    config.clear_flag(trt.BuilderFlag.TF32)
    for name, limit in (
        ("WORKSPACE", settings.workspace_mb),
        ("TACTIC_DRAM", settings.tactic_mb),
    ):
        if limit is not None:
            config.set_memory_pool_limit(getattr(trt.MemoryPoolType, name), limit * MEGABYTE)
            flags.append(f"{name.lower()} {limit} MiB")
    if settings.level is not None:
        config.builder_optimization_level = settings.level
        flags.append(f"level {settings.level}")
    if not settings.library_tactics:
        config.set_tactic_sources(0)
        flags.append("no library tactics")
    if library.is_rtx:
        config.num_compute_capabilities = 1
        capability = getattr(trt.ComputeCapability, RTX_COMPUTE_CAPABILITY)
        config.set_compute_capability(capability, 0)
        flags.append(RTX_COMPUTE_CAPABILITY)
    return flags


def configure_precision(
    config: Any, network: Any, build: GraphBuild, library: Library
) -> list[str]:
    """Set the flags of a weakly typed build, and hold what the graph wants in float32 to it.

    Args:
        config: TensorRT's builder configuration.
        network: The parsed network.
        build: What is built.
        library: With which TensorRT.

    Returns:
        What was set, for a person.
    """
    trt = library.trt
    import onnx_ir as ir

    graph = ir.load(build.graph).graph
    float32 = _float32_values(graph)
    mixed = float32 is not None
    if float32 is None and (build.calibration is not None or build.precision != "fp32"):
        # The image chain's whole numbers reach 2 ** 24: in FP16 nothing of a picture is left.
        float32 = _image_chain_values(graph)
    if build.calibration is not None:
        flags = ["INT8", "FP16"]  # what has no INT8 kernel, or no scale, may take FP16
    elif build.precision == "int8":
        flags = ["INT8", "FP16"] if mixed else ["INT8"]
    else:
        flags = {"fp32": [], "fp16": ["FP16"], "bf16": ["BF16"]}[build.precision]
    for name in flags:
        config.set_flag(getattr(trt.BuilderFlag, name))
    held = _hold_float32(trt, network, float32) if float32 else 0
    if held:
        config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
        flags.append(f"{held} layers held in float32")
    return flags


# What can lose by a lower precision; a shuffle or a gather moves values and changes none. A
# normalisation layer is computed in float32 whatever is allowed (`compute_precision` of TensorRT's
# INormalizationLayer, float32 by default), and must not be held: 8.6 then computes the whole
# region that it is fused into, the action head of a deployed graph, in float32. RMSNorm is no such
# layer: it comes as a square and a mean (Pow, ReduceMean), which are held.
_ARITHMETIC = (
    "ACTIVATION",
    "ELEMENTWISE",
    "MATRIX_MULTIPLY",
    "REDUCE",
    "SOFTMAX",
    "UNARY",
)


def _float32_values(graph: Any) -> frozenset[str] | None:
    """Return the values that a graph of mixed types keeps in float32; None if it has no other.

    Read from the graph, since TensorRT 8.6 calls every value of a weakly typed network float32.
    Values that an INT8 layer computes are left out: they are float32 in the graph and not in the
    engine.
    """
    import onnx_ir as ir

    float32, has_float16 = set(), False
    for node in graph:
        dequantised = any(
            value is not None
            and (producer := value.producer()) is not None
            and producer.op_type == "DequantizeLinear"
            for value in node.inputs
        )
        for value in node.outputs:
            has_float16 |= value.dtype == ir.DataType.FLOAT16
            if value.dtype == ir.DataType.FLOAT and value.name and not dequantised:
                float32.add(value.name)
    return frozenset(float32) if has_float16 else None


def _image_chain_values(graph: Any) -> frozenset[str]:
    """Return what a graph computes of its camera frames before the first layer; often nothing."""
    import onnx_ir as ir

    from offline_tools.quantize.layers import as_layer

    reached = {value.name for value in graph.inputs if value.dtype == ir.DataType.UINT8}
    frames = frozenset(reached)
    for node in graph:
        if as_layer(node) is None and any(
            value is not None and value.name in reached for value in node.inputs
        ):
            reached |= {value.name for value in node.outputs}
    return frozenset(name for name in reached - frames if name)


def _hold_float32(trt: Any, network: Any, float32: frozenset[str]) -> int:
    kinds = {getattr(trt.LayerType, name) for name in _ARITHMETIC if hasattr(trt.LayerType, name)}
    held = 0
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type in kinds and layer.get_output(0).name in float32:
            layer.precision = trt.float32
            layer.set_output_type(0, trt.float32)
            held += 1
    return held


def _fix_shapes(network: Any, profiles: Mapping[str, Profile]) -> dict[str, Profile]:
    """Write into the network what does not vary after all; return the profiles that remain.

    An axis whose smallest and largest length agree is known to TensorRT as a constant then, which
    lets it fuse more and lets its inspector tell formats.
    """
    remaining = {}
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if tensor.name not in profiles:
            continue
        smallest, _, largest = profile = profiles[tensor.name]
        tensor.shape = tuple(
            low if low == high else -1 for low, high in zip(smallest, largest, strict=True)
        )
        if smallest != largest:
            remaining[tensor.name] = profile
    return remaining


def _profile(builder: Any, shapes: Mapping[str, Profile]) -> Any:
    if not shapes:
        return None
    profile = builder.create_optimization_profile()
    for name, (smallest, best, largest) in shapes.items():
        profile.set_shape(name, smallest, best, largest)
    return profile


def _calibrate(
    builder: Any,
    config: Any,
    network: Any,
    build: GraphBuild,
    varying: Mapping[str, Profile],
    library: Library,
) -> tuple[Any, CalibrationResult]:
    assert build.calibration is not None
    batches = build.calibration.batches
    dtypes: dict[str, np.dtype[Any]] = {}
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        dtypes[tensor.name] = np.dtype(library.trt.nptype(tensor.dtype))
    cuda = None
    shapes = {name: profile[1] for name, profile in varying.items()}
    if batches is not None:
        cuda = Cuda()
        for name, (smallest, _, largest) in build.profiles.items():
            if smallest == largest != batches.shapes[name]:
                raise CalibrationError(
                    f"the samples have {name} of shape {list(batches.shapes[name])}, and the "
                    f"engine is built for {list(largest)} alone: leave out --exact, or give the "
                    "samples' length as --max-seq-len"
                )
        # Calibration runs at one shape of its own: that of the longest sample.
        shapes = {name: batches.shapes[name] for name in varying}
    profile = _profile(builder, {name: (s, s, s) for name, s in shapes.items()})
    if profile is not None:
        config.set_calibration_profile(profile)
    return make_entropy_calibrator(library.trt, cuda, batches, build.calibration.cache, dtypes)


def _build(
    builder: Any, network: Any, config: Any, library: Library, label: str, show_progress: bool
) -> Any:
    if not show_progress:
        return builder.build_serialized_network(network, config)
    with heartbeat(label):
        if not library.has_progress_monitor:
            return builder.build_serialized_network(network, config)
        monitor = make_progress_monitor(library.trt, label)
        config.progress_monitor = monitor
        try:
            return builder.build_serialized_network(network, config)
        finally:
            monitor.close()


def use_timing_cache(config: Any, content: bytes) -> list[str]:
    """Give a build the kernels that were measured before; without, if they are not for it.

    Args:
        config: TensorRT's builder configuration.
        content: What an earlier build returned; empty for none.

    Returns:
        What is to be said about it.
    """
    cache = config.create_timing_cache(content)
    # Nothing comes back for a damaged one, and one of another device or version is not taken.
    if cache and config.set_timing_cache(cache, False):
        return []
    config.set_timing_cache(config.create_timing_cache(b""), False)
    return ["timing cache of another device or damaged: begun anew"]


def _timing_cache(config: Any, library: Library) -> bytes | None:
    cache = None if library.is_rtx else config.get_timing_cache()
    return None if not cache else bytes(memoryview(cache.serialize()))


def _reasons(log: Any) -> str:
    return "; ".join(log.errors) or "it gave no reason"
