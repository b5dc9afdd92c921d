"""What can be checked without ROS: bundle, engine, memory, power mode, clock.

Owns: these checks. Must not import rclpy or torch; TensorRT and CUDA are asked for their versions
and the device alone, no engine is loaded.
"""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

from groot_int8_ros.errors import EngineError, GrootError
from groot_int8_ros.policy.bundle import Bundle, open_bundle
from groot_int8_ros.policy.engines import ENGINE_KINDS
from groot_int8_ros.policy.engines.cuda import Cuda, available_host_bytes
from groot_int8_ros.policy.engines.engine_report import (
    EnginesHere,
    advice,
    engines_here,
    read_engine_report,
    report_path,
)
from groot_int8_ros.policy.engines.tensorrt_engine import import_tensorrt
from groot_int8_ros.policy.engines.tensorrt_manifest import (
    ENGINE_SUFFIX,
    check_engine_fits,
)
from offline_tools.bags.dds import RANGE_VARIABLE, TRANSPORTS_VARIABLE
from offline_tools.doctor.findings import Finding, Level

# A board without a battery for its clock starts in the past.
_CLOCK_IS_SET_S = 1_735_689_600.0  # 2025-01-01
_GIB = 2**30


def examine_clock() -> Finding:
    """Check that the machine's clock was set since it was switched on."""
    now_s = time.time()
    date = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now_s))
    if now_s < _CLOCK_IS_SET_S:
        return Finding(
            Level.FAULT,
            "system clock",
            f"it is {date}, which cannot be",
            "set it (timedatectl, chrony): a jump while the robot runs drops observations",
        )
    return Finding(Level.OK, "system clock", date)


def examine_middleware() -> Finding:
    """Check the variables that decide whether large images come whole, as they are set here."""
    transports, reach = (os.environ.get(name) for name in (TRANSPORTS_VARIABLE, RANGE_VARIABLE))
    middleware = os.environ.get("RMW_IMPLEMENTATION", "rmw_fastrtps_cpp")
    if middleware != "rmw_fastrtps_cpp":
        return Finding(Level.OK, "middleware", f"{middleware}, of which nothing is known here")
    if transports and reach == "LOCALHOST":
        return Finding(
            Level.WARNING,
            "middleware",
            f"{RANGE_VARIABLE} is LOCALHOST, so {TRANSPORTS_VARIABLE} has no effect",
            f"unset {RANGE_VARIABLE} for the node and the drivers (docs/dds.md)",
        )
    if not transports:
        return Finding(
            Level.WARNING,
            "middleware",
            f"{TRANSPORTS_VARIABLE} is not set here: several raw cameras would lose most frames",
            "set it for the node and the drivers, as config/policy.yaml says",
        )
    return Finding(Level.OK, "middleware", f"{TRANSPORTS_VARIABLE} is {transports}")


def examine_bundle(
    folder: Path | None, *, verify_hashes: bool
) -> tuple[Bundle | None, list[Finding]]:
    """Open the bundle as the node does.

    Args:
        folder: The bundle, or None where nobody named one.
        verify_hashes: See `open_bundle`.

    Returns:
        The bundle if it is whole, and what was found.
    """
    if folder is None:
        return None, [
            Finding(
                Level.UNCHECKED,
                "bundle",
                "none is named, so frames, joints and engine cannot be compared with it",
                "give --bundle, or --params-file with the parameter 'bundle'",
            )
        ]
    try:
        bundle = open_bundle(folder, verify_hashes=verify_hashes)
    except GrootError as error:
        return None, [Finding(Level.FAULT, "bundle", str(error))]
    manifest = bundle.manifest
    how = "every hash is right" if verify_hashes else "sizes are right, hashes were not read"
    findings = [
        Finding(
            Level.OK,
            "bundle",
            f"{folder}: {manifest.family} graphs, {manifest.embodiment}, {how}",
        )
    ]
    findings += [Finding(Level.WARNING, "bundle", note) for note in manifest.notes]
    return bundle, findings


def examine_engine(
    bundle: Bundle, kind: str, *, verify_hashes: bool, is_loaded: bool = False
) -> list[Finding]:
    """Check that the engine that the node will load is there and belongs here.

    Args:
        bundle: The bundle.
        kind: The node's parameter `engine`.
        verify_hashes: Read the engines and compare their hashes.
        is_loaded: Whether a running node holds the engines already; what is free then need not
            suffice for another.
    """
    if kind not in ENGINE_KINDS:
        return [
            Finding(
                Level.FAULT,
                "engine",
                f"unknown engine {kind!r}",
                f"set the parameter 'engine' to one of {', '.join(ENGINE_KINDS)}",
            )
        ]
    if kind == "onnxruntime":
        return [_onnxruntime(), _memory(_graph_bytes(bundle), "the graphs' weights", is_loaded)]
    try:
        trt, cuda = import_tensorrt(), Cuda()
        device = cuda.device()
        here = engines_here(bundle)
        for name, manifest in here.manifests.items():
            check_engine_fits(
                manifest,
                here.folder / (bundle.graph_path(name).stem + ENGINE_SUFFIX),
                bundle.folder,
                library_version=str(trt.__version__),
                device=device,
                recorded_sha256={file: sha for file, (sha, _) in bundle.manifest.files.items()},
                verify_hash=verify_hashes,
            )
    except EngineError as error:
        return [Finding(Level.FAULT, "engine", str(error))]
    needed = sum(one.engine_bytes + one.device_memory_bytes for one in here.manifests.values())
    what = f"TensorRT {trt.__version__}, {device.describe()}: {len(here.manifests)} engines fit"
    return [
        Finding(Level.OK, "engine", what),
        examine_answers(bundle.folder, here),
        _memory(needed, "weights and activations", is_loaded, cuda.free_bytes()),
    ]


