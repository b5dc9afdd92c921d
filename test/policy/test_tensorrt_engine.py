"""Hazards of running an engine: memory taken twice or not given back, a graph that replays lies.

TensorRT and a GPU are not here, so both are stood in for: device memory is host memory behind
other addresses, and the engine doubles its input. What is shown is this side's own part: what it
allocates, when it captures, what it does when a call fails. That TensorRT and CUDA behave so is
shown on a GPU by `groot-int8 gpu-proof` (docs/verification.md).
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
from numpy.typing import NDArray

from groot_int8_ros.errors import EngineError
from groot_int8_ros.policy.engines import TensorSpec, host_copy
from groot_int8_ros.policy.engines.cuda import Cuda, CudaError
from groot_int8_ros.policy.engines.tensorrt_engine import TensorRTEngine, mapped_once
from groot_int8_ros.policy.engines.tensorrt_manifest import (
    EngineManifest,
    EngineTensor,
    engine_folder,
)

from ..page_cache import resident_file_bytes
from ..private_mapping import address_in, private_mapping

Profile: TypeAlias = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]

_VERSION = "10.3.0"
_LONGEST = 9
_ACTIVATIONS = 512
_PROFILE: Profile = ((1, 1), (1, 5), (1, _LONGEST))
_X = TensorSpec("int64", (1, "sequence"))
_Y = TensorSpec("float32", (1, "sequence"))


class _Code(int):
    """A status of the CUDA runtime: a number with a name."""

    name: str

    def __new__(cls, name: str = "cudaSuccess") -> _Code:
        code = super().__new__(cls, name != "cudaSuccess")
        code.name = name
        return code


@dataclass
class _Gpu:
    """The machine that is stood in for, and what was seen of it.

    Attributes:
        integrated: Whether CPU and GPU share memory.
        coherent: Whether they see the same bytes where they share it.
        capturable: Whether what an engine enqueues can be captured.
        honest: Whether a captured graph computes what it was captured from.
        memory: Bytes that can be allocated.
        blocks: Address to buffer of what is allocated.
        allocations: Calls of the CUDA runtime so far.
        copies: Copies between host and device.
        graphs: Graphs that are not destroyed.
        launches: Of graphs.
        streams: Streams that are not destroyed.
        pins: Whether CUDA knows of TensorRT's copies of regions.
    """

    integrated: bool = False
    coherent: bool = True
    capturable: bool = True
    honest: bool = True
    memory: int = 1 << 20
    blocks: dict[int, Any] = field(default_factory=dict)
    allocations: int = 0
    copies: int = 0
    graphs: int = 0
    launches: int = 0
    streams: int = 0
    pins: bool = False
    recording: list[Callable[[], None]] | None = None
    spoiled: bool = False

    def allocate(self, size: int) -> int:
        if size > self.memory - sum(map(len, self.blocks.values())):
            return 0
        block = ctypes.create_string_buffer(size)
        address = ctypes.addressof(block)
        self.blocks[address] = block
        return address

    def do(self, work: Callable[[], None]) -> None:
        if self.recording is None:
            work()
        else:
            self.recording.append(work)


def _runtime(gpu: _Gpu) -> Any:
    """Stand in for `cuda.bindings.runtime`."""
    ok = _Code()
    module: Any = types.ModuleType("cuda.bindings.runtime")
    attributes = {
        "cudaDevAttrIntegrated": int(gpu.integrated),
        "cudaDevAttrCanMapHostMemory": 1,
        "cudaDevAttrComputeCapabilityMajor": 8,
        "cudaDevAttrComputeCapabilityMinor": 7,
        "cudaDevAttrMultiProcessorCount": 8,
    }
    module.cudaDeviceAttr = types.SimpleNamespace(**{name: name for name in attributes})
    module.cudaMemcpyKind = types.SimpleNamespace(
        cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3
    )
    module.cudaStreamCaptureMode = types.SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    module.cudaHostAllocMapped, module.cudaHostAllocDefault = 2, 0
    module.cudaMemoryType = types.SimpleNamespace(cudaMemoryTypeUnregistered=0)

    def free_bytes() -> int:
        return gpu.memory - sum(map(len, gpu.blocks.values()))

    def allocate(size: int, flag: int = 0) -> tuple[Any, ...]:
        address = gpu.allocate(size)
        gpu.allocations += 1
        return (ok, address) if address else (_Code("cudaErrorMemoryAllocation"), 0)

    def free(address: int) -> tuple[Any, ...]:
        del gpu.blocks[address]
        return (ok,)

    def device_pointer(host: int, _: int) -> tuple[Any, ...]:
        # A board whose caches are not kept together is a second block that nobody fills.
        return ok, host if gpu.coherent else gpu.allocate(len(gpu.blocks[host]))

    def copy(target: int, source: int, size: int, kind: int, stream: Any = None) -> tuple[Any]:
        def work() -> None:
            gpu.copies += kind != 3
            ctypes.memmove(target, source, size)

        gpu.do(work) if stream is not None else work()
        return (ok,)

    def create_stream() -> tuple[Any, ...]:
        gpu.streams += 1
        return ok, 7

    def destroy_stream(_: Any) -> tuple[Any, ...]:
        gpu.streams -= 1
        return (ok,)

    def begin(*_: Any) -> tuple[Any, ...]:
        gpu.recording, gpu.spoiled = [], False
        return (ok,)

    def end(_: Any) -> tuple[Any, ...]:
        recorded, gpu.recording = gpu.recording, None
        if gpu.spoiled:
            return _Code("cudaErrorStreamCaptureInvalidated"), None
        return ok, recorded

    def instantiate(graph: Any, _: int) -> tuple[Any, ...]:
        gpu.graphs += 1
        return ok, graph if gpu.honest else graph[:1]  # copies its input and computes nothing

    def launch(graph: list[Callable[[], None]], _: Any) -> tuple[Any, ...]:
        gpu.launches += 1
        for work in graph:
            work()
        return (ok,)

    def destroy(_: Any) -> tuple[Any, ...]:
        gpu.graphs -= 1
        return (ok,)

    module.cudaGetDeviceCount = lambda: (ok, 1)
    module.cudaSetDevice = lambda _: (ok,)
    module.cudaGetDeviceProperties = lambda _: (ok, types.SimpleNamespace(name=b"Orin\0"))
    module.cudaDeviceGetAttribute = lambda name, _: (ok, attributes[name])
    module.cudaMemGetInfo = lambda: (ok, free_bytes(), gpu.memory)
    module.cudaPointerGetAttributes = lambda address: (
        ok,
        types.SimpleNamespace(
            type=int(any(b <= address < b + len(gpu.blocks[b]) for b in gpu.blocks))
        ),
    )
    module.cudaMalloc = module.cudaHostAlloc = allocate
    module.cudaFree = module.cudaFreeHost = free
    module.cudaHostGetDevicePointer = device_pointer
    module.cudaMemcpy = module.cudaMemcpyAsync = copy
    module.cudaStreamCreate, module.cudaStreamDestroy = create_stream, destroy_stream
    module.cudaStreamSynchronize = module.cudaDeviceSynchronize = lambda *_: (ok,)
    module.cudaStreamBeginCapture, module.cudaStreamEndCapture = begin, end
    module.cudaGetLastError = module.cudaGraphDestroy = lambda *_: (ok,)
    module.cudaGraphInstantiate, module.cudaGraphLaunch = instantiate, launch
    module.cudaGraphExecDestroy = destroy
    return module


class _Context:
    """The engine's one computation: y = 2 x, with int32 in and float32 out, as 8.6 would."""

    def __init__(self, gpu: _Gpu, log: Any, region: Any) -> None:
        self._gpu, self._log = gpu, log
        self._region, self._ran = region, False
        self._scratch = gpu.allocate(_ACTIVATIONS)
        self._address: dict[str, int] = {}
        self._shape: tuple[int, ...] = ()
        self.profiler: Any = None

    def __del__(self) -> None:
        self._gpu.blocks.pop(self._scratch, None)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._address[name] = address
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shape = shape
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._shape

    def execute_async_v3(self, stream: int) -> bool:
        if self._gpu.recording is not None and not self._gpu.capturable:
            self._gpu.spoiled = True
            self._log.log(1, "operation not permitted when stream is capturing")
            return False
        count = int(np.prod(self._shape))

        def work() -> None:
            # 8.6 reads its copy of a region until the first run is over.
            if not self._ran:
                self._ran = len(self._region[:]) > 0
            x = (ctypes.c_int32 * count).from_address(self._address["x"])
            y = (ctypes.c_float * count).from_address(self._address["y"])
            y[:] = [2.0 * value for value in x]
            if self.profiler is not None:
                self.profiler.report_layer_time("cast", 0.5)
                self.profiler.report_layer_time("double", 1.5)

        self._gpu.do(work)
        return True


