"""What the kernels of a bundle's graphs spend their time on, by ONNX Runtime's own profiler.

Owns: the runs under the profiler and how its events are sorted into kinds. Must not import torch.

The profiler names a kernel after the node that it came from, and a fused kernel after the first
one, with a suffix. It does not say which operands are constant: a weight that was packed is not
among the inputs that it lists. So that is read from the graph's file.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from groot_int8_ros.errors import EngineError
from groot_int8_ros.policy.bundle import Bundle
from groot_int8_ros.policy.engines.base import Tensors
from groot_int8_ros.policy.policy import Policy
from groot_int8_ros.policy.types import Float32Array, Observation

WEIGHT_PRODUCTS = "products with weights"
ACTIVATION_PRODUCTS = "products of activations"
NORMS = "softmax, norms"
OTHER = "other"
KINDS = (WEIGHT_PRODUCTS, ACTIVATION_PRODUCTS, NORMS, OTHER)

# One more goes before them, which touches the weights for the first time. The quickest is
# reported, for other work on the machine can only slow one down.
_ANSWERS = 5

# Parts of operators' names, those of ONNX Runtime's fused and quantised kernels included.
_PRODUCTS = ("MatMul", "Gemm", "Conv")
_NORMS = ("Softmax", "Normalization", "ReduceMean")
# Between a stored weight and the product that reads it.
_TRANSPARENT = (
    "Cast",
    "DequantizeLinear",
    "Gather",
    "Identity",
    "QuantizeLinear",
    "Reshape",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
)
_SUFFIX = "_kernel_time"

GraphRuns = Mapping[str, Sequence[Tensors]]


@dataclass(frozen=True)
class GraphProfile:
    """Kernel time of one graph, for one observation: the quickest of several answers to it.

    Attributes:
        graph: Name of the graph.
        runs: How often an observation runs it.
        kernel_ms: Each of `KINDS` to its time, summed over the runs.
        weight_gflop: Operations of the products with weights, 10^9, summed over the runs.
    """

    graph: str
    runs: int
    kernel_ms: Mapping[str, float]
    weight_gflop: float


def record_runs(policy: Policy, observation: Observation, noise: Float32Array) -> GraphRuns:
    """Answer one observation and return what each graph was fed, in the order of its runs.

    Args:
        policy: The policy.
        observation: What is answered.
        noise: float32, of the policy's `noise_shape`.
    """
    runs: dict[str, list[Tensors]] = {}

    def keep(graph: str, feeds: Tensors) -> None:
        runs.setdefault(graph, []).append({name: np.array(x) for name, x in feeds.items()})

    with policy.observed(keep):
        policy.infer(observation, noise=noise)
    return runs


def profile_bundle(
    bundle: Bundle, runs: GraphRuns, *, threads: int | None, int8_kernels: bool
) -> list[GraphProfile]:
    """Run a bundle's graphs under the profiler, one loaded at a time.

    Args:
        bundle: The bundle.
        runs: What `record_runs` gave for it.
        threads: CPU threads inside an operator; the engine's choice if None.
        int8_kernels: See `session_options`.

    Returns:
        A profile for each graph of `runs`.

    Raises:
        EngineError: A graph cannot be run, or a product in the profile is no node of the graph.
    """
    return [
        profile_graph(
            bundle.graph_path(name), name, feeds, threads=threads, int8_kernels=int8_kernels
        )
        for name, feeds in runs.items()
    ]


def profile_graph(
    path: Path, name: str, feeds: Sequence[Tensors], *, threads: int | None, int8_kernels: bool
) -> GraphProfile:
    """Run one graph under the profiler.

    Args:
        path: The `.onnx` file.
        name: Name of the graph.
        feeds: Inputs of each of an observation's runs.
        threads: See `profile_bundle`.
        int8_kernels: See `profile_bundle`.

    Raises:
        EngineError: See `profile_bundle`.
    """
    # Only here: without ONNX Runtime, importing it raises.
    from groot_int8_ros.policy.engines.onnxruntime_engine import OnnxRuntimeEngine

    with tempfile.TemporaryDirectory() as scratch:
        engine = OnnxRuntimeEngine(
            path, threads=threads, int8_kernels=int8_kernels, profile=Path(scratch) / name
        )
        for one in [*feeds] * (1 + _ANSWERS):
            engine.run(one)
        events = json.loads(engine.end_profile().read_text(encoding="utf-8"))
        engine.close()
    weights = _weights(path)
    answers = [dict.fromkeys(KINDS, 0.0) for _ in range(1 + _ANSWERS)]
    flops = 0
    finished = 0
    for event in events:
        if event["cat"] == "Session" and event["name"] == "model_run":
            finished += 1
        if event["cat"] == "Node":
            kind, operations = _classified(event, weights, path)
            answers[finished // len(feeds)][kind] += 1e-3 * event["dur"]
            flops += operations
    quickest = min(answers[1:], key=lambda kernel_ms: sum(kernel_ms.values()))
    return GraphProfile(name, len(feeds), quickest, 1e-9 * flops / len(answers))


def _classified(
    event: Mapping[str, Any], weights: Mapping[str, tuple[int, ...] | None], path: Path
) -> tuple[str, int]:
    """Return a kernel's kind and, of a product with a weight, its operations."""
    operator: str = event["args"]["op_name"]
    if not any(part in operator for part in _PRODUCTS):
        return (NORMS if any(part in operator for part in _NORMS) else OTHER), 0
    name = event["name"].removesuffix(_SUFFIX)
    nodes = [node for node in ((name,) if name in weights else weights) if name.startswith(node)]
    if not nodes:
        raise EngineError(
            f"the profile of {path} has a product {name}, and the graph no node of that name: "
            "this version of ONNX Runtime names its fused kernels otherwise. Leave out --profile"
        )
    weight = weights[max(nodes, key=len)]
    if weight is None:
        return ACTIVATION_PRODUCTS, 0
    given, written = (
        next(iter(event["args"][side][0].values()))
        for side in ("input_type_shape", "output_type_shape")
    )
    inner = math.prod(weight[1:]) if "Conv" in operator else given[-1]
    return WEIGHT_PRODUCTS, 2 * math.prod(written) * inner


def _weights(path: Path) -> dict[str, tuple[int, ...] | None]:
    """Return the shape of each product's constant operand, None where it has none, by node."""
    import onnx  # Only here: a robot that profiles nothing needs none.

    graph = onnx.load(path, load_external_data=False).graph
    stored = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    producers = {name: node for node in graph.node for name in node.output}

    def traced(name: str) -> tuple[int, ...] | None:
        while name not in stored:
            node = producers.get(name)
            if node is None or node.op_type not in _TRANSPARENT:
                return None
            name = node.input[0]
        return stored[name]

    found: dict[str, tuple[int, ...] | None] = {}
    for node in graph.node:
        if node.op_type in _PRODUCTS:
            right = traced(node.input[1])
            found[node.name] = traced(node.input[0]) if right is None else right
    return found
