"""A camera in a process of its own, for `measure-dds`: publishes frames and says how many.

Usage: python -m offline_tools.measure_dds.camera JSON, with `topic`, `width`, `height`, `rate_hz`,
`frames` and `reliable`. The stamp of a frame is the system's monotonic clock, which all processes
of one machine share.
"""

from __future__ import annotations

import json
import sys
import time

import rclpy
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import Image

from groot_int8_ros.ros.joints import time_message

_DISCOVERY_S = 20.0
# A reliable publisher that ends takes with it what was not delivered yet.
_LINGER_S = 1.0


def main() -> None:
    """Publish and print the number of frames as JSON."""
    asked = json.loads(sys.argv[1])
    rclpy.init(args=[])
    node = rclpy.create_node("camera")
    reliability = (
        ReliabilityPolicy.RELIABLE if asked["reliable"] else ReliabilityPolicy.BEST_EFFORT
    )
    publisher = node.create_publisher(
        Image, asked["topic"], QoSProfile(depth=1, reliability=reliability)
    )
    step = 3 * asked["width"]
    image = Image(
        height=asked["height"],
        width=asked["width"],
        step=step,
        encoding="rgb8",
        data=bytes(step * asked["height"] - 1) + b"\xff",
    )
    end_s = time.monotonic() + _DISCOVERY_S
    while not publisher.get_subscription_count() and time.monotonic() < end_s:
        time.sleep(0.01)
    # Discovery is told to both sides at different times.
    time.sleep(0.5)
    due_s, sent = time.monotonic(), 0
    for _ in range(asked["frames"]):
        time.sleep(max(0.0, due_s - time.monotonic()))
        due_s += 1.0 / asked["rate_hz"]
        image.header.stamp = time_message(time.monotonic_ns())
        publisher.publish(image)
        sent += 1
    time.sleep(_LINGER_S)
    print(json.dumps({"sent": sent}), flush=True)
    node.destroy_node()
    rclpy.shutdown()


if __name__ == "__main__":
    main()