def _tensorrt(gpu: _Gpu, dtype_of_y: str, version: str) -> Any:
    """Stand in for `tensorrt`; a plan of the word `good` gives an engine, another none."""
    module: Any = types.ModuleType("tensorrt")
    module.__version__ = version

    class ILogger:
        ERROR, INTERNAL_ERROR, WARNING = 1, 0, 2

    class IProfiler:
        pass

    class Engine:
        num_io_tensors = 2

        def __init__(self, log: Any, plan: Any) -> None:
            self._log = log
            # As 8.6 does with each compiled region: a copy of its own, in memory.
            self.region = private_mapping(bytes(plan[len(b"good") :]))
            if gpu.pins:
                gpu.blocks[address_in(self.region)] = self.region

        def get_tensor_name(self, index: int) -> str:
            return "xy"[index]

        def get_tensor_mode(self, name: str) -> str:
            return {"x": "in", "y": "out"}[name]

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return 1, -1

        def get_tensor_dtype(self, name: str) -> str:
            return {"x": "int32", "y": dtype_of_y}[name]

        def create_execution_context(self) -> _Context:
            return _Context(gpu, self._log, self.region)

    class Runtime:
        def __init__(self, log: Any) -> None:
            self._log = log

        def deserialize_cuda_engine(self, plan: Any) -> Engine | None:
            if bytes(plan[:4]) == b"good":
                return Engine(self._log, plan)
            self._log.log(1, "the plan cannot be read")
            return None

    module.ILogger, module.IProfiler, module.Runtime = ILogger, IProfiler, Runtime
    module.TensorIOMode = types.SimpleNamespace(INPUT="in")
    module.nptype = np.dtype
    return module


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., TensorRTEngine]:
    """Loads an engine on a stand-in: `load(gpu, plan=..., version=...)`."""

    def start(
        gpu: _Gpu,
        *,
        plan: bytes = b"good",
        dtype_of_y: str = "float32",
        profile: Profile = _PROFILE,
        version: str = _VERSION,
    ) -> TensorRTEngine:
        monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", _runtime(gpu))
        monkeypatch.setitem(sys.modules, "tensorrt", _tensorrt(gpu, dtype_of_y, version))
        device = Cuda().device()
        path = engine_folder(tmp_path, version, device) / "dit_model.engine"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(plan)
        graphs = {"onnx/dit_model.onnx": "a" * 64}
        files = {name: {"sha256": sha256, "bytes": 1} for name, sha256 in graphs.items()}
        (tmp_path / "manifest.json").write_text(json.dumps({"files": files}))
        manifest = EngineManifest(
            graph="onnx/dit_model.onnx",
            graph_sha256=graphs,
            engine_sha256=hashlib.sha256(plan).hexdigest(),
            engine_bytes=len(plan),
            device_memory_bytes=_ACTIVATIONS,
            precision="fp16",
            quantization="none",
            layer_precision={},
            calibration={},
            library="tensorrt",
            library_version=version,
            device=device,
            inputs={"x": EngineTensor(_X, profile)},
            outputs={"y": EngineTensor(_Y, profile)},
            build_options=("--graph", "dit", "--max-seq-len", "9", "--no-library-tactics"),
            build_flags=(),
            seconds=0.0,
            peak_memory_bytes=0,
        )
        path.with_suffix(".json").write_text(manifest.to_json())
        return TensorRTEngine(tmp_path / "onnx" / "dit_model.onnx")

    return start


