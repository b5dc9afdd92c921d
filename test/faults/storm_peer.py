"""A publisher that goes wild: as many messages as it can give, until it is killed.

Run with a JSON object: `topic`, and `names` and `value` for joint states, or `width` and `height`
for images. Every message is one that the robot could have sent: those are the ones that cost most.
"""

from __future__ import annotations

import json
import sys

import rclpy
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import Image, JointState

from groot_int8_ros.ros.joints import time_message


def main() -> None:
    """Publish until the process is killed."""
    asked = json.loads(sys.argv[1])
    rclpy.init(args=[])
    node = Node("storm")
    message: Image | JointState
    if "names" in asked:
        values = [asked["value"]] * len(asked["names"])
        message = JointState(name=asked["names"], position=values)
    else:
        step = 3 * asked["width"]
        message = Image(
            width=asked["width"],
            height=asked["height"],
            encoding="rgb8",
            step=step,
            data=bytes(step * asked["height"]),
        )
    qos = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
    publisher = node.create_publisher(type(message), asked["topic"], qos)
    sent = 0
    while True:
        message.header.stamp = time_message(node.get_clock().now().nanoseconds)
        if isinstance(message, Image):
            message.data[0] = sent % 256
        publisher.publish(message)
        sent += 1
        if sent % 100 == 0:
            print(sent, flush=True)


if __name__ == "__main__":
    main()
