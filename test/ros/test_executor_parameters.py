"""Parameters of the executor's channels: a limit that is missing, misspelt or of another joint."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="needs the ROS 2 Python packages")

import rclpy
from rclpy.context import Context
from rclpy.node import Node
from rclpy.parameter import Parameter

from groot_int8_ros.control.commitment import Commitment
from groot_int8_ros.errors import ConfigurationError
from groot_int8_ros.policy.robot import RobotDescription
from groot_int8_ros.policy.types import CameraSpec
from groot_int8_ros.ros.executor_messages import CommandWriter, commitment_message, commitment_of
from groot_int8_ros.ros.executor_parameters import (
    CHANNEL_PARAMETERS,
    ExecutorParameterSet,
    OutputParameters,
)
from groot_int8_ros.ros.parameters import Parameters

ARM: dict[str, Any] = {
    "channels": ["arm"],
    "channel.arm.joints": ["pan", "lift"],
    "channel.arm.topic": "/arm",
    "channel.arm.velocity": [1.0, 2.0],
}
Make = Callable[..., ExecutorParameterSet]


@pytest.fixture
def make() -> Iterator[Make]:
    context = Context()
    rclpy.init(args=[], context=context)
    nodes = []

    def declared(**given: Any) -> ExecutorParameterSet:
        values = ARM | {name.replace("__", "."): value for name, value in given.items()}
        node = Node(
            "executor_parameters_test",
            context=context,
            parameter_overrides=[Parameter(name, value=value) for name, value in values.items()],
            automatically_declare_parameters_from_overrides=True,
        )
        nodes.append(node)
        return ExecutorParameterSet(node, lambda: False, lambda names: None)

    yield declared
    for node in nodes:
        node.destroy_node()
    rclpy.shutdown(context=context)


def test_one_value_counts_for_all_joints_and_others_stay_unlimited(make: Make) -> None:
    settings, outputs = make(channel__arm__upper=[1.5]).settings()
    (channel,) = settings.channels
    assert channel.joints == ("pan", "lift")
    assert channel.limits.upper.tolist() == [1.5, 1.5]
    assert channel.limits.velocity.tolist() == [1.0, 2.0]
    assert channel.limits.lower.tolist() == [-math.inf, -math.inf]
    assert outputs["arm"].point_time_s == pytest.approx(settings.control_period_s)


def test_urdf_and_yaml_are_both_kept(make: Make, tmp_path: Path) -> None:
    urdf = tmp_path / "arm.urdf"
    limit = '<limit lower="-1" upper="1" velocity="1.5" effort="1"/>'
    joints = "".join(f'<joint name="{j}" type="revolute">{limit}</joint>' for j in ("pan", "lift"))
    urdf.write_text(f"<robot>{joints}</robot>")
    settings, _ = make(urdf=str(urdf), channel__arm__upper=[0.5, 3.0]).settings()
    limits = settings.channels[0].limits
    assert limits.upper.tolist() == [0.5, 1.0]
    assert limits.velocity.tolist() == [1.0, 1.5]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("channels", [""]),
        ("channel__arm__joints", [""]),
        ("channel__arm__topic", ""),
        ("channel__arm__topic", "a topic"),
        ("channel__arm__interface", "effort"),
        ("channel__arm__output", "joint_state"),
        ("channel__arm__output", "twist"),
        ("channel__arm__velocity", [math.inf]),
        ("channel__arm__velocity", [1.0, 2.0, 3.0]),
        ("channel__arm__upper", [math.nan]),
        ("channel__arm__upper", [1, 2]),
        ("channel__arm__point_time_s", -1.0),
        ("channel__arm__uper", [1.0]),
        ("channel__leg__upper", [1.0]),
        ("urdf", "/nothing.urdf"),
    ],
)
def test_wrong_value_is_refused_by_name(make: Make, name: str, value: object) -> None:
    dotted = name.replace("__", ".")
    with pytest.raises(ConfigurationError, match=re.escape(dotted)):
        make(**{name: value}).settings()


def test_a_stop_that_takes_longer_than_it_may_is_refused(make: Make) -> None:
    make(channel__arm__acceleration=[1.5]).settings()
    with pytest.raises(ConfigurationError, match=r"2\.08 s to come to rest.*stop_timeout_s"):
        make(channel__arm__acceleration=[1.0]).settings()


def test_axes_of_a_twist_are_checked(make: Make) -> None:
    base = {
        "channel__arm__interface": "velocity",
        "channel__arm__output": "twist",
        "channel__arm__axes": ["linear.x", "angular.z"],
    }
    _, outputs = make(**base).settings()
    assert outputs["arm"].axes == ("linear.x", "angular.z")
    for axes in (["linear.x"], ["linear.x", "linear.x"], ["linear.x", "yaw"]):
        with pytest.raises(ConfigurationError, match=r"channel\.arm\.axes"):
            make(**(base | {"channel__arm__axes": axes})).settings()


def test_two_channels_never_command_the_same(make: Make) -> None:
    other = {
        "channels": ["arm", "leg"],
        "channel__leg__joints": ["knee"],
        "channel__leg__velocity": [1.0],
    }
    with pytest.raises(ConfigurationError, match="two channels command on the topic /arm"):
        make(**other, channel__leg__topic="/arm").settings()
    with pytest.raises(ConfigurationError, match="both command pan"):
        make(**(other | {"channel__leg__joints": ["pan"]}), channel__leg__topic="/leg").settings()


def test_the_yaml_shows_every_value_of_a_channel(repository_root: Path) -> None:
    text = (repository_root / "config/chunk_executor.yaml").read_text(encoding="utf-8")
    shown = set(re.findall(r"^    #     (\w+):", text, re.MULTILINE))
    assert shown == set(CHANNEL_PARAMETERS)


@pytest.mark.parametrize(
    ("file", "cameras", "positions", "velocities"),
    [("so101", 2, 6, 0), ("unitree_g1", 1, 26, 0), ("mobile_two_arm", 4, 16, 2)],
)
def test_example_is_complete_for_both_nodes(
    repository_root: Path, file: str, cameras: int, positions: int, velocities: int
) -> None:
    path = repository_root / "config" / f"{file}.yaml"
    context = Context()
    rclpy.init(args=["--ros-args", "--params-file", str(path)], context=context)
    options: dict[str, Any] = {
        "context": context,
        "namespace": "some/robot",
        "automatically_declare_parameters_from_overrides": True,
    }
    executor, policy = Node("chunk_executor", **options), Node("policy_node", **options)
    try:
        declared = ExecutorParameterSet(executor, lambda: False, lambda names: None)
        settings, _ = declared.settings()
        assert declared.strangers() == []
        count = {"position": 0, "velocity": 0}
        for channel in settings.channels:
            count[channel.interface] += len(channel.joints)
            limits = channel.limits
            for of in (limits.lower, limits.upper, limits.velocity, limits.acceleration):
                assert np.isfinite(of).all(), channel.name
        assert count == {"position": positions, "velocity": velocities}

        keys = policy.get_parameters_by_prefix("cameras")
        names = {key.split(".")[0] for key in keys}
        assert len(names) == cameras
        robot = RobotDescription(
            tuple(CameraSpec(name, 48, 64) for name in sorted(names)), {}, {}, 0.05
        )
        known = Parameters(policy, lambda: False, lambda names: None)
        known.declare_robot(robot)
        assert known.strangers() == []
    finally:
        executor.destroy_node()
        policy.destroy_node()
        rclpy.shutdown(context=context)


def test_commands_are_written_as_their_controllers_take_them() -> None:
    def written(kind: Any, axes: tuple[str, ...] = ()) -> Any:
        output = OutputParameters(kind, "/topic", axes, 0.25)
        return CommandWriter(("a", "b"), output).write(np.array([1.5, -2.0]), 7_000_000_009)

    trajectory = written("joint_trajectory")
    assert trajectory.joint_names == ["a", "b"]
    (point,) = trajectory.points
    assert list(point.positions) == [1.5, -2.0]
    assert (point.time_from_start.sec, point.time_from_start.nanosec) == (0, 250_000_000)
    assert list(written("float64_multi_array").data) == [1.5, -2.0]
    twist = written("twist", ("linear.y", "angular.z"))
    assert (twist.linear.x, twist.linear.y, twist.angular.z) == (0.0, 1.5, -2.0)
    stamped = written("twist_stamped", ("linear.y", "angular.z"))
    assert stamped.twist == twist
    assert (stamped.header.stamp.sec, stamped.header.stamp.nanosec) == (7, 9)


def test_a_commitment_survives_its_message() -> None:
    made = Commitment(
        made_ns=1_700_000_001_000_000_000,
        joint_names=("a", "b"),
        due_ns=1_700_000_000_400_000_000 + 50_000_000 * np.arange(20, dtype=np.int64),
        targets=np.arange(40.0).reshape(20, 2),
    )
    read = commitment_of(commitment_message(made))
    assert read.joint_names == made.joint_names
    np.testing.assert_array_equal(read.due_ns, made.due_ns)
    np.testing.assert_array_equal(read.targets, made.targets)


@pytest.mark.parametrize(
    ("name", "stricter", "looser"),
    [
        ("chunk_timeout_s", 0.5, 1.5),
        ("joint_state_timeout_s", 0.1, 0.3),
        ("max_chunk_age_s", 1.0, 3.0),
        ("max_chunk_ahead_s", 0.05, 0.2),
        ("ramp_fraction", 0.1, 0.5),
        ("first_command", "refuse", "ramp"),
        ("on_outside", "refuse", "ignore"),
        ("on_outside_state", "refuse", "ignore"),
        ("hold_together", True, False),
    ],
)
def test_while_configured_a_parameter_only_becomes_stricter(
    make: Make, name: str, stricter: object, looser: object
) -> None:
    parameters = make()
    changed: list[str] = []
    parameters._is_configured = lambda: True
    parameters._changed = changed.extend

    def put(value: object) -> tuple[bool, str]:
        result = parameters._node.set_parameters([Parameter(name, value=value)])[0]
        return result.successful, result.reason

    assert put(stricter) == (True, "")
    assert changed == [name]
    assert getattr(parameters.current, name) == stricter
    taken, reason = put(looser)
    assert not taken
    assert f"'{name}' can only be made stricter" in reason
    assert getattr(parameters.current, name) == stricter


@pytest.mark.parametrize(
    ("name", "value"), [("lead_s", 0.0), ("seam.blend_s", 0.1), ("stop_timeout_s", 1.0)]
)
def test_what_could_make_a_command_jump_waits_for_the_next_configure(
    make: Make, name: str, value: object
) -> None:
    parameters = make()
    parameters._is_configured = lambda: True
    result = parameters._node.set_parameters([Parameter(name, value=value)])[0]
    assert not result.successful
    assert "takes effect when the node is configured" in result.reason