def _feed(*values: int) -> dict[str, NDArray[Any]]:
    return {"x": np.array([values], np.int64)}


def _doubled(engine: TensorRTEngine, *values: int) -> None:
    y = engine.run(_feed(*values))["y"]
    assert y.dtype == np.float32
    assert y.tolist() == [[2.0 * value for value in values]]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("cudaErrorNoDevice", "there is no NVIDIA GPU here"),
        ("cudaErrorInsufficientDriver", "there is no NVIDIA driver here, or it is too old"),
    ],
)
def test_machine_without_a_gpu_or_its_driver_is_told_so(
    monkeypatch: pytest.MonkeyPatch, code: str, words: str
) -> None:
    runtime = _runtime(_Gpu())
    runtime.cudaGetDeviceCount = lambda: (_Code(code), 0)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", runtime)
    with pytest.raises(CudaError, match=f"{code}: {words}"):
        Cuda()


def test_the_time_of_each_layer_is_its_mean_and_is_not_taken_from_a_graph(
    load: Callable[..., TensorRTEngine],
) -> None:
    gpu = _Gpu()
    engine = load(gpu)
    feeds = {"x": np.array([[1, 2, 3]], np.int64)}
    engine.run(feeds)
    launched = gpu.launches
    assert engine.layer_times_ms(4) == {"cast": 0.5, "double": 1.5}
    # A CUDA graph is one launch: nobody would report its layers.
    assert gpu.launches == launched
    assert engine.cuda_graph_state == "off, for its layers were timed"
    assert engine.run(feeds)["y"].tolist() == [[2.0, 4.0, 6.0]]
    engine.close()


