"""How much memory a build is going to take, and whether it is there.

Owns: the forecast. Must not import torch or TensorRT. The factors come from measurements on
x86-64: a build held the weights three times (parsed, arranged for the chosen kernels, serialised;
TensorRT-RTX took 6.9 GB for the 2.2 GB of a DiT of true size) beside what the libraries take by
themselves, and once more on the GPU, which on a Jetson is the same memory. Nobody here has
measured a Jetson: `--ignore-forecast` is for it, and each build prints its peak.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from groot_int8_ros.errors import EngineError

HOST_COPIES = 3.0
DEVICE_COPIES = 1.0
# TensorRT 8.6.1 on an H200 held 3.2 GB (4.0 GiB at the peak) for a graph of half a megabyte.
LIBRARY_BYTES = 3200 << 20
# What a workspace without a limit is taken for: kernels for matrix products rarely ask for more.
USUAL_WORKSPACE_MB = 1024
FLOAT_PAIR_GROWTH = 4  # an int8 weight as float32


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
                    "isolate multi-user.target), build with --low-memory or from an INT8 bundle, "
                    "or try all the same with --ignore-forecast"
                )


def forecast(
    files: list[Path], *, workspace_mb: int | None, float_pairs: bool, shared: bool
) -> Forecast:
    """Forecast a build's memory.

    Args:
        files: The graph's file and its external data.
        workspace_mb: The build's limit of the workspace, if it has one.
        float_pairs: Whether INT8 weights are handed over as float.
        shared: Whether CPU and GPU share one memory.
    """
    weights = sum(path.stat().st_size for path in files)
    parsed = weights * (FLOAT_PAIR_GROWTH if float_pairs else 1)
    workspace = (USUAL_WORKSPACE_MB if workspace_mb is None else workspace_mb) << 20
    return Forecast(
        host_bytes=int(parsed + (HOST_COPIES - 1) * weights) + LIBRARY_BYTES,
        device_bytes=int(DEVICE_COPIES * weights) + workspace,
        shared=shared,
    )


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f} GiB"
