"""The simulated scene as an MJCF model: arm, table, cubes, plates, lights and two cameras.

Owns: geometry, masses, friction and the names of everything in the model. Must not import MuJoCo:
it writes the XML text. Every shape is a primitive of our own; lengths of the arm come from
`kinematics.py`. Only jaws, cubes, plates and table touch each other; the links pass through.
"""

from __future__ import annotations

import math

from offline_tools.simulation import kinematics as arm
from offline_tools.simulation.tasks import CUBES, PLATES

CAMERAS = ("front", "wrist")
CUBE_SIDE_M = 0.03
PLATE_RADIUS_M = 0.055
PLATE_HEIGHT_M = 0.003
TABLE_LOOKS = 8
# The moving jaw turns about an axis this far above the pads' middle. At the gripper's zero the
# pads are parallel, a cube's side apart.
JAW_M = 0.075

TIMESTEP_S = 0.0025

_JAW_GEOMS = ("fixed_pad", "moving_pad")
_FORE = arm.FOREARM_M
_PAD_HALF = (0.011, 0.004, 0.02)
_PAD_GAP_M = CUBE_SIDE_M / 2.0


def cube_body(cube: str) -> str:
    """Return the name of a cube's body and geom."""
    return f"cube_{cube}"


def plate_body(plate: str) -> str:
    """Return the name of a plate's body and geom."""
    return f"plate_{plate}"


def jaw_geoms() -> tuple[str, str]:
    """Return the geoms that can hold a cube, the fixed one first."""
    return _JAW_GEOMS


def scene_xml() -> str:
    """Return the MJCF text of the scene.

    Colours, lights, cameras and places in it are a start only: `randomization.py` sets them.
    """
    return f"""
<mujoco model="tabletop">
  <compiler angle="radian" autolimits="true"/>
  <option timestep="{TIMESTEP_S}" integrator="implicitfast" cone="elliptic" impratio="10"
          noslip_iterations="2"/>
  <visual>
    <global offwidth="640" offheight="480"/>
    <quality shadowsize="512" offsamples="0"/>
    <map znear="0.02" zfar="20"/>
    <headlight ambient="0.25 0.25 0.25" diffuse="0.1 0.1 0.1" specular="0 0 0"/>
  </visual>
  <asset>
    <texture name="sky" type="skybox" builtin="gradient" rgb1="0.6 0.7 0.8" rgb2="0.3 0.35 0.4"
             width="32" height="192"/>
    {_table_looks()}
    <material name="link" rgba="0.9 0.8 0.3 1" specular="0.1"/>
    <material name="joint" rgba="0.2 0.2 0.22 1" specular="0.1"/>
    <material name="jaw" rgba="0.15 0.15 0.17 1" specular="0.1"/>
    <material name="plate" rgba="0.85 0.85 0.85 1" specular="0.1"/>
  </asset>
  <default>
    <geom contype="0" conaffinity="0" friction="0.6 0.01 0.0001"/>
    <joint type="hinge" damping="0.05" armature="0.008"/>
    <default class="solid">
      <geom contype="1" conaffinity="1" condim="4" solref="0.005 1" solimp="0.95 0.99 0.001"/>
    </default>
    <default class="pad">
      <geom contype="1" conaffinity="1" condim="4" friction="1.6 0.05 0.0005" priority="1"
            solref="0.005 1" solimp="0.95 0.99 0.001" material="jaw"/>
    </default>
  </default>
  <worldbody>
    <light name="sun" pos="0.2 0 1.5" dir="0 0 -1" directional="true" castshadow="true"
           diffuse="0.45 0.45 0.45" specular="0.1 0.1 0.1"/>
    <light name="lamp" pos="0.5 0.5 1.2" dir="-0.2 -0.4 -1" castshadow="false"
           diffuse="0.2 0.2 0.2" specular="0.1 0.1 0.1"/>
    <geom name="table" class="solid" type="box" pos="0.2 0 -0.02" size="0.5 0.6 0.02"
          material="table_0"/>
    <geom name="floor" type="plane" pos="0 0 -0.7" size="4 4 0.1" rgba="0.4 0.4 0.42 1"/>
    {_camera("front", (0.50, 0.0, 0.47), (0.16, 0.0, 0.0), 38)}
    {_arm()}
    {_plates()}
    {_cubes()}
  </worldbody>
  <actuator>
    {_actuators()}
  </actuator>
</mujoco>
"""


