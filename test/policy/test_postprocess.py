"""Hazards between the network's answer and the robot's joints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from groot_int8_ros.errors import EngineError, ObservationError
from groot_int8_ros.policy.postprocess import (
    clipped_rows,
    decode_actions,
    decode_actions_float64,
    encode_actions,
)
from groot_int8_ros.policy.processor import (
    ActionKey,
    ImageChain,
    Processor,
    StateKey,
    load_processor,
    parse_processor,
)
from groot_int8_ros.policy.types import CommittedActions

STEPS = 2


def _array(*values: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array(values, dtype=np.float64)


def _processor(*action_keys: ActionKey) -> Processor:
    state = StateKey("arm", 2, "min_max", low=_array(0, 0), high=_array(1, 1))
    return Processor(
        embodiment_tag="new_embodiment",
        embodiment_id=10,
        cameras=("front",),
        state_keys=(state,),
        action_keys=action_keys,
        delta_indices=tuple(range(STEPS)),
        max_state_dim=8,
        max_action_dim=6,
        max_action_horizon=4,
        image_chain=ImageChain(256, 0.95),
        formalize_language=True,
        clip_outliers=True,
    )


ABSOLUTE = ActionKey("hand", 1, "min_max", "absolute", low=_array(10), high=_array(30))
RELATIVE = ActionKey(
    "arm",
    2,
    "min_max",
    "relative",
    "arm",
    low=_array([-1, -2], [-10, -20]),
    high=_array([1, 2], [10, 20]),
)
MEAN_STD = ActionKey("wrist", 2, "mean_std", "absolute", mean=_array(5, 5), std=_array(2, 0))
STATE = {"arm": np.array([100, 200], np.float32)}


def test_keys_are_split_in_order_and_padding_never_leaks_in() -> None:
    processor = _processor(RELATIVE, ABSOLUTE)
    pred = np.full((4, 6), 0.9, np.float32)
    pred[:STEPS, :3] = [[0, 0, -1], [0, 0, 1]]
    decoded = decode_actions(processor, pred, STATE)
    assert list(decoded) == ["arm", "hand"]
    assert decoded["arm"].tolist() == [[100, 200], [100, 200]]
    assert decoded["hand"].tolist() == [[10], [30]]
    assert {value.dtype for value in decoded.values()} == {np.dtype(np.float32)}


def test_relative_steps_are_offsets_from_one_state_with_statistics_of_their_own_step() -> None:
    pred = np.zeros((STEPS, 6), np.float32)
    pred[:, :2] = [[1, -1], [1, -1]]
    decoded = decode_actions(_processor(RELATIVE), pred, STATE)
    # Step 1 adds its own 10 to the state, not to step 0's target.
    assert decoded["arm"].tolist() == [[101, 198], [110, 180]]


def test_bounded_keys_stay_inside_the_training_range() -> None:
    pred = np.zeros((STEPS, 6), np.float32)
    pred[:, 0] = [7.0, -7.0]
    assert decode_actions(_processor(ABSOLUTE), pred, {})["hand"].tolist() == [[30], [10]]


def test_bounded_keys_are_halved_in_float32_as_in_the_public_code() -> None:
    key = ActionKey("hand", 1, "min_max", "absolute", low=_array(0), high=_array(1))
    pred = np.full((STEPS, 6), 0.1, np.float32)
    # In float64 throughout it would be 0.5500000007.
    assert decode_actions_float64(_processor(key), pred, {})["hand"][0, 0] == np.float32(0.55)


def test_mean_std_keys_are_not_clipped_and_constant_joints_pass_through() -> None:
    pred = np.zeros((STEPS, 6), np.float32)
    pred[:, :2] = [[3.0, 3.0], [-3.0, -3.0]]
    decoded = decode_actions(_processor(MEAN_STD), pred, {})
    assert decoded["wrist"].tolist() == [[11, 3], [-1, -3]]


def test_a_constant_bounded_joint_gives_its_constant() -> None:
    key = ActionKey("lock", 1, "min_max", "absolute", low=_array(0.25), high=_array(0.25))
    pred = np.full((STEPS, 6), 0.7, np.float32)
    assert decode_actions(_processor(key), pred, {})["lock"].tolist() == [[0.25], [0.25]]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [(0, 0), (3, 5)])
def test_an_answer_that_is_not_finite_never_becomes_a_command(
    value: float, place: tuple[int, int]
) -> None:
    pred = np.zeros((4, 6), np.float32)
    pred[place] = value
    with pytest.raises(EngineError, match=f"step {place[0]}, value {place[1]}"):
        decode_actions(_processor(ABSOLUTE), pred, {})


def test_a_finite_answer_that_overflows_when_scaled_never_becomes_a_command() -> None:
    pred = np.full((STEPS, 6), 3e38, np.float32)
    with pytest.raises(EngineError, match="'wrist'"):
        decode_actions(_processor(MEAN_STD), pred, {})


@pytest.mark.parametrize("shape", [(1, 6), (4, 5), (4, 7), (1, 4, 6), (24,)])
def test_an_answer_of_another_checkpoint_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(EngineError, match="another checkpoint"):
        decode_actions(_processor(ABSOLUTE), np.zeros(shape, np.float32), {})


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "no state 'arm'"),
        ({"arm": np.zeros(3, np.float32)}, r"shape \(3,\)"),
        ({"arm": np.array([0, np.nan], np.float32)}, "joint index 1"),
    ],
)
def test_relative_targets_need_a_usable_state(state: dict[str, Any], message: str) -> None:
    with pytest.raises(ObservationError, match=message):
        decode_actions(_processor(RELATIVE), np.zeros((STEPS, 6), np.float32), state)


def test_decoding_changes_neither_the_answer_nor_the_state() -> None:
    pred = np.full((STEPS, 6), 0.5, np.float32)
    state = {"arm": STATE["arm"].copy()}
    decoded = decode_actions(_processor(RELATIVE, ABSOLUTE), pred, state)
    decoded["arm"][...] = 0
    assert (pred == 0.5).all()
    assert (state["arm"] == STATE["arm"]).all()


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("denoising_steps", [1, 2, 4])
def test_decoded_chunks_equal_the_public_code_to_the_bit(
    golden_dir: Path, index: int, denoising_steps: int
) -> None:
    processor = load_processor(golden_dir / "checkpoint")
    with np.load(golden_dir / f"golden_obs{index}.npz") as golden:
        prefix = f"n{denoising_steps}"
        pred = golden[f"{prefix}.action_pred"][0]
        state = {key.key: golden[f"state.{key.key}"][0] for key in processor.state_keys}
        decoded = decode_actions(processor, pred, state)
        decoded64 = decode_actions_float64(processor, pred, state)
        assert set(decoded) == {"single_arm", "gripper"}
        for key, value in decoded.items():
            expected = golden[f"{prefix}.decoded.{key}"][0]
            assert value.dtype == expected.dtype
            assert np.array_equal(value, expected)
            assert np.array_equal(decoded64[key], golden[f"{prefix}.decoded64.{key}"][0])


@pytest.mark.parametrize("percentiles", [0, 1])
@pytest.mark.parametrize("item", [0, 1])
def test_every_encoding_decodes_as_the_public_code_to_the_bit(
    golden_dir: Path, percentiles: int, item: int
) -> None:
    content = json.loads((golden_dir / "golden_norm.json").read_text())
    modalities = content["modality_config"] | {
        "video": {"delta_indices": [0], "modality_keys": ["front"]}
    }
    config = {
        "processor_kwargs": {
            "modality_configs": {"new_embodiment": modalities},
            "use_albumentations": True,
            "use_relative_action": True,
            "use_percentiles": bool(percentiles),
        }
    }
    processor = parse_processor(config, content["statistics"], None, None)
    with np.load(golden_dir / "golden_norm.npz") as golden:
        pred = np.zeros((processor.action_steps, processor.max_action_dim), np.float32)
        normalised = [golden[f"in.normalized_action.{key.key}"] for key in processor.action_keys]
        used = np.concatenate([value[item] for value in normalised], axis=-1)
        pred[:, : used.shape[-1]] = used
        state = {"trunk": golden["in.trunk_state_batch"][item, -1]}
        decoded = decode_actions_float64(processor, pred, state)
        assert set(decoded) == {"pos", "vel", "torso"}
        for key, value in decoded.items():
            assert np.array_equal(value, golden[f"percentiles{percentiles}.decoded.{key}"][item])


def _committed(processor: Processor, rows: list[int], pred: Any) -> CommittedActions:
    decoded = decode_actions(processor, pred, STATE)
    return CommittedActions(rows, {key: value[rows] for key, value in decoded.items()})


@pytest.mark.parametrize("rows", [[0, 1], [1], [1, 0], []])
def test_encoding_is_the_inverse_of_decoding_row_by_row(rows: list[int]) -> None:
    processor = _processor(RELATIVE, ABSOLUTE, MEAN_STD)
    pred = np.random.RandomState(0).uniform(-1, 1, (4, 6)).astype(np.float32)
    encoded = encode_actions(processor, _committed(processor, rows, pred), STATE)
    assert encoded.dtype == np.float32
    # Targets near 200 are exact to 8e-6, and the first step's range is 2.
    np.testing.assert_allclose(encoded[:, :5], pred[rows][:, :5], atol=2e-5)
    assert not encoded[:, 5:].any()
    assert clipped_rows(processor, _committed(processor, rows, pred), STATE) == 0


def test_committed_rows_are_taken_relative_to_the_new_observation() -> None:
    processor = _processor(RELATIVE)
    moved = {"arm": STATE["arm"] + 0.5}
    committed = CommittedActions([1], {"arm": np.array([[105, 205]], np.float32)})
    encoded = encode_actions(processor, committed, moved)
    pred = np.zeros((STEPS, 6), np.float32)
    pred[1] = encoded[0]
    assert decode_actions(processor, pred, moved)["arm"][1].tolist() == [105, 205]
    # 4.5 of the second step's range of 10.
    assert encoded[0, 0] == np.float32(0.45)


def test_what_the_network_cannot_say_is_clipped_to_what_it_can() -> None:
    committed = CommittedActions([0, 1], {"hand": np.array([[50.0], [-50.0]], np.float32)})
    encoded = encode_actions(_processor(ABSOLUTE), committed, {})
    assert encoded[:, 0].tolist() == [1, -1]
    assert clipped_rows(_processor(ABSOLUTE), committed, {}) == 2
    inside = CommittedActions([0, 1], {"hand": np.array([[20.0], [0.0]], np.float32)})
    assert clipped_rows(_processor(ABSOLUTE), inside, {}) == 1


@pytest.mark.parametrize("rows", [[0, 2], [-1, 0], [1, 1], [0, 2**63], [0, -(10**30)]])
def test_rows_that_no_chunk_has_are_refused(rows: list[int]) -> None:
    committed = CommittedActions(rows, {"hand": np.zeros((2, 1), np.float32)})
    for encode in (encode_actions, clipped_rows):
        with pytest.raises(ObservationError, match="must be different rows of the coming chunk"):
            encode(_processor(ABSOLUTE), committed, {})


def test_joint_that_never_moved_is_encoded_as_nothing_and_decodes_to_itself() -> None:
    still = ActionKey("hand", 1, "min_max", "absolute", low=_array(7), high=_array(7))
    committed = CommittedActions([0], {"hand": np.array([[7.0]], np.float32)})
    assert encode_actions(_processor(still), committed, {})[0].tolist() == [0] * 6
