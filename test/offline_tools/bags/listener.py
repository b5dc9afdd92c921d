"""A real subscriber in a process of its own: writes what it receives as JSON lines.

Usage: listener.py OUTPUT TOPIC=TYPE... Prints `ready` when it listens. On SIGTERM it writes what
has arrived by then and ends.
"""

from __future__ import annotations

import importlib
import json
import signal
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import rclpy
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.signals import SignalHandlerOptions

# Looks for a message, a tenth of a second each, after which none has arrived.
SILENT_LOOKS = 3


def main() -> None:
    stopped, heard = False, 0

    def stop(*_: object) -> None:
        nonlocal stopped
        stopped = True

    signal.signal(signal.SIGTERM, stop)
    rclpy.init(args=[], signal_handler_options=SignalHandlerOptions.NO)
    node = rclpy.create_node("listener")
    with Path(sys.argv[1]).open("w", encoding="utf-8", buffering=1) as output:

        def receive(topic: str, message: Any) -> None:
            nonlocal heard
            heard += 1
            entry: dict[str, Any] = {"topic": topic, "received_s": time.monotonic()}
            if hasattr(message, "clock"):
                entry["stamp_ns"] = message.clock.sec * 10**9 + message.clock.nanosec
            if hasattr(message, "header"):
                stamp = message.header.stamp
                entry["stamp_ns"] = stamp.sec * 10**9 + stamp.nanosec
            if hasattr(message, "position"):
                entry["position"] = list(message.position)
            if hasattr(message, "encoding"):
                entry["crc"] = zlib.crc32(bytes(message.data))
            if type(message).__name__ == "String":
                entry["text"] = message.data
            output.write(json.dumps(entry) + "\n")

        for argument in sys.argv[2:]:
            topic, _, type_name = argument.partition("=")
            package, _, name = type_name.split("/")
            latched = topic.endswith("instruction")
            node.create_subscription(
                getattr(importlib.import_module(f"{package}.msg"), name),
                topic,
                lambda message, topic=topic: receive(topic, message),
                QoSProfile(
                    depth=100,
                    reliability=ReliabilityPolicy.BEST_EFFORT
                    if topic == "/clock"
                    else ReliabilityPolicy.RELIABLE,
                    # Matches a publisher only if it offers transient local, as recorded.
                    durability=DurabilityPolicy.TRANSIENT_LOCAL
                    if latched
                    else DurabilityPolicy.VOLATILE,
                ),
            )
        print("ready", flush=True)
        silent = 0
        while not stopped or silent < SILENT_LOOKS:
            before = heard
            rclpy.spin_once(node, timeout_sec=0.1)
            silent = silent + 1 if stopped and heard == before else 0
    node.destroy_node()
    rclpy.try_shutdown()


if __name__ == "__main__":
    main()
