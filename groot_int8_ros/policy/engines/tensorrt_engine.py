"""A TensorRT engine of the bundle, run through cuda-python.

Owns: `TensorRTEngine`. Must not import torch. TensorRT and cuda-python are imported when an engine
is loaded, so a robot that runs ONNX Runtime needs neither.

Memory. The engine's file is mapped, not read: TensorRT copies the weights to where the GPU reads
them, and the file's pages go back to the kernel before the next engine is loaded. Of a copy that
TensorRT keeps for itself the pages are put behind a file (`host_copy`), so no second copy stays
where there is a disk for it.
Inputs and outputs are allocated once, for the largest shapes. Where CPU and GPU share memory and a
probe shows that they see the same bytes, TensorRT reads and writes those buffers in place.

CUDA graph. Each shape is run once plainly and once as a captured graph; the graph is kept if
capturing works and gives the same outputs. It did not work for engines that allocate while they
run (seen by others on JetPack 6.2), and then the engine runs without.
"""

from __future__ import annotations

import importlib
import math
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from groot_int8_ros.errors import EngineError
from groot_int8_ros.policy.engines.base import Tensors, TensorSpec, checked_feeds, is_unchanged
from groot_int8_ros.policy.engines.cuda import Cuda, CudaError, host_view
from groot_int8_ros.policy.engines.host_copy import HostCopy, Span, move_copies, private_memory
from groot_int8_ros.policy.engines.tensorrt_manifest import (
    EngineManifest,
    EngineTensor,
    check_engine_fits,
    find_engine,
    read_engine_manifest,
    rebuild_command,
    without_options,
)
from groot_int8_ros.policy.files import read_json

_BUNDLE_MANIFEST = "manifest.json"
# Of the system, for files that need not be in memory; a bundle is verified and not written to.
_DISK_FOLDER = "/var/tmp"
_INT32 = np.iinfo(np.int32)


def import_tensorrt() -> Any:
    """Import TensorRT.

    Raises:
        EngineError: It is not installed, or its libraries do not load.
    """
    try:
        return importlib.import_module("tensorrt")
    except (ImportError, OSError) as error:
        raise EngineError(
            f"TensorRT cannot be imported ({error}): it comes with JetPack (package "
            "python3-libnvinfer; let the virtual environment see system packages), elsewhere as "
            "NVIDIA's wheel beside a GPU"
        ) from error


