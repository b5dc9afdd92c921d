"""Nodes as processes of their own, and a recorder of what the policy node publishes.

Owns: starting, watching and ending the processes, and `ChunkRecorder`. Must not import torch, and
imports rclpy only when a recorder is made. A process ends with the block that started it, and with
this process, however that ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from groot_int8_ros.errors import GrootError
from groot_int8_ros.policy.types import Float64Array
from offline_tools.bags.dds import LARGE_IMAGE_TRANSPORTS, TRANSPORTS_VARIABLE
from offline_tools.benchmark.memory import process_memory

_NODE_NAME = "policy_node"
_ENGINE_STATUS = f"{_NODE_NAME}: engine"
# `diagnostic_msgs/DiagnosticStatus.ERROR`
_ERROR = 2
_START_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 30.0
_END_TIMEOUT_S = 10.0
# util-linux: the kernel ends the child when this process dies without ending it.
_TIED_TO_PARENT = ("setpriv", "--pdeathsig", "INT") if shutil.which("setpriv") else ()


class LiveRunError(GrootError):
    """The node or the player did not do its part."""


@dataclass(frozen=True)
class LiveChunk:
    """One chunk as it came over DDS.

    Attributes:
        stamp_ns: Stamp of the trajectory: the observation's.
        joint_names: Column names.
        positions: Joint targets in the units of ROS messages, float64, shape (steps, joints).
        time_from_start_s: float64, shape (steps,).
        info: What the node published beside it; see `groot_int8_ros.policy_node`.
    """

    stamp_ns: int
    joint_names: tuple[str, ...]
    positions: Float64Array
    time_from_start_s: Float64Array
    info: Mapping[str, Any]


@contextlib.contextmanager
def isolated_ros() -> Iterator[None]:
    """Keep this process and its children to themselves: own domain, this machine only.

    Variables that the user has set stay as they are; the others are unset again at the end.
    """
    settings = {
        "ROS_DOMAIN_ID": str(1 + os.getpid() % 100),
        "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST",
        TRANSPORTS_VARIABLE: LARGE_IMAGE_TRANSPORTS,
    }
    ours = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


class NodeProcess:
    """A child process with a log file; `node_process` makes it."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self._process = process
        self._log = log
        self.pid = process.pid

    def poll(self) -> int | None:
        """Return the exit code, or None while it runs."""
        return self._process.poll()

    def failure(self, what: str) -> LiveRunError:
        """Return the error that says what went wrong, with the log's end."""
        with contextlib.suppress(OSError):
            tail = self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
            return LiveRunError(
                f"{self._log.stem} {what}; {self._log} ends with:\n" + "\n".join(tail)
            )
        return LiveRunError(f"{self._log.stem} {what}")

    def check_running(self) -> None:
        """Raise `LiveRunError` if it has ended."""
        if self.poll() is not None:
            raise self.failure(f"ended early with exit code {self.poll()}")

    def stop(self) -> None:
        """Ask with SIGINT, as a terminal does, and expect a clean end."""
        self.send_signal(signal.SIGINT)
        code = self.wait(_STOP_TIMEOUT_S)
        if code != 0:
            raise self.failure(f"stopped with exit code {code}")

    def send_signal(self, number: int) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    def wait(self, timeout_s: float) -> int:
        """Return the exit code once it has ended.

        Raises:
            LiveRunError: It has not in time.
        """
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise self.failure(f"did not stop within {timeout_s:.0f} s") from None

    def peak_memory(self) -> int:
        """Return its largest resident memory so far, bytes."""
        try:
            return process_memory("VmHWM", self.pid)
        except RuntimeError as error:  # it has ended
            raise self.failure("does not tell its peak memory") from error

    def end(self) -> None:
        """End it, whatever it does; a killed one leaves shared memory behind, so it is asked."""
        try:
            if self.poll() is None:
                self._process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(_END_TIMEOUT_S)
        finally:
            if self.poll() is None:
                self._process.kill()
                self._process.wait()


@contextlib.contextmanager
def node_process(arguments: Sequence[str], log: Path) -> Iterator[NodeProcess]:
    """Run this Python with some arguments; it ends with the block, and with this process.

    Args:
        arguments: Behind the interpreter's name.
        log: File for all that it prints.
    """
    # In a session of its own it does not hear a terminal's Ctrl-C: it is ended here, in order.
    with log.open("wb") as stream:
        child = NodeProcess(
            subprocess.Popen(
                [*_TIED_TO_PARENT, sys.executable, *arguments],
                stdout=stream,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            ),
            log,
        )
        try:
            yield child
        finally:
            child.end()


