"""Hazards of the expert: a task it cannot do, a missed grasp it does not see, a second try."""

from __future__ import annotations

import math

import numpy as np
import pytest

from groot_int8_ros.errors import ConfigurationError
from offline_tools.simulation.environment import CONTROL_PERIOD_S, Tabletop
from offline_tools.simulation.expert import plan
from offline_tools.simulation.tasks import TASKS, Task, other_task, parse_task


@pytest.mark.parametrize("seed", range(12))
def test_every_task_is_done_in_a_few_seconds(simulation: Tabletop, seed: int) -> None:
    task = TASKS[seed % len(TASKS)]
    simulation.reset(seed)
    path = plan(simulation, task)
    for target in path:
        simulation.step(target)
    assert {other for other in TASKS if simulation.success(other)} == {task}
    assert len(path) * CONTROL_PERIOD_S < 8.0


def test_targets_move_without_a_jump(simulation: Tabletop) -> None:
    simulation.reset(4)
    path = plan(simulation, TASKS[4])
    np.testing.assert_allclose(path[0], simulation.target_rad(), atol=1e-9)
    speed = np.abs(np.diff(path, axis=0)).max(axis=0) / CONTROL_PERIOD_S
    assert (speed < [1.6, 4.0, 4.0, 4.0, 1.6, 3.0]).all()


def test_a_missed_grasp_is_seen_and_repaired(simulation: Tabletop) -> None:
    task = Task("green", "right")
    simulation.reset(1)
    for target in plan(simulation, task, cube_shift_m=(-0.04, 0.0))[: round(3 / CONTROL_PERIOD_S)]:
        simulation.step(target)
    assert simulation.truth().held is None
    for target in plan(simulation, task):
        simulation.step(target)
    assert simulation.success(task)


def test_over_the_plate_a_held_cube_is_let_go_and_not_lifted_again(simulation: Tabletop) -> None:
    task = Task("red", "left")
    simulation.reset(6)
    for target in plan(simulation, task):
        simulation.step(target)
        truth = simulation.truth()
        low = truth.cubes["red"][2] < 0.04
        away = math.dist(truth.cubes["red"][:2], truth.plates["left"][:2])
        if truth.held == "red" and low and away < 0.02:
            break
    else:
        pytest.fail("the cube was never held over the plate")
    gripper = plan(simulation, task)[: round(1.0 / CONTROL_PERIOD_S), 5]
    assert gripper.max() > math.radians(20.0)


def test_tasks_are_named_by_cube_and_plate_or_by_their_sentence() -> None:
    for task in TASKS:
        assert parse_task(f"{task.cube}/{task.plate}") == task
        assert parse_task(task.instruction) == task
    with pytest.raises(ConfigurationError, match="red/left"):
        parse_task("pink/left")


def test_the_wrong_task_shares_neither_cube_nor_plate() -> None:
    for task in TASKS:
        others = {other_task(task, offset) for offset in range(4)}
        assert len(others) == 2
        assert all(other.cube != task.cube and other.plate != task.plate for other in others)
