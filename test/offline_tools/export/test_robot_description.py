"""Hazards of the robot that a bundle is exported for: a source that misses or contradicts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from groot_int8_ros.errors import ConfigurationError, DatasetError
from groot_int8_ros.policy.processor import Processor, load_processor
from groot_int8_ros.policy.types import JointSpec
from offline_tools.export.robot_description import describe_robot

ROBOT: Any = {
    "action_period_s": 0.1,
    "cameras": {"wrist": {"width": 320, "height": 240}, "front": {"width": 800, "height": 600}},
    "state_joints": {
        "single_arm": [{"name": f"arm{i}", "unit": "degrees", "sign": -1} for i in range(5)]
    },
}


@pytest.fixture(scope="module")
def processor(tiny_checkpoint: Path) -> Processor:
    return load_processor(tiny_checkpoint)


@pytest.fixture
def robot_file(tmp_path: Path) -> Callable[[Callable[[Any], None]], Path]:
    def write(change: Callable[[Any], None]) -> Path:
        content = copy.deepcopy(ROBOT)
        change(content)
        path = tmp_path / "robot.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


Writer = Callable[[Callable[[Any], None]], Path]


def test_nothing_given_says_what_to_pass(processor: Processor) -> None:
    with pytest.raises(ConfigurationError, match="pass --dataset with the training data, or --ro"):
        describe_robot(processor, None, None)


def test_dataset_alone_gives_sizes_names_and_rate(
    processor: Processor, tiny_dataset: Path
) -> None:
    robot = describe_robot(processor, None, tiny_dataset)
    assert [(c.key, c.height, c.width) for c in robot.cameras] == [
        ("front", 480, 640),
        ("wrist", 480, 640),
    ]
    assert [joint.name for joint in robot.state_joints["single_arm"]] == [
        "shoulder_pan",
        "shoulder_lift",
        "elbow_flex",
        "wrist_flex",
        "wrist_roll",
    ]
    assert robot.action_joints == robot.state_joints
    assert robot.action_period_s == pytest.approx(1 / 30)


def test_robot_file_alone_is_enough_and_cameras_take_the_checkpoints_order(
    processor: Processor, robot_file: Writer
) -> None:
    robot = describe_robot(processor, robot_file(lambda r: None), None)
    assert [(c.key, c.width) for c in robot.cameras] == [("front", 800), ("wrist", 320)]
    # Commands go to the joints whose states are read, through the inverse of the same mapping.
    assert robot.action_joints["single_arm"] == robot.state_joints["single_arm"]
    assert robot.state_joints["single_arm"][4] == JointSpec("arm4", "degrees", -1.0, 0.0)
    # No source names the gripper's joint.
    assert robot.state_joints["gripper"] == (JointSpec("gripper_0"),)


def test_robot_file_comes_before_the_dataset_key_by_key(
    processor: Processor, robot_file: Writer, tiny_dataset: Path
) -> None:
    path = robot_file(lambda r: r["cameras"].pop("wrist"))
    robot = describe_robot(processor, path, tiny_dataset)
    assert [(c.key, c.width) for c in robot.cameras] == [("front", 800), ("wrist", 640)]
    assert robot.state_joints["single_arm"][0].name == "arm0"
    assert robot.state_joints["gripper"] == (JointSpec("gripper"),)
    assert robot.action_period_s == 0.1


def test_action_joints_of_their_own_are_kept(processor: Processor, robot_file: Writer) -> None:
    path = robot_file(lambda r: r.update(action_joints={"gripper": ["finger"]}))
    robot = describe_robot(processor, path, None)
    assert robot.action_joints["gripper"] == (JointSpec("finger"),)
    assert robot.state_joints["gripper"] == (JointSpec("gripper_0"),)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda r: r["cameras"].pop("wrist"),
            r"sees through a camera 'wrist', and neither .* gives its size; they know \['front'\]",
        ),
        (
            lambda r: r["cameras"].update(wirst={"width": 1, "height": 1}),
            r"the checkpoint has no cameras\.wirst; it has front, wrist",
        ),
        (
            lambda r: r["state_joints"].update(single_arms=["a"]),
            r"the checkpoint has no state_joints\.single_arms; it has single_arm, gripper",
        ),
        (
            lambda r: r.update(action_joints={"arm": ["a"]}),
            r"the checkpoint has no action_joints\.arm; it has single_arm, gripper",
        ),
        (
            lambda r: r["state_joints"]["single_arm"].pop(),
            "the state key 'single_arm' has 5 dimensions in .* but 4 joints are given",
        ),
        (
            lambda r: r.update(action_joints={"gripper": ["left", "right"]}),
            "the action key 'gripper' has 1 dimensions in .* but 2 joints are given",
        ),
        (
            lambda r: r["state_joints"]["single_arm"].append("arm0"),
            r"state_joints\.single_arm names the joint 'arm0' twice",
        ),
        (
            lambda r: r["state_joints"]["single_arm"][0].update(unit="turns"),
            r"state_joints\.single_arm\[0\]\.unit must be one of radians, degrees, raw",
        ),
    ],
)
def test_robot_file_that_does_not_fit_the_checkpoint_is_refused(
    processor: Processor, robot_file: Writer, change: Callable[[Any], None], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        describe_robot(processor, robot_file(change), None)


def test_dataset_that_is_none_is_refused(processor: Processor, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=str(tmp_path)):
        describe_robot(processor, None, tmp_path)