def examine_answers(bundle: Path, here: EnginesHere) -> Finding:
    """Say whether these engines were compared with their graphs, and what came of it.

    Args:
        bundle: The bundle's folder.
        here: Its engines for this device.
    """
    try:
        report = read_engine_report(report_path(bundle, here.folder))
    except EngineError as error:
        # The policy refuses them for it.
        return Finding(Level.FAULT, "answers", str(error))
    if report is None or report.engines != here.hashes:
        return Finding(
            Level.WARNING,
            "answers",
            "these engines were never compared with their graphs"
            if report is None
            else "the engines were built again since they were compared with their graphs",
            f"a builder can be wrong without a word: groot-int8 verify-engines --bundle {bundle}",
        )
    level = Level.OK if report.passed else Level.FAULT
    what = f"the engines' actions are {report.error}"
    return Finding(level, "answers", what, "" if report.passed else advice(bundle, here))


def _onnxruntime() -> Finding:
    try:
        from groot_int8_ros.policy.engines.onnxruntime_engine import VERSION
    except EngineError as error:
        return Finding(Level.FAULT, "engine", str(error))
    return Finding(Level.OK, "engine", f"ONNX Runtime {VERSION}, on the CPU")


def _graph_bytes(bundle: Bundle) -> int:
    # The graphs that an engine runs, with their external data.
    names = {bundle.manifest.graphs[name].file for name in bundle.manifest.engine_graphs}
    return sum(
        size
        for file, (_, size) in bundle.manifest.files.items()
        if file in names or file.removesuffix(".data") in names
    )


def _memory(needed: int, what: str, is_loaded: bool, free: int | None = None) -> Finding:
    free = available_host_bytes() if free is None else free
    if free is None:
        return Finding(Level.UNCHECKED, "memory", "the kernel does not say what is free")
    text = f"{needed / _GIB:.2f} GiB for {what}, {free / _GIB:.2f} GiB free"
    if is_loaded:
        return Finding(Level.OK, "memory", f"{text} beside the node, which has loaded them")
    if needed > free:
        return Finding(
            Level.FAULT,
            "memory",
            text,
            "stop other processes (on a Jetson also the desktop: sudo systemctl isolate "
            "multi-user.target), or use an INT8 bundle",
        )
    return Finding(Level.OK, "memory", text)


def examine_power(root: Path = Path("/")) -> Finding:
    """Say which power mode a Jetson is in, from the files that `nvpmodel` keeps.

    Args:
        root: Where the filesystem begins; another one in tests.
    """
    if not (root / "etc/nv_tegra_release").is_file():
        return Finding(Level.OK, "power mode", "this is no Jetson")
    try:
        status = (root / "var/lib/nvpmodel/status").read_text(encoding="utf-8")
        modes = _power_modes((root / "etc/nvpmodel.conf").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        status, modes = "", {}
    number = re.search(r"pmode:(\d+)", status)
    if number is None or int(number[1]) not in modes:
        return Finding(
            Level.UNCHECKED,
            "power mode",
            "the files of nvpmodel do not say",
            "ask it: sudo nvpmodel -q",
        )
    name, frequency = modes[int(number[1])]
    fastest = max(modes, key=lambda number: modes[number][1])
    if frequency < modes[fastest][1]:
        return Finding(
            Level.WARNING,
            "power mode",
            f"{name}, whose GPU clock is lower than {modes[fastest][0]}'s",
            f"sudo nvpmodel -m {fastest} and build the engines again, for the mode changes the "
            "GPU they are made for",
        )
    return Finding(Level.OK, "power mode", name)


def _power_modes(configuration: str) -> dict[int, tuple[str, float]]:
    # Number to name and the GPU's clock limit, of which -1 says that there is none.
    modes = {}
    blocks = re.split(r"^< *POWER_MODEL +", configuration, flags=re.MULTILINE)[1:]
    for block in blocks:
        head = re.match(r"ID=(\d+) +NAME=(\S+)", block)
        if head is None:
            continue
        body = re.split(r"^<", block, maxsplit=1, flags=re.MULTILINE)[0]
        limit = re.search(r"^GPU +MAX_FREQ +(-?\d+)", body, re.MULTILINE)
        hertz = float(limit[1]) if limit else 0.0
        modes[int(head[1])] = (head[2], float("inf") if hertz < 0 else hertz)
    return modes
