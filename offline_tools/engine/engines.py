"""A bundle's engines: built one by one, each with its manifest, for the device that is here.

Owns: the order of a build, the forecast before it, what is written and where. Must not import
torch. Every graph is built in a process of its own (see `child`), and what it writes is written
under a temporary name and renamed, the manifest last: a build that is killed leaves the engines
that were there, and an engine without its own manifest is refused when it is loaded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from groot_int8_ros.capture.store import INDEX_FILE, CaptureStore
from groot_int8_ros.errors import CalibrationError, ConfigurationError, EngineError
from groot_int8_ros.policy.bundle import Bundle, GraphRecord, open_bundle
from groot_int8_ros.policy.engines.base import TensorSpec
from groot_int8_ros.policy.engines.cuda import Cuda, Device, available_host_bytes
from groot_int8_ros.policy.engines.tensorrt_engine import make_logger, mapped_once
from groot_int8_ros.policy.engines.tensorrt_manifest import (
    ENGINE_SUFFIX,
    EngineManifest,
    EngineTensor,
    engine_folder,
)
from groot_int8_ros.policy.families import LARGE_GRAPHS, REFERENCE, engine_graphs
from groot_int8_ros.policy.files import atomic_file, sha256_of_file
from offline_tools.engine.builder import (
    BuilderSettings,
    Calibration,
    GraphBuild,
    build_plan,
)
from offline_tools.engine.calibration_cache import (
    CacheRecord,
    check_cache,
    hash_of_graph,
    write_cache,
)
from offline_tools.engine.calibrator import describe_batches
from offline_tools.engine.child import run_in_child
from offline_tools.engine.inspector import judge, parse_inspection
from offline_tools.engine.library import Library, open_library
from offline_tools.engine.memory import Forecast, forecast
from offline_tools.engine.profiles import Lengths, lengths_of
from offline_tools.engine.verdicts import LayerVerdict
from offline_tools.quantize.calibration_set import ADVISED_SET

PRECISIONS = ("fp32", "fp16", "bf16", "int8")
QUANTIZATIONS = ("qdq", "calibrator")
LAYERS_SUFFIX = ".layers.json"
TIMING_CACHE = "timing.cache"
CALIBRATION_FOLDER = "calibration"

# A board whose 16 GB are shared with the CPU: scratch memory and kernel trials that leave room
# for the weights, and the level below the default one, which tries fewer kernels.
LOW_MEMORY = BuilderSettings(workspace_mb=256, tactic_mb=1024, level=2)

# What stands around the reference family's two large graphs.
_FLOAT32_GRAPHS = frozenset(engine_graphs(REFERENCE)) - frozenset(LARGE_GRAPHS[REFERENCE])


@dataclass(frozen=True)
class BuildOptions:
    """What the user asks a build for.

    Attributes:
        bundle: The bundle.
        graphs: Graphs to build; all of them if empty.
        precision: Of the two large graphs, one of `PRECISIONS`; the bundle's own if None.
        quantization: `qdq` or `calibrator`; what the bundle has if None.
        captures: Capture store that the calibrator is fed from.
        calibration_cache: Where the calibrator's cache is read from or written to; in the
            bundle's calibration folder if None.
        max_seq_len: See `lengths_of`, as the next three.
        opt_seq_len: See `lengths_of`.
        opt_sa_seq: See `lengths_of`.
        exact: See `lengths_of`.
        settings: How TensorRT searches.
        timing_cache: File of measured kernels; `timing.cache` beside the engines if None.
        ignore_forecast: Start although the forecast says that memory will not do.
        words: The options as they stood on the command line, for rebuilding.
    """

    bundle: Path
    graphs: tuple[str, ...] = ()
    precision: str | None = None
    quantization: str | None = None
    captures: Path | None = None
    calibration_cache: Path | None = None
    max_seq_len: int | None = None
    opt_seq_len: int | None = None
    opt_sa_seq: int | None = None
    exact: bool = False
    settings: BuilderSettings = field(default_factory=BuilderSettings)
    timing_cache: Path | None = None
    ignore_forecast: bool = False
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class EngineJob:
    """One graph's build, complete enough to be sent to another process.

    Attributes:
        bundle: The bundle's folder.
        name: The graph's name.
        record: Its record in the manifest.
        files: SHA-256 of each file of the graph.
        precision: What is asked for.
        quantization: `none`, `qdq` or `calibrator`.
        lengths: Lengths of the varying axes.
        folder: Where the engine goes.
        captures: Capture store, for a calibrator.
        cache: Calibration cache to use or to write.
        timing_cache: File of measured kernels.
        settings: How TensorRT searches.
        library: Name of the library.
        device: The device here.
        words: Options that build it again.
    """

    bundle: Path
    name: str
    record: GraphRecord
    files: Mapping[str, str]
    precision: str
    quantization: str
    lengths: Lengths
    folder: Path
    captures: Path | None
    cache: Path
    timing_cache: Path
    settings: BuilderSettings
    library: str
    device: Device
    words: tuple[str, ...]

    @property
    def graph(self) -> Path:
        """The graph's file."""
        return self.bundle / self.record.file

    @property
    def engine(self) -> Path:
        """The file that the engine is written to."""
        return self.folder / (self.graph.stem + ENGINE_SUFFIX)

    @property
    def graph_sha256(self) -> str:
        """Hash over the graph and its weights."""
        return hash_of_graph(self.files)


