"""Hazards of drawn scenes: cubes that touch, cubes out of reach, looks that never change."""

from __future__ import annotations

import math
from itertools import combinations

import mujoco
import numpy as np

from offline_tools.simulation.expert import grasp_place
from offline_tools.simulation.kinematics import arm_joints, hand_place
from offline_tools.simulation.randomization import Appearance, draw_start
from offline_tools.simulation.scene import CUBE_SIDE_M, PLATE_RADIUS_M, scene_xml


def test_cubes_lie_apart_off_the_plates_and_in_reach() -> None:
    for seed in range(300):
        start = draw_start(np.random.RandomState(seed))
        places = [*start.cubes.values()]
        for (x, y, _), (other_x, other_y, _) in combinations(places, 2):
            assert math.hypot(x - other_x, y - other_y) > 1.5 * CUBE_SIDE_M
        for x, y, _ in places:
            for plate_x, plate_y in start.plates.values():
                assert math.hypot(x - plate_x, y - plate_y) > PLATE_RADIUS_M
            for height in (0.016, 0.085):
                place = grasp_place(np.array([x, y, 0.0]), height)
                reached = hand_place(arm_joints(place))
                np.testing.assert_allclose(reached.array(), place.array(), atol=1e-6)


def test_looks_change_around_the_compiled_ones_and_do_not_drift() -> None:
    model = mujoco.MjModel.from_xml_string(scene_xml())
    compiled = model.cam_pos.copy()
    appearance = Appearance(model)
    seen = []
    for seed in range(60):
        appearance.draw(np.random.RandomState(seed))
        seen.append((model.geom("table").matid[0], model.light("sun").diffuse[0]))
        assert np.abs(model.cam_pos - compiled).max() <= 0.004
    assert len({table for table, _ in seen}) >= 6
    assert len({light for _, light in seen}) == 60