@contextlib.contextmanager
def chunk_recorder() -> Iterator[ChunkRecorder]:
    """Make a recorder in a ROS context of its own, for the length of a block."""
    import rclpy

    context = rclpy.Context()
    rclpy.init(context=context)
    try:
        recorder = ChunkRecorder(context)
        try:
            yield recorder
        finally:
            recorder.close()
    finally:
        rclpy.shutdown(context=context)


class ChunkRecorder:
    """A node in this process that keeps every chunk and the last diagnostics."""

    def __init__(self, context: Any) -> None:
        import rclpy
        from diagnostic_msgs.msg import DiagnosticArray
        from lifecycle_msgs.msg import State
        from lifecycle_msgs.srv import GetState
        from rclpy.executors import SingleThreadedExecutor
        from std_msgs.msg import String
        from trajectory_msgs.msg import JointTrajectory

        self._active = State.PRIMARY_STATE_ACTIVE
        self._state_request = GetState.Request()
        self._node = rclpy.create_node(f"live_run_{os.getpid()}", context=context)
        self._executor = SingleThreadedExecutor(context=context)
        self._executor.add_node(self._node)
        self._trajectories: dict[int, Any] = {}
        self._infos: dict[int, dict[str, Any]] = {}
        self.statuses: dict[str, tuple[int, str]] = {}
        for kind, topic, callback in (
            (JointTrajectory, f"/{_NODE_NAME}/action_chunk", self._on_chunk),
            (String, f"/{_NODE_NAME}/chunk_info", self._on_info),
            (DiagnosticArray, "/diagnostics", self._on_diagnostics),
        ):
            self._node.create_subscription(kind, topic, callback, 1000)
        self._get_state: Any = self._node.create_client(GetState, f"/{_NODE_NAME}/get_state")

    def spin(self, seconds: float) -> None:
        """Receive for a while."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._executor.spin_once(timeout_sec=left)

    def wait_until_active(self, process: NodeProcess) -> None:
        """Receive until the policy node is active.

        Raises:
            LiveRunError: It ended, failed, or was not active in time.
        """
        end = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < end:
            process.check_running()
            if self._get_state.service_is_ready():
                future = self._get_state.call_async(self._state_request)
                self._executor.spin_until_future_complete(future, timeout_sec=5.0)
                if future.done() and future.result().current_state.id == self._active:
                    return
            self.spin(0.2)
            level, message = self.statuses.get(_ENGINE_STATUS, (0, ""))
            if level == _ERROR:
                # Autostart is tried once; the node then waits for somebody to mend it.
                raise process.failure(f"does not start ({message})")
        raise process.failure(f"was not active after {_START_TIMEOUT_S:.0f} s")

    def chunks(self) -> tuple[LiveChunk, ...]:
        """Return the chunks with what the node published beside them.

        Raises:
            LiveRunError: One came without the other.
        """
        missing = set(self._trajectories) ^ set(self._infos)
        if missing:
            raise LiveRunError(f"{len(missing)} chunk(s) came without their info, or the reverse")
        return tuple(
            LiveChunk(
                stamp_ns=stamp,
                joint_names=tuple(message.joint_names),
                positions=np.array([point.positions for point in message.points], np.float64),
                time_from_start_s=np.array(
                    [
                        point.time_from_start.sec + point.time_from_start.nanosec * 1e-9
                        for point in message.points
                    ]
                ),
                info=self._infos[stamp],
            )
            for stamp, message in self._trajectories.items()
        )

    def close(self) -> None:
        """Leave."""
        self._executor.shutdown()
        self._node.destroy_node()

    def _on_chunk(self, message: Any) -> None:
        stamp = message.header.stamp
        self._trajectories[stamp.sec * 10**9 + stamp.nanosec] = message

    def _on_info(self, message: Any) -> None:
        info = json.loads(message.data)
        self._infos[info["stamp_ns"]] = info

    def _on_diagnostics(self, message: Any) -> None:
        for status in message.status:
            level = status.level[0] if isinstance(status.level, bytes) else int(status.level)
            self.statuses[status.name] = (level, status.message)
