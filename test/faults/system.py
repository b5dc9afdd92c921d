"""What the fault matrices share: processes with their output, and an ear for what they say."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState, GetState
from rcl_interfaces.srv import SetParameters
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.parameter import Parameter
from std_srvs.srv import Trigger

DEADLINE_S = 120.0
DOMAIN_ID = 1 + os.getpid() % 100
# Twentieths of a second without a command after which none is to come.
SILENT_SPINS = 6
PEER = Path(__file__).with_name("policy_peer.py")
STORM = Path(__file__).with_name("storm_peer.py")


class Listener:
    """Publishes like a robot until something is seen.

    A subclass implements the two methods after the constructor.
    """

    period_s = 0.02

    def __init__(self, node: Node, executor: SingleThreadedExecutor) -> None:
        self.node = node
        self._executor = executor
        self.statuses: dict[str, DiagnosticStatus] = {}
        node.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 50)
        name = "/chunk_executor"
        self._change: Any = node.create_client(ChangeState, f"{name}/change_state")
        self._state: Any = node.create_client(GetState, f"{name}/get_state")
        self._set: Any = node.create_client(SetParameters, f"{name}/set_parameters")
        self._triggers: dict[str, Any] = {
            service: node.create_client(Trigger, f"{name}/{service}")
            for service in ("enable", "disable", "estop", "reset_estop")
        }

    def publish(self) -> None:
        """Publish what a robot does every `period_s`."""
        raise NotImplementedError

    def commands_heard(self) -> int:
        """Return how many commands have come."""
        raise NotImplementedError

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        self.statuses |= {status.name: status for status in message.status}

    def spin(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.publish()
            next_s = time.monotonic() + self.period_s
            while (left := next_s - time.monotonic()) > 0:
                self._executor.spin_once(timeout_sec=left)

    def until(self, met: Callable[[], Any], what: str) -> Any:
        end = time.monotonic() + DEADLINE_S
        while time.monotonic() < end:
            self.spin(0.05)
            found = met()
            if found:
                return found
        states = {name: status.message for name, status in self.statuses.items()}
        pytest.fail(f"not seen within {DEADLINE_S} s: {what}; diagnostics say {states}")

    def settle(self) -> None:
        """Wait until commands have ceased and all that came has been read."""
        counts: list[int] = []

        def silent() -> bool:
            counts.append(self.commands_heard())
            return len(counts) > SILENT_SPINS and len(set(counts[-SILENT_SPINS:])) == 1

        self.until(silent, "the end of commands")

    def call(self, client: Any, request: Any) -> Any:
        self.until(client.service_is_ready, f"service {client.srv_name}")
        future = client.call_async(request)
        self.until(future.done, f"answer of {client.srv_name}")
        return future.result()

    def answered(self) -> None:
        """Ask for the executor's state until it is answered: later answers find their way then."""
        self.until(self._state.service_is_ready, "service get_state")
        futures: list[Any] = []
        asked_s = 0.0

        def ask() -> bool:
            nonlocal asked_s
            if time.monotonic() - asked_s > 2.0:
                asked_s = time.monotonic()
                futures.append(self._state.call_async(GetState.Request()))
            return any(future.done() for future in futures)

        self.until(ask, "answer of get_state")

    def trigger(self, service: str) -> Any:
        return self.call(self._triggers[service], Trigger.Request())

    def change(self, transition: int) -> bool:
        request = ChangeState.Request(transition=Transition(id=transition))
        return bool(self.call(self._change, request).success)

    def set(self, name: str, value: Any) -> Any:
        request = SetParameters.Request(
            parameters=[Parameter(name, value=value).to_parameter_msg()]
        )
        return self.call(self._set, request).results[0]

    def enable(self) -> None:
        self.answered()
        self.until(lambda: self.trigger("enable").success, "enabling")

    def says(self, name: str, pattern: str, node: str = "chunk_executor") -> bool:
        """Whether the newest status of that name matches."""
        found = self.statuses.get(f"{node}: {name}")
        return found is not None and re.search(pattern, found.message, re.DOTALL) is not None

    def value(self, name: str, key: str, node: str = "chunk_executor") -> str:
        found = self.statuses.get(f"{node}: {name}")
        values = found.values if found else []
        return next((entry.value for entry in values if entry.key == key), "")

    def count(self, name: str, key: str, node: str = "chunk_executor") -> int:
        return int(self.value(name, key, node) or 0)

    def forget(self) -> None:
        self.statuses.clear()


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
