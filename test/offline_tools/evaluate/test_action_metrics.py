"""Hazards of judging actions: mixed units, wrong time scale, answers that are not numbers."""

from __future__ import annotations

import json

import numpy as np
import pytest

from groot_int8_ros.policy.processor import ActionKey, ImageChain, Processor, StateKey
from groot_int8_ros.policy.robot import RobotDescription
from groot_int8_ros.policy.types import CameraSpec, JointSpec
from offline_tools.evaluate.action_metrics import action_errors, jerk

ROWS = 6
PERIOD_S = 0.1
STATE = {"arm": np.array([10.0], np.float32)}


def _array(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float64)


def _processor() -> Processor:
    return Processor(
        embodiment_tag="new_embodiment",
        embodiment_id=10,
        cameras=("front",),
        state_keys=(StateKey("arm", 1, "min_max", low=_array(0), high=_array(1)),),
        action_keys=(
            ActionKey("arm", 1, "min_max", "absolute", low=_array(-90), high=_array(90)),
            ActionKey("hand", 1, "min_max", "absolute", low=_array(0), high=_array(2)),
        ),
        delta_indices=tuple(range(ROWS)),
        max_state_dim=3,
        max_action_dim=3,
        max_action_horizon=ROWS,
        image_chain=ImageChain(256, 0.95),
        formalize_language=True,
        clip_outliers=True,
    )


def _robot() -> RobotDescription:
    # The table's order is not the order of the action keys, which is what counts.
    return RobotDescription(
        cameras=(CameraSpec("front", 8, 8),),
        state_joints={"arm": (JointSpec("elbow", "degrees"),)},
        action_joints={"hand": (JointSpec("grip"),), "arm": (JointSpec("elbow", "degrees"),)},
        action_period_s=PERIOD_S,
    )


def _chunk(seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).uniform(-0.5, 0.5, (ROWS, 3)).astype(np.float32)


def test_an_error_of_one_joint_is_reported_in_its_unit_alone() -> None:
    reference, found = _chunk(), _chunk()
    found[2, 0] += 0.1  # a twentieth of the arm's 180 degrees
    errors = action_errors(_processor(), _robot(), [reference], [found], [STATE])
    assert errors.by_unit["degrees"].maximum == pytest.approx(9.0, abs=1e-4)
    assert errors.by_unit["raw"].maximum == 0.0
    assert errors.by_unit["raw"].jerk_ratio == pytest.approx(1.0)


def test_the_worst_sample_does_not_hide_behind_good_ones() -> None:
    reference = [_chunk(0), _chunk(1), _chunk(2), _chunk(3)]
    found = [reference[0], reference[1], reference[2], -reference[3]]
    errors = action_errors(_processor(), _robot(), reference, found, [STATE] * 4)
    assert errors.worst_relative_l2 == pytest.approx(2.0)
    assert errors.relative_l2 < 1.5


def test_trembling_that_a_cosine_does_not_see_shows_as_jerk() -> None:
    position = np.linspace(-0.5, 0.5, ROWS)[:, None]
    steady = (position + 0.1 * position**3) * np.ones((1, 3))
    reference = steady.astype(np.float32)
    found = (steady + 0.005 * (-1.0) ** np.arange(ROWS)[:, None]).astype(np.float32)
    errors = action_errors(_processor(), _robot(), [reference], [found], [STATE])
    assert errors.cosine > 0.99
    assert errors.by_unit["degrees"].jerk_ratio > 1.2


def test_answers_that_are_not_numbers_are_infinitely_wrong_and_valid_json() -> None:
    found = _chunk()
    found[0, 2] = np.nan  # in the padding: the next denoising step would spread it
    errors = action_errors(_processor(), _robot(), [_chunk()], [found], [STATE])
    assert errors.relative_l2 == np.inf
    assert errors.by_unit["degrees"].maximum == np.inf
    text = json.dumps(errors.to_dict(), allow_nan=False)
    assert json.loads(text)["relative_l2"] is None


def test_jerk_of_a_cubic_is_its_third_derivative_even_where_rows_are_left_out() -> None:
    times_s = np.array([0.0, 0.1, 0.2, 0.4, 0.8])
    targets = (2.0 * times_s**3 - 5.0 * times_s**2)[:, None]
    assert jerk(targets, times_s) == pytest.approx(np.full((2, 1), 12.0))


def test_a_chunk_too_short_for_a_third_difference_has_no_jerk() -> None:
    assert jerk(np.ones((2, 3, 1)), np.arange(3.0)).shape == (2, 0, 1)


def test_sets_of_different_size_are_refused() -> None:
    with pytest.raises(ValueError, match="samples"):
        action_errors(_processor(), _robot(), [_chunk()], [], [STATE])
