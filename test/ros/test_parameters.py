"""Parameters: wrong ones are refused by name, and the YAML says what the code does."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("rclpy", reason="needs the ROS 2 Python packages")

import rclpy
from rclpy.context import Context
from rclpy.node import Node
from rclpy.parameter import Parameter

from groot_int8_ros.errors import ConfigurationError
from groot_int8_ros.policy.robot import RobotDescription
from groot_int8_ros.policy.types import CameraSpec, JointSpec
from groot_int8_ros.ros.executor_parameters import EXECUTOR_PARAMETERS
from groot_int8_ros.ros.parameters import PARAMETERS, Declaration, Parameters
from groot_int8_ros.ros.recorder_parameters import RECORDER_PARAMETERS

ARM = (JointSpec("pan", "degrees", -1.0, 90.0), JointSpec("lift", "degrees"))
ROBOT = RobotDescription(
    cameras=(CameraSpec("front", 48, 64), CameraSpec("ego view", 48, 64)),
    state_joints={"arm": ARM},
    action_joints={"arm": ARM, "jaw": (JointSpec("jaw"),)},
    action_period_s=0.1,
)
MakeNode = Callable[..., Node]


@pytest.fixture
def make_node() -> Iterator[MakeNode]:
    context = Context()
    rclpy.init(args=[], context=context)
    nodes = []

    def make(**given: Any) -> Node:
        node = Node(
            "parameters_test",
            context=context,
            parameter_overrides=[
                Parameter(name.replace("__", "."), value=value) for name, value in given.items()
            ],
            automatically_declare_parameters_from_overrides=True,
        )
        nodes.append(node)
        return node

    yield make
    for node in nodes:
        node.destroy_node()
    rclpy.shutdown(context=context)


def parameters(node: Node, configured: bool = False) -> Parameters:
    return Parameters(node, lambda: configured, lambda names: None)


def test_no_commitments_is_a_choice_and_no_chunks_is_none(make_node: MakeNode) -> None:
    assert parameters(make_node(committed_topic="")).current.committed_topic == ""
    for topic in ({"committed_topic": "a topic"}, {"chunk_topic": ""}):
        with pytest.raises(ConfigurationError, match=next(iter(topic))):
            parameters(make_node(**topic))


@pytest.mark.parametrize(
    ("file", "declarations"),
    [
        ("policy.yaml", PARAMETERS),
        ("calibration_recorder.yaml", RECORDER_PARAMETERS),
        ("chunk_executor.yaml", EXECUTOR_PARAMETERS),
    ],
)
def test_yaml_documents_every_parameter_with_its_default_and_range(
    repository_root: Path, file: str, declarations: Mapping[str, Declaration]
) -> None:
    path = repository_root / "config" / file
    text = path.read_text(encoding="utf-8")
    tree = yaml.safe_load(text)["/**"]["ros__parameters"]
    flat: dict[str, object] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{inner}": given for inner, given in value.items()}
        else:
            flat[name] = value
    assert flat == {name: declaration.default for name, declaration in declarations.items()}
    assert {name: type(value) for name, value in flat.items()} == {
        name: type(declaration.default) for name, declaration in declarations.items()
    }
    for name, declaration in declarations.items():
        key = name.rpartition(".")[2]
        comment = re.search(rf"((?:^ *#.*\n)*)^ *{key}:", text, re.MULTILINE)
        assert comment is not None
        assert ("Live." in comment[1]) == declaration.live, name
        if declaration.low is not None:
            assert f"[{declaration.low}, {declaration.high}]" in comment[1], name


def test_given_values_arrive(make_node: MakeNode) -> None:
    node = make_node(bundle="/b", seed=7, sensor_qos__depth=3, inference_rate_hz=2.5)
    current = parameters(node).current
    assert current.bundle_path == Path("/b")
    assert (current.seed, current.sensor_qos_depth, current.inference_rate_hz) == (7, 3, 2.5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("inference_rate_hz", 10),
        ("inference_rate_hz", 0.0),
        ("inference_rate_hz", float("nan")),
        ("max_observation_age_s", -1.0),
        ("max_observation_skew_s", "soon"),
        ("joint_state__max_age_s", -0.1),
        ("max_frozen_s", 1),
        ("seed", -1),
        ("seed", 2**32),
        ("threads", 1000),
        ("sensor_qos__depth", 0),
        ("sensor_qos__reliability", "best-effort"),
        ("chunk_topic", "a chunk"),
        ("joint_state_topic", ""),
        ("bundle", 7),
        ("autostart", "yes"),
    ],
)
def test_wrong_value_is_refused_by_name(make_node: MakeNode, name: str, value: object) -> None:
    node = make_node(**{name: value})
    with pytest.raises(ConfigurationError, match=re.escape(name.replace("__", "."))):
        parameters(node)


def test_bundle_is_required(make_node: MakeNode) -> None:
    with pytest.raises(ConfigurationError, match="'bundle' is empty"):
        _ = parameters(make_node()).current.bundle_path


def test_robot_comes_from_the_bundle_where_nothing_is_given(make_node: MakeNode) -> None:
    robot = parameters(make_node()).declare_robot(ROBOT)
    assert robot.state_joints == ROBOT.state_joints
    assert robot.action_joints == ROBOT.action_joints
    assert [camera.topic for camera in robot.cameras] == [
        "cameras/front/image_raw",
        "cameras/ego_view/image_raw",
    ]


def test_robot_is_overridden_column_by_column(make_node: MakeNode) -> None:
    node = make_node(
        cameras__front__transport="compressed",
        cameras__front__max_age_s=0.2,
        state_joints__arm__names=["a", "b"],
        state_joints__arm__signs=[1.0, -1.0],
    )
    robot = parameters(node).declare_robot(ROBOT)
    assert robot.cameras[0].transport == "compressed"
    assert [camera.max_age_s for camera in robot.cameras] == [0.2, 0.0]
    assert robot.cameras[0].topic == "cameras/front/image_raw/compressed"
    assert robot.state_joints["arm"] == (
        JointSpec("a", "degrees", 1.0, 90.0),
        JointSpec("b", "degrees", -1.0, 0.0),
    )
    assert robot.action_joints == ROBOT.action_joints


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("cameras__frnot__topic", "/x"),
        ("cameras__front__topics", "/x"),
        ("cameras__front__topic", "not a topic"),
        ("cameras__front__transport", "theora"),
        ("state_joints__arm__name", ["a", "b"]),
        ("state_joints__leg__names", ["a", "b"]),
        ("state_joints__arm__names", ["a"]),
        ("state_joints__arm__names", ["a", "a"]),
        ("state_joints__arm__names", ["a", ""]),
        ("state_joints__arm__units", ["degrees", "turns"]),
        ("state_joints__arm__signs", [1.0, 2.0]),
        ("state_joints__arm__signs", [1, -1]),
        ("action_joints__arm__offsets", [0.0, float("nan")]),
    ],
)
def test_wrong_robot_parameter_is_refused_by_name(
    make_node: MakeNode, name: str, value: object
) -> None:
    node = make_node(**{name: value})
    with pytest.raises(ConfigurationError, match=re.escape(name.replace("__", "."))):
        parameters(node).declare_robot(ROBOT)


def test_wrong_robot_parameter_can_be_set_right_and_tried_again(make_node: MakeNode) -> None:
    node = make_node(state_joints__arm__names=["a"])
    declared = parameters(node)
    with pytest.raises(ConfigurationError):
        declared.declare_robot(ROBOT)
    result = node.set_parameters([Parameter("state_joints.arm.names", value=["a", "b"])])[0]
    assert result.successful
    robot = declared.declare_robot(ROBOT)
    assert [joint.name for joint in robot.state_joints["arm"]] == ["a", "b"]


def test_another_bundle_brings_its_own_joints(make_node: MakeNode) -> None:
    declared = parameters(make_node())
    declared.declare_robot(ROBOT)
    other = RobotDescription(
        cameras=(CameraSpec("top", 48, 64),),
        state_joints={"arm": (JointSpec("x"), JointSpec("y"), JointSpec("z"))},
        action_joints={"arm": (JointSpec("x"), JointSpec("y"), JointSpec("z"))},
        action_period_s=0.1,
    )
    robot = declared.declare_robot(other)
    assert robot.state_joints == other.state_joints
    assert [camera.key for camera in robot.cameras] == ["top"]


def test_change_at_run_time_is_applied_or_refused_with_a_reason(make_node: MakeNode) -> None:
    node = make_node()
    heard: list[str] = []
    declared = Parameters(node, lambda: True, heard.extend)

    def change(**values: Any) -> tuple[bool, str]:
        changes = [
            Parameter(name.replace("__", "."), value=value) for name, value in values.items()
        ]
        result = node.set_parameters_atomically(changes)
        return result.successful, result.reason

    assert change(max_observation_age_s=2.0, instruction="wave") == (True, "")
    assert (declared.current.max_observation_age_s, declared.current.instruction) == (2.0, "wave")
    assert sorted(heard) == ["instruction", "max_observation_age_s"]
    before = declared.current
    for values, word in (
        ({"bundle": "/other"}, "cleanup"),
        ({"chunk_topic": "x"}, "cleanup"),
        ({"autostart": True}, "read-only"),
        ({"max_observation_age_s": -1.0}, ""),
        ({"inference_rate_hz": 3}, "type"),
        ({"seed": 1, "engine": "x"}, "cleanup"),
    ):
        successful, reason = change(**values)
        assert not successful, values
        assert word in reason
    assert declared.current == before
