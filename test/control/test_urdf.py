"""Limits from a URDF: a limit that is missing, misread or taken from an attack."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from groot_int8_ros.control.urdf import urdf_limits
from groot_int8_ros.errors import ConfigurationError

URDF = """<?xml version="1.0"?>
<robot name="arm">
  <link name="base"/>
  <joint name="pan" type="revolute">
    <limit lower="-1.5" upper="1.25" effort="5" velocity="2"/>
  </joint>
  <joint name="wheel" type="continuous"><limit effort="5" velocity="3"/></joint>
  <joint name="free" type="continuous"/>
  <joint name="slide" type="prismatic"><limit upper="0.4" velocity="0" effort="1"/></joint>
</robot>
"""


def write(folder: Path, text: str = URDF) -> Path:
    path = folder / "robot.urdf"
    path.write_text(text)
    return path


def test_limits_are_read_in_the_order_of_the_joints(tmp_path: Path) -> None:
    limits = urdf_limits(write(tmp_path), ["slide", "pan", "free", "wheel"])
    assert limits.lower.tolist() == [0.0, -1.5, -np.inf, -np.inf]
    assert limits.upper.tolist() == [0.4, 1.25, np.inf, np.inf]
    # Zero is what URDFs hold where nobody thought about speed, and no joint could move at it.
    assert limits.velocity.tolist() == [np.inf, 2.0, np.inf, 3.0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (URDF.replace('"1.25"', '"${pi}"'), "joint pan: limit upper"),
        (URDF.replace('"-1.5"', '"nan"'), "joint pan: limit lower"),
        (URDF.replace('name="pan"', 'name="tilt"'), "no joint pan; it has free, slide, tilt"),
        ("<robot", "not XML"),
        ('<!DOCTYPE r [<!ENTITY a "b">]>' + URDF[22:], "document type"),
    ],
)
def test_a_urdf_that_gives_no_limit_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        urdf_limits(write(tmp_path, text), ["pan", "wheel"])


def test_a_missing_urdf_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"nothing\.urdf"):
        urdf_limits(tmp_path / "nothing.urdf", ["pan"])
