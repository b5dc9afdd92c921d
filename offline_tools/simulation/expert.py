"""A scripted expert: the path that fulfils a task from wherever the simulation is.

Owns: `plan`. Must not render. It reads the simulator's truth, so it can show what to do from any
state: at the start, after a missed grasp, with the cube in the hand. The path is drawn through a
few places at constant speed and then averaged over a short window, which rounds the corners
without stopping in them: a policy that sees one frame cannot tell how long it has been waiting.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from groot_int8_ros.policy.types import Float64Array
from offline_tools.simulation.environment import CONTROL_PERIOD_S, Tabletop, Truth
from offline_tools.simulation.kinematics import JOINTS, Place, arm_joints, hand_place
from offline_tools.simulation.scene import CUBE_SIDE_M, JAW_M
from offline_tools.simulation.tasks import Task

HOME = Place(0.0, 0.15, 0.12)

_OPEN_RAD = math.radians(40.0)
_CLOSED_RAD = math.radians(-18.0)
_HOVER_M = 0.085
_GRASP_M = 0.016
_CARRY_M = 0.095
_RELEASE_M = 0.03
# The cube's middle lies this far from the fixed jaw's side of the closed hand when it is grasped,
# which leaves the same room on both sides of it; closing pushes it against the fixed jaw.
_GRASP_OFFSET_M = 0.015
_NEAR_M = 0.009
_OVER_PLATE_M = 0.03
_HOLDING_RAD = math.radians(-5.0)
_WIDE_RAD = math.radians(25.0)

_SPEED_M_S = 0.22
_TURN_RAD_S = 1.3
_GRIPPER_RAD_S = 2.6
_WINDOW_S = 0.24
# A path begins where the arm is, which need not be a place that the hand can be told to take.
_CATCH_UP_S = 0.3
_GRASP_PAUSE_S = 0.16
_END_PAUSE_S = 0.8


@dataclass(frozen=True)
class _Stop:
    """One corner of a path: pan, radius, height and gripper, and how long to stay there."""

    place: Place
    gripper_rad: float
    pause_s: float = 0.0

    def array(self) -> Float64Array:
        return np.array([*self.place.array(), self.gripper_rad])


def plan(
    simulation: Tabletop, task: Task, *, cube_shift_m: tuple[float, float] = (0.0, 0.0)
) -> Float64Array:
    """Return the joint targets that fulfil a task from now on.

    Args:
        simulation: Read, not stepped.
        task: What is to be done.
        cube_shift_m: Error along x and y of where the expert takes the cube to be, to bring about
            the states that follow a bad grasp.

    Returns:
        One target a control period, the first for now, radians, float64, shape (steps, 6).
    """
    truth = simulation.truth()
    # From the target, not from the measured pose: the arm lags, and holding a cube the gripper is
    # wider than it is told to be.
    now = simulation.target_rad()
    begin = _Stop(hand_place(now), float(now[JOINTS.index("gripper")]))
    cube = truth.cubes[task.cube] + np.array([*cube_shift_m, 0.0])
    path = _smoothed(_sampled([begin, *_stops(truth, task, begin, cube)]))
    targets = np.stack(
        [[*arm_joints(Place(*place)), gripper] for *place, gripper in path.tolist()]
    )
    rest = now - targets[0]
    fade = np.clip(1.0 - np.arange(len(targets)) * CONTROL_PERIOD_S / _CATCH_UP_S, 0.0, 1.0)
    caught_up: Float64Array = targets + rest * (fade * fade * (3.0 - 2.0 * fade))[:, None]
    return caught_up


def grasp_place(cube_m: Float64Array, height_m: float = _GRASP_M) -> Place:
    """Return where the hand is to grasp a cube, or above it."""
    return Place.at(float(cube_m[0]), float(cube_m[1]) - _GRASP_OFFSET_M, height_m)


def _stops(truth: Truth, task: Task, begin: _Stop, cube_m: Float64Array) -> list[_Stop]:
    plate = truth.plates[task.plate]
    hand = begin.place
    if truth.on_plate(task.cube, task.plate) or _let_go_on_plate(truth, task, begin):
        return [*_raise(hand), _Stop(HOME, _OPEN_RAD)]
    over = Place.at(float(plate[0]), float(plate[1]), _CARRY_M)
    release = Place(over.pan_rad, over.radius_m, _RELEASE_M)
    put = [
        _Stop(over, _CLOSED_RAD),
        _Stop(release, _CLOSED_RAD, 0.06),
        _Stop(release, _OPEN_RAD),
        _Stop(over, _OPEN_RAD),
        _Stop(HOME, _OPEN_RAD),
    ]
    lift = Place(hand.pan_rad, hand.radius_m, _CARRY_M)
    if truth.held == task.cube and begin.gripper_rad < _HOLDING_RAD:
        if hand.height_m >= _CARRY_M - 0.02:
            return put
        if _horizontal_m(hand, over) < _OVER_PLATE_M:
            return put[1:]
        return [_Stop(lift, _CLOSED_RAD), *put]
    if _between_jaws(hand, begin.gripper_rad, cube_m):
        return [
            _Stop(hand, _CLOSED_RAD, _GRASP_PAUSE_S),
            _Stop(lift, _CLOSED_RAD),
            *put,
        ]
    grasp = grasp_place(cube_m)
    take = [
        _Stop(grasp, _OPEN_RAD, 0.06),
        _Stop(grasp, _CLOSED_RAD, _GRASP_PAUSE_S),
        _Stop(Place(grasp.pan_rad, grasp.radius_m, _CARRY_M), _CLOSED_RAD),
        *put,
    ]
    aside_m = _horizontal_m(hand, grasp)
    if aside_m < _NEAR_M and begin.gripper_rad > _WIDE_RAD:
        return take
    hover = _Stop(Place(grasp.pan_rad, grasp.radius_m, _HOVER_M), _OPEN_RAD)
    # Something may stand between the jaws: up first, sideways then.
    return [*(_raise(hand) if aside_m > _NEAR_M else []), hover, *take]


def _let_go_on_plate(truth: Truth, task: Task, begin: _Stop) -> bool:
    """Whether the cube stands on its plate between jaws that are opening."""
    offset = truth.cubes[task.cube] - truth.plates[task.plate]
    return (
        math.hypot(offset[0], offset[1]) < _OVER_PLATE_M
        and offset[2] < CUBE_SIDE_M
        and begin.gripper_rad > math.radians(5.0)
    )


def _between_jaws(hand: Place, gripper_rad: float, cube_m: Float64Array) -> bool:
    """Whether closing the jaws here takes the cube; the hand's y is the table's."""
    forward = cube_m[0] - hand.radius_m * math.cos(hand.pan_rad)
    aside = cube_m[1] - hand.radius_m * math.sin(hand.pan_rad)
    room = JAW_M * math.sin(max(gripper_rad, 0.0))
    return bool(
        hand.height_m < _GRASP_M + 0.012
        and abs(forward) < 0.012
        and -0.003 < aside < room + 0.003
        and cube_m[2] < CUBE_SIDE_M
    )


def _raise(hand: Place) -> list[_Stop]:
    if hand.height_m >= _HOVER_M - 0.02:
        return []
    return [
        _Stop(hand, _OPEN_RAD),
        _Stop(Place(hand.pan_rad, hand.radius_m, _HOVER_M), _OPEN_RAD),
    ]


def _horizontal_m(first: Place, second: Place) -> float:
    return math.hypot(
        first.radius_m * math.cos(first.pan_rad) - second.radius_m * math.cos(second.pan_rad),
        first.radius_m * math.sin(first.pan_rad) - second.radius_m * math.sin(second.pan_rad),
    )


def _sampled(stops: list[_Stop]) -> Float64Array:
    """Return straight lines between the stops at constant speed, one row a control period."""
    rows = [stops[0].array()]
    for before, after in pairwise(stops):
        first, last = before.array(), after.array()
        change = np.abs(last - first)
        seconds = max(
            change[0] / _TURN_RAD_S,
            math.hypot(change[1], change[2]) / _SPEED_M_S,
            change[3] / _GRIPPER_RAD_S,
        )
        steps = max(1, math.ceil(seconds / CONTROL_PERIOD_S))
        rows += list(first + (last - first) * (np.arange(1, steps + 1) / steps)[:, None])
        rows += [last] * round(after.pause_s / CONTROL_PERIOD_S)
    rows += [rows[-1]] * round(_END_PAUSE_S / CONTROL_PERIOD_S)
    return np.stack(rows)


def _smoothed(path: Float64Array) -> Float64Array:
    """Return the moving average over `_WINDOW_S`, the ends held."""
    width = round(_WINDOW_S / CONTROL_PERIOD_S) // 2 * 2 + 1
    padded = np.pad(path, ((width // 2, width // 2), (0, 0)), mode="edge")
    kernel = np.full(width, 1.0 / width)
    return np.stack([np.convolve(column, kernel, mode="valid") for column in padded.T], axis=1)
