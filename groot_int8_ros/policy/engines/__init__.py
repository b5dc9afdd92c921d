"""Inference engines behind one small interface; see `base.Engine`."""

from __future__ import annotations

from pathlib import Path

from groot_int8_ros.errors import EngineError
from groot_int8_ros.policy.engines.base import Engine, Tensors, TensorSpec

ENGINE_KINDS = ("onnxruntime", "tensorrt")

__all__ = ["ENGINE_KINDS", "Engine", "TensorSpec", "Tensors", "load_engine"]


def load_engine(
    kind: str,
    graph: Path,
    *,
    threads: int | None = None,
    verify_hashes: bool = True,
    int8_kernels: bool = False,
) -> Engine:
    """Load one graph of a bundle.

    Args:
        kind: One of `ENGINE_KINDS`.
        graph: The graph's `.onnx` file.
        threads: CPU threads inside an operator of ONNX Runtime; its choice if None.
        verify_hashes: Compare the hash of a TensorRT engine before it is loaded. The graph itself
            is checked by `open_bundle`.
        int8_kernels: Let ONNX Runtime use its int8 kernels; see `session_options`. TensorRT
            always does.

    Raises:
        EngineError: The kind is unknown, its library is missing, or the graph does not load.
    """
    if kind not in ENGINE_KINDS:
        raise EngineError(f"unknown engine {kind!r}; choose one of {', '.join(ENGINE_KINDS)}")
    if kind == "tensorrt":
        from groot_int8_ros.policy.engines.tensorrt_engine import TensorRTEngine

        return TensorRTEngine(graph, verify_hash=verify_hashes)
    from groot_int8_ros.policy.engines.onnxruntime_engine import OnnxRuntimeEngine

    return OnnxRuntimeEngine(graph, threads=threads, int8_kernels=int8_kernels)