def build_engines(
    options: BuildOptions,
    report: Callable[[str], None],
    *,
    library_name: str = "tensorrt",
    device: Device | None = None,
) -> dict[str, EngineManifest]:
    """Build a bundle's engines.

    Args:
        options: What to build.
        report: Called with a line at a time.
        library_name: Which library builds; anything but TensorRT is for a test of this code.
        device: The device that it builds for; the one here if None.

    Returns:
        The manifest of each engine, by graph.

    Raises:
        GrootError: The bundle, the options, the library or the machine do not allow it. Engines
            that were finished before stay.
    """
    bundle = open_bundle(options.bundle)
    library = open_library(library_name)
    free_host, free_device = available_host_bytes(), 0
    if device is None:
        cuda = Cuda()
        device, free_device = cuda.device(), cuda.free_bytes()
    jobs = _plan(bundle, options, library, device)
    report(
        f"{library.name} {library.version} on {device.describe()}: {len(jobs)} "
        f"engine{'s' if len(jobs) > 1 else ''} into {jobs[0].folder}"
    )
    for note in _unfinished_captures(jobs):
        report(f"note: {note}")
    for job in jobs:
        expected = forecast_of(job, library)
        report(f"  {job.name:16} {job.precision:5} forecast: {expected.describe()}")
        if free_device and not options.ignore_forecast:
            expected.check(free_host, free_device, f"building {job.name}")
    built = {}
    for job in jobs:
        manifest = run_in_child(build_job, job, what=f"building {job.name}")
        built[job.name] = manifest
        counted = count_precisions(manifest)
        report(
            f"  {job.name:16} {manifest.precision:5} {manifest.engine_bytes / 1e6:9.1f} MB "
            f"{manifest.seconds:7.1f} s, peak {manifest.peak_memory_bytes / 2**30:.2f} GiB"
            + (f"; layers: {counted}" if counted else "")
        )
    return built


def forecast_of(job: EngineJob, library: Library) -> Forecast:
    """Forecast the memory of a job."""
    pairs = job.record.precision == "int8" and (
        not library.stores_int8_weights
        if job.settings.weight_form == "auto"
        else job.settings.weight_form == "float-pair"
    )
    return forecast(
        [job.bundle / file for file in job.files],
        graph_precision=job.record.precision,
        precision=job.precision,
        strongly_typed=library.strongly_typed,
        float_pairs=pairs,
        workspace_mb=job.settings.workspace_mb,
        shared=job.device.integrated,
    )


def count_precisions(manifest: EngineManifest) -> str:
    """Return how many layers got which verdict, as one reads it; empty if nobody looked."""
    found: dict[str, int] = {}
    for precision in manifest.layer_precision.values():
        found[precision] = found.get(precision, 0) + 1
    return ", ".join(f"{number} {precision}" for precision, number in sorted(found.items()))


def build_job(job: EngineJob) -> EngineManifest:
    """Build one engine and write it with its manifest; runs in a process of its own."""
    start = time.perf_counter()
    library = open_library(job.library)
    calibration, samples_sha256 = _calibration(job)
    known = job.timing_cache.read_bytes() if job.timing_cache.is_file() else b""
    built = build_plan(
        GraphBuild(
            graph=job.graph,
            graph_precision=job.record.precision,
            precision=job.precision,
            inputs=job.record.inputs,
            profiles=job.lengths.profiles(job.record.inputs),
            calibration=calibration,
        ),
        job.settings,
        library,
        timing_cache=known,
        show_progress=True,
    )
    built.write(job.engine)
    engine_bytes = memoryview(built.plan).nbytes
    calibrated = _keep_calibration(job, calibration, built.calibration, samples_sha256)
    if built.timing_cache is not None:
        with atomic_file(job.timing_cache) as temporary:
            temporary.write_bytes(built.timing_cache)
    flags, peak = built.flags, built.peak_memory_bytes
    del built
    inspected = _Inspection() if library.is_rtx else _inspect(job, library)
    manifest = EngineManifest(
        graph=job.record.file,
        graph_sha256=dict(job.files),
        engine_sha256=sha256_of_file(job.engine),
        engine_bytes=engine_bytes,
        device_memory_bytes=inspected.device_memory_bytes,
        precision=job.precision,
        quantization=job.quantization,
        layer_precision={v.layer: v.verdict.value for v in inspected.verdicts},
        calibration=calibrated,
        library=library.name,
        library_version=library.version,
        device=job.device,
        inputs=_tensors(job.record.inputs, job.lengths),
        outputs=_tensors(job.record.outputs, job.lengths),
        build_options=job.words,
        build_flags=flags,
        seconds=time.perf_counter() - start,
        peak_memory_bytes=peak,
    )
    with atomic_file(job.engine.with_suffix(".json")) as temporary:
        temporary.write_text(manifest.to_json(), encoding="utf-8")
    return manifest