def _camera(
    name: str,
    position: tuple[float, float, float],
    target: tuple[float, float, float],
    vertical_view_deg: float,
) -> str:
    """Return a camera that looks at a point, with its horizontal axis along the parent's y."""
    back = tuple(a - b for a, b in zip(position, target, strict=True))
    length = math.hypot(*back)
    up = f"{-back[2] / length:.4f} 0 {back[0] / length:.4f}"
    return (
        f'<camera name="{name}" pos="{_numbers(position)}" xyaxes="0 1 0 {up}" '
        f'fovy="{vertical_view_deg}"/>'
    )


def _table_looks() -> str:
    patterns = ("flat", "checker", "gradient", "flat")
    looks = []
    for index in range(TABLE_LOOKS):
        pattern = patterns[index % len(patterns)]
        mark = ' mark="random" random="0.02"' if index % 4 == 3 else ""
        repeat = 2 + 3 * index
        looks.append(
            f'<texture name="table_{index}" type="2d" builtin="{pattern}"{mark} width="128" '
            'height="128" rgb1="1 1 1" rgb2="0.8 0.8 0.8" markrgb="0.6 0.6 0.6"/>\n'
            f'    <material name="table_{index}" texture="table_{index}" '
            f'texrepeat="{repeat} {repeat}" specular="0.05"/>'
        )
    return "\n    ".join(looks)


def _hinge(name: str, axis: str) -> str:
    index = arm.JOINTS.index(name)
    low, high = arm.LOW_RAD[index], arm.HIGH_RAD[index]
    return f'<joint name="{name}" axis="{axis}" range="{low:.6f} {high:.6f}"/>'


