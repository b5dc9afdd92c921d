"""Parameters from a bundle: statistics of another joint or unit, a file that is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from groot_int8_ros.policy.bundle import open_bundle
from groot_int8_ros.policy.robot import policy_to_joint
from offline_tools.cli import EXIT_USER_ERROR, main
from offline_tools.dataset.lerobot import LeRobotDataset


def write(bundle: Path, output: Path, *words: str) -> dict[str, Any]:
    assert main(["executor-params", "--bundle", str(bundle), "--output", str(output), *words]) == 0
    values: dict[str, Any] = yaml.safe_load(output.read_text())["/**/chunk_executor"]
    return dict(values["ros__parameters"])


def test_statistics_are_what_was_recorded_in_the_units_of_the_robot(
    tiny_bundle: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    values = write(tiny_bundle, tmp_path / "executor.yaml", "--velocity", "2.0")
    robot = open_bundle(tiny_bundle, verify_hashes=False).manifest.robot
    episode = LeRobotDataset.open(tiny_dataset).episode(0)
    assert values["channels"] == list(robot.action_joints)
    for key, joints in robot.action_joints.items():
        channel = values["channel"][key]
        assert channel["joints"] == [joint.name for joint in joints]
        # The arm's actions are relative: its range is that of the state; the gripper's is its own.
        recorded = episode.state[key] if key != "gripper" else episode.action[key]
        positions = policy_to_joint(joints, recorded.astype(np.float64))
        np.testing.assert_allclose(channel["statistics_low"], positions.min(0), atol=1e-5)
        np.testing.assert_allclose(channel["statistics_high"], positions.max(0), atol=1e-5)


def test_the_executor_takes_the_file(tiny_bundle: Path, tmp_path: Path) -> None:
    rclpy = pytest.importorskip("rclpy", reason="needs the ROS 2 Python packages")
    from rclpy.context import Context
    from rclpy.node import Node

    from groot_int8_ros.ros.executor_parameters import ExecutorParameterSet

    file = tmp_path / "executor.yaml"
    write(tiny_bundle, file, "--velocity", "2.0", "--acceleration", "8.0")
    context = Context()
    rclpy.init(args=["--ros-args", "--params-file", str(file)], context=context)
    node = Node(
        "chunk_executor", context=context, automatically_declare_parameters_from_overrides=True
    )
    try:
        declared = ExecutorParameterSet(node, lambda: False, lambda names: None)
        settings, _ = declared.settings()
        assert declared.strangers() == []
        assert sum(len(channel.joints) for channel in settings.channels) == 6
        assert {channel.limits.velocity[0] for channel in settings.channels} == {2.0}
    finally:
        node.destroy_node()
        rclpy.shutdown(context=context)


def test_what_is_missing_is_said(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["executor-params", "--bundle", str(tiny_bundle), "--output", str(tmp_path / "x.yaml")]
    assert main(words) == EXIT_USER_ERROR
    assert "--velocity" in capsys.readouterr().err
    urdf = tmp_path / "other.urdf"
    urdf.write_text('<robot><joint name="else" type="revolute"/></robot>')
    assert main([*words, "--urdf", str(urdf)]) == EXIT_USER_ERROR
    assert "has no joint" in capsys.readouterr().err
    assert not (tmp_path / "x.yaml").exists()
