"""`groot-int8 measure-dds`: camera frames between processes, under each transport of Fast DDS.

Owns: the settings, the processes and the table. Must not import torch, and imports rclpy in the
processes that it starts alone: a transport is chosen by an environment variable, which counts when
a process begins. Every camera is a process, as drivers are, and so is the receiver.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import select
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from groot_int8_ros.errors import ConfigurationError
from offline_tools.arguments import positive_float, positive_int
from offline_tools.bags.dds import (
    LARGE_IMAGE_TRANSPORTS,
    RANGE_VARIABLE,
    TRANSPORTS_VARIABLE,
)

# None leaves the variable unset.
SETTINGS: Mapping[str, str | None] = {
    "default": None,
    "UDPv4": "UDPv4",
    "LARGE_DATA": "LARGE_DATA",
    "recommended": LARGE_IMAGE_TRANSPORTS,
}
# Beside the seconds of publishing: start, discovery and the last frames.
_PROCESS_S = 60.0


@dataclass(frozen=True)
class Row:
    """What one setting gave.

    Attributes:
        setting: Its name.
        sent: Frames of all cameras.
        received: Of these, those that arrived whole.
        worst_camera: Share of its frames that arrived, of the camera that lost most.
        median_ms: From publish to callback; None if nothing arrived.
        p99_ms: Of 100 frames 99 took less.
        receiver_cpu: Cores that the receiver used while frames came.
        middleware: As rclpy names it.
    """

    setting: str
    sent: int
    received: int
    worst_camera: float
    median_ms: float | None
    p99_ms: float | None
    receiver_cpu: float
    middleware: str


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("--cameras", type=positive_int, default=4, help="default: %(default)s")
    parser.add_argument("--size", default="640x480", help="WIDTHxHEIGHT, rgb8: %(default)s")
    parser.add_argument("--rate", type=positive_float, default=30.0, help="Hz: %(default)s")
    parser.add_argument(
        "--seconds", type=positive_float, default=10.0, help="default: %(default)s"
    )
    parser.add_argument(
        "--settings",
        nargs="+",
        choices=[*SETTINGS],
        default=[*SETTINGS],
        help=f"values of {TRANSPORTS_VARIABLE} to compare (default: all)",
    )
    parser.add_argument(
        "--reliable", action="store_true", help="reliable publishers and subscriptions"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    """Measure every setting and print a row for each."""
    if not args.json:
        print("| setting | sent | whole | worst camera | median ms | p99 ms | receiver, cores |")
        print("|---|---|---|---|---|---|---|")
    rows = []
    for name in args.settings:
        row = _measure(name, args)
        rows.append(row)
        if not args.json:
            print(_line(row), flush=True)
    if args.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        reach = os.environ.get(RANGE_VARIABLE, "unset")
        print(f"\n{rows[0].middleware}, {os.cpu_count()} cores, {RANGE_VARIABLE} {reach}")
    return 0


def _line(row: Row) -> str:
    latencies = [
        "none" if value is None else f"{value:.1f}" for value in (row.median_ms, row.p99_ms)
    ]
    return (
        f"| {row.setting} | {row.sent} | {row.received} | {row.worst_camera:.0%} | "
        f"{' | '.join(latencies)} | {row.receiver_cpu:.2f} |"
    )


def _measure(setting: str, args: argparse.Namespace) -> Row:
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", args.size)
    if found is None or not all(int(side) for side in found.groups()):
        raise ConfigurationError(f"--size is written like 640x480, not {args.size!r}")
    width, height = map(int, found.groups())
    topics = [f"/measure_dds_{os.getpid()}/camera_{number}" for number in range(args.cameras)]
    environment = {k: v for k, v in os.environ.items() if k != TRANSPORTS_VARIABLE}
    if (value := SETTINGS[setting]) is not None:
        environment[TRANSPORTS_VARIABLE] = value
    receiver_asked = {
        "topics": topics,
        "bytes": 3 * width * height,
        "reliable": args.reliable,
    }
    camera_asked = {
        "width": width,
        "height": height,
        "rate_hz": args.rate,
        "frames": max(1, round(args.rate * args.seconds)),
        "reliable": args.reliable,
    }
    with contextlib.ExitStack() as stack:
        receiver = stack.enter_context(_process("receiver", receiver_asked, environment))
        _line_of("receiver", receiver, _PROCESS_S)  # it listens
        cameras = [
            stack.enter_context(_process("camera", camera_asked | {"topic": topic}, environment))
            for topic in topics
        ]
        timeout_s = args.seconds + _PROCESS_S
        sent = [
            int(json.loads(_line_of("camera", camera, timeout_s))["sent"]) for camera in cameras
        ]
        receiver.send_signal(signal.SIGTERM)
        counted = json.loads(_line_of("receiver", receiver, _PROCESS_S))
    received, latencies = counted["received"], sorted(counted["latencies_ms"])
    return Row(
        setting=setting,
        sent=sum(sent),
        received=sum(received.values()),
        worst_camera=min(
            received[topic] / frames for topic, frames in zip(topics, sent, strict=True)
        ),
        median_ms=statistics.median(latencies) if latencies else None,
        p99_ms=latencies[int(0.99 * (len(latencies) - 1))] if latencies else None,
        receiver_cpu=counted["cpu_s"] / args.seconds,
        middleware=counted["middleware"],
    )


def _command(module: str, asked: Mapping[str, Any]) -> list[str]:
    return [sys.executable, "-m", f"offline_tools.measure_dds.{module}", json.dumps(asked)]


@contextlib.contextmanager
def _process(
    module: str, asked: Mapping[str, Any], environment: Mapping[str, str]
) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        _command(module, asked),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(environment),
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _line_of(what: str, process: subprocess.Popen[str], timeout_s: float) -> str:
    # Its end is not waited for: Fast DDS may hang when a participant with TCP is taken down.
    assert process.stdout is not None
    line = ""
    if select.select([process.stdout], [], [], timeout_s)[0]:
        line = process.stdout.readline().strip()
    if not line:
        process.kill()
        errors = process.communicate()[1].strip().splitlines()
        reason = errors[-1] if errors else f"it said nothing for {timeout_s:.0f} s"
        raise ConfigurationError(
            f"the {what}'s process failed: {reason}. It needs rclpy: source the ROS 2 "
            "distribution, or install the extra `ros`"
        )
    return line
