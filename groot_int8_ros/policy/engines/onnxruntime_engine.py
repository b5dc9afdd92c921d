"""ONNX Runtime on the CPU: the embedded default engine, and the yardstick for every other.

Owns: `OnnxRuntimeEngine`, `session_options`, and the `EngineError` that importing this module
raises where ONNX Runtime is not installed or does not load. Must not import TensorRT or torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from groot_int8_ros.errors import EngineError
from groot_int8_ros.policy.engines.base import Tensors, TensorSpec, checked_feeds

try:
    import onnxruntime as ort
except ImportError as error:
    raise EngineError(
        f"ONNX Runtime cannot be imported ({error}): pip install onnxruntime"
    ) from error

VERSION = str(ort.__version__)

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(uint8)": "uint8",
    "tensor(int8)": "int8",
    "tensor(bool)": "bool",
}


def session_options(
    *,
    threads: int | None = None,
    keep_graph_as_written: bool = False,
    int8_kernels: bool = False,
) -> ort.SessionOptions:
    """Return options under which a graph's result does not depend on the CPU.

    Args:
        threads: Threads used inside an operator; ONNX Runtime's choice if None.
        keep_graph_as_written: Use as little memory as possible: nothing is folded, fused or
            packed, which would copy weights; weights stay in the mapped file and are cast or
            dequantised one at a time, just before they are used. A true-size backbone in half
            precision peaks at 2.7 GB this way, below the size of its file.
        int8_kernels: Fuse Q/DQ nodes into int8 products, for timing them. The result then does
            depend on the CPU: without VNNI or AMX their sums saturate.
    """
    options = ort.SessionOptions()
    # The runtime's own log goes to stderr line by line; what matters reaches the user as an
    # EngineError.
    options.log_severity_level = 3
    # Fused int8 kernels saturate on CPUs without VNNI, so the result would depend on the CPU. A
    # yardstick computes what the Q/DQ nodes say, everywhere.
    options.add_session_config_entry("session.disable_quant_qdq", "0" if int8_kernels else "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    if keep_graph_as_written:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        # Prepacking copies every weight; without it they stay in the mapped file.
        options.add_session_config_entry("session.disable_prepacking", "1")
        # The arena keeps what it once took, and the default order casts all weights at the start.
        options.enable_cpu_mem_arena = False
        options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    return options


class OnnxRuntimeEngine:
    """One ONNX graph in one ONNX Runtime session."""

    def __init__(
        self,
        path: Path,
        *,
        threads: int | None = None,
        keep_graph_as_written: bool = False,
        int8_kernels: bool = False,
        profile: Path | None = None,
    ) -> None:
        """Load a graph.

        Args:
            path: The `.onnx` file; its external data lie beside it.
            threads: Threads used inside an operator; ONNX Runtime's choice if None.
            keep_graph_as_written: See `session_options`.
            int8_kernels: See `session_options`.
            profile: Where ONNX Runtime writes the time of every kernel, without the ending that
                it adds; see `end_profile`. Nowhere if None.

        Raises:
            EngineError: ONNX Runtime cannot load the file.
        """
        options = session_options(
            threads=threads,
            keep_graph_as_written=keep_graph_as_written,
            int8_kernels=int8_kernels,
        )
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile)
        try:
            self._session: ort.InferenceSession | None = ort.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise EngineError(
                f"ONNX Runtime cannot load {path}: {_first_line(error)}. Export the bundle again."
            ) from error
        self._path = path
        self._inputs = {node.name: _spec(node) for node in self._session.get_inputs()}
        self._outputs = {node.name: _spec(node) for node in self._session.get_outputs()}

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """Specs by input name."""
        return self._inputs

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        """Specs by output name."""
        return self._outputs

    @property
    def remarks(self) -> Sequence[str]:
        """Nothing: it runs as it was asked to, or does not load."""
        return ()

    def run(self, feeds: Tensors) -> dict[str, NDArray[Any]]:
        """Run the graph once; see `Engine.run`."""
        if self._session is None:
            raise RuntimeError(f"{self._path.name} was closed")
        checked = checked_feeds(self._path.name, self._inputs, feeds)
        try:
            values = self._session.run(list(self._outputs), checked)
        except Exception as error:
            raise EngineError(f"{self._path.name} failed: {_first_line(error)}") from error
        return dict(zip(self._outputs, values, strict=True))

    def end_profile(self) -> Path:
        """Stop the profiler that `profile` asked for and return its file: JSON events."""
        if self._session is None:
            raise RuntimeError(f"{self._path.name} was closed")
        return Path(self._session.end_profiling())

    def close(self) -> None:
        """Release the session."""
        self._session = None


def _spec(node: Any) -> TensorSpec:
    dtype = _DTYPES.get(node.type)
    if dtype is None:
        raise EngineError(f"tensor {node.name} has the type {node.type}, which is not supported")
    shape = tuple(axis if isinstance(axis, int) else str(axis) for axis in node.shape)
    return TensorSpec(dtype=dtype, shape=shape)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]
