"""`groot-int8 benchmark-node`: the node's own cost, from a camera's message to the engine's input.

Owns: the subcommand: it starts the sensors and the measured node as processes over DDS.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from groot_int8_ros.errors import EngineError
from groot_int8_ros.policy.bundle import open_bundle
from groot_int8_ros.policy.files import atomic_file
from offline_tools.arguments import positive_float
from offline_tools.bags.dds import LARGE_IMAGE_TRANSPORTS, TRANSPORTS_VARIABLE

_LONGEST_START_S = 120.0
# Neither the default domain nor one that a robot is likely to use.
_DOMAIN = 87


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's options."""
    add = parser.add_argument
    add("--bundle", type=Path, required=True, help="its cameras are published and read")
    add("--seconds", type=positive_float, default=20.0, help="default: %(default)s")
    add("--rate-hz", type=positive_float, default=30.0, help="of a camera (default: %(default)s)")
    add(
        "--pause-ms",
        type=positive_float,
        default=3.0,
        help="what stands for an inference; short, so that the node is waiting when a frame "
        "comes (default: %(default)s)",
    )
    add("--output", type=Path, help="write the figures to this JSON file too")


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    cameras = open_bundle(args.bundle).manifest.robot.cameras
    # With ROS_AUTOMATIC_DISCOVERY_RANGE=LOCALHOST Fast DDS takes transports that lose frames
    # (docs/dds.md), so that is the user's choice; the domain keeps robots out.
    environment = {
        **os.environ,
        "ROS_DOMAIN_ID": os.environ.get("ROS_DOMAIN_ID", str(_DOMAIN)),
        TRANSPORTS_VARIABLE: LARGE_IMAGE_TRANSPORTS,
    }

    def start(module: str, *options: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", f"offline_tools.benchmark.{module}", str(args.bundle)]
        return subprocess.Popen(
            [*command, *options],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    forever = str(args.seconds + _LONGEST_START_S)
    sensors = start("cameras", "--rate-hz", str(args.rate_hz), "--seconds", forever)
    try:
        node = start(
            "node_overhead", "--seconds", str(args.seconds), "--pause-ms", str(args.pause_ms)
        )
        try:
            out, error = node.communicate(timeout=args.seconds + _LONGEST_START_S)
        except BaseException:
            node.kill()
            raise
    finally:
        sensors.kill()
        sensors.communicate()
    if node.returncode != 0:
        last = (error.strip() or "it said nothing").splitlines()[-1]
        raise EngineError(f"the measured node failed: {last}")
    figures = json.loads(out.splitlines()[-1])
    road, stages = figures["arrival_to_engine_ms"], figures["stages_median_ms"]
    wanted = args.rate_hz * figures["seconds"]
    sizes = ", ".join(f"{camera.width}x{camera.height}" for camera in cameras)
    print(f"{len(cameras)} cameras ({sizes}) at {args.rate_hz:g} Hz, {figures['chunks']} chunks\n")
    print("| what | figure |")
    print("|---|---|")
    for name, count in figures["received"].items():
        print(f"| received of {name} | {100 * count / wanted:.1f} % |")
    print(f"| callbacks, of a core | {100 * figures['callbacks_core_share']:.1f} % |")
    print(f"| whole process, of a core | {100 * figures['process_core_share']:.1f} % |")
    print(f"| arrival of the newest frame to engine input, median | {road['median']:.2f} ms |")
    print(f"| the same, 99th percentile | {road['p99']:.2f} ms |")
    for stage, value in stages.items():
        print(f"| of it {stage}, median | {value:.2f} ms |")
    print(f"| resident memory without engines | {figures['resident_bytes'] / 1e6:.0f} MB |")
    if args.output is not None:
        with atomic_file(args.output) as temporary:
            temporary.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0
