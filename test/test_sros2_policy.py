"""Hazard: a topic or service that the SROS2 policy forgets, which then fails on the robot.

The real nodes, configured, are asked what they publish, read and serve; the policy has to allow
each of it and nothing that none of them has.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

pytest.importorskip("rclpy", reason="needs the ROS 2 Python packages")

from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node

from groot_int8_ros.calibration_recorder_node import CalibrationRecorderNode
from groot_int8_ros.chunk_executor_node import ChunkExecutorNode
from groot_int8_ros.policy_node import PolicyNode

DEADLINE_S = 60.0
DOMAIN_ID = 1 + os.getpid() % 100
Names = dict[str, set[str]]


def _allowed(repository_root: Path, node: str) -> Names:
    root = ElementTree.parse(repository_root / "config/sros2/groot.policy.xml").getroot()
    (profile,) = root.iterfind(f".//profile[@node='{node}']")
    names: Names = {"publish": set(), "subscribe": set(), "reply": set()}
    for block in profile:
        for verb in block.attrib:
            for element in block:
                assert element.text is not None
                text = element.text.replace("~", f"/{node}", 1)
                names[verb].add(text if text.startswith("/") else f"/{text}")
    return names


@pytest.fixture
def watcher(ros_node: Callable[..., Any]) -> Iterator[tuple[Node, SingleThreadedExecutor]]:
    with ros_node("watcher", DOMAIN_ID) as made:
        yield made


def _parameters(repository_root: Path, bundle: Path, node: str, output: Path) -> list[str]:
    file = repository_root / "config" / "so101.yaml"
    words = ["--ros-args", "--params-file", str(file), "-p", "engine:=onnxruntime"]
    if node == "chunk_executor":
        return [*words[:3], "-p", "seam.kind:=rtc"]
    if node == "calibration_recorder":
        words = ["--ros-args", "-p", f"output:={output}"]
        for camera in ("front", "wrist"):
            words += ["-p", f"cameras.{camera}.topic:=/{camera}_camera/image_raw"]
    return [*words, "-p", f"bundle:={bundle}"]


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("policy_node", PolicyNode),
        ("chunk_executor", ChunkExecutorNode),
        ("calibration_recorder", CalibrationRecorderNode),
    ],
)
def test_the_policy_allows_what_a_node_uses_and_no_more(
    watcher: tuple[Node, SingleThreadedExecutor],
    repository_root: Path,
    small_deployed: Path,
    tmp_path: Path,
    name: str,
    make: Callable[..., Any],
) -> None:
    other, executor = watcher
    arguments = _parameters(repository_root, small_deployed, name, tmp_path / "store")
    node = make(context=other.context, cli_args=arguments, parameter_overrides=[])
    executor.add_node(node)
    allowed = _allowed(repository_root, name)
    try:
        node.trigger_configure()
        assert node._failure is None

        def used() -> Names:
            return {
                verb: {topic for topic, _ in ask(name, "/")}
                for verb, ask in (
                    ("publish", other.get_publisher_names_and_types_by_node),
                    ("subscribe", other.get_subscriber_names_and_types_by_node),
                    ("reply", other.get_service_names_and_types_by_node),
                )
            }

        end = time.monotonic() + DEADLINE_S
        # Time is subscribed to with use_sim_time only, and get_type_description is not in Humble.
        optional = {"/clock", f"/{name}/get_type_description"}
        if name == "calibration_recorder":
            # Read where it records without a policy node.
            optional |= {"/instruction"}
        while True:
            differences = {
                verb: (names ^ allowed[verb]) - optional for verb, names in used().items()
            }
            if not any(differences.values()):
                return
            assert time.monotonic() < end, differences
            executor.spin_once(timeout_sec=0.1)
    finally:
        executor.remove_node(node)
        node.close()
        node.destroy_node()
