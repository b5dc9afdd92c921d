"""Nodes in processes of their own, and an ear for what they say.

Owns: how node tests wait. What is to happen is waited for with a deadline that only a failure
costs, so that a busy machine makes a test slower and not red.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
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
ASK_AGAIN_S = 3.0
CHECK_S = 0.05


class Listener:
    """Publishes like a robot until something is seen, and asks a node's services.

    Args:
        node: As the fixture `ros_node` makes it.
        executor: What spins it.
        name: The node whose services are asked and whose statuses are read.
        triggers: Its services of the type std_srvs/Trigger.
    """

    # From one `publish` to the next.
    period_s = 0.05

    def __init__(
        self,
        node: Node,
        executor: SingleThreadedExecutor,
        name: str,
        triggers: Sequence[str] = (),
    ) -> None:
        self.node = node
        self.executor = executor
        self.name = name
        self.statuses: dict[str, DiagnosticStatus] = {}
        node.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 50)
        self._change: Any = node.create_client(ChangeState, f"/{name}/change_state")
        self._state: Any = node.create_client(GetState, f"/{name}/get_state")
        self._set: Any = node.create_client(SetParameters, f"/{name}/set_parameters")
        self._triggers: dict[str, Any] = {
            service: node.create_client(Trigger, f"/{name}/{service}") for service in triggers
        }

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        self.statuses |= {status.name: status for status in message.status}

    def publish(self) -> None:
        """Publish what a robot does every `period_s`: by itself a listener has nothing to say."""

    def spin(self, seconds: float, publish: Callable[[], object] | None = None) -> None:
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            (publish or self.publish)()
            next_s = time.monotonic() + self.period_s
            while (left_s := next_s - time.monotonic()) > 0:
                self.executor.spin_once(timeout_sec=left_s)

    def until(
        self, met: Callable[[], Any], what: str, publish: Callable[[], object] | None = None
    ) -> Any:
        """Spin until something is so, and return what `met` did."""
        end_s = time.monotonic() + DEADLINE_S
        while time.monotonic() < end_s:
            self.spin(CHECK_S, publish)
            if found := met():
                return found
        pytest.fail(self._missed(what))

    def _missed(self, what: str) -> str:
        states = {name: status.message for name, status in self.statuses.items()}
        return f"not seen within {DEADLINE_S} s: {what}; diagnostics say {states}"

    def _answered(self, future: Any, seconds: float) -> bool:
        """Publish and listen until an answer is there, for so long at most."""
        end_s = time.monotonic() + seconds
        while not future.done() and time.monotonic() < end_s:
            self.publish()
            self.executor.spin_until_future_complete(future, timeout_sec=self.period_s)
        return bool(future.done())

    def _wait_for_service(self, client: Any) -> None:
        if not client.service_is_ready():
            self.until(client.service_is_ready, f"service {client.srv_name}")

    def call(self, client: Any, request: Any) -> Any:
        self.state()  # once this is answered, other services' answers find their way, too
        self._wait_for_service(client)
        future = client.call_async(request)
        if not self._answered(future, DEADLINE_S):
            pytest.fail(self._missed(f"answer of {client.srv_name}"))
        return future.result()

    def state(self) -> str:
        """Ask for the node's state until it is answered.

        A service is ready when its requests can arrive; the answer to the first one is lost where
        the service has not discovered the client yet. Asking again is harmless here only.
        """
        self._wait_for_service(self._state)
        end_s = time.monotonic() + DEADLINE_S
        asked: list[Any] = []
        while not (done := [future for future in asked if future.done()]):
            if time.monotonic() > end_s:
                pytest.fail(self._missed("answer of get_state"))
            asked.append(self._state.call_async(GetState.Request()))
            self._answered(asked[-1], ASK_AGAIN_S)
        return str(done[0].result().current_state.label)

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

    def status(self, name: str, node: str = "") -> str:
        """Message of the newest status of that name."""
        found = self.statuses.get(f"{node or self.name}: {name}")
        return found.message if found else ""

    def says(self, name: str, pattern: str, node: str = "") -> bool:
        """Whether the newest status of that name matches."""
        return re.search(pattern, self.status(name, node), re.DOTALL) is not None

    def values(self, name: str, node: str = "") -> dict[str, str]:
        """Values of the newest status of that name."""
        found = self.statuses.get(f"{node or self.name}: {name}")
        return {entry.key: entry.value for entry in found.values} if found else {}

    def count(self, name: str, key: str, node: str = "") -> int:
        """One of those values, which is 0 until it is told."""
        return int(self.values(name, node).get(key, 0))

    def forget(self) -> None:
        self.statuses.clear()


class NodeProcess:
    """A node of this package in a process of its own.

    Args:
        module: Of the package.
        folder: For its parameters and its output; it is made.
        parameters: By their names, or nested.
        domain_id: Of DDS.
    """

    def __init__(
        self, module: str, folder: Path, parameters: Mapping[str, object], domain_id: int
    ) -> None:
        folder.mkdir()
        file = folder / "parameters.yaml"
        file.write_text(yaml.safe_dump({"/**": {"ros__parameters": dict(parameters)}}))
        self._log = folder / "log.txt"
        words = ["-m", f"groot_int8_ros.{module}", "--ros-args", "--params-file", str(file)]
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, *words],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"ROS_DOMAIN_ID": str(domain_id), "OMP_NUM_THREADS": "1"},
            )

    def text(self) -> str:
        """What it has printed."""
        return self._log.read_text()

    def end(self, number: int) -> int:
        """Send a signal and return the exit code."""
        self.process.send_signal(number)
        return self.process.wait(DEADLINE_S)

    def kill(self) -> None:
        """Kill it, if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
