"""Fields of any message by path: wrong paths are refused beforehand, numbers arrive unchanged."""

from __future__ import annotations

import contextlib
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("rclpy", reason="needs the ROS 2 Python packages")

from geometry_msgs.msg import Twist
from sensor_msgs.msg import Imu, MultiDOFJointState, PointCloud2, RegionOfInterest
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from groot_int8_ros.errors import ConfigurationError, GrootError, ObservationError
from groot_int8_ros.policy.types import JointSpec
from groot_int8_ros.ros.field_map import (
    FieldMap,
    FieldPath,
    FieldStateReader,
    message_class,
    parse_fields,
)

TOPIC = "/low_state"


def trajectory(*rows: list[float]) -> JointTrajectory:
    return JointTrajectory(points=[JointTrajectoryPoint(positions=row) for row in rows])


def test_nested_and_indexed_fields_are_read_in_the_order_of_the_map() -> None:
    fields = {"b": "points[1].positions[2]", "a": "points[0].positions[0]"}
    found = FieldMap(JointTrajectory, fields).read(trajectory([1.0], [2.0, 3.0, 4.0]))
    np.testing.assert_array_equal(found, [4.0, 1.0])
    assert found.dtype == np.float64


def test_integers_fixed_arrays_and_plain_fields_are_numbers_too() -> None:
    imu = Imu()
    imu.orientation_covariance[8] = 0.5
    assert FieldMap(Imu, {"c": "orientation_covariance[8]"}).read(imu) == [0.5]
    region = RegionOfInterest(width=7)
    assert FieldMap(RegionOfInterest, {"w": "width"}).read(region) == [7.0]
    seconds = FieldMap(JointTrajectory, {"t": "points[0].time_from_start.sec"})
    assert seconds.read(trajectory([])) == [0.0]


@pytest.mark.parametrize(
    ("kind", "path", "words"),
    [
        (JointTrajectory, "point[0].positions[0]", "no field 'point'; it has header, joint_names"),
        (JointTrajectory, "points.positions[0]", "say which of its entries"),
        (JointTrajectory, "points[0].positions", "say which of its entries"),
        (JointTrajectory, "points[0]", "trajectory_msgs/JointTrajectoryPoint, which is no number"),
        (JointTrajectory, "header[0].stamp.sec", "no entries to index"),
        (JointTrajectory, "joint_names[0]", "string, which is no number"),
        (JointTrajectory, "header.frame_id.x", "string, which has no fields"),
        (JointTrajectory, "points[0].positions[0].x", "double, which has no fields"),
        (Imu, "orientation_covariance[9]", re.escape("9 entries, from 0, so there is no [9]")),
        (RegionOfInterest, "do_rectify", "boolean, which is no number"),
        (PointCloud2, "fields[0].name", "no number"),
    ],
)
def test_path_that_does_not_fit_the_message_is_refused_with_what_is_there(
    kind: type[Any], path: str, words: str
) -> None:
    with pytest.raises(ConfigurationError, match=words):
        FieldMap(kind, {"joint": path})


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            ".",
            "a.",
            ".a",
            "a..b",
            "a[",
            "a[]",
            "a[-1]",
            "a[1][2]",
            "a[0]b",
            "a [0]",
            "a[0x1]",
        ),
        *("A", "_a", "__class__", "a.__class__", "a()", "a[0];b", "a[9999999]", "a[٣]", "ä"),
    ],
)
def test_text_that_is_no_path_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="is not the path of a field"):
        FieldPath.parse(text)


@given(st.text(max_size=40))
@settings(max_examples=50)
def test_any_text_is_a_path_or_an_error_that_the_user_can_mend(text: str) -> None:
    for make in (
        FieldPath.parse,
        lambda text: FieldMap(JointTrajectory, {"joint": text}),
        message_class,
        lambda text: parse_fields([text], "fields"),
    ):
        with contextlib.suppress(GrootError):
            make(text)


@pytest.mark.parametrize(
    "name", ["JointState", "os.path/msg/Join", "sensor_msgs/srv/Set", "sensor_msgs/msg/joint"]
)
def test_name_that_is_no_message_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match="is not the name of a message"):
        message_class(name)


@pytest.mark.parametrize("name", ["unitree_none/msg/LowState", "sensor_msgs/msg/None", "os/msg/X"])
def test_message_that_is_not_installed_is_told_with_what_to_do(name: str) -> None:
    with pytest.raises(ConfigurationError, match="source the workspace"):
        message_class(name)
    assert message_class("trajectory_msgs/msg/JointTrajectory") is JointTrajectory