def make_logger(trt: Any) -> Any:
    """Make a logger for TensorRT that keeps errors for the message and drops the rest.

    Returns:
        A `trt.ILogger` with the list `errors`.
    """

    class ErrorLog(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            # pybind11 asks for the base's own __init__; 8.6 refuses super().
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: object, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

    return ErrorLog()


@contextmanager
def mapped_once(path: Path) -> Iterator[mmap.mmap]:
    """Map a file that is read once, and leave none of it in memory.

    The kernel keeps the pages of a file that was read, and on a Jetson they come out of the memory
    that the GPU allocates from. It drops no page that is still mapped, so it is asked afterwards;
    what an earlier reading of the file (its hash) left goes with them.

    Args:
        path: A file that is not empty.

    Yields:
        Its bytes, read-only.
    """
    with path.open("rb") as stream:
        try:
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                yield mapped
        finally:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@dataclass
class _Buffer:
    """Memory of one tensor, for its largest shape.

    Attributes:
        host: Page-locked memory that the CPU reads or writes.
        device: What TensorRT reads or writes; the GPU's address of `host` if it is shared.
        size_bytes: Length of both.
        dtype: The engine's own element type, which for integers may be narrower than the graph's.
        shared: Whether `host` and `device` are the same bytes.
    """

    host: int
    device: int
    size_bytes: int
    dtype: np.dtype[Any]
    shared: bool


class TensorRTEngine:
    """One engine of a bundle on the GPU; see `Engine` for its lifecycle."""

    def __init__(
        self, graph: Path, *, verify_hash: bool = True, use_cuda_graph: bool = True
    ) -> None:
        """Find the engine that was built from a graph for this device, check it, load it.

        Args:
            graph: The `.onnx` file inside the bundle that the engine was built from.
            verify_hash: Compare the engine's hash before it is loaded; False compares its size.
            use_cuda_graph: Probe whether the engine can run as a CUDA graph, and use it if so.

        Raises:
            EngineError: TensorRT, cuda-python or a GPU is missing, no engine was built for this
                device, the engine does not fit, or the memory does not suffice.
        """
        self._close_steps: list[Any] = []
        self._context: Any = None
        self._engine: Any = None
        trt = self._trt = import_tensorrt()
        self._cuda = Cuda()
        self._bundle = graph.parent.parent
        self._path, self._manifest = self._find(graph, str(trt.__version__), verify_hash)
        self._use_cuda_graph = use_cuda_graph
        self._graph: Any = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        # What each input's buffer was last filled from.
        self._given: dict[str, NDArray[Any]] = {}
        self.cuda_graph_state = "off" if not use_cuda_graph else "not tried"
        self.host_copy = HostCopy()
        self._log = make_logger(trt)
        try:
            before = private_memory()
            self._load(trt)
            self._warm_up()
            # Not earlier: TensorRT reads its copy once more until the first run is over.
            self.host_copy = self._move_host_copy(before)
        except BaseException:
            self.close()
            raise

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """Specs by input name, as the graph has them."""
        return {name: tensor.spec for name, tensor in self._manifest.inputs.items()}

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        """Specs by output name, as the graph has them."""
        return {name: tensor.spec for name, tensor in self._manifest.outputs.items()}

    @property
    def remarks(self) -> Sequence[str]:
        """What costs time or memory here and need not; see `Engine.remarks`."""
        found = []
        if self.cuda_graph_state != "in use" and not self.cuda_graph_state.startswith("off"):
            found.append(f"it runs without a CUDA graph: {self.cuda_graph_state}")
        copy = self.host_copy
        if copy.kept_bytes:
            found.append(
                f"TensorRT keeps a copy of {copy.kept_bytes / 2**30:.2f} GiB of it in memory, "
                f"which could not be moved to a disk: {copy.reason}"
            )
        elif copy.reason:
            found.append(f"TensorRT may keep a copy of it in memory: {copy.reason}")
        return found

    @property
    def manifest(self) -> EngineManifest:
        """What the engine was built from."""
        return self._manifest

    @property
    def zero_copy(self) -> bool:
        """Whether TensorRT works on the CPU's buffers in place."""
        return all(buffer.shared for buffer in self._buffers.values())

    def run(self, feeds: Tensors) -> dict[str, NDArray[Any]]:
        """Run the engine once; see `Engine.run`."""
        if self._context is None:
            raise RuntimeError(f"{self._path.name} was closed")
        checked = checked_feeds(self._path.name, self.inputs, feeds)
        self._set_shapes({name: array.shape for name, array in checked.items()})
        for name, array in checked.items():
            if not is_unchanged(array, self._given.get(name)):
                self._write(name, array)
                self._given[name] = array
        try:
            self._execute()
        except CudaError as error:
            raise self._failure("failed", error) from error
        return {name: self._read(name) for name in self._manifest.outputs}

    def time_ms(self, runs: int) -> float:
        """Return the mean time of a run on the current inputs, by the GPU's own clock."""
        with self._cuda.timing(self._stream) as result:
            for _ in range(runs):
                self._launch()
        return result[0] / runs

    def inspect(self) -> str:
        """Return what TensorRT's engine inspector says, as JSON."""
        inspector = self._engine.create_engine_inspector()
        inspector.execution_context = self._context
        text: str = inspector.get_engine_information(self._trt.LayerInformationFormat.JSON)
        return text

    def layer_times_ms(self, runs: int) -> dict[str, float]:
        """Return the mean time of each of the engine's layers on the current inputs.

        TensorRT waits for every layer when it measures, so the sum is more than a run takes. The
        engine keeps measuring afterwards: close it.
        """
        trt: Any = self._trt
        totals: dict[str, float] = {}

        class Profiler(trt.IProfiler):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                trt.IProfiler.__init__(self)

            def report_layer_time(self, layer_name: str, ms: float) -> None:
                totals[layer_name] = totals.get(layer_name, 0.0) + ms

        # On its own context: another would need an optimisation profile of its own.
        self._stop_using_graphs("off, for its layers were timed")
        profiler = Profiler()
        self._context.profiler = profiler
        for _ in range(runs):
            self._enqueue()
            self._cuda.synchronize(self._stream)
        return {name: total / runs for name, total in totals.items()}

    def close(self) -> None:
        """Release the engine's memory."""
        # What fails in here has no memory to give back; the rest must still be released.
        with suppress(CudaError):
            self._drop_graph()
        self._context = None
        while self._close_steps:
            with suppress(CudaError):
                self._close_steps.pop()()
        self._engine = None

    def _find(
        self, graph: Path, library_version: str, verify_hash: bool
    ) -> tuple[Path, EngineManifest]:
        device = self._cuda.device()
        path = find_engine(self._bundle, graph, library_version, device)
        manifest = read_engine_manifest(path.with_suffix(".json"), self._bundle)
        check_engine_fits(
            manifest,
            path,
            self._bundle,
            library_version=library_version,
            device=device,
            recorded_sha256=_recorded_hashes(self._bundle),
            verify_hash=verify_hash,
        )
        return path, manifest

    def _load(self, trt: Any) -> None:
        twice = self._copies_in_host_memory(str(trt.__version__))
        weights = self._manifest.engine_bytes * (1 + twice)
        needed = weights + self._manifest.device_memory_bytes
        free = self._cuda.free_bytes()
        self._forecast = (
            f"it takes about {needed / 2**30:.2f} GiB (weights {weights / 2**30:.2f}"
            f"{', twice while TensorRT 8 loads it' if twice else ''}, activations "
            f"{self._manifest.device_memory_bytes / 2**30:.2f}), and {free / 2**30:.2f} GiB were "
            "free"
        )
        if needed > free:
            raise EngineError(
                f"{self._path} does not fit into the memory: {self._forecast}. Stop other "
                "processes, or take an INT8 bundle (groot-int8 quantize) and build its engines."
            )
        self._stream = self._cuda.create_stream()
        self._close_steps.append(lambda: self._cuda.destroy_stream(self._stream))
        self._runtime = trt.Runtime(self._log)
        self._engine = self._deserialize()
        if self._engine is None:
            raise self._failure("cannot be loaded")
        self._check_tensors(trt)
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise self._failure("got no memory for its activations")
        try:
            self._allocate(trt)
        except CudaError as error:
            raise self._failure("got no memory for its inputs and outputs", error) from error

    def _copies_in_host_memory(self, library_version: str) -> bool:
        """Return whether loading takes the weights twice of the memory that `free_bytes` is of.

        TensorRT 8.6 copies what it compiled as one region, which is most of a transformer, into
        the host's memory besides the GPU's. That copy can be moved only when it is complete.
        """
        return library_version.startswith("8.") and self._cuda.device().integrated

    def _deserialize(self) -> Any:
        with mapped_once(self._path) as mapped:
            return self._runtime.deserialize_cuda_engine(mapped)

    def _move_host_copy(self, before: Sequence[Span]) -> HostCopy:
        folders = dict.fromkeys((os.environ.get("TMPDIR") or _DISK_FOLDER, _DISK_FOLDER))
        return move_copies(self._path, before, map(Path, folders), self._cuda.is_unknown)

    def _check_tensors(self, trt: Any) -> None:
        found: dict[bool, set[str]] = {True: set(), False: set()}
        for index in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(index)
            found[self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT].add(name)
        wanted = {True: set(self._manifest.inputs), False: set(self._manifest.outputs)}
        if found != wanted:
            raise self._misfit(
                f"has the inputs {sorted(found[True])} and the outputs {sorted(found[False])}, "
                f"and its manifest says {sorted(wanted[True])} and {sorted(wanted[False])}"
            )
        for name, tensor in {**self._manifest.inputs, **self._manifest.outputs}.items():
            shape = tuple(int(axis) for axis in self._engine.get_tensor_shape(name))
            dtype = np.dtype(trt.nptype(self._engine.get_tensor_dtype(name)))
            if not _is_form_of(tensor.spec, shape, dtype):
                raise self._misfit(
                    f"has {name} as {dtype}{list(shape)}, and its manifest says "
                    f"{tensor.spec.describe()}"
                )

    def _allocate(self, trt: Any) -> None:
        shared = self._cuda.has_zero_copy()
        self._buffers: dict[str, _Buffer] = {}
        for name, tensor in {**self._manifest.inputs, **self._manifest.outputs}.items():
            dtype = np.dtype(trt.nptype(self._engine.get_tensor_dtype(name)))
            size = math.prod(_largest(name, tensor)) * dtype.itemsize
            host = self._cuda.allocate_host(size, mapped=shared)
            self._close_steps.append(lambda pointer=host: self._cuda.free_host(pointer))
            if shared:
                device = self._cuda.device_address(host)
            else:
                device = self._cuda.allocate(size)
                self._close_steps.append(lambda pointer=device: self._cuda.free(pointer))
            self._buffers[name] = _Buffer(host, device, size, dtype, shared)
            self._context.set_tensor_address(name, device)

    def _warm_up(self) -> None:
        """Run once at the best shape, so that the first observation does not pay for it."""
        best = {}
        for name, tensor in self._manifest.inputs.items():
            best[name] = tensor.profile[1] if tensor.profile else _largest(name, tensor)
        self._set_shapes(best)
        for name, shape in best.items():
            self._write(name, np.zeros(shape, self._manifest.inputs[name].spec.dtype))
        try:
            self._execute()
        except CudaError as error:
            raise self._failure("failed in its first run", error) from error

    def _set_shapes(self, shapes: dict[str, tuple[int, ...]]) -> None:
        if shapes == self._shapes:
            return
        for name, shape in shapes.items():
            profile = self._manifest.inputs[name].profile
            if profile is not None:
                self._require_inside(name, shape, profile[0], profile[2])
        # A graph belongs to the shapes that it was captured with, and so does the context's state.
        self._drop_graph()
        self._shapes = {}
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise self._failure(f"does not take {name} of shape {list(shape)}")
        self._shapes = shapes

    def _require_inside(
        self,
        name: str,
        shape: tuple[int, ...],
        smallest: tuple[int, ...],
        largest: tuple[int, ...],
    ) -> None:
        axes = zip(smallest, shape, largest, strict=True)
        outside = [axis for low, axis, high in axes if not low <= axis <= high]
        if not outside:
            return
        # Only the prompt's length moves, and the other graphs have the same.
        options = without_options(
            self._manifest.build_options,
            {"--graph", "--max-seq-len", "--opt-seq-len"},
            {"--exact"},
        )
        exact = " --exact, or without --exact" if smallest == largest else ""
        raise EngineError(
            f"{self._path.name}: input {name} has the shape {list(shape)}, and the engine was "
            f"built for {list(smallest)} to {list(largest)}. Build it for this length: "
            f"{rebuild_command(self._bundle, options)} --max-seq-len {outside[0]}{exact}"
        )

    def _execute(self) -> None:
        """Run on what the host buffers hold; the first run of a shape settles the CUDA graph."""
        self._launch()
        self._cuda.synchronize(self._stream)
        if not self._use_cuda_graph or self._graph is not None:
            return
        plain = {name: self._read(name) for name in self._manifest.outputs}
        try:
            self._graph = self._cuda.capture(self._stream, self._enqueue)
            self._spoil_outputs()
            self._launch()
            self._cuda.synchronize(self._stream)
        except EngineError as error:
            reason = self._log.errors[-1] if self._log.errors else str(error)
            self._stop_using_graphs(f"capture failed: {_short(reason)}")
        else:
            if all(_agree(plain[name], self._read(name)) for name in plain):
                self.cuda_graph_state = "in use"
                return
            self._stop_using_graphs("its outputs differ from a plain run's")
        self._enqueue()
        self._cuda.synchronize(self._stream)

    def _launch(self) -> None:
        if self._graph is not None:
            self._cuda.launch(self._graph, self._stream)
        else:
            self._enqueue()

    def _enqueue(self) -> None:
        for name in self._manifest.inputs:
            buffer = self._buffers[name]
            if not buffer.shared:
                size = math.prod(self._shapes[name]) * buffer.dtype.itemsize
                self._cuda.copy_to_device(buffer.device, buffer.host, size, self._stream)
        self._log.errors.clear()
        if not self._context.execute_async_v3(int(self._stream)):
            raise self._failure("failed")
        for name in self._manifest.outputs:
            buffer = self._buffers[name]
            if not buffer.shared:
                size = math.prod(self._output_shape(name)) * buffer.dtype.itemsize
                self._cuda.copy_to_host(buffer.host, buffer.device, size, self._stream)

    def _spoil_outputs(self) -> None:
        """Overwrite the outputs, or a graph that computes nothing would seem to give them."""
        for name in self._manifest.outputs:
            buffer = self._buffers[name]
            host_view(buffer.host, (buffer.size_bytes,), np.dtype(np.uint8)).fill(0xFF)
            if not buffer.shared:
                self._cuda.copy_to_device(
                    buffer.device, buffer.host, buffer.size_bytes, self._stream
                )

    def _stop_using_graphs(self, reason: str) -> None:
        self._use_cuda_graph = False
        self.cuda_graph_state = reason
        self._drop_graph()

    def _drop_graph(self) -> None:
        if self._graph is not None:
            self._cuda.destroy_graph(self._graph)
            self._graph = None

    def _output_shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(axis) for axis in self._context.get_tensor_shape(name))

    def _write(self, name: str, array: NDArray[Any]) -> None:
        buffer = self._buffers[name]
        if (
            array.dtype == np.int64
            and buffer.dtype == np.int32
            and array.size
            and not _INT32.min <= int(array.min()) <= int(array.max()) <= _INT32.max
        ):
            raise EngineError(f"{self._path.name}: input {name} holds numbers beyond 32 bits")
        view = host_view(buffer.host, array.shape, buffer.dtype)
        np.copyto(view, array, casting="unsafe")

    def _read(self, name: str) -> NDArray[Any]:
        buffer = self._buffers[name]
        # A copy: the buffer is overwritten by the next run.
        return host_view(buffer.host, self._output_shape(name), buffer.dtype).astype(
            self._manifest.outputs[name].spec.dtype, copy=True
        )

    def _failure(self, what: str, error: CudaError | None = None) -> EngineError:
        reasons = [*self._log.errors[-3:], *([str(error)] if error else [])]
        text = "; ".join(reasons) or "TensorRT gave no reason"
        return EngineError(f"{self._path} {what}: {text} ({self._forecast})")

    def _misfit(self, what: str) -> EngineError:
        again = rebuild_command(self._bundle, self._manifest.build_options)
        return EngineError(f"{self._path} {what}. Build it again: {again}")


