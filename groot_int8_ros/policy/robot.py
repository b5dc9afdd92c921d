"""The robot as the policy knows it: cameras, joints and the time between two actions.

Owns: `RobotDescription`, its YAML and JSON form, and the joint mapping's arithmetic. Must not
import ROS. The same description stands in the bundle's manifest, in the file given to
`groot-int8 export --robot`, and behind the node's joint parameters.

YAML form (`joints` lists stand in the order of the key's dimensions; a plain name is short for a
joint whose value is used as it is)::

    action_period_s: 0.0333
    cameras:
      front: {width: 640, height: 480}
    state_joints:
      single_arm:
        - {name: shoulder_pan, unit: degrees, sign: 1, offset: 0.0}
        - elbow
    action_joints: {}   # `export` lets a missing key take the state joints of its name
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from groot_int8_ros.errors import ConfigurationError
from groot_int8_ros.policy.files import read_yaml
from groot_int8_ros.policy.types import CameraSpec, Float64Array, JointSpec, JointUnit

_UNITS: tuple[JointUnit, ...] = get_args(JointUnit)


@dataclass(frozen=True)
class RobotDescription:
    """What a bundle was exported for.

    Attributes:
        cameras: In the order of the checkpoint's video keys.
        state_joints: State key to its joints, one for each dimension, in order.
        action_joints: Action key to its joints, likewise.
        action_period_s: Time between two rows of an action chunk, seconds.
    """

    cameras: tuple[CameraSpec, ...]
    state_joints: Mapping[str, tuple[JointSpec, ...]]
    action_joints: Mapping[str, tuple[JointSpec, ...]]
    action_period_s: float

    def to_dict(self) -> dict[str, Any]:
        """Return the description as plain JSON or YAML values."""
        return {
            "action_period_s": self.action_period_s,
            "cameras": {
                camera.key: {"width": camera.width, "height": camera.height}
                for camera in self.cameras
            },
            "state_joints": _joints_to_dict(self.state_joints),
            "action_joints": _joints_to_dict(self.action_joints),
        }


def joint_to_policy(joints: Sequence[JointSpec], positions: Sequence[float]) -> Float64Array:
    """Turn `JointState` positions into the policy's values.

    Args:
        joints: One mapping for each position.
        positions: Radians (or metres) as ROS has them, one for each joint.

    Returns:
        `sign * convert(position) + offset`, float64, shape (len(joints),).
    """
    scale, offset = _scale_and_offset(joints)
    return np.asarray(positions, np.float64) * scale + offset


def policy_to_joint(joints: Sequence[JointSpec], values: Float64Array) -> Float64Array:
    """Turn the policy's values into joint positions: the inverse of `joint_to_policy`.

    Args:
        joints: One mapping for each column.
        values: Policy values, float, shape (..., len(joints)).

    Returns:
        Positions in the units of ROS messages, float64, same shape.
    """
    scale, offset = _scale_and_offset(joints)
    return (np.asarray(values, np.float64) - offset) / scale


def load_robot(path: Path) -> RobotDescription:
    """Read a robot description from YAML.

    Raises:
        ConfigurationError: The file is missing, is not YAML or does not describe a robot.
    """
    try:
        content = read_yaml(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"cannot read the robot description {path}: {error}") from error
    except ValueError as error:
        raise ConfigurationError(
            f"the robot description {path} is not valid YAML: {error}"
        ) from error
    return parse_robot(content, str(path))


def parse_robot(content: object, source: str) -> RobotDescription:
    """Check plain values and turn them into a `RobotDescription`.

    Args:
        content: What YAML or JSON gave.
        source: Named in error messages.

    Raises:
        ConfigurationError: Something is missing, misspelt or of a wrong type.
    """
    table = _mapping(content, "the description", source)
    _refuse_unknown(
        table, {"action_period_s", "cameras", "state_joints", "action_joints"}, "", source
    )
    state_joints = _parse_joint_groups(table.get("state_joints", {}), "state_joints", source)
    action_joints = _parse_joint_groups(table.get("action_joints", {}), "action_joints", source)
    return RobotDescription(
        cameras=_parse_cameras(table.get("cameras", {}), source),
        state_joints=state_joints,
        action_joints=action_joints,
        action_period_s=_positive(table.get("action_period_s"), "action_period_s", source),
    )


def _scale_and_offset(joints: Sequence[JointSpec]) -> tuple[Float64Array, Float64Array]:
    scale = [
        joint.sign * (math.degrees(1.0) if joint.unit == "degrees" else 1.0) for joint in joints
    ]
    return np.array(scale, np.float64), np.array([joint.offset for joint in joints], np.float64)


def _joints_to_dict(groups: Mapping[str, tuple[JointSpec, ...]]) -> dict[str, Any]:
    return {
        key: [{"name": j.name, "unit": j.unit, "sign": j.sign, "offset": j.offset} for j in joints]
        for key, joints in groups.items()
    }


def _mapping(value: object, what: str, source: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ConfigurationError(
            f"{source}: {what} must be a table of names to values, not {value!r:.80}"
        )
    return value


def _refuse_unknown(table: Mapping[str, Any], known: set[str], where: str, source: str) -> None:
    unknown = sorted(set(table) - known)
    if unknown:
        raise ConfigurationError(
            f"{source}: unknown entry {where}{unknown[0]}; known here: {', '.join(sorted(known))}"
        )


def _positive(value: object, what: str, source: str) -> float:
    number = _number(value, what, source)
    if number <= 0.0:
        raise ConfigurationError(f"{source}: {what} must be positive, not {value!r}")
    return number


def _number(value: object, what: str, source: str) -> float:
    try:
        number = float(value) if isinstance(value, (int, float)) else math.nan
    except OverflowError:  # an integer beyond the range of floats
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise ConfigurationError(f"{source}: {what} must be a finite number, not {value!r:.80}")
    return number


def _parse_cameras(value: object, source: str) -> tuple[CameraSpec, ...]:
    cameras = []
    for key, entry in _mapping(value, "cameras", source).items():
        where = f"cameras.{key}"
        table = _mapping(entry, where, source)
        _refuse_unknown(table, {"width", "height"}, f"{where}.", source)
        sizes = {}
        for side in ("width", "height"):
            pixels = table.get(side)
            if isinstance(pixels, bool) or not isinstance(pixels, int) or not 0 < pixels <= 16384:
                raise ConfigurationError(
                    f"{source}: {where}.{side} must be a whole number of pixels from 1 to 16384, "
                    f"not {pixels!r:.80}"
                )
            sizes[side] = pixels
        cameras.append(CameraSpec(key=key, height=sizes["height"], width=sizes["width"]))
    return tuple(cameras)


def _parse_joint_groups(value: object, what: str, source: str) -> dict[str, tuple[JointSpec, ...]]:
    groups = {}
    for key, entry in _mapping(value, what, source).items():
        where = f"{what}.{key}"
        if not isinstance(entry, list) or not entry:
            raise ConfigurationError(
                f"{source}: {where} must be a list of joints, not {entry!r:.80}"
            )
        joints = tuple(
            _parse_joint(joint, f"{where}[{index}]", source) for index, joint in enumerate(entry)
        )
        names = [joint.name for joint in joints]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ConfigurationError(f"{source}: {where} names the joint {repeated[0]!r} twice")
        groups[key] = joints
    return groups


def _parse_joint(value: object, where: str, source: str) -> JointSpec:
    table = {"name": value} if isinstance(value, str) else _mapping(value, where, source)
    _refuse_unknown(table, {"name", "unit", "sign", "offset"}, f"{where}.", source)
    name = table.get("name")
    if not isinstance(name, str) or not name:
        raise ConfigurationError(
            f"{source}: {where}.name must be a joint's name, not {name!r:.80}"
        )
    unit = next((known for known in _UNITS if known == table.get("unit", "raw")), None)
    if unit is None:
        raise ConfigurationError(
            f"{source}: {where}.unit must be one of {', '.join(_UNITS)}, not {table['unit']!r:.80}"
        )
    sign = _number(table.get("sign", 1.0), f"{where}.sign", source)
    if sign not in (1.0, -1.0):
        raise ConfigurationError(f"{source}: {where}.sign must be 1 or -1, not {sign!r}")
    offset = _number(table.get("offset", 0.0), f"{where}.offset", source)
    return JointSpec(name=name, unit=unit, sign=sign, offset=offset)
