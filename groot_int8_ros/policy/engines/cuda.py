"""The few calls of the CUDA runtime that an engine needs, through cuda-python.

Owns: `Cuda`, `Device`, the two names under which cuda-python has lived, and the translation of
CUDA's error codes. Must not import torch or TensorRT. cuda-python 12.8 and later (and all of 13)
call the module `cuda.bindings.runtime`, earlier ones, as on JetPack 6, `cuda.cudart`.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from groot_int8_ros.errors import EngineError

_MODULES = ("cuda.bindings.runtime", "cuda.cudart")
_BOARD_MODEL = Path("/proc/device-tree/model")
_MEMORY_INFO = Path("/proc/meminfo")
_PROBE_BYTES = 4096


class CudaError(EngineError):
    """A call of the CUDA runtime failed.

    Attributes:
        code: CUDA's name of the error, such as `cudaErrorMemoryAllocation`.
    """

    def __init__(self, call: str, code: str) -> None:
        self.call, self.code = call, code
        advice = {
            "cudaErrorNoDevice": "there is no NVIDIA GPU here",
            "cudaErrorInsufficientDriver": "there is no NVIDIA driver here, or it is too old for "
            "this cuda-python",
            "cudaErrorMemoryAllocation": "the memory does not suffice; stop what else uses it",
        }.get(code)
        super().__init__(f"{call} failed with {code}" + (f": {advice}" if advice else ""))

    def __reduce__(self) -> tuple[type[CudaError], tuple[str, str]]:
        # It crosses from the process that builds to the one that asked.
        return CudaError, (self.call, self.code)


@dataclass(frozen=True)
class Device:
    """The GPU that engines are built for and run on.

    Attributes:
        name: The board's model where it has one, for all Orin modules call their GPU `Orin`; else
            the GPU's name.
        compute_capability: Such as `8.7`.
        multiprocessors: Streaming multiprocessors; on a Jetson the power mode changes the number.
        memory_bytes: Whole memory of the GPU, shared with the CPU if `integrated`.
        integrated: Whether CPU and GPU share one memory.
    """

    name: str
    compute_capability: str
    multiprocessors: int
    memory_bytes: int
    integrated: bool

    @property
    def slug(self) -> str:
        """The name as part of a folder's name."""
        words = "".join(c if c.isalnum() else " " for c in self.name.lower()).split()
        kept = [word for word in words if word not in {"nvidia", "developer", "kit", "reference"}]
        return "-".join(kept) or "gpu"

    def describe(self) -> str:
        """Return the device as one reads it in a message."""
        return (
            f"{self.name} (sm_{self.compute_capability.replace('.', '')}, {self.multiprocessors} "
            f"multiprocessors, {self.memory_bytes / 2**30:.1f} GiB)"
        )


