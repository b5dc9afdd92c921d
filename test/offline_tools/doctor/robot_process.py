"""Cameras and joints of a bundle's robot in a process of their own, sound or spoilt.

Run as `python robot_process.py BUNDLE JSON`. The JSON says which cameras are `raw` (the others
send PNG) and what to spoil: `skip` and `best_effort` (camera keys), `encoding` and `size` (camera
key to value, of raw ones), `frame_id` (camera key to value), `lose` (joint names), `behind_s` (of
every stamp). Publishes each stream at 4 Hz until it is ended. All messages are small: large ones
are lost on a busy machine.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import rclpy
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CompressedImage, Image, JointState

from groot_int8_ros.policy.bundle import open_bundle
from groot_int8_ros.ros.joints import time_message
from groot_int8_ros.ros.topics import default_image_topic

PERIOD_S = 0.25


def main(bundle: Path, spoil: dict[str, Any]) -> None:
    robot = open_bundle(bundle, verify_hashes=False).manifest.robot
    rclpy.init(args=[])
    node = Node("robot_drivers")
    random = np.random.default_rng(0)
    cameras = [camera for camera in robot.cameras if camera.key not in spoil.get("skip", [])]
    raw = spoil.get("raw", [])
    publishers = {
        camera.key: node.create_publisher(
            Image if camera.key in raw else CompressedImage,
            default_image_topic(camera.key, "raw" if camera.key in raw else "compressed"),
            QoSProfile(
                depth=1,
                reliability=ReliabilityPolicy.BEST_EFFORT
                if camera.key in spoil.get("best_effort", [])
                else ReliabilityPolicy.RELIABLE,
            ),
        )
        for camera in cameras
    }
    joints = node.create_publisher(JointState, "joint_states", 1)
    names = [
        name
        for name in dict.fromkeys(j.name for group in robot.state_joints.values() for j in group)
        if name not in spoil.get("lose", [])
    ]

    def publish() -> None:
        now_ns = node.get_clock().now().nanoseconds
        stamp = time_message(now_ns - round(spoil.get("behind_s", 0.0) * 1e9))
        for camera in cameras:
            height, width = spoil.get("size", {}).get(camera.key, (camera.height, camera.width))
            image: Image | CompressedImage
            if camera.key in raw:
                image = Image(
                    height=height,
                    width=width,
                    step=3 * width,
                    encoding=spoil.get("encoding", {}).get(camera.key, "rgb8"),
                    data=bytes(3 * height * width),
                )
            else:
                frame = np.full((height, width, 3), random.integers(0, 255), np.uint8)
                image = CompressedImage(
                    format="png", data=cv2.imencode(".png", frame)[1].tobytes()
                )
            image.header.stamp = stamp
            image.header.frame_id = spoil.get("frame_id", {}).get(camera.key, camera.key)
            publishers[camera.key].publish(image)
        message = JointState(name=names, position=[0.1] * len(names))
        message.header.stamp = stamp
        joints.publish(message)

    node.create_timer(PERIOD_S, publish)
    rclpy.spin(node)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
