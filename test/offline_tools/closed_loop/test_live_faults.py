"""Hazards of the live loop: a robot that stops in the middle of an episode, or is gone.

Robot, policy node and executor are three processes over DDS, in real time.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rclpy", reason="rclpy is not installed: no node can be run")

from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from trajectory_msgs.msg import JointTrajectory

from offline_tools.evaluate.node_processes import NodeProcess, node_process
from offline_tools.simulation.config_files import NODES, config_file
from offline_tools.simulation.ros_messages import ARM_COMMAND_TOPIC, CHUNK_TOPIC

from ...nodes import Listener

DOMAIN_ID = 1 + os.getpid() % 100


class Watcher(Listener):
    """What the executor commands and says, and how many chunks the policy gives."""

    def __init__(self, node: Node, executor: SingleThreadedExecutor) -> None:
        super().__init__(node, executor, "chunk_executor")
        self.commands: list[tuple[float, ...]] = []
        self.chunks = 0
        node.create_subscription(JointTrajectory, ARM_COMMAND_TOPIC, self._on_command, 100)
        node.create_subscription(JointTrajectory, CHUNK_TOPIC, self._on_chunk, 100)

    def _on_command(self, message: JointTrajectory) -> None:
        self.commands.append(tuple(message.points[-1].positions))

    def _on_chunk(self, _: JointTrajectory) -> None:
        self.chunks += 1

    def until_it_works(self) -> None:
        """Wait for new chunks and for commands that move."""
        chunks, self.commands = self.chunks, []
        self.until(
            lambda: self.chunks > chunks + 1 and len(set(self.commands[-10:])) > 5,
            "chunks and commands that move",
        )

    def until_it_holds(self) -> None:
        """Wait until the executor says that the robot is silent, and stands still."""
        self.forget()
        self.until(lambda: self.says("joint states", "joint state is stale"), "the silence")
        self.commands = []
        self.until(
            lambda: len(self.commands) > 20 and len(set(self.commands[-20:])) == 1, "a hold"
        )


@pytest.fixture
def watcher(ros_node: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[Watcher]:
    monkeypatch.setenv("ROS_DOMAIN_ID", str(DOMAIN_ID))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with ros_node("watcher", DOMAIN_ID) as (node, executor):
        yield Watcher(node, executor)


@pytest.mark.slow
def test_a_robot_that_is_paused_or_gone_in_mid_episode_is_held_and_taken_up_again(
    watcher: Watcher, shipped_bundle: Path, tmp_path: Path
) -> None:
    words = ["--ros-args", "--params-file", str(config_file(NODES))]
    with contextlib.ExitStack() as running:

        def start(name: str, *arguments: str) -> NodeProcess:
            return running.enter_context(node_process(["-m", *arguments], tmp_path / name))

        def start_robot(name: str, *more: str) -> NodeProcess:
            # Episodes without end.
            return start(name, "offline_tools.cli", "simulate", "--episodes", "10000", *more)

        policy = start(
            "policy", "groot_int8_ros.policy_node", *words, "-p", f"bundle:={shipped_bundle}"
        )
        executor = start("executor", "groot_int8_ros.chunk_executor_node", *words)
        robot = start_robot("robot", "--enable")
        watcher.until_it_works()

        os.kill(robot.pid, signal.SIGSTOP)
        watcher.until_it_holds()
        chunks = watcher.chunks
        # The observations that there were have been answered.
        watcher.commands = []
        watcher.until(lambda: len(watcher.commands) > 50, "commands that go on")
        assert watcher.chunks <= chunks + 1
        os.kill(robot.pid, signal.SIGCONT)
        watcher.until_it_works()

        os.kill(robot.pid, signal.SIGKILL)
        watcher.until_it_holds()
        start_robot("another robot")
        watcher.until_it_works()
        for node in (executor, policy):
            node.check_running()
            node.stop()
