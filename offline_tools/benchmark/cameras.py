"""A robot's sensors as a process of their own: cameras and joint states at a steady pace.

Owns: publishing for the node's benchmark. Must not import torch or an engine. All streams of a
tick carry one stamp, as hardware-triggered cameras do. Each camera shows one picture, made once,
of which a single value changes: this process has little to do, and the node does not take it for a
frozen camera, whichever frames are lost.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import rclpy
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import Image, JointState

from groot_int8_ros.policy.bundle import open_bundle
from groot_int8_ros.ros.joints import time_message


def main(argv: list[str] | None = None) -> int:
    """Publish until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rate-hz", type=float, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--only", help="one stream: a camera's key, or joint_states; else all")
    args = parser.parse_args(argv)
    robot = open_bundle(args.bundle, verify_hashes=False).manifest.robot
    rclpy.init()
    node = rclpy.create_node("benchmark_cameras")
    qos = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE)
    random = np.random.RandomState(0)
    images = []
    for camera in robot.cameras:
        if args.only not in (None, camera.key):
            continue
        publisher = node.create_publisher(Image, f"cameras/{camera.key}/image_raw", qos)
        images.append((publisher, _picture(random, camera.height, camera.width)))
    names = [joint.name for joints in robot.state_joints.values() for joint in joints]
    joint_state = JointState(name=names, position=[0.1] * len(names))
    joints = node.create_publisher(JointState, "joint_states", qos)
    start = due = time.monotonic()
    tick = 0
    while due < start + args.seconds:
        time.sleep(max(0.0, due - time.monotonic()))
        stamp = time_message(node.get_clock().now().nanoseconds)
        if args.only in (None, "joint_states"):
            joint_state.header.stamp = stamp
            joints.publish(joint_state)
        tick += 1
        for publisher, message in images:
            message.header.stamp = stamp
            message.data[0] = tick % 256
            publisher.publish(message)
        due += 1.0 / args.rate_hz
    node.destroy_node()
    rclpy.shutdown()
    return 0


def _picture(random: np.random.RandomState, height: int, width: int) -> Image:
    message = Image(height=height, width=width, encoding="rgb8", step=3 * width)
    pixels = random.randint(0, 256, height * width * 3, dtype=np.uint8)
    message.data.frombytes(pixels.tobytes())
    return message


if __name__ == "__main__":
    sys.exit(main())