@dataclass(frozen=True)
class _Inspection:
    device_memory_bytes: int = 0
    verdicts: tuple[LayerVerdict, ...] = ()


def inspect_engine(
    trt: Any, plan: Any, profiles: Mapping[str, tuple[Any, Any, Any]]
) -> tuple[str, int]:
    """Load an engine and ask TensorRT about it.

    Args:
        trt: The TensorRT that built it.
        plan: The serialised engine, as bytes or mapped.
        profiles: Shapes by input; the inspection is that of the best ones.

    Returns:
        The inspector's JSON, and the activation memory in bytes.

    Raises:
        EngineError: The engine does not load.
    """
    log = make_logger(trt)
    runtime = trt.Runtime(log)
    engine = runtime.deserialize_cuda_engine(plan)
    context = engine.create_execution_context() if engine is not None else None
    if context is None:
        raise EngineError(f"the engine does not load here: {'; '.join(log.errors)}")
    for name, (_, best, _) in profiles.items():
        context.set_input_shape(name, best)
    inspector = engine.create_engine_inspector()
    inspector.execution_context = context
    text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    size = getattr(engine, "device_memory_size_v2", None)
    return text, int(engine.device_memory_size if size is None else size)


def _inspect(job: EngineJob, library: Library) -> _Inspection:
    profiles = job.lengths.profiles(job.record.inputs)
    with mapped_once(job.engine) as plan:
        text, size = inspect_engine(library.trt, plan, profiles)
    with atomic_file(job.engine.with_name(job.graph.stem + LAYERS_SUFFIX)) as temporary:
        temporary.write_text(text, encoding="utf-8")
    from offline_tools.quantize.graph_audit import audit_graph  # needs onnx

    in_graph = audit_graph(job.graph, job.record.quantization)
    verdicts = judge(
        parse_inspection(text, str(job.engine)),
        {one.layer: one.wanted for one in in_graph},
        products={one.layer: one.products for one in in_graph},
    )
    return _Inspection(size, tuple(verdicts))


def _plan(
    bundle: Bundle, options: BuildOptions, library: Library, device: Device
) -> list[EngineJob]:
    known = bundle.manifest.engine_graphs
    names = options.graphs or known
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigurationError(
            f"the bundle has no graph {unknown[0]!r} for an engine; it has {', '.join(known)}"
        )
    if options.quantization == "calibrator" and options.precision not in (None, "int8"):
        raise ConfigurationError(
            f"--quantization calibrator builds INT8 engines, not {options.precision}"
        )
    lengths = lengths_of(
        bundle,
        max_seq_len=options.max_seq_len,
        opt_seq_len=options.opt_seq_len,
        opt_sa_seq=options.opt_sa_seq,
        exact=options.exact,
    )
    folder = engine_folder(bundle.folder, library.version, device)
    jobs = []
    for name in names:
        record = bundle.manifest.graphs[name]
        precision, quantization = _precision_of(name, record, options)
        if not library.strongly_typed:
            from offline_tools.engine.known_faults import refuse_known_faults  # needs onnx

            refuse_known_faults(
                bundle.folder,
                bundle.graph_path(name),
                family=bundle.manifest.family,
                quantization=quantization,
                level=options.settings.level,
            )
        cache = options.calibration_cache
        if cache is not None and cache.is_dir():
            cache = cache / f"{name}.cache"
        job = EngineJob(
            bundle=bundle.folder,
            name=name,
            record=record,
            files={
                file: bundle.manifest.files[file][0] for file in bundle.manifest.files_of(name)
            },
            precision=precision,
            quantization=quantization,
            lengths=lengths,
            folder=folder,
            captures=options.captures,
            cache=cache or bundle.folder / CALIBRATION_FOLDER / f"{name}.cache",
            timing_cache=options.timing_cache or folder / TIMING_CACHE,
            settings=options.settings,
            library=library.name,
            device=device,
            words=("--graph", name, *options.words),
        )
        jobs.append(job)
    calibrated = [job for job in jobs if job.quantization == "calibrator"]
    if calibrated and not library.has_calibrators:
        raise EngineError(
            f"{library.name} {library.version} has no INT8 calibrators (they are gone since "
            "TensorRT 11): quantise the bundle (groot-int8 quantize) and build with "
            "--quantization qdq"
        )
    if len({job.cache for job in calibrated}) < len(calibrated):
        raise ConfigurationError(
            f"--calibration-cache {options.calibration_cache} is one file, and a cache is of one "
            f"graph: name a folder that exists, or one of {_names(calibrated)} with --graph"
        )
    if options.quantization == "calibrator" and not calibrated:
        raise ConfigurationError(
            "--quantization calibrator applies to "
            f"{' and '.join(LARGE_GRAPHS[bundle.manifest.family])}, and none of them is asked for"
        )
    return jobs


