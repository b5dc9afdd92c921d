"""Hazards of the robot description: a misspelt entry, a joint named twice, a wrong unit."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from groot_int8_ros.errors import ConfigurationError
from groot_int8_ros.policy.robot import (
    joint_to_policy,
    load_robot,
    parse_robot,
    policy_to_joint,
)
from groot_int8_ros.policy.types import JointSpec

Change = Callable[[Any], None]

ROBOT: Any = {
    "action_period_s": 0.05,
    "cameras": {"front": {"width": 640, "height": 480}, "wrist": {"width": 320, "height": 240}},
    "state_joints": {
        "arm": [
            {"name": "shoulder", "unit": "degrees", "sign": -1, "offset": 12.5},
            {"name": "elbow", "unit": "radians"},
            "wrist",
        ]
    },
    "action_joints": {"arm": ["shoulder", "elbow", "wrist"]},
}


def _changed(change: Change) -> Any:
    content = copy.deepcopy(ROBOT)
    change(content)
    return content


def test_yaml_is_read_with_sizes_order_and_defaults(tmp_path: Path) -> None:
    path = tmp_path / "robot.yaml"
    path.write_text(yaml.safe_dump(ROBOT, sort_keys=False))
    robot = load_robot(path)
    assert [(c.key, c.width, c.height) for c in robot.cameras] == [
        ("front", 640, 480),
        ("wrist", 320, 240),
    ]
    assert robot.state_joints["arm"] == (
        JointSpec(name="shoulder", unit="degrees", sign=-1.0, offset=12.5),
        JointSpec(name="elbow", unit="radians", sign=1.0, offset=0.0),
        JointSpec(name="wrist", unit="raw", sign=1.0, offset=0.0),
    )
    assert robot.action_period_s == 0.05


def test_what_a_manifest_stores_reads_back_as_the_same_robot() -> None:
    robot = parse_robot(ROBOT, "here")
    assert parse_robot(robot.to_dict(), "there") == robot


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(camera={}), "unknown entry camera; known here: action_joints"),
        (lambda r: r["cameras"]["front"].update(fps=30), r"unknown entry cameras\.front\.fps"),
        (
            lambda r: r["state_joints"]["arm"][0].update(units="degrees"),
            r"unknown entry state_joints\.arm\[0\]\.units",
        ),
        (lambda r: r.pop("action_period_s"), "action_period_s must be a finite number, not None"),
        (lambda r: r.update(action_period_s=0), "action_period_s must be positive"),
        (lambda r: r.update(action_period_s=-0.1), "action_period_s must be positive"),
        (lambda r: r.update(action_period_s=math.nan), "action_period_s must be a finite number"),
        (lambda r: r.update(action_period_s=True), "action_period_s must be a finite number"),
        (lambda r: r.update(action_period_s=10**400), "action_period_s must be a finite number"),
        (lambda r: r.update(cameras=["front"]), "cameras must be a table"),
        (lambda r: r.update(cameras={1: {}}), "cameras must be a table of names"),
        (lambda r: r["cameras"].update(front=640), r"cameras\.front must be a table"),
        (lambda r: r["cameras"]["front"].pop("width"), r"cameras\.front\.width must be a whole"),
        (lambda r: r["cameras"]["front"].update(width=0), r"cameras\.front\.width"),
        (lambda r: r["cameras"]["front"].update(height=16385), r"cameras\.front\.height"),
        (lambda r: r["cameras"]["front"].update(height=480.0), r"cameras\.front\.height"),
        (lambda r: r["cameras"]["front"].update(height=True), r"cameras\.front\.height"),
        (lambda r: r.update(state_joints=[]), "state_joints must be a table"),
        (lambda r: r["state_joints"].update(arm={}), r"state_joints\.arm must be a list"),
        (lambda r: r["state_joints"].update(arm=[]), r"state_joints\.arm must be a list"),
        (
            lambda r: r["state_joints"]["arm"].append("shoulder"),
            r"state_joints\.arm names the joint 'shoulder' twice",
        ),
        (lambda r: r["action_joints"].update(arm=[7]), r"action_joints\.arm\[0\] must be a table"),
        (lambda r: r["state_joints"].update(arm=[""]), r"arm\[0\]\.name must be a joint's name"),
        (lambda r: r["state_joints"].update(arm=[{}]), r"arm\[0\]\.name must be a joint's name"),
        (
            lambda r: r["state_joints"]["arm"][1].update(unit="grad"),
            r"arm\[1\]\.unit must be one of radians, degrees, raw, not 'grad'",
        ),
        (
            lambda r: r["state_joints"]["arm"][1].update(unit=["degrees"]),
            r"arm\[1\]\.unit must be one of",
        ),
        (lambda r: r["state_joints"]["arm"][0].update(sign=0), r"arm\[0\]\.sign must be 1 or -1"),
        (lambda r: r["state_joints"]["arm"][0].update(sign=2), r"arm\[0\]\.sign must be 1 or -1"),
        (
            lambda r: r["state_joints"]["arm"][0].update(offset="5"),
            r"arm\[0\]\.offset must be a finite number, not '5'",
        ),
        (
            lambda r: r["state_joints"]["arm"][0].update(offset=math.inf),
            r"arm\[0\]\.offset must be a finite number",
        ),
    ],
)
def test_wrong_entry_is_refused_by_its_name(change: Change, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        parse_robot(_changed(change), "robot.yaml")
    assert str(caught.value).startswith("robot.yaml: ")


@pytest.mark.parametrize("content", [None, 3, [], "text", {1: 2}])
def test_something_else_than_a_table_is_refused(content: object) -> None:
    with pytest.raises(ConfigurationError, match="the description must be a table"):
        parse_robot(content, "robot.yaml")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"cameras: [", "is not valid YAML"),
        (b"\xff\xfe\x00", "cannot read the robot description"),
        (b"!!python/object/apply:os.system [echo]", "is not valid YAML"),
        (b"action_period_s: 2026-13-01", "is not valid YAML"),
        (b"action_period_s: " + b"9" * 5000, "is not valid YAML"),
        (b"[" * 5000, "is not valid YAML"),
        (b"", "the description must be a table"),
    ],
)
def test_damaged_yaml_is_refused_with_the_files_name(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "robot.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=message) as caught:
        load_robot(path)
    assert str(path) in str(caught.value)


def test_missing_file_is_refused_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"cannot read .*absent\.yaml.*No such file"):
        load_robot(tmp_path / "absent.yaml")


# What YAML and JSON can give, integers too large for a float among them.
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def _mutated(draw: st.DrawFn) -> Any:
    """Replace one value anywhere in a valid description."""
    content = copy.deepcopy(ROBOT)
    node: Any = content
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = draw(st.sampled_from(keys))
        if not isinstance(node[key], (dict, list)) or not node[key] or draw(st.booleans()):
            node[key] = draw(_VALUES)
            return content
        node = node[key]


@given(_mutated())
def test_any_mutation_is_read_or_refused_and_never_crashes(content: Any) -> None:
    try:
        robot = parse_robot(content, "robot.yaml")
    except ConfigurationError:
        return
    assert parse_robot(robot.to_dict(), "again") == robot


def test_degrees_sign_and_offset_are_applied_in_the_documented_order() -> None:
    joints = [
        JointSpec("a", unit="degrees", sign=-1.0, offset=10.0),
        JointSpec("b", unit="radians", offset=0.5),
        JointSpec("c"),
    ]
    values = joint_to_policy(joints, [math.pi / 2, 1.0, -3.0])
    np.testing.assert_allclose(values, [-80.0, 1.5, -3.0], rtol=1e-12)


_JOINTS = st.builds(
    JointSpec,
    name=st.just("joint"),
    unit=st.sampled_from(["radians", "degrees", "raw"]),
    sign=st.sampled_from([1.0, -1.0]),
    offset=st.floats(-360, 360),
)


@given(st.lists(st.tuples(_JOINTS, st.floats(-10, 10)), min_size=1, max_size=8), st.integers(1, 3))
def test_commands_take_the_inverse_road_of_states(
    pairs: list[tuple[JointSpec, float]], steps: int
) -> None:
    joints = [joint for joint, _ in pairs]
    positions = np.tile([position for _, position in pairs], (steps, 1))
    values = joint_to_policy(joints, positions)  # type: ignore[arg-type]
    np.testing.assert_allclose(policy_to_joint(joints, values), positions, atol=1e-9)