def _arm() -> str:
    turn = math.sqrt(0.5)
    forward = f"{turn} 0 {turn} 0"  # a quarter turn about y: z points forwards
    hand = arm.HAND_M
    return f"""<body name="base" gravcomp="1">
      <geom type="cylinder" pos="0 0 0.03" size="0.045 0.03" material="joint"/>
      <body name="shoulder" pos="0 0 0.06" gravcomp="1">
        {_hinge("shoulder_pan", "0 0 1")}
        <geom type="box" pos="0.01 0 0.03" size="0.035 0.025 0.03" material="link" mass="0.1"/>
        <body name="upper_arm" pos="{arm.SHOULDER_FORWARD_M} 0 {arm.SHOULDER_HEIGHT_M - 0.06:.3f}"
              gravcomp="1">
          {_hinge("shoulder_lift", "0 1 0")}
          <geom type="cylinder" zaxis="0 1 0" size="0.02 0.024" material="joint" mass="0.03"/>
          <geom type="box" pos="0 0 {arm.UPPER_ARM_M / 2}"
                size="0.014 0.018 {arm.UPPER_ARM_M / 2}" material="link" mass="0.09"/>
          <body name="forearm" pos="0 0 {arm.UPPER_ARM_M}" quat="{forward}" gravcomp="1">
            {_hinge("elbow_flex", "0 1 0")}
            <geom type="cylinder" zaxis="0 1 0" size="0.018 0.022" material="joint" mass="0.03"/>
            <geom type="box" pos="0 0 {_FORE / 2}" size="0.012 0.016 {_FORE / 2}"
                  material="link" mass="0.07"/>
            <body name="wrist" pos="0 0 {_FORE}" gravcomp="1">
              {_hinge("wrist_flex", "0 1 0")}
              <geom type="cylinder" zaxis="0 1 0" size="0.016 0.02" material="joint" mass="0.03"/>
              <body name="hand" gravcomp="1">
                {_hinge("wrist_roll", "0 0 1")}
                <geom type="box" pos="0 0 0.025" size="0.014 0.016 0.02" material="link"
                      mass="0.03"/>
                <geom type="box" pos="0 0.01 0.05" size="0.012 0.034 0.006" material="jaw"
                      mass="0.02"/>
                <geom type="box" pos="0 {-_PAD_GAP_M - 0.006} {hand - 0.045}"
                      size="0.009 0.003 0.03" material="jaw" mass="0.01"/>
                <geom name="fixed_pad" class="pad" type="box" size="{_numbers(_PAD_HALF)}"
                      pos="0 {-_PAD_GAP_M - _PAD_HALF[1]} {hand}" mass="0.01"/>
                {_camera("wrist", (-0.065, 0.012, 0.01), (0.0, 0.012, hand), 70)}
                <site name="grasp" pos="0 0 {hand}" size="0.003" rgba="0 0 0 0"/>
                <body name="jaw" pos="0 {_PAD_GAP_M + 0.004} {hand - JAW_M}" gravcomp="1">
                  {_hinge("gripper", "-1 0 0")}
                  <geom type="box" pos="0 0.002 {JAW_M / 2 - 0.008}" size="0.009 0.003 0.03"
                        material="jaw" mass="0.01"/>
                  <geom name="moving_pad" class="pad" type="box" size="{_numbers(_PAD_HALF)}"
                        pos="0 {-0.004 + _PAD_HALF[1]} {JAW_M}" mass="0.01"/>
                </body>
              </body>
            </body>
          </body>
        </body>
      </body>
    </body>"""


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:g}" for value in values)


def _plates() -> str:
    return "\n    ".join(
        f'<body name="{plate_body(plate)}" mocap="true" pos="0.15 {side * 0.19} 0">\n'
        f'      <geom name="{plate_body(plate)}" class="solid" type="cylinder" material="plate"\n'
        f'            pos="0 0 {PLATE_HEIGHT_M / 2}" '
        f'size="{PLATE_RADIUS_M} {PLATE_HEIGHT_M / 2}"/>\n'
        "    </body>"
        for plate, side in zip(PLATES, (1, -1), strict=True)
    )


def _cubes() -> str:
    half = CUBE_SIDE_M / 2.0
    colours = {"red": "0.8 0.1 0.1 1", "green": "0.1 0.6 0.15 1", "blue": "0.1 0.2 0.8 1"}
    return "\n    ".join(
        f'<body name="{cube_body(cube)}" pos="0.2 {0.08 * (index - 1)} {half}">\n'
        f'      <freejoint name="{cube_body(cube)}"/>\n'
        f'      <geom name="{cube_body(cube)}" class="solid" type="box" mass="0.02"\n'
        f'            size="{half} {half} {half}" rgba="{colours[cube]}"/>\n'
        "    </body>"
        for index, cube in enumerate(CUBES)
    )


def _actuators() -> str:
    # Stiff enough to follow with about 0.1 s of lag, as hobby servos with position loops do; the
    # gripper's force is limited so that it holds a cube and does not push through it.
    lines = []
    for name in arm.JOINTS:
        stiffness, force = (6.0, 0.6) if name == "gripper" else (25.0, 8.0)
        index = arm.JOINTS.index(name)
        lines.append(
            f'<position name="{name}" joint="{name}" kp="{stiffness}" dampratio="1" '
            f'ctrlrange="{arm.LOW_RAD[index]:.6f} {arm.HIGH_RAD[index]:.6f}" '
            f'forcerange="{-force} {force}"/>'
        )
    return "\n    ".join(lines)
