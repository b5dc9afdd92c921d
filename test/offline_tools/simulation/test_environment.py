"""Hazards of the simulation: a seed that means two things, success that is not, blind cameras."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from offline_tools.simulation.environment import Tabletop, Truth
from offline_tools.simulation.kinematics import Place, arm_joints
from offline_tools.simulation.randomization import draw_start
from offline_tools.simulation.robot import FRAME_SIZES
from offline_tools.simulation.tasks import CUBES, TASKS, Task


def test_a_seed_gives_the_same_frames_and_another_seed_others(simulation: Tabletop) -> None:
    frames = []
    for seed in (7, 8, 7):
        simulation.reset(seed)
        for _ in range(5):
            simulation.step(np.zeros(6))
        frames.append(simulation.frames())
    for camera, (height, width) in FRAME_SIZES.items():
        first, other, again = (one[camera] for one in frames)
        assert first.shape == (height, width, 3)
        np.testing.assert_array_equal(first, again)
        assert (first != other).any(axis=2).mean() > 0.5


def test_both_cameras_see_each_cube_in_its_colour(simulation: Tabletop) -> None:
    start = simulation.reset(3)
    for cube in CUBES:
        x, y, _ = start.cubes[cube]
        simulation.put_arm(np.array([*arm_joints(Place.at(x, y - 0.015, 0.09)), 0.7]))
        wrist = simulation.frame("wrist")
        simulation.put_arm(np.array([*arm_joints(Place(0.0, 0.13, 0.16)), 0.7]))
        for frame in (wrist, simulation.frame("front")):
            red, green, blue = np.moveaxis(frame.astype(int), 2, 0)
            channel = {"red": red, "green": green, "blue": blue}[cube]
            rest = red + green + blue - channel
            assert ((channel > 60) & (channel > rest)).sum() > 60, cube


def test_no_task_is_fulfilled_before_anything_moved(simulation: Tabletop) -> None:
    for seed in range(20):
        simulation.reset(seed)
        assert not any(simulation.success(task) for task in TASKS)


def test_success_is_the_asked_cube_resting_on_the_asked_plate(simulation: Tabletop) -> None:
    start = draw_start(np.random.RandomState(5))
    x, y = start.plates["left"]
    on_left = replace(start, cubes={**start.cubes, "green": (x + 0.02, y, 0.1)})
    simulation.reset(5, start=on_left)
    for _ in range(25):
        simulation.step(simulation.target_rad())
    fulfilled = {task for task in TASKS if simulation.success(task)}
    assert fulfilled == {Task("green", "left")}


def test_a_cube_beside_the_plate_is_no_success(simulation: Tabletop) -> None:
    start = draw_start(np.random.RandomState(5))
    x, y = start.plates["left"]
    beside = replace(start, cubes={**start.cubes, "green": (x + 0.075, y, 0.0)})
    simulation.reset(5, start=beside)
    assert not simulation.success(Task("green", "left"))


def test_a_cube_over_its_plate_gives_a_truth_that_results_can_hold() -> None:
    above = {"green": np.array([0.0, 0.0, 0.1])}
    truth = Truth(above, {"left": np.zeros(3)}, None, frozenset())
    # A NumPy truth has no JSON.
    assert truth.on_plate("green", "left") is False


def test_a_cube_between_the_jaws_is_held_and_no_success(simulation: Tabletop) -> None:
    start = draw_start(np.random.RandomState(5))
    x, y = start.plates["left"]
    simulation.reset(5, start=replace(start, cubes={**start.cubes, "green": (x, y, 0.0)}))
    simulation.put_arm(np.array([*arm_joints(Place.at(x, y, 0.022)), 0.15]))
    closed = simulation.target_rad()
    closed[5] = -0.3
    for _ in range(40):
        simulation.step(closed)
    assert simulation.truth().held == "green"
    assert not simulation.success(Task("green", "left"))


def test_targets_beyond_the_joints_are_cut_and_the_arm_follows(simulation: Tabletop) -> None:
    simulation.reset(0)
    target = simulation.joints_rad()
    target[0] = 9.0
    for _ in range(100):
        simulation.step(target)
    assert simulation.target_rad()[0] < 1.8
    assert simulation.joints_rad()[0] == pytest.approx(simulation.target_rad()[0], abs=0.01)


def test_a_machine_that_cannot_draw_is_told_what_to_install() -> None:
    # A platform that PyOpenGL does not find stands for a machine without the library.
    result = subprocess.run(
        [sys.executable, "-m", "offline_tools.cli", "make-sim-dataset", "--output", "nowhere"],
        env={**os.environ, "MUJOCO_GL": "osmesa", "LD_LIBRARY_PATH": "/nonexistent"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    if result.returncode == 0:
        pytest.skip("this machine has OSMesa")
    assert result.returncode == 2
    assert "libosmesa6" in result.stderr
    assert "Traceback" not in result.stderr
