"""What differs from one simulated episode to the next: places, colours, lights, cameras.

Owns: drawing them from a seed and writing them into a compiled model. Must not render or step.
Everything is drawn from one `numpy.random.RandomState`, whose streams NumPy promises to keep, in a
fixed order, so a seed means the same episode on every machine.
"""

from __future__ import annotations

import colorsys
import math
from dataclasses import dataclass

import mujoco
import numpy as np

from groot_int8_ros.policy.types import Float64Array
from offline_tools.simulation.kinematics import Place
from offline_tools.simulation.scene import (
    CUBE_SIDE_M,
    TABLE_LOOKS,
    cube_body,
    plate_body,
)
from offline_tools.simulation.tasks import CUBES, PLATES

# Cubes lie in this part of a ring around the base, far enough apart for the open jaws, which open
# sideways: less distance is needed to the front and the back.
_RADIUS_M = (0.15, 0.245)
_PAN_RAD = (math.radians(-36.0), math.radians(36.0))
_CUBE_DISTANCE_M = 0.072
_SIDEWAYS = 0.78
_CUBE_YAW_RAD = math.radians(15.0)
_PLATE_PAN_RAD = math.radians(56.0)
_PLATE_RADIUS_M = 0.2
_PLATE_SHIFT_M = 0.012
_HUES = {"red": 0.0, "green": 0.35, "blue": 0.62}


@dataclass(frozen=True)
class Start:
    """Where everything is when an episode begins.

    Attributes:
        cubes: Cube to x, y in metres and yaw in radians.
        plates: Plate to x, y in metres.
        hand: Place of the hand.
        gripper_rad: Opening of the gripper.
    """

    cubes: dict[str, tuple[float, float, float]]
    plates: dict[str, tuple[float, float]]
    hand: Place
    gripper_rad: float


def draw_start(random: np.random.RandomState) -> Start:
    """Draw the places of one episode."""
    cubes: dict[str, tuple[float, float, float]] = {}
    while len(cubes) < len(CUBES):
        # Few draws collide for good: start over when the third cube finds no room.
        cubes = {}
        for cube in CUBES:
            for _ in range(20):
                radius, pan = random.uniform(*_RADIUS_M), random.uniform(*_PAN_RAD)
                x, y = radius * math.cos(pan), radius * math.sin(pan)
                if all(
                    math.hypot(x - other[0], _SIDEWAYS * (y - other[1])) >= _CUBE_DISTANCE_M
                    for other in cubes.values()
                ):
                    cubes[cube] = (x, y, random.uniform(-_CUBE_YAW_RAD, _CUBE_YAW_RAD))
                    break
    plates = {}
    for plate, side in zip(PLATES, (1.0, -1.0), strict=True):
        shift = random.uniform(-_PLATE_SHIFT_M, _PLATE_SHIFT_M, 2)
        pan = side * _PLATE_PAN_RAD
        plates[plate] = (
            _PLATE_RADIUS_M * math.cos(pan) + shift[0],
            _PLATE_RADIUS_M * math.sin(pan) + shift[1],
        )
    hand = Place(random.uniform(-0.6, 0.6), random.uniform(0.13, 0.19), random.uniform(0.09, 0.15))
    return Start(cubes, plates, hand, math.radians(random.uniform(10.0, 50.0)))


def place_objects(model: mujoco.MjModel, data: mujoco.MjData, start: Start) -> None:
    """Put cubes and plates where a start has them."""
    for cube, (x, y, yaw) in start.cubes.items():
        joint = data.joint(cube_body(cube))
        joint.qpos = [x, y, CUBE_SIDE_M / 2.0, math.cos(yaw / 2.0), 0.0, 0.0, math.sin(yaw / 2.0)]
        joint.qvel = 0.0
    for plate, (x, y) in start.plates.items():
        mocap = model.body(plate_body(plate)).mocapid[0]
        data.mocap_pos[mocap] = [x, y, 0.0]


class Appearance:
    """Redraws the looks of a model around what they were when it was compiled."""

    def __init__(self, model: mujoco.MjModel) -> None:
        """Remember the cameras' places, which are only moved a little."""
        self._model = model
        self._camera_positions = model.cam_pos.copy()
        self._camera_turns = model.cam_quat.copy()

    def draw(self, random: np.random.RandomState) -> None:
        """Draw colours, table, lights and small errors of the cameras' mounting."""
        model = self._model
        for cube in CUBES:
            hue = (_HUES[cube] + random.uniform(-0.025, 0.025)) % 1.0
            colour = colorsys.hsv_to_rgb(hue, random.uniform(0.8, 1.0), random.uniform(0.6, 0.95))
            model.geom(cube_body(cube)).rgba[:3] = colour
        table = int(random.randint(TABLE_LOOKS))
        model.geom("table").matid = model.material(f"table_{table}").id
        model.material(f"table_{table}").rgba[:3] = _muted(random, 0.25, 0.85)
        model.material("link").rgba[:3] = _muted(random, 0.4, 0.95)
        for name in ("joint", "jaw"):
            model.material(name).rgba[:3] = _muted(random, 0.08, 0.3)
        model.material("plate").rgba[:3] = _muted(random, 0.6, 1.0)
        model.geom("floor").rgba[:3] = _muted(random, 0.2, 0.7)
        model.vis.headlight.ambient[:] = random.uniform(0.18, 0.32)
        for name, low, high in (("sun", 0.3, 0.55), ("lamp", 0.05, 0.3)):
            light = model.light(name)
            light.diffuse[:] = random.uniform(low, high) * random.uniform(0.92, 1.0, 3)
            direction = np.array([*random.uniform(-0.45, 0.45, 2), -1.0])
            light.dir[:] = direction / np.linalg.norm(direction)
        for camera in range(model.ncam):
            model.cam_pos[camera] = self._camera_positions[camera] + random.uniform(
                -0.004, 0.004, 3
            )
            turn = np.zeros(4)
            mujoco.mju_euler2Quat(turn, np.radians(random.uniform(-0.8, 0.8, 3)), "xyz")
            mujoco.mju_mulQuat(model.cam_quat[camera], self._camera_turns[camera], turn)


def _muted(random: np.random.RandomState, low: float, high: float) -> Float64Array:
    """Draw a colour of low saturation, so that nothing but a cube looks like a cube."""
    grey = random.uniform(low, high)
    colour: Float64Array = np.clip(grey * random.uniform(0.88, 1.12, 3), 0.0, 1.0)
    return colour
