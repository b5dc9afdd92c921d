"""Hazards of open-loop evaluation: rows joined to the wrong frame, figures of another dataset."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="needs ONNX Runtime")
pytest.importorskip("pyarrow", reason="reading a dataset needs pyarrow")

import pyarrow as pa
import pyarrow.parquet as pq

from groot_int8_ros.errors import BundleError, ConfigurationError, DatasetError
from groot_int8_ros.policy.bundle import Bundle, open_bundle
from groot_int8_ros.policy.policy import Policy
from offline_tools.evaluate.open_loop import (
    Trajectory,
    answer,
    plan_trajectories,
    predicted_actions,
    recorded_errors,
)
from offline_tools.evaluate.same_policy import refuse_other_policy

SEED = 3
HORIZON = 7
FRAMES = 17
STARTS = (0, 7, 14)  # the last chunk is asked for three frames only


@pytest.fixture(scope="module")
def policy(fp16_bundle: Path) -> Iterator[Policy]:
    loaded = Policy.load(fp16_bundle, threads=1)
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def bundle(fp16_bundle: Path) -> Bundle:
    return open_bundle(fp16_bundle)


@pytest.fixture(scope="module")
def trajectory(bundle: Bundle, tiny_dataset: Path) -> Trajectory:
    (found,) = plan_trajectories(
        bundle, tiny_dataset, [0, 0], action_horizon=HORIZON, steps=FRAMES
    )
    return found


def test_each_frame_gets_the_row_that_was_predicted_for_it(
    policy: Policy, trajectory: Trajectory
) -> None:
    assert trajectory.starts == STARTS
    answers = answer(policy, "float", "onnxruntime", [trajectory], SEED)
    joined = predicted_actions(policy.processor, trajectory, answers.action_pred)
    chunks = [policy.infer(one, seed=SEED) for one in trajectory.observations()]
    for frame in range(FRAMES):
        asked, row = divmod(frame, HORIZON)
        for key, lines in joined.items():
            np.testing.assert_array_equal(lines[frame], chunks[asked].actions[key][row])
    assert {key: value.shape for key, value in joined.items()} == {
        "single_arm": (FRAMES, 5),
        "gripper": (FRAMES, 1),
    }


def test_observations_are_those_of_the_frames_that_are_asked(trajectory: Trajectory) -> None:
    for start, observation, state in zip(
        STARTS, trajectory.observations(), trajectory.states(), strict=True
    ):
        recorded = trajectory.episode.state["single_arm"][start]
        np.testing.assert_array_equal(observation.state["single_arm"], recorded)
        np.testing.assert_array_equal(state["single_arm"], recorded)


def test_an_error_of_one_joint_stays_with_that_joint(
    bundle: Bundle, trajectory: Trajectory
) -> None:
    predicted = {k: v[:FRAMES].astype(np.float64) for k, v in trajectory.episode.action.items()}
    predicted["single_arm"][:, 1] += np.where(np.arange(FRAMES) % 2, 3.0, -3.0)
    errors = recorded_errors(bundle.manifest.robot, trajectory, predicted)
    by_name = {joint.joint: joint for joint in errors.joints}
    assert (by_name["shoulder_lift"].mse, by_name["shoulder_lift"].mae) == (9.0, 3.0)
    assert {joint.mae for name, joint in by_name.items() if name != "shoulder_lift"} == {0.0}
    assert errors.mse == pytest.approx(9.0 / 6)
    assert errors.mae == pytest.approx(3.0 / 6)


def test_a_trajectory_named_twice_counts_once(bundle: Bundle, tiny_dataset: Path) -> None:
    (found,) = plan_trajectories(bundle, tiny_dataset, [0, 0])
    assert found.episode.index == 0


def test_a_trajectory_shorter_than_asked_is_evaluated_to_its_end(
    bundle: Bundle, tiny_dataset: Path
) -> None:
    (found,) = plan_trajectories(bundle, tiny_dataset, [0], steps=1000)
    assert found.frames == len(found.episode) == 45
    assert found.starts == (0, 16, 32)


def _sparse(bundle: Bundle, deltas: Sequence[int]) -> Bundle:
    return replace(bundle, processor=replace(bundle.processor, delta_indices=tuple(deltas)))


@pytest.mark.parametrize(
    ("deltas", "horizon", "message"),
    [
        (range(16), 17, r"--action-horizon 17 is longer than the chunk.*use at most 16"),
        # Frames 3 and 5 have no row: nothing may be put in their place.
        ((0, 1, 2, 4, 6), 4, "use at most 3"),
        ((1, 2, 3), None, "no row for the observation's own frame"),
    ],
)
def test_frames_without_a_prediction_are_not_made_up(
    bundle: Bundle, tiny_dataset: Path, deltas: Sequence[int], horizon: int | None, message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        plan_trajectories(_sparse(bundle, deltas), tiny_dataset, [0], action_horizon=horizon)


def test_dataset_of_another_robot_is_refused(bundle: Bundle, g1_dataset_dir: Path) -> None:
    with pytest.raises(DatasetError, match="no camera 'front'"):
        plan_trajectories(bundle, g1_dataset_dir, [0])


def test_joints_of_another_width_are_refused_by_name(bundle: Bundle, tiny_dataset: Path) -> None:
    first, *others = bundle.processor.action_keys
    wider = replace(bundle.processor, action_keys=(replace(first, dim=first.dim + 1), *others))
    with pytest.raises(DatasetError, match=f"action key '{first.key}' of 6 .* one of 5 dim"):
        plan_trajectories(replace(bundle, processor=wider), tiny_dataset, [0])


def test_unknown_trajectory_is_refused(bundle: Bundle, tiny_dataset: Path) -> None:
    with pytest.raises(DatasetError, match="no episode 1"):
        plan_trajectories(bundle, tiny_dataset, [0, 1])


def test_a_state_that_is_not_finite_is_refused_with_its_episode_and_frame(
    bundle: Bundle, tiny_dataset: Path, tmp_path: Path
) -> None:
    dataset = tmp_path / "dataset"
    shutil.copytree(tiny_dataset, dataset)
    (file,) = dataset.glob("data/**/*.parquet")
    table = pq.read_table(file)
    column = table.column_names.index("observation.state")
    rows = table["observation.state"].to_pylist()
    rows[HORIZON][0] = float("nan")
    spoilt = pa.array(rows, table.schema.field(column).type)
    pq.write_table(table.set_column(column, table.schema.field(column), spoilt), file)
    message = f"dataset, episode 0, frame {HORIZON}: state 'single_arm' is nan at joint index 0"
    with pytest.raises(DatasetError, match=message):
        plan_trajectories(bundle, dataset, [0], action_horizon=HORIZON)
    # At a frame that is not asked it is no harm.
    plan_trajectories(bundle, dataset, [0], action_horizon=HORIZON - 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"checkpoint_sha256": "0" * 64}, "another checkpoint than .* runs of their own"),
        ({"embodiment": "gr1"}, "another embodiment"),
        ({"action_horizon": 50}, "another action horizon"),
        # The same words would become other tokens.
        ({"files": {"tokenizer.json": ("0" * 64, 1)}}, r"another tokenizer\.json"),
    ],
)
def test_bundles_of_different_policies_are_not_compared(
    bundle: Bundle, change: dict[str, Any], message: str
) -> None:
    if "files" in change:
        change = {"files": {**bundle.manifest.files, **change["files"]}}
    other = replace(bundle, manifest=replace(bundle.manifest, **change))
    with pytest.raises(BundleError, match=message):
        refuse_other_policy(bundle, other)
    refuse_other_policy(bundle, bundle)


def test_no_denoising_step_is_refused(fp16_bundle: Path) -> None:
    # Zero steps would return the noise as the actions.
    with pytest.raises(ConfigurationError, match="at least one step"):
        Policy.load(fp16_bundle, denoising_steps=0)
