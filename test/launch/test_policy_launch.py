"""The launch files with the real launch system, where it is installed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("rclpy", reason="needs the ROS 2 Python packages")
# The repository's folder launch/ passes for an empty package of that name: a part is asked for.
pytest.importorskip("launch.actions", reason="launch comes with ROS 2, not with PyPI")
pytest.importorskip("launch_ros.actions", reason="launch_ros comes with ROS 2, not with PyPI")

from diagnostic_msgs.msg import DiagnosticArray
from rcl_interfaces.srv import GetParameters
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.parameter import parameter_value_to_python

DEADLINE_S = 120.0
DOMAIN_ID = 1 + os.getpid() % 100

# What `ros2 launch FILE NAME:=VALUE ...` does, with another process that would keep it alive.
LAUNCHER = """
import sys
from launch import LaunchDescription, LaunchService
from launch.actions import ExecuteProcess, IncludeLaunchDescription
from launch.launch_description_sources import PythonLaunchDescriptionSource

file, *arguments = sys.argv[1:]
service = LaunchService()
service.include_launch_description(
    LaunchDescription(
        [
            ExecuteProcess(cmd=["sleep", "600"]),
            IncludeLaunchDescription(
                PythonLaunchDescriptionSource(file),
                launch_arguments=[tuple(text.split(":=", 1)) for text in arguments],
            )
        ]
    )
)
sys.exit(service.run())
"""


@pytest.fixture
def prefix(tmp_path: Path, repository_root: Path) -> Path:
    """The package as an ament prefix, the way `colcon build` lays it out."""
    folder = tmp_path / "install"
    marker = folder / "share/ament_index/resource_index/packages/groot_int8_ros"
    marker.parent.mkdir(parents=True)
    marker.touch()
    for name in ("launch", "config"):
        shutil.copytree(repository_root / name, folder / "share/groot_int8_ros" / name)
    for name in ("policy_node", "calibration_recorder_node", "chunk_executor_node"):
        executable = folder / "lib/groot_int8_ros" / name
        executable.parent.mkdir(parents=True, exist_ok=True)
        executable.write_text(
            f"#!{sys.executable}\nimport sys\nfrom groot_int8_ros.{name} import main\n"
            "sys.exit(main())\n"
        )
        executable.chmod(executable.stat().st_mode | stat.S_IXUSR)
    return folder


class Launched:
    """A launch in its own process, and what can be seen of it."""

    def __init__(
        self,
        prefix: Path,
        repository_root: Path,
        ear: tuple[Node, SingleThreadedExecutor],
        file: str,
        *arguments: str,
    ) -> None:
        self.log = prefix / "log.txt"
        node, executor = ear
        self._node = node
        self._executor = executor
        self.messages: dict[str, str] = {}
        node.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 50)
        search = [
            str(repository_root),
            *(entry for entry in sys.path if entry and "site-packages" not in entry),
        ]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-c", LAUNCHER),
                    str(prefix / "share/groot_int8_ros/launch" / file),
                    *arguments,
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ
                | {
                    "AMENT_PREFIX_PATH": str(prefix),
                    "PYTHONPATH": os.pathsep.join(search),
                    "ROS_DOMAIN_ID": str(DOMAIN_ID),
                    "ROS_LOG_DIR": str(prefix / "log"),
                },
            )

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        self.messages |= {status.name: status.message for status in message.status}

    def until(self, met: Callable[[], Any], what: str) -> None:
        end = time.monotonic() + DEADLINE_S
        while not met():
            if time.monotonic() > end or self.process.poll() is not None:
                pytest.fail(f"not seen: {what}\n{self.log.read_text()}")
            self._executor.spin_once(timeout_sec=0.1)

    def parameters(self, node_name: str, names: list[str]) -> dict[str, object]:
        client: Any = self._node.create_client(GetParameters, f"{node_name}/get_parameters")
        self.until(client.service_is_ready, f"{node_name}'s parameter service")
        future = client.call_async(GetParameters.Request(names=names))
        self.until(future.done, "parameters")
        values = [parameter_value_to_python(value) for value in future.result().values]
        return dict(zip(names, values, strict=True))

    def node_process_id(self, name: str = "policy_node") -> int:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        for process_id in map(int, children.split()):
            if name.encode() in Path(f"/proc/{process_id}/cmdline").read_bytes():
                return process_id
        pytest.fail(f"{name} is not among the launched processes {children}")


Start = Callable[..., Launched]


@pytest.fixture
def start(prefix: Path, repository_root: Path, ros_node: Callable[..., Any]) -> Iterator[Start]:
    started: list[Launched] = []
    with ros_node("launch_test", DOMAIN_ID) as ear:

        def launch(*arguments: str, file: str = "policy.launch.py") -> Launched:
            started.append(Launched(prefix, repository_root, ear, file, *arguments))
            return started[-1]

        yield launch
        for launched in started:
            if launched.process.poll() is None:
                os.killpg(launched.process.pid, signal.SIGKILL)
                launched.process.wait()


def test_arguments_reach_the_node_and_the_yaml_keeps_what_they_leave_out(
    start: Start, tmp_path: Path
) -> None:
    file = tmp_path / "robot.yaml"
    content = {"seed": 5, "bundle": "/from/the/yaml", "instruction": "wave"}
    file.write_text(yaml.safe_dump({"/**": {"ros__parameters": content}}))
    launched = start(
        "namespace:=arm",
        f"params_file:={file}",
        "bundle:=/nowhere/bundle",
        "use_sim_time:=true",
        "log_level:=debug",
    )
    names = ["seed", "bundle", "instruction", "use_sim_time", "autostart"]
    assert launched.parameters("/arm/policy_node", names) == {
        "seed": 5,
        "bundle": "/nowhere/bundle",
        "instruction": "wave",
        "use_sim_time": True,
        "autostart": True,
    }
    # Started by itself, refused for its reason, and alive to be tried again.
    launched.until(
        lambda: "/nowhere/bundle" in launched.messages.get("arm/policy_node: engine", ""),
        "why configuring failed",
    )
    launched.until(lambda: "[DEBUG]" in launched.log.read_text(), "debug output")
    launched.process.send_signal(signal.SIGINT)
    assert launched.process.wait(DEADLINE_S) == 0, launched.log.read_text()
    assert "process has finished cleanly" in launched.log.read_text()


def test_recorders_arguments_reach_the_node(start: Start, tmp_path: Path) -> None:
    launched = start(
        "bundle:=/nowhere/bundle",
        f"output:={tmp_path / 'store'}",
        "with_chunks:=false",
        "use_sim_time:=true",
        file="recorder.launch.py",
    )
    names = ["bundle", "output", "with_chunks", "use_sim_time", "samples"]
    assert launched.parameters("/calibration_recorder", names) == {
        "bundle": "/nowhere/bundle",
        "output": str(tmp_path / "store"),
        "with_chunks": False,
        "use_sim_time": True,
        "samples": 256,
    }
    launched.until(
        lambda: "/nowhere/bundle" in launched.messages.get("calibration_recorder: recorder", ""),
        "why configuring failed",
    )
    launched.process.send_signal(signal.SIGINT)
    assert launched.process.wait(DEADLINE_S) == 0, launched.log.read_text()
    assert not (tmp_path / "store").exists()


def test_executors_arguments_reach_the_node(start: Start) -> None:
    launched = start("use_sim_time:=true", "namespace:=arm", file="executor.launch.py")
    names = ["channels", "use_sim_time", "autostart", "control_rate_hz"]
    assert launched.parameters("/arm/chunk_executor", names) == {
        "channels": [""],
        "use_sim_time": True,
        "autostart": True,
        "control_rate_hz": 50.0,
    }
    launched.until(
        lambda: "channels" in launched.messages.get("arm/chunk_executor: executor", ""),
        "why configuring failed",
    )
    launched.process.send_signal(signal.SIGINT)
    assert launched.process.wait(DEADLINE_S) == 0, launched.log.read_text()


def test_the_executor_outlives_the_policy_and_the_launch_ends_with_the_executor(
    start: Start, repository_root: Path
) -> None:
    launched = start(
        f"params_file:={repository_root / 'config' / 'so101.yaml'}",
        "bundle:=/nowhere/bundle",
        file="robot.launch.py",
    )
    assert launched.parameters("/policy_node", ["bundle", "engine"]) == {
        "bundle": "/nowhere/bundle",
        "engine": "tensorrt",
    }
    assert launched.parameters("/chunk_executor", ["channels"]) == {"channels": ["arm", "gripper"]}
    active = "commands are disabled; call ~/enable"
    launched.until(
        lambda: launched.messages.get("chunk_executor: executor") == active, "an active executor"
    )
    first = launched.node_process_id()
    os.kill(first, signal.SIGKILL)
    # Launch starts the policy again; the executor has not noticed.
    started = re.compile(r"policy_node-\d+\]: process started with pid \[(\d+)\]")
    launched.until(
        lambda: {int(pid) for pid in started.findall(launched.log.read_text())} - {first},
        "another policy",
    )
    assert launched.messages["chunk_executor: executor"] == active
    os.kill(launched.node_process_id("chunk_executor"), signal.SIGKILL)
    launched.process.wait(DEADLINE_S)


def test_launch_ends_when_its_node_dies(start: Start) -> None:
    launched = start("autostart:=false")
    assert launched.parameters("/policy_node", ["bundle", "autostart"]) == {
        "bundle": "",
        "autostart": False,
    }
    os.kill(launched.node_process_id(), signal.SIGKILL)
    launched.process.wait(DEADLINE_S)
    assert "process has died" in launched.log.read_text()


def test_the_demo_does_its_episode_and_ends_with_it(
    start: Start, shipped_bundle: Path, tmp_path: Path
) -> None:
    pytest.importorskip("mujoco", reason="the simulated robot needs MuJoCo")
    results = tmp_path / "results.jsonl"
    arguments = (f"bundle:={shipped_bundle}", "stepped:=true", "episodes:=1", f"output:={results}")
    launched = start(*arguments, file="demo.launch.py")
    names = ["chunk_timeout_s", "channels"]
    assert launched.parameters("/chunk_executor", names) == {
        "chunk_timeout_s": 60.0,
        "channels": ["arm", "gripper"],
    }
    assert launched.process.wait(5 * DEADLINE_S) == 0, launched.log.read_text()
    (result,) = map(json.loads, results.read_text().splitlines())
    assert result["success"], launched.log.read_text()
    # Robot, executor and policy.
    assert launched.log.read_text().count("process has finished cleanly") == 3


def test_the_demo_without_a_bundle_is_the_whole_demonstration_and_ends_with_it(
    start: Start, tmp_path: Path
) -> None:
    pytest.importorskip("mujoco", reason="the demonstration needs the simulated robot")
    # Told of a number that the command refuses: what is asked for arrives, and nothing is made.
    launched = start("episodes:=0", f"output:={tmp_path / 'out'}", file="demo.launch.py")
    assert launched.process.wait(DEADLINE_S) == 0
    text = launched.log.read_text()
    assert "groot-int8 demo" in text
    assert "--episodes: expected a whole number of at least 1, not '0'" in text
    assert not (tmp_path / "out").exists()
