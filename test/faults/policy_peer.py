"""A policy as the chunk executor sees one: a process that publishes chunks, until its fault.

Run with the fault's name. It says "ready" behind its first chunk. From then on the fault begins on
SIGUSR1; chunks are good before it:

    good    nothing happens
    slow    a chunk takes longer than the executor waits
    late    every row of a chunk is past on arrival
    hang    the process stays and publishes nothing
    crash   the process dies of a segmentation fault
    nan     targets are not numbers
    jump    targets are far beyond every limit
    mixed   chunks come twice, reordered and with rows that go back in time
    flood   hundreds of chunks a second
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time

import rclpy
from builtin_interfaces.msg import Duration
from rclpy.node import Node
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

JOINTS = ["shoulder", "elbow", "jaw", "base_x", "base_yaw"]
ROW_S = 0.05
ROWS = 16
PERIOD_S = 0.15
LATENCY_NS = 60_000_000


def wave(seconds: float) -> float:
    """Where the arm is to be at a time."""
    return 0.3 * math.sin(1.5 * seconds)


def chunk(stamp_ns: int, rows: int = ROWS) -> JointTrajectory:
    """Return the good chunk of an observation."""
    message = JointTrajectory(joint_names=JOINTS)
    message.header.stamp.sec, message.header.stamp.nanosec = divmod(stamp_ns, 10**9)
    for row in range(rows):
        value = wave(stamp_ns * 1e-9 + row * ROW_S)
        nanoseconds = round(row * ROW_S * 1e9)
        message.points.append(
            JointTrajectoryPoint(
                positions=[value, value, value, 0.2, -0.2],
                time_from_start=Duration(nanosec=nanoseconds % 10**9, sec=nanoseconds // 10**9),
            )
        )
    return message


def main() -> None:
    """Publish until the process is killed."""
    fault, bad, ready = sys.argv[1], False, False

    def begin(*_: object) -> None:
        nonlocal bad
        bad = fault != "good"

    signal.signal(signal.SIGUSR1, begin)
    rclpy.init(args=sys.argv[2:])
    node = Node("policy_peer")
    publisher = node.create_publisher(JointTrajectory, "/policy_node/action_chunk", 10)
    while True:
        rclpy.spin_once(node, timeout_sec=0.0)
        stamp_ns = node.get_clock().now().nanoseconds - LATENCY_NS
        message = chunk(stamp_ns)
        if bad and fault == "slow":
            time.sleep(1.5)
            message = chunk(node.get_clock().now().nanoseconds - LATENCY_NS)
        elif bad and fault == "late":
            message = chunk(stamp_ns - 1_500_000_000)
        elif bad and fault == "hang":
            time.sleep(3600.0)
        elif bad and fault == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        elif bad and fault == "nan":
            message.points[7].positions[1] = math.nan
        elif bad and fault == "jump":
            for point in message.points:
                point.positions = [50.0, -50.0, 50.0, 9.0, -9.0]
        elif bad and fault == "mixed":
            publisher.publish(message)
            publisher.publish(message)
            publisher.publish(chunk(stamp_ns - 200_000_000))
            message = chunk(stamp_ns + 1)
            message.points[3].time_from_start.sec = -5
        publisher.publish(message)
        if not ready:
            ready = True
            print("ready", flush=True)
        time.sleep(0.003 if bad and fault == "flood" else PERIOD_S)


if __name__ == "__main__":
    main()