class Cuda:
    """CUDA device 0 through cuda-python.

    Pointers are integers. Every method raises `CudaError` when the runtime reports one.
    """

    def __init__(self) -> None:
        """Find cuda-python and a GPU.

        Raises:
            EngineError: cuda-python is not installed.
            CudaError: There is no GPU or no driver.
        """
        self._rt: Any = _runtime_module()
        self._call("cudaGetDeviceCount")
        self._call("cudaSetDevice", 0)

    def _call(self, name: str, *arguments: Any) -> Any:
        status, *values = getattr(self._rt, name)(*arguments)
        if int(status) != 0:
            raise CudaError(name, status.name)
        return values[0] if len(values) == 1 else tuple(values)

    def _attribute(self, name: str) -> int:
        value = getattr(self._rt.cudaDeviceAttr, name)
        return int(self._call("cudaDeviceGetAttribute", value, 0))

    def device(self) -> Device:
        """Describe the GPU."""
        properties = self._call("cudaGetDeviceProperties", 0)
        name = properties.name
        gpu = name.decode().strip("\0 ") if isinstance(name, bytes) else str(name)
        integrated = bool(self._attribute("cudaDevAttrIntegrated"))
        if integrated and _BOARD_MODEL.is_file():
            gpu = _BOARD_MODEL.read_text(encoding="utf-8").strip("\0 \n") or gpu
        major = self._attribute("cudaDevAttrComputeCapabilityMajor")
        minor = self._attribute("cudaDevAttrComputeCapabilityMinor")
        return Device(
            name=gpu,
            compute_capability=f"{major}.{minor}",
            multiprocessors=self._attribute("cudaDevAttrMultiProcessorCount"),
            memory_bytes=self._call("cudaMemGetInfo")[1],
            integrated=integrated,
        )

    def free_bytes(self) -> int:
        """Return the memory that an engine can take.

        Where CPU and GPU share it, CUDA does not count what the kernel would give back (the page
        cache), so the kernel's own estimate is taken if it is larger.
        """
        free = int(self._call("cudaMemGetInfo")[0])
        if self._attribute("cudaDevAttrIntegrated"):
            return max(free, available_host_bytes() or 0)
        return free

    def allocate(self, size_bytes: int) -> int:
        """Allocate device memory."""
        return int(self._call("cudaMalloc", max(1, size_bytes)))

    def free(self, pointer: int) -> None:
        """Free device memory."""
        self._call("cudaFree", pointer)

    def allocate_host(self, size_bytes: int, *, mapped: bool) -> int:
        """Allocate page-locked host memory; `mapped` gives it an address on the GPU too."""
        flag = self._rt.cudaHostAllocMapped if mapped else self._rt.cudaHostAllocDefault
        return int(self._call("cudaHostAlloc", max(1, size_bytes), flag))

    def free_host(self, pointer: int) -> None:
        """Free page-locked host memory."""
        self._call("cudaFreeHost", pointer)

    def is_unknown(self, pointer: int) -> bool:
        """Whether CUDA neither allocated nor page-locked the memory at an address."""
        try:
            kind = self._call("cudaPointerGetAttributes", pointer).type
        except CudaError:
            self._rt.cudaGetLastError()  # or the next, unrelated call would report it
            return False
        return bool(kind == self._rt.cudaMemoryType.cudaMemoryTypeUnregistered)

    def device_address(self, host_pointer: int) -> int:
        """Return the GPU's address of mapped host memory."""
        return int(self._call("cudaHostGetDevicePointer", host_pointer, 0))

    def copy_to_device(self, target: int, source: int, size_bytes: int, stream: Any) -> None:
        """Copy from the host, asynchronously if the host memory is page-locked."""
        kind = self._rt.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", target, source, size_bytes, kind, stream)

    def upload(self, target: int, array: NDArray[Any]) -> None:
        """Copy a contiguous array to the device and wait for it."""
        kind = self._rt.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpy", target, array.ctypes.data, array.nbytes, kind)

    def copy_to_host(self, target: int, source: int, size_bytes: int, stream: Any) -> None:
        """Copy to the host, asynchronously if the host memory is page-locked."""
        kind = self._rt.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", target, source, size_bytes, kind, stream)

    def create_stream(self) -> Any:
        """Create a stream; `int()` of it is the handle that TensorRT takes."""
        return self._call("cudaStreamCreate")

    def destroy_stream(self, stream: Any) -> None:
        """Destroy a stream."""
        self._call("cudaStreamDestroy", stream)

    def synchronize(self, stream: Any) -> None:
        """Wait until the stream is done, and report what failed on it."""
        self._call("cudaStreamSynchronize", stream)

    def capture(self, stream: Any, work: Callable[[], None]) -> Any:
        """Record what `work` puts on a stream and return it as an executable graph.

        Raises:
            CudaError: Something in `work` cannot be captured. The stream can be used again.
            EngineError: `work` raised it.
        """
        mode = self._rt.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", stream, mode)
        try:
            work()
        except BaseException:
            self._rt.cudaStreamEndCapture(stream)
            self._rt.cudaGetLastError()
            raise
        try:
            graph = self._call("cudaStreamEndCapture", stream)
        except CudaError:
            self._rt.cudaGetLastError()  # or the next, unrelated call would report it
            raise
        try:
            return self._call("cudaGraphInstantiate", graph, 0)
        finally:
            self._call("cudaGraphDestroy", graph)

    def launch(self, graph: Any, stream: Any) -> None:
        """Put an executable graph on a stream."""
        self._call("cudaGraphLaunch", graph, stream)

    def destroy_graph(self, graph: Any) -> None:
        """Destroy an executable graph."""
        self._call("cudaGraphExecDestroy", graph)

    @contextmanager
    def timing(self, stream: Any) -> Iterator[list[float]]:
        """Time what the block puts on the stream: the list then holds milliseconds."""
        result: list[float] = []
        start, end = self._call("cudaEventCreate"), self._call("cudaEventCreate")
        try:
            self._call("cudaEventRecord", start, stream)
            yield result
            self._call("cudaEventRecord", end, stream)
            self._call("cudaEventSynchronize", end)
            result.append(float(self._call("cudaEventElapsedTime", start, end)))
        finally:
            self._call("cudaEventDestroy", start)
            self._call("cudaEventDestroy", end)

    def has_zero_copy(self) -> bool:
        """Whether the GPU reads and writes the CPU's memory in place, shown on one page.

        A discrete GPU can map host memory too, but reaches it over the bus: copying is faster
        there, so only integrated ones are asked.
        """
        if not (
            self._attribute("cudaDevAttrIntegrated")
            and self._attribute("cudaDevAttrCanMapHostMemory")
        ):
            return False
        pointer = self.allocate_host(_PROBE_BYTES, mapped=True)
        try:
            seen = host_view(pointer, (_PROBE_BYTES,), np.dtype(np.uint8))
            seen[:] = np.arange(_PROBE_BYTES, dtype=np.int64) % 251
            address = self.device_address(pointer)
            half = _PROBE_BYTES // 2
            self._call(
                "cudaMemcpy",
                address + half,
                address,
                half,
                self._rt.cudaMemcpyKind.cudaMemcpyDeviceToDevice,
            )
            self._call("cudaDeviceSynchronize")
            return bool((seen[half:] == seen[:half]).all())
        finally:
            self.free_host(pointer)


def host_view(pointer: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return an array over host memory that CUDA allocated; it does not own it."""
    count = int(np.prod(shape, dtype=np.int64))
    memory: Any = (ctypes.c_uint8 * (count * dtype.itemsize)).from_address(pointer)
    array: NDArray[Any] = np.frombuffer(memory, dtype, count).reshape(shape)
    return array


def available_host_bytes() -> int | None:
    """Return what the kernel could give without swapping, or None where it does not say."""
    if not _MEMORY_INFO.is_file():
        return None
    for line in _MEMORY_INFO.read_text(encoding="utf-8").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _runtime_module() -> Any:
    for name in _MODULES:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise EngineError(
        "TensorRT engines need cuda-python, which is not installed: pip install cuda-python "
        "('cuda-python<13' on JetPack 6)"
    )