def _names(jobs: Sequence[EngineJob]) -> str:
    return " and ".join(job.name for job in jobs)


def _precision_of(name: str, record: GraphRecord, options: BuildOptions) -> tuple[str, str]:
    own = "qdq" if record.precision == "int8" else "none"
    # The small graphs carry the actions themselves and stay in float32, whatever is asked for.
    if name in _FLOAT32_GRAPHS:
        return record.precision, own
    if options.quantization == "calibrator":
        if own == "qdq":
            raise EngineError(
                f"the graph {name} already has explicit Q/DQ: build it with --quantization qdq, "
                "or give the float bundle, which a calibrator works on"
            )
        return "int8", "calibrator"
    if options.quantization == "qdq" and own != "qdq":
        raise EngineError(
            f"the graph {name} is {record.precision} and has no Q/DQ: quantise the bundle first "
            "(groot-int8 quantize)"
        )
    return options.precision or record.precision, own


def _captures_of(job: EngineJob) -> Path | None:
    own = job.bundle / CALIBRATION_FOLDER
    return own if job.captures is None and (own / INDEX_FILE).is_file() else job.captures


def _unfinished_captures(jobs: Sequence[EngineJob]) -> list[str]:
    """Return what is to be said of the capture stores that calibrators are fed from."""
    folders = {_captures_of(job) for job in jobs if job.quantization == "calibrator"}
    stores = [CaptureStore.open(folder, verify_hashes=False) for folder in filter(None, folders)]
    return [store.unfinished for store in stores if store.unfinished]


def _calibration(job: EngineJob) -> tuple[Calibration | None, str]:
    if job.quantization != "calibrator":
        return None, ""
    folder = _captures_of(job)
    store = None if folder is None else CaptureStore.open(folder)
    if job.cache.is_file():
        digest = None if store is None else store.content_sha256
        found = check_cache(job.cache, job.graph_sha256, digest)
        return Calibration(None, job.cache.read_bytes()), found.samples_sha256
    if store is None:
        raise CalibrationError(
            f"{job.name}: there is no calibration cache {job.cache}, so --captures is needed: a "
            "capture store (groot-int8 calibrate)"
        )
    feeds = store.feeds(job.name, open_bundle(job.bundle, verify_hashes=False))
    batches = describe_batches(job.record.inputs, lambda: feeds, str(store.folder))
    if len(store) < ADVISED_SET:
        print(f"{job.name}: {len(store)} samples calibrate; {ADVISED_SET} or more are advised")
    return Calibration(batches, None), store.content_sha256


def _keep_calibration(
    job: EngineJob, calibration: Calibration | None, result: Any, samples_sha256: str
) -> dict[str, str]:
    if calibration is None:
        quantised = job.record.quantization
        found = None if quantised is None else quantised.calibration_sha256
        return {} if found is None else {"samples_sha256": found}
    if calibration.batches is not None:
        if result.cache is None:
            raise CalibrationError(f"{job.name}: TensorRT wrote no calibration cache")
        record = CacheRecord(job.graph_sha256, samples_sha256, calibration.batches.count)
        write_cache(job.cache, result.cache, record)
    return {"samples_sha256": samples_sha256, "cache_sha256": sha256_of_file(job.cache)}


def _tensors(specs: Mapping[str, TensorSpec], lengths: Lengths) -> dict[str, EngineTensor]:
    return {
        name: EngineTensor(spec, lengths.profile(name, spec) if spec.varies else None)
        for name, spec in specs.items()
    }
