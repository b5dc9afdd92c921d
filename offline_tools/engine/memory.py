"""How much memory a build is going to take, and whether it is there.

Owns: the forecast. Must not import torch or TensorRT. It is what the libraries take by themselves
and the graph's files so and so many times, from the highest resident memory of builds on x86-64.
On the GPU the weights lie once more, which on a Jetson is the same memory. Nobody has measured a
Jetson: `--ignore-forecast` is for it, and each build prints its peak.

Strongly typed (TensorRT 10 and later, TensorRT-RTX): a build held the weights three times, parsed,
arranged for the chosen kernels and serialised; TensorRT-RTX took 6.9 GB for the 2.2 GB of a DiT of
true size. TensorRT 8.6 is another matter: it compiles most of a transformer as one region, on the
host, and the fewer bits the weights have, the more copies of them it holds (`_WEAKLY_TYPED`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from groot_int8_ros.errors import EngineError

DEVICE_COPIES = 1.0
# What a workspace without a limit is taken for: kernels for matrix products rarely ask for more.
USUAL_WORKSPACE_MB = 1024


@dataclass(frozen=True)
class _Host:
    """What the building process holds.

    Attributes:
        library_bytes: Whatever the graph.
        copies: Times that it holds the graph's files.
    """

    library_bytes: int
    copies: float


# The library's part is from TensorRT 8.6.1 on an H200: 3.2 GB for a graph of half a megabyte.
_STRONGLY_TYPED = _Host(3200 << 20, 3.0)
# From float weights in the place of int8 ones: what is parsed is four times as large.
_STRONGLY_TYPED_PAIRS = _Host(3200 << 20, 6.0)
# TensorRT 8.6.1 on an H100 took 4.0 to 4.8 GiB for graphs of 10 to 37 MB, of any precision. The
# copies keep the forecast above each recorded peak, by 1.6 times at most; a test has the peaks. Of
# FP32 no graph larger than 0.6 GB was built. INT8 weights are handed over as float.
_WEAK_LIBRARY_BYTES = 5000 << 20
_WEAKLY_TYPED = {"fp32": 3.0, "fp16": 10.0, "int8": 36.0}
# FP32 graphs that may be computed in FP16 or INT8: as many bytes a weight as FP16's; a guess.
_LOWERED_COPIES = 5.0


@dataclass(frozen=True)
class Forecast:
    """Memory of one build.

    Attributes:
        host_bytes: Peak of the building process.
        device_bytes: Peak on the GPU.
        shared: Whether both come out of one memory.
    """

    host_bytes: int
    device_bytes: int
    shared: bool

    def describe(self) -> str:
        """Return the forecast as one reads it."""
        if self.shared:
            return f"{_gib(self.host_bytes + self.device_bytes)} of shared memory"
        return f"{_gib(self.host_bytes)} of memory and {_gib(self.device_bytes)} on the GPU"

    def check(self, free_host_bytes: int | None, free_device_bytes: int, what: str) -> None:
        """Refuse to start what will not fit.

        Args:
            free_host_bytes: Memory that can be had; None if unknown.
            free_device_bytes: The same on the GPU; ignored where it is the same memory.
            what: What is built.

        Raises:
            EngineError: The forecast is larger.
        """
        if self.shared:
            pairs = [(self.host_bytes + self.device_bytes, free_device_bytes, "shared memory")]
        else:
            pairs = [(self.device_bytes, free_device_bytes, "GPU memory")]
            if free_host_bytes is not None:
                pairs.append((self.host_bytes, free_host_bytes, "memory"))
        for needed, free, kind in pairs:
            if needed > free:
                raise EngineError(
                    f"{what} is forecast to take {_gib(needed)} of {kind}, and {_gib(free)} are "
                    "free. Stop other processes (on a Jetson also the desktop: sudo systemctl "
                    "isolate multi-user.target), build with --low-memory or, with TensorRT 10 and "
                    "later, from an INT8 bundle, or try all the same with --ignore-forecast"
                )


def forecast(
    files: list[Path],
    *,
    graph_precision: str,
    precision: str,
    strongly_typed: bool,
    float_pairs: bool,
    workspace_mb: int | None,
    shared: bool,
) -> Forecast:
    """Forecast a build's memory.

    Args:
        files: The graph's file and its external data.
        graph_precision: Precision of the graph: `fp32`, `fp16` or `int8`.
        precision: What is asked for.
        strongly_typed: Whether the library can be strongly typed; 8.6 cannot.
        float_pairs: Whether INT8 weights are handed over as float.
        workspace_mb: The build's limit of the workspace, if it has one.
        shared: Whether CPU and GPU share one memory.
    """
    weights = sum(path.stat().st_size for path in files)
    workspace = (USUAL_WORKSPACE_MB if workspace_mb is None else workspace_mb) << 20
    if strongly_typed:
        host = _STRONGLY_TYPED_PAIRS if float_pairs else _STRONGLY_TYPED
    else:
        lowered = precision != graph_precision
        copies = _LOWERED_COPIES if lowered else _WEAKLY_TYPED[graph_precision]
        host = _Host(_WEAK_LIBRARY_BYTES, copies)
    return Forecast(
        host_bytes=int(host.copies * weights) + host.library_bytes,
        device_bytes=int(DEVICE_COPIES * weights) + workspace,
        shared=shared,
    )


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f} GiB"
