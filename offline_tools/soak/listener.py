"""What a soak hears and asks over DDS.

Owns: the diagnostics of both nodes, the counts taken from them over time, and the calls of their
services. It hears no image, so that it costs next to nothing beside what is observed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from rclpy.executors import SingleThreadedExecutor
from std_srvs.srv import Trigger

from groot_int8_ros.errors import EngineError
from groot_int8_ros.ros.managed_node import RELIABLE
from offline_tools.soak.ledger import Ledger, read_ledger

_SPIN_S = 0.1
_ASK_AGAIN_S = 2.0


class Listener:
    """Hears both nodes; a context manager that owns its ROS context."""

    def __init__(self) -> None:
        self._context = rclpy.Context()
        rclpy.init(args=[], context=self._context)
        self.node = rclpy.create_node("soak_listener", context=self._context)
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self.node)
        self.statuses: dict[str, dict[str, str]] = {}
        self.messages: dict[str, str] = {}
        self.heard: dict[str, int] = {}
        self.worst_second = (0, 0)
        self._before: tuple[int, int] | None = None
        self.node.create_subscription(
            DiagnosticArray, "/diagnostics", self._on_diagnostics, RELIABLE
        )

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown()
        self.node.destroy_node()
        rclpy.shutdown(context=self._context)

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        for status in message.status:
            self.statuses[status.name] = {entry.key: entry.value for entry in status.values}
            self.messages[status.name] = status.message
        node = message.status[0].name.partition(":")[0]
        self.heard[node] = self.heard.get(node, 0) + 1
        values = self.statuses.get("chunk_executor: executor", {})
        if node == "chunk_executor" and "steps" in values:
            self._watch_deadlines(int(values["deadline misses"]), int(values["steps"]))

    def _watch_deadlines(self, misses: int, steps: int) -> None:
        before, self._before = self._before, (misses, steps)
        if before is None or steps <= before[1]:
            return
        missed, done = misses - before[0], steps - before[1]
        worst_missed, worst_done = self.worst_second
        if missed * max(worst_done, 1) > worst_missed * done:
            self.worst_second = missed, done

    def forget_deadlines(self) -> None:
        """Let the worst second begin now."""
        self._before, self.worst_second = None, (0, 0)

    def ledger(self) -> Ledger:
        """Return the newest counts of both nodes."""
        return read_ledger(self.statuses)

    def spin(self, seconds: float) -> None:
        """Listen for a time."""
        end_s = time.monotonic() + seconds
        while (left_s := end_s - time.monotonic()) > 0:
            self._executor.spin_once(timeout_sec=min(left_s, _SPIN_S))

    def until(self, met: Callable[[], bool], what: str, timeout_s: float) -> None:
        """Listen until something is so.

        Raises:
            EngineError: It was not so in time.
        """
        end_s = time.monotonic() + timeout_s
        while not met():
            if time.monotonic() > end_s:
                told = "; ".join(f"{name}: {text}" for name, text in self.messages.items())
                raise EngineError(f"not seen within {timeout_s:g} s: {what}. Seen: {told}")
            self.spin(_SPIN_S)

    def fresh(self, timeout_s: float) -> None:
        """Listen until each node has told its counts twice more."""
        wanted = {node: count + 2 for node, count in self.heard.items()}
        self.until(
            lambda: all(self.heard[node] >= count for node, count in wanted.items()),
            "diagnostics of both nodes",
            timeout_s,
        )

    def enable(self, timeout_s: float) -> None:
        """Enable the executor.

        Raises:
            EngineError: It has not in time.
        """
        self._ask(Trigger, "/chunk_executor/enable", Trigger.Request(), timeout_s, self._enabled)

    def _enabled(self) -> bool:
        return self.statuses.get("chunk_executor: executor", {}).get("enabled") == "True"

    def change(self, transition: int, before: str, after: str, timeout_s: float) -> None:
        """Ask the policy node for a transition.

        Args:
            transition: Which.
            before: The state that it is asked in.
            after: The state that it leads to.
            timeout_s: Longest wait.

        Raises:
            EngineError: It has not made it in time.
        """

        def state() -> str:
            return self.statuses.get("policy_node: engine", {}).get("lifecycle", "")

        self.until(lambda: state() == before, f"the policy node {before}", timeout_s)
        self._ask(
            ChangeState,
            "/policy_node/change_state",
            ChangeState.Request(transition=Transition(id=transition)),
            timeout_s,
            lambda: state() == after,
            lambda: state() == before,
        )

    def _ask(
        self,
        kind: type[Any],
        service: str,
        request: Any,
        timeout_s: float,
        done: Callable[[], bool],
        wanted: Callable[[], bool] = lambda: True,
    ) -> None:
        # A request gets lost where the service has not been found yet: it is made again.
        client: Any = self.node.create_client(kind, service)
        asked_s = 0.0

        def asked_and_done() -> bool:
            nonlocal asked_s
            again = time.monotonic() - asked_s > _ASK_AGAIN_S
            if again and client.service_is_ready() and wanted() and not done():
                asked_s = time.monotonic()
                client.call_async(request)
            return done()

        self.until(asked_and_done, f"what {service} was asked for", timeout_s)
        self.node.destroy_client(client)
