"""Joint limits from a robot description.

Owns: reading `<limit>` of a URDF's joints. Must not import ROS: a URDF is an XML file, and four
attributes of it are wanted. A document type is refused, since nothing in a URDF needs one and
entities are how XML files attack their readers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from groot_int8_ros.control.limits import JointLimits
from groot_int8_ros.errors import ConfigurationError

_LARGEST_BYTES = 64 << 20


def urdf_limits(path: Path, joints: Sequence[str]) -> JointLimits:
    """Return the position and velocity limits of some joints; what a joint lacks is infinite.

    Args:
        path: URDF file, not xacro.
        joints: Their names.

    Raises:
        ConfigurationError: The file cannot be read, is no URDF or lacks a joint.
    """
    try:
        if path.stat().st_size > _LARGEST_BYTES:
            raise ConfigurationError(f"the URDF {path} is too large to be one")
        text = path.read_bytes()
        if b"<!DOCTYPE" in text or b"<!ENTITY" in text:
            raise ConfigurationError(f"the URDF {path} has a document type; remove it")
        root = ElementTree.fromstring(text)
    except OSError as error:
        raise ConfigurationError(f"cannot read the URDF {path}: {error}") from error
    except ElementTree.ParseError as error:
        raise ConfigurationError(
            f"the URDF {path} is not XML: {error}. A xacro file has to be expanded first: "
            "xacro robot.urdf.xacro > robot.urdf"
        ) from error
    found = {element.get("name"): element for element in root.iter("joint")}
    missing = [joint for joint in joints if joint not in found]
    if missing:
        raise ConfigurationError(
            f"the URDF {path} has no joint {', '.join(missing)}; it has "
            f"{', '.join(sorted(name for name in found if name))}"
        )
    rows = [_limits_of(found[joint], f"{path}: joint {joint}") for joint in joints]
    lower, upper, velocity = np.array(rows, np.float64).reshape(len(rows), 3).T
    unlimited = np.full(len(rows), np.inf)
    return JointLimits(lower, upper, velocity, unlimited, unlimited.copy())


def _limits_of(joint: ElementTree.Element, where: str) -> tuple[float, float, float]:
    limit = joint.find("limit")
    values: dict[str, float] = {}
    for name in ("lower", "upper", "velocity"):
        text = None if limit is None else limit.get(name)
        if text is None:
            continue
        try:
            values[name] = float(text)
        except ValueError:
            values[name] = math.nan
        if not math.isfinite(values[name]):
            raise ConfigurationError(f"{where}: limit {name} is {text!r}, not a number")
    # The URDF's rule: a missing bound is 0 for a joint that has a range; turning joints have none.
    ranged = joint.get("type") in ("revolute", "prismatic")
    lower = values.get("lower", 0.0) if ranged else -math.inf
    upper = values.get("upper", 0.0) if ranged else math.inf
    velocity = values.get("velocity", math.inf)
    return lower, upper, velocity if velocity > 0.0 else math.inf
