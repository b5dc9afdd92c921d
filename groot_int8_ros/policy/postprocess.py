"""From the network's normalised answer to targets in the robot's physical units, and back.

Owns: the inverse of the action normalisation and the step from relative to absolute targets, and
for rows that are committed already the way back.
Must not import torch, ROS or an engine: the node, the evaluation and the calibration decode with
the same few lines. The arithmetic, including where it is float32 and where float64, is that of
the public Isaac-GR00T processor (commit e29d8fc), so that decoded actions agree to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

from groot_int8_ros.errors import EngineError, ObservationError
from groot_int8_ros.policy.preprocess import state_vector
from groot_int8_ros.policy.processor import ActionKey, Processor
from groot_int8_ros.policy.types import (
    CommittedActions,
    Float32Array,
    Float64Array,
    Int64Array,
)

# Of a range or of its bounds: what a committed row may lie beyond them and pass for rounding.
_CLIPPED_PART = 1e-3


def decode_actions(
    processor: Processor, action_pred: Float32Array, state: Mapping[str, ArrayLike]
) -> dict[str, Float32Array]:
    """Turn the network's answer into physical targets.

    Args:
        processor: The embodiment's conventions.
        action_pred: Normalised actions, float32, shape (horizon, max_action_dim). Steps beyond
            the processor's `delta_indices` and values beyond its action keys are ignored.
        state: Raw state of the observation that was answered, shape (D,) per key; needed for the
            keys that relative actions refer to. The whole chunk is decoded against this state.

    Returns:
        Action key to targets in physical units, float32, shape (steps, D).

    Raises:
        EngineError: `action_pred` has another shape, or holds NaN or infinity.
        ObservationError: The state of a relative key is missing, misshapen or not finite.
    """
    decoded = decode_actions_float64(processor, action_pred, state)
    with np.errstate(over="ignore"):
        actions = {key: value.astype(np.float32) for key, value in decoded.items()}
    for key, value in actions.items():
        if not np.isfinite(value).all():
            raise EngineError(
                f"the decoded actions of '{key}' do not fit into float32: the engine answered "
                "with absurdly large numbers. Nothing is sent to the robot. Compare the engine "
                "with the reference graph (groot-int8 verify) and rebuild it."
            )
    return actions


def decode_actions_float64(
    processor: Processor, action_pred: Float32Array, state: Mapping[str, ArrayLike]
) -> dict[str, Float64Array]:
    """Do what `decode_actions` does, without its last cast to float32.

    Keys encoded by mean and standard deviation pass through float32 in the public code; their
    values are exact float32 numbers here too.
    """
    predicted = _checked(processor, action_pred)
    decoded: dict[str, Float64Array] = {}
    start = 0
    for key in processor.action_keys:
        normalised = predicted[: processor.action_steps, start : start + key.dim]
        start += key.dim
        values = _unnormalise(key, normalised)
        if key.reference_state_key is not None:
            reference = state_vector(state, key.reference_state_key, key.dim)
            values = values + reference.astype(np.float64)
        decoded[key.key] = values
    return decoded


def encode_actions(
    processor: Processor, committed: CommittedActions, state: Mapping[str, ArrayLike]
) -> Float32Array:
    """Turn committed rows into the network's normalised actions: `decode_actions` backwards.

    What a bounded key cannot express (`decode_actions` clips) is clipped, and a joint that never
    moved in training, which decodes to one value whatever the network says, becomes 0.

    Args:
        processor: The embodiment's conventions.
        committed: Rows of the chunk that is to be computed, in physical units.
        state: Raw state of the observation that the chunk is decoded against; not that of the
            chunk which the rows come from.

    Returns:
        Normalised actions, float32 (M, max_action_dim), zero beyond the action keys as in
        training.

    Raises:
        ObservationError: A row is not of the chunk or given twice, a key is missing, misshapen or
            not finite, or the state of a relative key is.
    """
    rows = _rows(processor, committed)
    encoded = np.zeros((rows.size, processor.max_action_dim), np.float32)
    start = 0
    for key in processor.action_keys:
        values = _offsets(key, committed, state, rows.size)
        encoded[:, start : start + key.dim] = _normalise(key, values, rows)
        start += key.dim
    return encoded


def clipped_rows(
    processor: Processor, committed: CommittedActions, state: Mapping[str, ArrayLike]
) -> int:
    """Count the committed rows that `encode_actions` clips, and by more than rounding.

    Args:
        processor: As for `encode_actions`, as the others.
        committed: Likewise.
        state: Likewise.

    Raises:
        ObservationError: As `encode_actions`.
    """
    rows = _rows(processor, committed)
    clipped = np.zeros(rows.size, np.bool_)
    for key in processor.action_keys:
        if key.encoding == "mean_std":
            continue
        values = _offsets(key, committed, state, rows.size)
        low, high = _of_rows(key.low, rows), _of_rows(key.high, rows)
        slack = _CLIPPED_PART * np.maximum(high - low, np.maximum(np.abs(low), np.abs(high)))
        clipped |= ((values < low - slack) | (values > high + slack)).any(axis=1)
    return int(clipped.sum())


def _offsets(
    key: ActionKey, committed: CommittedActions, state: Mapping[str, ArrayLike], rows: int
) -> Float64Array:
    values = _physical(key, committed, rows)
    if key.reference_state_key is None:
        return values
    reference = state_vector(state, key.reference_state_key, key.dim)
    return values - reference.astype(np.float64)


def _rows(processor: Processor, committed: CommittedActions) -> Int64Array:
    rows = [int(row) for row in committed.rows]
    # Before they are int64, which not every whole number fits.
    if not all(0 <= row < processor.action_steps for row in rows) or len(set(rows)) < len(rows):
        raise ObservationError(
            f"the committed rows {rows} must be different rows of the coming chunk, from 0 to "
            f"{processor.action_steps - 1}"
        )
    return np.array(rows, np.int64)


def _physical(key: ActionKey, committed: CommittedActions, rows: int) -> Float64Array:
    if key.key not in committed.actions:
        raise ObservationError(
            f"there are no committed actions of '{key.key}' (given are "
            f"{', '.join(committed.actions) or 'none'}): give the rows of every action key"
        )
    values = np.asarray(committed.actions[key.key], np.float64)
    if values.shape != (rows, key.dim) or not np.isfinite(values).all():
        raise ObservationError(
            f"the committed actions of '{key.key}' have shape {values.shape}; they must be finite "
            f"and of shape ({rows}, {key.dim})"
        )
    return values


def _normalise(key: ActionKey, values: Float64Array, rows: Int64Array) -> Float32Array:
    """Invert `_unnormalise` for one key.

    Args:
        key: Its encoding and statistics.
        values: float64 (M, D).
        rows: Row of the chunk of each, which chooses the statistics where each step has its own.

    Returns:
        float32 (M, D).
    """
    if key.encoding == "mean_std":
        mean, std = _of_rows(key.mean, rows), _of_rows(key.std, rows)
        varies = std != 0.0
        scaled = (values - mean) / np.where(varies, std, 1.0)
        return np.where(varies, scaled, values).astype(np.float32)
    low = _of_rows(key.low, rows)
    span = _of_rows(key.high, rows) - low
    varies = span != 0.0
    unit = (values - low) / np.where(varies, span, 1.0)
    return np.where(varies, np.clip(2.0 * unit - 1.0, -1.0, 1.0), 0.0).astype(np.float32)


def _of_rows(statistics: Float64Array | None, rows: Int64Array) -> Float64Array:
    assert statistics is not None
    return statistics[rows] if statistics.ndim > 1 else statistics


def _checked(processor: Processor, action_pred: Float32Array) -> Float32Array:
    predicted = np.asarray(action_pred, dtype=np.float32)
    if (
        predicted.ndim != 2
        or predicted.shape[0] < processor.action_steps
        or predicted.shape[1] != processor.max_action_dim
    ):
        raise EngineError(
            f"the engine's action_pred has shape {predicted.shape}; expected at least "
            f"{processor.action_steps} steps of {processor.max_action_dim} values. The engine was "
            "built from another checkpoint than the processor files: export and build again."
        )
    # Padding is checked as well: within the denoising loop every value reaches the others.
    if not np.isfinite(predicted).all():
        step, index = (int(i) for i in np.argwhere(~np.isfinite(predicted))[0])
        raise EngineError(
            f"the engine's action_pred holds NaN or infinity, first at step {step}, value "
            f"{index}. Nothing is sent to the robot. A layer overflows in its precision: run "
            "groot-int8 verify on this bundle and keep the layer that it names in float."
        )
    return predicted


def _unnormalise(key: ActionKey, normalised: Float32Array) -> Float64Array:
    """Invert one key's normalisation.

    Args:
        key: Its encoding and statistics.
        normalised: float32 (steps, D).

    Returns:
        float64 (steps, D).
    """
    if key.encoding == "mean_std":
        assert key.mean is not None
        assert key.std is not None
        with np.errstate(over="ignore"):
            scaled = (normalised * key.std + key.mean).astype(np.float32)
        return np.where(key.std != 0.0, scaled, normalised).astype(np.float64)
    assert key.low is not None
    assert key.high is not None
    # Clip, shift and halve in float32, as the public code does; only the scaling is float64.
    unit = (np.clip(normalised, -1.0, 1.0) + np.float32(1.0)) / np.float32(2.0)
    scaled64: Float64Array = unit * (key.high - key.low) + key.low
    return scaled64
