"""What the tests of both nodes share: their processes, and the listener that enables them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node

from groot_int8_ros.policy.robot import RobotDescription

from ..nodes import Listener

DOMAIN_ID = 1 + os.getpid() % 100
# Of `Listener.until` without a command, after which none is to come.
SILENT_CHECKS = 6
PEER = Path(__file__).with_name("policy_peer.py")
STORM = Path(__file__).with_name("storm_peer.py")

# Of a robot that runs the bundle `slow_rows`, and stands still whatever it is commanded: every
# chunk can be reached from where it stands.
POSE, REACH, SPEED, CONTROL_S = 0.1, 3.0, 2.0, 0.02


def standing_arm(robot: RobotDescription) -> dict[str, Any]:
    """Return an executor's parameters for all joints of such a robot, commanded on /test/arm."""
    names = [joint.name for group in robot.action_joints.values() for joint in group]
    return {
        "channels": ["arm"],
        "autostart": True,
        "control_rate_hz": 1.0 / CONTROL_S,
        "channel": {
            "arm": {
                "joints": names,
                "topic": "/test/arm",
                "lower": [-REACH],
                "upper": [REACH],
                "velocity": [SPEED],
                "acceleration": [20.0],
                "guard_distance": [100.0],
            }
        },
    }


def check_standing_arm(commands: list[list[float]]) -> None:
    """Assert that no command that came broke a limit of those parameters."""
    rows = np.array(commands)
    assert np.isfinite(rows).all()
    assert np.abs(rows).max() <= REACH
    assert np.abs(np.diff(rows, axis=0)).max() <= SPEED * CONTROL_S * (1.0 + 1e-6)


class ExecutorListener(Listener):
    """Enables a chunk executor, and hears what it commands.

    A subclass implements `publish` and `commands_heard`.
    """

    period_s = 0.02

    def __init__(self, node: Node, executor: SingleThreadedExecutor) -> None:
        services = ("enable", "disable", "estop", "reset_estop")
        super().__init__(node, executor, "chunk_executor", services)

    def commands_heard(self) -> int:
        """Return how many commands have come."""
        raise NotImplementedError

    def settle(self) -> None:
        """Wait until commands have ceased and all that came has been read."""
        counts: list[int] = []

        def silent() -> bool:
            counts.append(self.commands_heard())
            return len(counts) > SILENT_CHECKS and len(set(counts[-SILENT_CHECKS:])) == 1

        self.until(silent, "the end of commands")

    def enable(self) -> None:
        """Ask until it is granted: joint states have to come."""
        self.until(lambda: self.trigger("enable").success, "enabling")


class Processes:
    """Nodes and their peers, each in its own process."""

    def __init__(self, folder: Path, executor_parameters: Mapping[str, Any]) -> None:
        self.folder = folder
        self._parameters = executor_parameters
        self.all: list[subprocess.Popen[bytes]] = []

    def start(self, words: list[str], log: Path) -> subprocess.Popen[bytes]:
        with log.open("w") as file:
            self.all.append(
                subprocess.Popen(
                    [sys.executable, *words],
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=os.environ | {"ROS_DOMAIN_ID": str(DOMAIN_ID), "OMP_NUM_THREADS": "1"},
                )
            )
        return self.all[-1]

    def node(
        self, words: list[str], name: str, parameters: Mapping[str, Any]
    ) -> tuple[subprocess.Popen[bytes], Path]:
        number = len(self.all)
        file = self.folder / f"parameters{number}.yaml"
        file.write_text(yaml.safe_dump({"/**": {"ros__parameters": dict(parameters)}}))
        log = self.folder / f"{name}{number}.txt"
        return self.start([*words, "--ros-args", "--params-file", str(file)], log), log

    def executor(self, code: str = "", **changes: Any) -> subprocess.Popen[bytes]:
        words = ["-c", code] if code else ["-m", "groot_int8_ros.chunk_executor_node"]
        process, self.log = self.node(words, "executor", {**self._parameters, **changes})
        return process

    def peer(self, fault: str) -> subprocess.Popen[bytes]:
        self.peer_log = self.folder / f"peer{len(self.all)}.txt"
        return self.start([str(PEER), fault], self.peer_log)

    @contextlib.contextmanager
    def storm(self, **asked: Any) -> Iterator[None]:
        words = [str(STORM), json.dumps(asked)]
        process = self.start(words, self.folder / f"storm{len(self.all)}.txt")
        try:
            yield
        finally:
            self.end(process)

    def end(self, process: subprocess.Popen[bytes]) -> None:
        if process.poll() is None:
            process.kill()
        process.wait()
