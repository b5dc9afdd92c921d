"""Stages of the model in PyTorch on a GPU, each captured as a CUDA graph and replayed in turns.

Owns: making a stage's modules with random weights, capturing and timing them. Weights and inputs
are random: nothing in the arithmetic depends on them, and nobody here has the released ones.

It answers what a rewritten graph buys on a GPU where TensorRT is not at hand: both families run
the same library's kernels, without launch gaps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from groot_int8_ros.errors import EngineError
from offline_tools.cost.work import GraphWork, observation, total
from offline_tools.export.deployed_stages import StageGraph
from offline_tools.export.graph import GraphInput, GraphSpec
from offline_tools.model.deployed.constants import fill_constants

_WARM_UP = 3
_WEIGHT_SIZE = 0.02
_COPY_BYTES = 1 << 30
_MATRIX_SIDE = 8192


@dataclass(frozen=True)
class Ceilings:
    """What this GPU reaches at best, measured.

    Attributes:
        bytes_per_s: Of a large copy on the device, bytes read plus bytes written.
        flops_per_s: Of a large matrix product in half precision.
    """

    bytes_per_s: float
    flops_per_s: float

    def floor_s(self, graphs: Iterable[GraphWork]) -> float:
        """Return the time below which one observation's work cannot be on this GPU.

        All products at the measured peak, or all reads of weights at the measured bandwidth,
        whichever is longer. A weight counts at every launch of every run that multiplies by it,
        as in `groot-int8 cost`, and not once an observation: before a denoising step reads a
        weight of the DiT again, it has read all others, more than 1.6 GB at the public sizes, and
        no GPU's cache holds these (50 MB on an H100). Of a model that fits the cache it would be
        no floor. Left out, which only lowers it: activations, biases, norms, embedding tables and
        the embodiment's rows that the reference graphs gather.

        Args:
            graphs: What `count_stage` found in the graphs that are timed.
        """
        work = total(observation(graphs))
        return max(work.weight_bytes / self.bytes_per_s, work.flops / self.flops_per_s)


@dataclass(frozen=True, eq=False)
class Captured:
    """One part of a stage, ready to be replayed.

    Attributes:
        graph: The CUDA graph of one observation's runs.
        owners: Modules and inputs: the graph reads their memory and does not keep it.
    """

    graph: torch.cuda.CUDAGraph
    owners: Sequence[object]


def require_gpu() -> torch.device:
    """Return the GPU.

    Raises:
        EngineError: There is none.
    """
    if not torch.cuda.is_available():
        raise EngineError(
            "PyTorch sees no GPU here, and this command times nothing else. On a CPU use "
            "groot-int8 benchmark with exported bundles."
        )
    return torch.device("cuda")


def measure_ceilings(device: torch.device) -> Ceilings:
    """Measure a large copy and a large matrix product."""
    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_s = _best_s(lambda: target.copy_(source))
    a, b = (
        torch.randn(_MATRIX_SIDE, _MATRIX_SIDE, dtype=torch.float16, device=device)
        for _ in range(2)
    )
    product_s = _best_s(lambda: torch.matmul(a, b))
    return Ceilings(2 * _COPY_BYTES / copy_s, 2 * _MATRIX_SIDE**3 / product_s)


def capture(graphs: Sequence[StageGraph], device: torch.device, *, compiled: bool) -> Captured:
    """Build graphs with random weights and capture one observation's runs of them.

    Args:
        graphs: Run one after the other, each `runs` times.
        device: A GPU.
        compiled: Let torch.compile fuse each module first.

    Raises:
        EngineError: The device's memory does not suffice.
    """
    try:
        made = [(make_module(graph.spec, device), graph) for graph in graphs]
    except torch.OutOfMemoryError as error:
        raise EngineError(f"the model does not fit this GPU: {error}") from error
    inputs = [make_inputs(graph.spec, device) for graph in graphs]
    modules = [
        (torch.compile(module, fullgraph=True) if compiled else module, graph.runs)
        for module, graph in made
    ]

    def run() -> None:
        with torch.no_grad():
            for (module, runs), given in zip(modules, inputs, strict=True):
                for _ in range(runs):
                    module(*given)

    make_stream: Any = torch.cuda.Stream  # which PyTorch does not annotate
    side = make_stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(side)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        run()
    return Captured(recorded, (modules, inputs))


def time_interleaved(
    parts: Mapping[str, Captured], *, rounds: int, warmup: int
) -> dict[str, list[float]]:
    """Replay parts in turns.

    Returns:
        Part to its time in each counted round, milliseconds.
    """
    times: dict[str, list[float]] = {name: [] for name in parts}
    for number in range(warmup + rounds):
        for name, part in parts.items():
            taken_ms = _time_ms(part.graph.replay)
            if number >= warmup:
                times[name].append(taken_ms)
    return times


def make_module(spec: GraphSpec, device: torch.device) -> nn.Module:
    """Build a graph's module with random weights of its type."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(spec.dtype)
    try:
        with torch.device(device), no_init_weights():
            module = spec.build()
    finally:
        torch.set_default_dtype(previous)
    fill_constants(module)
    module.to(device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, tensor in module.named_parameters():
            if tensor.ndim == 1 and name.endswith("weight"):
                tensor.fill_(1.0)  # a norm's
            else:
                tensor.normal_(0.0, _WEIGHT_SIZE, generator=generator)
    return module.requires_grad_(False).eval()


def make_inputs(spec: GraphSpec, device: torch.device) -> list[Tensor]:
    """Make random inputs of a graph of fixed shapes."""
    return [_input(value, device) for value in spec.inputs.values()]


def _input(value: GraphInput, device: torch.device) -> Tensor:
    shape = [axis if isinstance(axis, int) else 1 for axis in value.shape]
    if value.dtype == torch.bool:
        # Every second place: neither kind of token is missing.
        return torch.arange(shape[-1], device=device).remainder(2).bool().expand(shape).clone()
    if value.dtype == torch.uint8:
        return torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    if value.dtype.is_floating_point:
        return torch.randn(shape, dtype=value.dtype, device=device)
    return torch.ones(shape, dtype=value.dtype, device=device)


def _best_s(work: Callable[[], object]) -> float:
    return min(_time_ms(work) for _ in range(10)) / 1e3


def _time_ms(work: Callable[[], object]) -> float:
    # Typed loosely: PyTorch does not annotate its events.
    event: Any = torch.cuda.Event
    start, end = event(enable_timing=True), event(enable_timing=True)
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))
