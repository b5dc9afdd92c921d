"""Episodes of the scripted expert, recorded at the policy's rate.

Owns: `demonstrate`: the disturbances under which the expert works, and what is recorded. Must not
import torch or ROS.

The arm is driven by the expert's target plus a slow random error, while the target alone is
recorded as the action (Laskey et al. 2017, DART, arXiv 1703.09327): the states next to the clean
path are in the data, with actions that lead back. Some episodes begin in the middle of an attempt
that aimed beside the cube, so that missed grasps and their repair are in the data too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from groot_int8_ros.policy.types import Float32Array, Float64Array, UInt8Array
from offline_tools.simulation.environment import CONTROL_PERIOD_S, Tabletop
from offline_tools.simulation.expert import plan
from offline_tools.simulation.kinematics import hand_place
from offline_tools.simulation.robot import ACTION_PERIOD_S, degrees
from offline_tools.simulation.tasks import TASKS, Task

ROW_STEPS = round(ACTION_PERIOD_S / CONTROL_PERIOD_S)

_ERROR_S = 0.5
_LARGEST_ERROR_RAD = np.radians([2.5, 2.0, 2.0, 2.5, 4.0, 3.0])
_LOW_M = 0.06
_ERROR_WHEN_LOW = 0.3
_LATE_STARTS = 0.35
_LARGEST_AIM_M = 0.045
_LATEST_START_S = 4.0


@dataclass(frozen=True)
class Demonstration:
    """One recorded episode.

    Attributes:
        task: What the expert did.
        state_deg: Measured joints at each row, degrees, float32, shape (T, 6).
        action_deg: The expert's target at each row, degrees, float32, shape (T, 6).
        cubes_m: Centres of the cubes at each row, metres, float32, shape (T, 3, 3).
        plates_m: Middles of the plates, metres, float32, shape (T, 2, 3).
        success: Whether the task was fulfilled at the end.
    """

    task: Task
    state_deg: Float32Array
    action_deg: Float32Array
    cubes_m: Float32Array
    plates_m: Float32Array
    success: bool


def demonstrate(
    simulation: Tabletop,
    seed: int,
    *,
    task: Task | None = None,
    disturbed: bool = True,
    on_frames: Callable[[Mapping[str, UInt8Array]], None] | None = None,
) -> Demonstration:
    """Let the expert do one task and record it, a row every `ACTION_PERIOD_S`.

    Args:
        simulation: Reset by this.
        seed: Seed of scene, task and disturbances.
        task: The task; drawn from the seed if None.
        disturbed: Whether the arm errs and some episodes begin late.
        on_frames: Called at each row with the frames; None draws nothing.

    Returns:
        The episode.
    """
    simulation.reset(seed)
    random = np.random.RandomState([seed, 1])
    drawn = TASKS[int(random.randint(len(TASKS)))]
    task = drawn if task is None else task
    if disturbed and random.uniform() < _LATE_STARTS:
        aim = random.uniform(-_LARGEST_AIM_M, _LARGEST_AIM_M, 2)
        steps = round(random.uniform(0.0, _LATEST_START_S) / CONTROL_PERIOD_S)
        for target in plan(simulation, task, cube_shift_m=(aim[0], aim[1]))[:steps]:
            simulation.step(target)
    scale = _LARGEST_ERROR_RAD * (random.uniform() if disturbed else 0.0)
    path = plan(simulation, task)
    state, cubes, plates = [], [], []
    for step, (target, error) in enumerate(zip(path, _errors(random, scale), strict=False)):
        if step % ROW_STEPS == 0:
            truth = simulation.truth()
            state.append(simulation.joints_rad())
            cubes.append(np.stack(list(truth.cubes.values())))
            plates.append(np.stack(list(truth.plates.values())))
            if on_frames is not None:
                on_frames(simulation.frames())
        low = hand_place(target).height_m < _LOW_M
        simulation.step(target + error * (_ERROR_WHEN_LOW if low else 1.0))
    return Demonstration(
        task=task,
        state_deg=degrees(np.stack(state)),
        action_deg=degrees(path[::ROW_STEPS]),
        cubes_m=np.stack(cubes).astype(np.float32),
        plates_m=np.stack(plates).astype(np.float32),
        success=simulation.success(task),
    )


def _errors(random: np.random.RandomState, scale_rad: Float64Array) -> Iterator[Float64Array]:
    """Yield an Ornstein-Uhlenbeck process of a given deviation, one value a control period."""
    keep = np.exp(-CONTROL_PERIOD_S / _ERROR_S)
    error = np.zeros_like(scale_rad)
    while True:
        error = keep * error + np.sqrt(1 - keep**2) * scale_rad * random.standard_normal(
            scale_rad.shape
        )
        yield error


def chunks(action_deg: Float32Array, horizon: int) -> Float32Array:
    """Return the actions that follow each row, the last one repeated, (T, horizon, 6)."""
    rows = np.arange(len(action_deg))[:, None] + np.arange(horizon)
    following: Float32Array = action_deg[np.minimum(rows, len(action_deg) - 1)]
    return following
