"""How far two engines' actions are apart where it matters: in joint units, and in smoothness.

Owns: the metrics in action space that the comparison of quantisation schemes and the open-loop
evaluation share. Must not import torch, ROS or an engine: it judges what others computed. Figures
of one tensor (cosine, relative L2) are those of `verify.comparison`. What `quantize` holds its
budget against is `quantize.evaluation.compare_actions`: only the dimensions that the embodiment
uses, and joints by action key, as its limits are given.

Joints of different units are never averaged: each unit that the bundle's manifest names has its
own figures, in that unit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from groot_int8_ros.policy.postprocess import decode_actions
from groot_int8_ros.policy.processor import Processor
from groot_int8_ros.policy.robot import RobotDescription
from groot_int8_ros.policy.types import Float32Array, Float64Array, JointUnit
from offline_tools.verify.comparison import compare

# A third difference needs four rows of a chunk.
_JERK_ORDER = 3


@dataclass(frozen=True)
class UnitErrors:
    """Errors of all joints that the manifest gives in one unit.

    Attributes:
        p99: 99th percentile of the absolute error of a target, in the unit.
        maximum: Largest absolute error of a target, in the unit.
        jerk_rms: Root mean square of the third derivative of the chunks under test, in unit/s³.
        jerk_ratio: `jerk_rms` over the reference's; 1 is as smooth as the reference. NaN for
            chunks of fewer than four rows and for a reference that does not move.
    """

    p99: float
    maximum: float
    jerk_rms: float
    jerk_ratio: float


@dataclass(frozen=True)
class ActionErrors:
    """What a set of answers is off from the reference's answers to the same observations.

    Attributes:
        samples: Number of observations.
        cosine: Cosine similarity of `action_pred`, over all samples at once.
        relative_l2: Norm of the difference over the norm of the reference's `action_pred`, over
            all samples at once. Whole arrays, padding included, as in the reference's own figures.
        worst_relative_l2: The same of the single worst sample.
        by_unit: Errors of the decoded targets, by the unit of the joints.
    """

    samples: int
    cosine: float
    relative_l2: float
    worst_relative_l2: float
    by_unit: Mapping[JointUnit, UnitErrors]

    def to_dict(self) -> dict[str, Any]:
        """Return the errors as JSON values; figures that are not finite become None."""
        return {key: _json_value(value) for key, value in asdict(self).items()}


def action_errors(
    processor: Processor,
    robot: RobotDescription,
    reference: Sequence[Float32Array],
    found: Sequence[Float32Array],
    states: Sequence[Mapping[str, ArrayLike]],
) -> ActionErrors:
    """Compare two engines' answers to the same observations and the same noise.

    Args:
        processor: Decodes normalised actions.
        robot: Names the joints' units and the action period.
        reference: `action_pred` that is taken as right, float32, shape (horizon,
            max_action_dim), one for each observation.
        found: `action_pred` under test, likewise.
        states: Raw state of each observation; relative actions are decoded against it.

    Returns:
        The errors. Where `found` holds NaN or infinity every figure is infinite (cosine: NaN):
        such an answer is as wrong as one can be, and a table of schemes has to show it.
    """
    if not len(reference) == len(found) == len(states) or not len(reference):
        raise ValueError(f"{len(reference)}, {len(found)} and {len(states)} samples to compare")
    units = _columns_by_unit(processor, robot)
    if not all(np.isfinite(one).all() for one in found):
        broken = UnitErrors(math.inf, math.inf, math.inf, math.inf)
        return ActionErrors(len(found), math.nan, math.inf, math.inf, dict.fromkeys(units, broken))
    whole = compare("action_pred", np.stack(reference), np.stack(found))
    each = [compare("action_pred", a, b) for a, b in zip(reference, found, strict=True)]
    wanted = _decode(processor, reference, states)
    got = _decode(processor, found, states)
    times_s = np.array(processor.delta_indices, np.float64) * robot.action_period_s
    return ActionErrors(
        samples=len(found),
        cosine=whole.cosine,
        relative_l2=whole.relative_l2,
        worst_relative_l2=max(one.relative_l2 for one in each),
        by_unit={
            unit: _unit_errors(wanted[..., columns], got[..., columns], times_s)
            for unit, columns in units.items()
        },
    )


def jerk(targets: NDArray[np.floating], times_s: Float64Array) -> Float64Array:
    """Return the third derivative of chunks of targets.

    Six times the third divided difference, which is the exact third derivative of the cubic
    through four neighbouring rows, also where `delta_indices` leave rows out.

    Args:
        targets: Shape (..., rows, joints).
        times_s: When each row is due, seconds, shape (rows,).

    Returns:
        Shape (..., rows - 3, joints), in the targets' unit per s³; no rows for fewer than four.
    """
    value = np.asarray(targets, np.float64)
    for order in range(1, _JERK_ORDER + 1):
        span_s = times_s[order:] - times_s[:-order]
        value = np.diff(value, axis=-2) / span_s[:, None]
    return value * math.factorial(_JERK_ORDER)


def _columns_by_unit(processor: Processor, robot: RobotDescription) -> dict[JointUnit, list[int]]:
    columns: dict[JointUnit, list[int]] = {}
    joints = [joint for key in processor.action_keys for joint in robot.action_joints[key.key]]
    for index, joint in enumerate(joints):
        columns.setdefault(joint.unit, []).append(index)
    return columns


def _decode(
    processor: Processor,
    predictions: Sequence[Float32Array],
    states: Sequence[Mapping[str, ArrayLike]],
) -> Float64Array:
    """Return targets of shape (samples, rows, joints), joints in the order of the action keys."""
    chunks = []
    for prediction, state in zip(predictions, states, strict=True):
        decoded = decode_actions(processor, prediction, state)
        chunks.append(np.concatenate([decoded[key.key] for key in processor.action_keys], axis=1))
    return np.stack(chunks).astype(np.float64)


def _unit_errors(wanted: Float64Array, got: Float64Array, times_s: Float64Array) -> UnitErrors:
    error = np.abs(got - wanted)
    found_rms, reference_rms = _rms(jerk(got, times_s)), _rms(jerk(wanted, times_s))
    return UnitErrors(
        p99=float(np.percentile(error, 99)),
        maximum=float(error.max()),
        jerk_rms=found_rms,
        jerk_ratio=found_rms / reference_rms if reference_rms else math.nan,
    )


def _rms(values: Float64Array) -> float:
    return float(np.sqrt(np.mean(values**2))) if values.size else math.nan


def _json_value(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _json_value(inner) for key, inner in value.items()}
    return value