def test_package_without_messages_is_refused_before_its_code_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "planted_msgs").mkdir()
    (tmp_path / "planted_msgs" / "__init__.py").write_text("raise SystemExit('it ran')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigurationError, match="no package planted_msgs with messages"):
        message_class("planted_msgs/msg/Trap")
    assert "planted_msgs" not in sys.modules


def test_two_joints_in_one_field_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"'a' and 'b' are both in linear\.x"):
        FieldMap(Twist, {"a": "linear.x", "b": "linear.x"})


def test_message_with_too_few_entries_is_told_with_the_joint() -> None:
    fields = FieldMap(JointTrajectory, {"knee": "points[0].positions[3]"})
    for message in (trajectory(), trajectory([1.0, 2.0, 3.0])):
        with pytest.raises(ObservationError, match=r"positions\[3\] \(knee\)"):
            fields.read(message)


INDICES = st.integers(0, 5)
PATHS = st.one_of(
    st.builds("points[{}].positions[{}]".format, INDICES, INDICES),
    st.builds("points[{}].effort[{}]".format, INDICES, INDICES),
)
FINITE = st.floats(allow_nan=False, allow_infinity=False)


@given(st.dictionaries(PATHS, FINITE, min_size=1, max_size=12))
@settings(max_examples=50)
def test_what_is_written_is_read_back_and_the_rest_is_zero(values: dict[str, float]) -> None:
    fields = FieldMap(JointTrajectory, {path: path for path in values})
    message = JointTrajectory()
    fields.write(message, np.array(list(values.values())))
    np.testing.assert_array_equal(fields.read(message), list(values.values()))
    total = sum(1 for p in message.points for v in [*p.positions, *p.effort] if v != 0.0)
    assert total == sum(1 for value in values.values() if value != 0.0)


@given(st.floats())
def test_number_that_does_not_fit_an_integer_field_never_wraps_around(value: float) -> None:
    fields = FieldMap(RegionOfInterest, {"width": "width"})
    message = RegionOfInterest(width=3)
    if 0.0 <= value <= 2**32 - 1:
        fields.write(message, np.array([value]))
        assert abs(message.width - value) <= 0.5
    else:
        with pytest.raises(ObservationError, match="width cannot hold"):
            fields.write(message, np.array([value]))
        assert message.width == 3


def test_message_is_written_wholly_or_not_at_all() -> None:
    fields = FieldMap(MultiDOFJointState, {"x": "twist[0].linear.x", "y": "twist[0].linear.y"})
    message = MultiDOFJointState()
    with pytest.raises(ObservationError, match=r"linear\.y"):
        fields.write(message, np.array([1.0, math.nan]))
    assert message == MultiDOFJointState()
    fields.write(message, np.array([1.0, 2.0]))
    assert (message.twist[0].linear.x, message.twist[0].linear.y) == (1.0, 2.0)


def test_state_has_units_and_signs_like_that_of_joint_state() -> None:
    joints = {"arm": (JointSpec("pan", "degrees", -1.0, 90.0), JointSpec("lift", "raw"))}
    fields = {"lift": "linear.x", "spare": "linear.z", "pan": "angular.y"}
    reader = FieldStateReader(joints, Twist, fields, TOPIC)
    message = Twist()
    message.angular.y, message.linear.x = math.pi / 6, 0.25
    state = reader.read(message)
    np.testing.assert_allclose(state["arm"], [60.0, 0.25], rtol=1e-6)
    assert state["arm"].dtype == np.float32
    message.angular.y = math.nan
    with pytest.raises(ObservationError, match="/low_state: the position of pan is not a finite"):
        reader.read(message)


def test_joint_without_a_field_and_a_wrong_field_of_an_unused_joint_are_refused() -> None:
    joints = {"arm": (JointSpec("pan"), JointSpec("lift"))}
    with pytest.raises(ConfigurationError, match="no field for lift"):
        FieldStateReader(joints, Twist, {"pan": "linear.x"}, TOPIC)
    fields = {"pan": "linear.x", "lift": "linear.y", "spare": "linear.w"}
    with pytest.raises(ConfigurationError, match="no field 'w'"):
        FieldStateReader(joints, Twist, fields, TOPIC)


def test_lines_of_the_parameter_are_parsed_and_wrong_ones_are_named() -> None:
    lines = ["", " a=b = points[0].positions[0] ", "lift=linear.x"]
    fields = parse_fields(lines, "joint_state_fields")
    assert fields == {"a=b": "points[0].positions[0]", "lift": "linear.x"}
    for lines, words in ((["pan"], "'pan' has to be"), (["a = x", "a = y"], "names 'a' twice")):
        with pytest.raises(ConfigurationError, match=f"joint_state_fields.*{words}"):
            parse_fields(lines, "joint_state_fields")
