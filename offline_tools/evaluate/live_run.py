"""Running the policy node on a bag, in a process of its own, and collecting what it publishes.

Owns: starting node and player as processes, and the recorder between them. Must not import torch.
Nothing is short-circuited: camera frames and joint states reach the node through DDS as they
would on a robot.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from groot_int8_ros.errors import GrootError
from groot_int8_ros.policy.types import Float64Array
from offline_tools.bags.dds import LARGE_IMAGE_TRANSPORTS, TRANSPORTS_VARIABLE

# A recorded frame can be sent again, so a busy machine need not lose it; and what comes late must
# not count as stale, since it is the recording that is judged, not this machine.
PLAYBACK_PARAMETERS: Mapping[str, Any] = {
    "sensor_qos.reliability": "reliable",
    "sensor_qos.depth": 5,
    "max_observation_age_s": 2.0,
    "max_observation_skew_s": 0.5,
}

_NODE_NAME = "policy_node"
_ENGINE_STATUS = f"{_NODE_NAME}: engine"
# `diagnostic_msgs/DiagnosticStatus.ERROR`
_ERROR = 2
_START_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 30.0
# After the player's end the node may still be busy with its last observation.
_SETTLE_S = 2.0


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


@dataclass(frozen=True)
class LiveRun:
    """What one run gave.

    Attributes:
        chunks: In the order of their arrival.
        statuses: The last diagnostic status of each name: (level, message).
        wall_s: From the player's start to its end.
        node_peak_bytes: Largest resident memory of the node's process.
    """

    chunks: tuple[LiveChunk, ...]
    statuses: Mapping[str, tuple[int, str]]
    wall_s: float
    node_peak_bytes: int


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


def run_live(
    bag: Path,
    parameters: Mapping[str, Any],
    folder: Path,
    *,
    rate: float = 1.0,
    report: Callable[[str], None] = print,
) -> LiveRun:
    """Start the node, play a bag to it and collect its chunks.

    Args:
        bag: rosbag2 with the topics that the parameters name.
        parameters: The node's parameters; `PLAYBACK_PARAMETERS`, `use_sim_time` and `autostart`
            are added.
        folder: Where `parameters.yaml` and both processes' logs go.
        rate: Speed of the bag.
        report: Called with a line of progress at a time.

    Raises:
        LiveRunError: A process did not start, failed, or did not stop; the message names its log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        **PLAYBACK_PARAMETERS,
        **parameters,
        "use_sim_time": True,
        "autostart": True,
    }
    parameter_file = folder / "parameters.yaml"
    parameter_file.write_text(
        yaml.safe_dump({"/**": {"ros__parameters": settings}}), encoding="utf-8"
    )
    node_command = ["-m", "groot_int8_ros.policy_node", "--ros-args", "--params-file"]
    play_command = ["-m", "offline_tools.cli", "play-bag", str(bag), "--clock"]
    play_command += ["--rate", str(rate), "--wait-for-subscribers", "20"]
    with isolated_ros(), _recorder() as recorder:
        with _process([*node_command, str(parameter_file)], folder / "policy_node.log") as node:
            recorder.wait_until_active(node)
            report(f"{_NODE_NAME} is active (process {node.pid})")
            start = time.monotonic()
            with _process(play_command, folder / "play_bag.log") as player:
                while player.poll() is None:
                    recorder.spin(0.1)
                    node.check_running()
                if player.poll() != 0:
                    raise player.failure(f"ended with exit code {player.poll()}")
            wall = time.monotonic() - start
            recorder.spin(_SETTLE_S)
            peak = _peak_memory(node.pid)
            node.stop()
        return LiveRun(
            chunks=recorder.chunks(),
            statuses=recorder.statuses,
            wall_s=wall,
            node_peak_bytes=peak,
        )


class _Process:
    """A child process with a log file."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self._process = process
        self._log = log
        self.pid = process.pid

    def poll(self) -> int | None:
        return self._process.poll()

    def failure(self, what: str) -> LiveRunError:
        with contextlib.suppress(OSError):
            tail = self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
            return LiveRunError(
                f"{self._log.stem} {what}; {self._log} ends with:\n" + "\n".join(tail)
            )
        return LiveRunError(f"{self._log.stem} {what}")

    def check_running(self) -> None:
        if self.poll() is not None:
            raise self.failure(f"ended early with exit code {self.poll()}")

    def stop(self) -> None:
        """Ask with SIGINT, as a terminal does, and expect a clean end."""
        self._process.send_signal(signal.SIGINT)
        try:
            code = self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise self.failure(f"did not stop within {_STOP_TIMEOUT_S:.0f} s") from None
        if code != 0:
            raise self.failure(f"stopped with exit code {code}")

    def kill(self) -> None:
        if self.poll() is None:
            self._process.kill()
            self._process.wait()


@contextlib.contextmanager
def _process(arguments: list[str], log: Path) -> Iterator[_Process]:
    with log.open("wb") as stream:
        child = _Process(
            subprocess.Popen(
                [sys.executable, *arguments],
                stdout=stream,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            ),
            log,
        )
        try:
            yield child
        finally:
            child.kill()


@contextlib.contextmanager
def _recorder() -> Iterator[_Recorder]:
    import rclpy

    context = rclpy.Context()
    rclpy.init(context=context)
    try:
        recorder = _Recorder(context)
        try:
            yield recorder
        finally:
            recorder.close()
    finally:
        rclpy.shutdown(context=context)


class _Recorder:
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
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._executor.spin_once(timeout_sec=left)

    def wait_until_active(self, process: _Process) -> None:
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


def _peak_memory(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise LiveRunError(f"/proc/{pid}/status does not tell the process's peak memory")