def _largest(name: str, tensor: EngineTensor) -> tuple[int, ...]:
    if tensor.profile:
        return tensor.profile[2]
    fixed = tuple(axis for axis in tensor.spec.shape if isinstance(axis, int))
    if len(fixed) != len(tensor.spec.shape):
        raise EngineError(f"the engine's manifest gives no profile for the varying tensor {name}")
    return fixed


def _is_form_of(spec: TensorSpec, shape: tuple[int, ...], dtype: np.dtype[Any]) -> bool:
    """Whether an engine's tensor can hold what the graph's does.

    TensorRT 8.6 narrows 64-bit integers to 32. An axis whose length it does not know is -1; one
    whose length varies in the graph may be fixed in the engine.
    """
    narrowed = spec.dtype == "int64" and dtype == np.int32
    return (
        (dtype == np.dtype(spec.dtype) or narrowed)
        and len(shape) == len(spec.shape)
        and all(
            isinstance(want, str) or have in (want, -1)
            for want, have in zip(spec.shape, shape, strict=True)
        )
    )


def _agree(plain: NDArray[Any], replayed: NDArray[Any]) -> bool:
    if not np.issubdtype(plain.dtype, np.floating):
        return bool(np.array_equal(plain, replayed))
    # Kernels may sum in another order; a graph that reads stale memory is off by far more.
    a, b = plain.astype(np.float64), replayed.astype(np.float64)
    scale = float(np.max(np.abs(a), initial=0.0, where=np.isfinite(a)))
    return bool(np.allclose(a, b, rtol=0, atol=1e-2 * scale, equal_nan=True))


def _short(reason: str) -> str:
    """Return the end of TensorRT's message, which says what is wrong; the source line does not."""
    return " ".join(reason.split())[-120:]


def _recorded_hashes(bundle: Path) -> dict[str, str]:
    path = bundle / _BUNDLE_MANIFEST
    try:
        files = read_json(path)["files"]
        return {name: str(record["sha256"]) for name, record in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EngineError(f"{path} cannot be read: {error}. Export the bundle again.") from error
