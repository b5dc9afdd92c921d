"""The node's side, for `measure-dds`: subscribes as the policy node does, counts what arrives.

Usage: python -m offline_tools.measure_dds.receiver JSON, with `topics`, `bytes` and `reliable`.
Prints `ready` when it listens, ends on SIGTERM and then prints what it counted as JSON.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
import time
from functools import partial

import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.signals import SignalHandlerOptions
from rclpy.utilities import get_rmw_implementation_identifier
from sensor_msgs.msg import Image

from groot_int8_ros.ros.joints import stamp_ns

_CHECK_S = 0.1


def main() -> None:
    """Receive until SIGTERM."""
    asked = json.loads(sys.argv[1])
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
    rclpy.init(args=[], signal_handler_options=SignalHandlerOptions.NO)
    node = rclpy.create_node("receiver")
    reliability = (
        ReliabilityPolicy.RELIABLE if asked["reliable"] else ReliabilityPolicy.BEST_EFFORT
    )
    counts = dict.fromkeys(asked["topics"], 0)
    latencies_ms: list[float] = []

    def receive(topic: str, image: Image) -> None:
        now_ns = time.monotonic_ns()
        # One copy, as the policy node makes it when it reads.
        if len(bytes(image.data)) == asked["bytes"] and image.data[-1] == 0xFF:
            counts[topic] += 1
            latencies_ms.append((now_ns - stamp_ns(image.header)) / 1e6)

    for topic in asked["topics"]:
        node.create_subscription(
            Image, topic, partial(receive, topic), QoSProfile(depth=1, reliability=reliability)
        )
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    print("ready", flush=True)
    while not stopped:
        executor.spin_once(timeout_sec=_CHECK_S)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    print(
        json.dumps(
            {
                "received": counts,
                "latencies_ms": latencies_ms,
                "cpu_s": usage.ru_utime + usage.ru_stime,
                "middleware": get_rmw_implementation_identifier(),
            }
        ),
        flush=True,
    )
    executor.shutdown()
    node.destroy_node()
    rclpy.shutdown()


if __name__ == "__main__":
    main()