def test_runs_of_every_length_allocate_nothing_and_closing_gives_all_back(
    load: Callable[..., TensorRTEngine],
) -> None:
    gpu = _Gpu()
    engine = load(gpu)
    assert gpu.allocations == 4, "host and device, input and output"
    _doubled(engine, 1, 2, 3)
    kept = engine.run(_feed(4, 5))["y"]
    _doubled(engine, *range(_LONGEST))
    assert kept.tolist() == [[8.0, 10.0]], "an answer is the caller's, not the buffer"
    assert gpu.allocations == 4
    engine.close()
    assert (gpu.blocks, gpu.streams, gpu.graphs) == ({}, 0, 0)
    with pytest.raises(RuntimeError, match="was closed"):
        engine.run(_feed(1))


def test_graph_is_captured_anew_for_another_length_and_replayed_for_the_same(
    load: Callable[..., TensorRTEngine],
) -> None:
    gpu = _Gpu()
    engine = load(gpu)
    assert engine.cuda_graph_state == "in use"
    for values in ((1, 2), (3, 4), (5, 6, 7), (8, 9, 10)):
        before = gpu.launches
        _doubled(engine, *values)
        assert gpu.launches == before + 1
    assert gpu.graphs == 1, "graphs of other lengths are destroyed"


def test_engine_that_cannot_be_captured_runs_without_a_graph_and_says_why(
    load: Callable[..., TensorRTEngine],
) -> None:
    gpu = _Gpu(capturable=False)
    engine = load(gpu)
    assert engine.cuda_graph_state == (
        "capture failed: operation not permitted when stream is capturing"
    )
    _doubled(engine, 1, 2, 3)
    assert (gpu.launches, gpu.graphs) == (0, 0)


def test_graph_that_replays_something_else_is_not_used(
    load: Callable[..., TensorRTEngine],
) -> None:
    gpu = _Gpu(honest=False)
    engine = load(gpu)
    for values in ((1, 2, 3), (4, 5, 6)):
        _doubled(engine, *values)
    assert engine.cuda_graph_state == "its outputs differ from a plain run's"
    assert gpu.graphs == 0


@pytest.mark.parametrize(
    ("integrated", "coherent", "zero_copy"),
    [(True, True, True), (True, False, False), (False, True, False)],
)
def test_buffers_are_shared_only_where_a_probe_shows_the_same_bytes(
    load: Callable[..., TensorRTEngine], integrated: bool, coherent: bool, zero_copy: bool
) -> None:
    gpu = _Gpu(integrated=integrated, coherent=coherent)
    engine = load(gpu)
    assert engine.zero_copy == zero_copy
    gpu.copies = 0
    _doubled(engine, 1, 2, 3)
    assert (gpu.copies == 0) == zero_copy


def test_engine_that_will_not_fit_is_refused_before_it_is_read(
    load: Callable[..., TensorRTEngine],
) -> None:
    gpu = _Gpu(memory=500)
    with pytest.raises(EngineError, match=r"does not fit into the memory: it takes about .* free"):
        load(gpu)
    assert (gpu.allocations, gpu.blocks) == (0, {})


def test_memory_that_runs_out_while_loading_is_explained_and_given_back(
    load: Callable[..., TensorRTEngine],
) -> None:
    # Room for the plan and its activations, and for one of two buffers on either side.
    gpu = _Gpu(memory=_ACTIVATIONS + 3 * 4 * _LONGEST)
    with pytest.raises(
        EngineError,
        match=r"got no memory for its inputs and outputs: cudaMalloc failed.*activations.*free",
    ):
        load(gpu)
    assert (gpu.blocks, gpu.streams) == ({}, 0)


