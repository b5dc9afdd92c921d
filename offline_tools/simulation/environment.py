"""The simulated robot at its table: reset, step, look, judge.

Owns: `Tabletop`. Must not import ROS or torch: the node, the demonstrations and the evaluation run
this one simulation. Joints are in radians as in a `JointState`; frames are RGB.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from groot_int8_ros.errors import ConfigurationError
from groot_int8_ros.policy.types import Float64Array, UInt8Array
from offline_tools.simulation.kinematics import HIGH_RAD, JOINTS, LOW_RAD, arm_joints
from offline_tools.simulation.tasks import CUBES, PLATES, Task

try:
    import mujoco

    from offline_tools.simulation.randomization import (
        Appearance,
        Start,
        draw_start,
        place_objects,
    )
    from offline_tools.simulation.scene import (
        CAMERAS,
        CUBE_SIDE_M,
        PLATE_HEIGHT_M,
        PLATE_RADIUS_M,
        TIMESTEP_S,
        cube_body,
        jaw_geoms,
        plate_body,
        scene_xml,
    )

    # Where the library that draws is missing, MuJoCo is imported all the same, without this.
    mujoco.Renderer  # noqa: B018
except (ImportError, AttributeError) as error:
    raise ConfigurationError(
        f"the simulator cannot be loaded ({error}). It needs MuJoCo (pip install '.[sim]') and a "
        "library that draws without a display: apt-get install libegl1 libgl1-mesa-dri, or "
        "libosmesa6 with MUJOCO_GL=osmesa."
    ) from error

CAMERA_SIZES: Mapping[str, tuple[int, int]] = dict.fromkeys(CAMERAS, (240, 320))
CONTROL_PERIOD_S = 0.02

_SUBSTEPS = round(CONTROL_PERIOD_S / TIMESTEP_S)
_SETTLE_STEPS = 20
# A cube on a plate stands no higher than this over it, or it lies on another cube.
_RESTING_M = PLATE_HEIGHT_M + CUBE_SIDE_M / 2.0 + 0.008


@dataclass(frozen=True)
class Truth:
    """What only a simulator knows.

    Attributes:
        cubes: Cube to its centre, metres, float64, shape (3,).
        plates: Plate to its middle on the table, metres, float64, shape (3,).
        held: Cube between the jaws, touched by both, or None.
        touched: Cubes that at least one jaw touches.
    """

    cubes: Mapping[str, Float64Array]
    plates: Mapping[str, Float64Array]
    held: str | None
    touched: frozenset[str]

    def on_plate(self, cube: str, plate: str) -> bool:
        """Whether a cube rests on a plate, let go."""
        offset = self.cubes[cube] - self.plates[plate]
        return (
            math.hypot(offset[0], offset[1]) < PLATE_RADIUS_M
            and float(offset[2]) < _RESTING_M
            and cube not in self.touched
        )


class Tabletop:
    """One simulated arm, three cubes, two plates.

    Lifecycle: `reset` begins an episode, `step` goes on, `close` frees the renderer. One thread.
    """

    def __init__(self, *, camera_sizes: Mapping[str, tuple[int, int]] = CAMERA_SIZES) -> None:
        """Compile the scene; nothing is drawn yet.

        Args:
            camera_sizes: Camera to height and width of its frames in pixels.
        """
        self._model = mujoco.MjModel.from_xml_string(scene_xml())
        self._data = mujoco.MjData(self._model)
        self._appearance = Appearance(self._model)
        self._camera_sizes = dict(camera_sizes)
        self._renderers: dict[tuple[int, int], mujoco.Renderer] = {}
        self._joint_rows = [int(self._model.joint(name).qposadr[0]) for name in JOINTS]
        self._speed_rows = [int(self._model.joint(name).dofadr[0]) for name in JOINTS]
        self._jaws = {self._model.geom(name).id: name for name in jaw_geoms()}
        self._cube_geoms = {self._model.geom(cube_body(cube)).id: cube for cube in CUBES}

    @property
    def time_s(self) -> float:
        """Simulated time since the reset."""
        return float(self._data.time)

    def reset(self, seed: int, *, start: Start | None = None) -> Start:
        """Begin an episode.

        Args:
            seed: Seed of places and looks, 0 to 2**32 - 1.
            start: Places to use instead of those of the seed, whose looks stay.

        Returns:
            The places.
        """
        random = np.random.RandomState(seed)
        drawn = draw_start(random)
        start = drawn if start is None else start
        self._appearance.draw(random)
        mujoco.mj_resetData(self._model, self._data)
        place_objects(self._model, self._data, start)
        self.put_arm(np.array([*arm_joints(start.hand), start.gripper_rad]))
        for _ in range(_SETTLE_STEPS):
            mujoco.mj_step(self._model, self._data)
        self._data.time = 0.0
        return start

    def put_arm(self, joints_rad: Float64Array) -> None:
        """Put the arm into a pose at rest, without moving through the poses between."""
        joints_rad = np.clip(joints_rad, LOW_RAD, HIGH_RAD)
        self._data.qpos[self._joint_rows] = joints_rad
        self._data.qvel[self._speed_rows] = 0.0
        self._data.ctrl[:] = joints_rad
        mujoco.mj_forward(self._model, self._data)

    def step(self, target_rad: Float64Array) -> None:
        """Hold a target for one control period, `CONTROL_PERIOD_S`.

        Args:
            target_rad: Target of each of `JOINTS`, radians, shape (6,); cut to the joint's range.
        """
        self._data.ctrl[:] = np.clip(target_rad, LOW_RAD, HIGH_RAD)
        mujoco.mj_step(self._model, self._data, _SUBSTEPS)

    def joints_rad(self) -> Float64Array:
        """Return the measured joint angles, radians, float64, shape (6,)."""
        measured: Float64Array = self._data.qpos[self._joint_rows].copy()
        return measured

    def target_rad(self) -> Float64Array:
        """Return the targets that the arm follows, radians, float64, shape (6,)."""
        target: Float64Array = self._data.ctrl.copy()
        return target

    def frames(self) -> dict[str, UInt8Array]:
        """Draw every camera: RGB, uint8, shape (height, width, 3)."""
        return {camera: self.frame(camera) for camera in self._camera_sizes}

    def frame(self, camera: str) -> UInt8Array:
        """Draw one camera: RGB, uint8, shape (height, width, 3)."""
        size = self._camera_sizes[camera]
        if size not in self._renderers:
            self._renderers[size] = mujoco.Renderer(self._model, *size)
        renderer = self._renderers[size]
        renderer.update_scene(self._data, camera)
        return np.asarray(renderer.render(), np.uint8)

    def truth(self) -> Truth:
        """Return what the simulator knows of cubes, plates and contacts."""
        touching: dict[str, set[str]] = {}
        for contact in self._data.contact[: self._data.ncon]:
            first, second = int(contact.geom1), int(contact.geom2)
            for jaw, other in ((first, second), (second, first)):
                if jaw in self._jaws and other in self._cube_geoms:
                    touching.setdefault(self._cube_geoms[other], set()).add(self._jaws[jaw])
        held = [cube for cube, jaws in touching.items() if len(jaws) == len(self._jaws)]
        return Truth(
            cubes={cube: self._data.body(cube_body(cube)).xpos.copy() for cube in CUBES},
            plates={plate: self._data.body(plate_body(plate)).xpos.copy() for plate in PLATES},
            held=held[0] if held else None,
            touched=frozenset(touching),
        )

    def success(self, task: Task) -> bool:
        """Whether the task's cube rests on the task's plate, let go."""
        return self.truth().on_plate(task.cube, task.plate)

    def close(self) -> None:
        """Free the renderers."""
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers.clear()
