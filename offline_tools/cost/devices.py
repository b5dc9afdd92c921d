"""Devices that GR00T's latency was published for or is asked for: what they could do at best.

Owns: the table and how a device and its mode are named. Must not import torch.

Peaks are those of dense tensor-core products with FP16 operands and float32 accumulation, and with
INT8 operands. NVIDIA prints sparse ones for the Jetsons, twice as much, and adds the accelerators
(DLA) that no transformer runs on; so they are computed here from the number of multiprocessors and
the clock: an Orin multiprocessor does 2048 FP16 and 4096 INT8 operations a cycle (AGX Orin: 16 of
them at 1.3 GHz are 85 dense INT8 TOPS of NVIDIA's 170 sparse, Jetson AGX Orin Technical Brief;
Orin Nano at 1.02 GHz: 33 of its 67 sparse, data sheet of the Super kit).
"""

from __future__ import annotations

from dataclasses import dataclass

from groot_int8_ros.errors import ConfigurationError

_ORIN_FP16_PER_CYCLE = 2048


@dataclass(frozen=True)
class Device:
    """One device in one mode.

    Attributes:
        name: Name and mode.
        fp16_flops: Dense FP16 operations a second.
        int8_ops: Dense INT8 operations a second.
        bytes_per_s: Memory bandwidth.
    """

    name: str
    fp16_flops: float
    int8_ops: float
    bytes_per_s: float


def _orin(name: str, multiprocessors: int, clock_hz: float, bytes_per_s: float) -> Device:
    flops = multiprocessors * clock_hz * _ORIN_FP16_PER_CYCLE
    return Device(name, flops, 2 * flops, bytes_per_s)


# By the name a user gives: the device, then its modes, the first of which is the default.
DEVICES: dict[str, dict[str, Device]] = {
    # 8 multiprocessors, 128-bit LPDDR5 at 3200 MHz: 102.4 GB/s (data sheet DS-10712-001). Clocks
    # of the modes: nvpmodel_p3767_0000_super.conf of JetPack 6.2 (LineageOS/
    # android_device_nvidia_concord has it, commit 370b63a): 40W and MAXN_SUPER 1173 MHz, 25W
    # 408 MHz, 15W and 10W 612 MHz with half of the multiprocessors (TPC_PG_MASK 252 where the
    # others have 240), 10W with the memory at 2133 MHz. MAXN before JetPack 6.2: 918 MHz (data
    # sheet). JetPack 6.2 boots a module into 40W.
    "orin-nx-16gb": {
        "40W": _orin("Orin NX 16 GB, 40W", 8, 1.173e9, 102.4e9),
        "MAXN_SUPER": _orin("Orin NX 16 GB, MAXN_SUPER", 8, 1.173e9, 102.4e9),
        "MAXN": _orin("Orin NX 16 GB, MAXN (before JetPack 6.2)", 8, 0.918e9, 102.4e9),
        "25W": _orin("Orin NX 16 GB, 25W", 8, 0.408e9, 102.4e9),
        "15W": _orin("Orin NX 16 GB, 15W", 4, 0.612e9, 102.4e9),
        "10W": _orin("Orin NX 16 GB, 10W", 4, 0.612e9, 68.3e9),
    },
    # 8 multiprocessors at 1020 MHz, 102 GB/s (data sheet of the Super kit); before JetPack 6.2
    # 625 MHz and 68 GB/s. The 25W mode clocks 918 MHz (nvpmodel_p3767_0003_super.conf).
    "orin-nano-8gb": {
        "MAXN_SUPER": _orin("Orin Nano 8 GB, MAXN_SUPER", 8, 1.02e9, 102.4e9),
        "25W": _orin("Orin Nano 8 GB, 25W", 8, 0.918e9, 102.4e9),
        "15W": _orin("Orin Nano 8 GB, 15W (before JetPack 6.2)", 8, 0.625e9, 68.3e9),
    },
    # 16 multiprocessors at 1.3 GHz, 204.8 GB/s (Jetson AGX Orin Technical Brief).
    "agx-orin": {"MAXN": _orin("AGX Orin 64 GB, MAXN", 16, 1.3e9, 204.8e9)},
    # 2070 sparse FP4 TFLOPS and 273 GB/s (data sheet): an eighth is dense FP16, a quarter FP8.
    # INT8 is taken to run as FP8 does; NVIDIA prints no figure for it.
    "thor": {"MAXN": Device("Thor (T5000), MAXN", 258.8e12, 517.5e12, 273e9)},
    # NVIDIA's data sheets: H100 SXM; RTX 4090 and 5090 with float32 accumulation.
    "h100": {"SXM": Device("H100 SXM", 989.4e12, 1978.9e12, 3352e9)},
    "rtx-4090": {"desktop": Device("RTX 4090", 165.2e12, 660.6e12, 1008e9)},
    "rtx-5090": {"desktop": Device("RTX 5090", 209.5e12, 838.0e12, 1792e9)},
}


def find_device(name: str, mode: str | None = None) -> Device:
    """Return a device in a mode, its default one if None.

    Raises:
        ConfigurationError: There is none of that name, or no such mode.
    """
    modes = DEVICES.get(name)
    if modes is None:
        raise ConfigurationError(f"no device {name!r}; known are {', '.join(DEVICES)}")
    if mode is None:
        return next(iter(modes.values()))
    if mode not in modes:
        raise ConfigurationError(f"{name} has no mode {mode!r}; known are {', '.join(modes)}")
    return modes[mode]