@pytest.mark.parametrize(
    ("version", "integrated", "twice"),
    [("8.6.1", True, True), ("8.6.1", False, False), ("10.3.0", True, False)],
)
def test_forecast_counts_the_copy_that_tensorrt_8_makes_where_memory_is_shared(
    load: Callable[..., TensorRTEngine], version: str, integrated: bool, twice: bool
) -> None:
    gpu = _Gpu(memory=_ACTIVATIONS + len(b"good"), integrated=integrated)
    with pytest.raises(EngineError, match="got no memory for its inputs") as error:
        load(gpu, version=version)
    assert ("weights 0.00, twice while TensorRT 8 loads it," in str(error.value)) == twice


def test_copy_that_tensorrt_keeps_leaves_memory_or_is_told(
    load: Callable[..., TensorRTEngine], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plan = b"good" + os.urandom(40 << 20)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    engine = load(_Gpu(memory=1 << 30), plan=plan)
    if "keeps its files" in engine.host_copy.reason:
        pytest.skip(engine.host_copy.reason)
    assert engine.host_copy.found_bytes > 39 << 20
    assert (engine.host_copy.kept_bytes, engine.remarks) == (0, [])
    assert engine.host_copy.returned_bytes() == 0
    assert engine._engine.region[-len(plan) + 4 :] == plan[4:]
    _doubled(engine, 1, 2, 3)
    engine.close()

    engine = load(_Gpu(memory=1 << 30, pins=True), plan=plan)
    assert engine.host_copy.moved == ()
    assert engine.remarks[0].endswith("to a disk: CUDA uses some of that memory itself")
    engine.close()

    monkeypatch.setattr(host_copy, "_SPARE_BYTES", 1 << 60)
    engine = load(_Gpu(memory=1 << 30, capturable=False), plan=plan)
    assert engine.host_copy.kept_bytes == engine.host_copy.found_bytes > 39 << 20
    graph, copy = engine.remarks
    assert graph.startswith("it runs without a CUDA graph: capture failed: operation not")
    assert copy.startswith("TensorRT keeps a copy of 0.04 GiB of it in memory, which could not be")
    assert [part.split(": has no room")[0] for part in copy.split(": ", 1)[1].split("; ")] == [
        str(tmp_path),
        "/var/tmp",
    ]
    _doubled(engine, 1, 2, 3)
    engine.close()


def test_plan_that_tensorrt_cannot_read_is_refused_with_its_reason(
    load: Callable[..., TensorRTEngine],
) -> None:
    with pytest.raises(EngineError, match="cannot be loaded: the plan cannot be read"):
        load(_Gpu(), plan=b"bad!")


def test_engine_with_other_tensors_than_its_manifest_is_refused(
    load: Callable[..., TensorRTEngine],
) -> None:
    with pytest.raises(EngineError, match=r"has y as float16\[1, -1\], and its manifest says"):
        load(_Gpu(), dtype_of_y="float16")


def test_prompt_longer_than_the_engine_is_refused_with_the_option(
    load: Callable[..., TensorRTEngine],
) -> None:
    engine = load(_Gpu())
    with pytest.raises(EngineError, match=r"built for \[1, 1\] to \[1, 9\].*--max-seq-len 10$"):
        engine.run(_feed(*range(_LONGEST + 1)))
    _doubled(engine, 1, 2)


def test_prompt_shorter_than_an_exact_engine_is_not_told_to_build_a_longer_one(
    load: Callable[..., TensorRTEngine],
) -> None:
    longest = (1, _LONGEST)
    engine = load(_Gpu(), profile=(longest, longest, longest))
    # As it was built otherwise: a TensorRT without cuBLAS cannot do without that option.
    again = r" --no-library-tactics --max-seq-len 3 --exact, or without --exact$"
    with pytest.raises(EngineError, match=r"--bundle \S+" + again):
        engine.run(_feed(1, 2, 3))


def test_number_that_a_32_bit_input_cannot_hold_is_refused(
    load: Callable[..., TensorRTEngine],
) -> None:
    with pytest.raises(EngineError, match="input x holds numbers beyond 32 bits"):
        load(_Gpu()).run(_feed(1 << 40))


def test_engine_file_leaves_no_pages_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "dit_model.engine"
    with path.open("wb") as stream:
        stream.write(os.urandom(1 << 20))
        stream.flush()
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if resident_file_bytes(path):
        pytest.skip(f"the file system of {tmp_path} keeps all files in memory")
    digest = hashlib.sha256(path.read_bytes()).digest()
    assert resident_file_bytes(path) > 0
    with mapped_once(path) as mapped:
        assert hashlib.sha256(mapped).digest() == digest
    assert resident_file_bytes(path) == 0
