"""The values that cross the policy's boundary: an observation in, an action chunk out.

Owns: `Observation`, `CommittedActions`, `ActionChunk` and the robot description (`CameraSpec`,
`JointSpec`). Must not import ROS, torch or any engine: a notebook, a test or another middleware
uses the same values as the node.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

UInt8Array = NDArray[np.uint8]
Float32Array = NDArray[np.float32]
Float64Array = NDArray[np.float64]
Int64Array = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

JointUnit = Literal["radians", "degrees", "raw"]


@dataclass(frozen=True)
class CameraSpec:
    """One camera as the policy was exported for.

    Attributes:
        key: Name of the camera in the checkpoint's video modality.
        height: Frame height in pixels.
        width: Frame width in pixels.
    """

    key: str
    height: int
    width: int


@dataclass(frozen=True)
class JointSpec:
    """How one joint of the robot maps to one dimension of a state or action key.

    The policy's value is `sign * convert(position) + offset`, where `convert` turns the radians
    of a ROS `JointState` into `unit` (`raw` leaves the number as it is). Commands take the
    inverse road.

    Attributes:
        name: Joint name as it appears in `sensor_msgs/JointState.name`.
        unit: Unit of the policy's value.
        sign: 1.0 or -1.0.
        offset: Added after the conversion, in `unit`.
    """

    name: str
    unit: JointUnit = "raw"
    sign: float = 1.0
    offset: float = 0.0


@dataclass(frozen=True)
class Observation:
    """What the robot saw and felt at one instant.

    Attributes:
        images: Camera key to RGB frame, uint8, shape (height, width, 3).
        state: State key to joint values in the checkpoint's physical units, float32, shape (D,).
        instruction: Task in natural language, as the user gave it.
        stamp_ns: Source time of the observation in nanoseconds.
    """

    images: Mapping[str, UInt8Array]
    state: Mapping[str, Float32Array]
    instruction: str
    stamp_ns: int = 0


@dataclass(frozen=True)
class CommittedActions:
    """Rows of the coming chunk that the robot executes whatever the policy answers.

    Real-time chunking (Black et al., arXiv 2506.07339): while a chunk is computed the robot goes
    on with the last one, so the first rows of the new chunk are given and the others have to fit.

    Attributes:
        rows: Which rows of the new chunk, from 0, each once; shape (M,).
        actions: Action key to these rows in physical units, float32, shape (M, D).
    """

    rows: Sequence[int]
    actions: Mapping[str, Float32Array]

    def to_dict(self) -> dict[str, Any]:
        """Return the rows as JSON holds them, to the bit."""
        actions = {key: np.asarray(values).tolist() for key, values in self.actions.items()}
        return {"rows": [int(row) for row in self.rows], "actions": actions}

    @classmethod
    def from_dict(cls, content: Any) -> CommittedActions:
        """Return what `to_dict` gave.

        Raises:
            ValueError: The content is not of that form. Whether it fits a policy is checked where
                that is known (`postprocess.encode_actions`).
        """
        if not isinstance(content, Mapping) or set(content) != {"rows", "actions"}:
            raise ValueError("committed rows must be an object of rows and actions alone")
        rows, actions = content["rows"], content["actions"]
        if not isinstance(rows, list) or not all(type(row) is int for row in rows):
            raise ValueError("the numbers of the committed rows must be a list of whole numbers")
        if not isinstance(actions, Mapping):
            raise ValueError("the committed actions must be an object, key by key")
        return cls(rows, {key: _matrix(key, values) for key, values in actions.items()})


def _matrix(key: str, values: object) -> Float32Array:
    try:
        array = np.array(values)
    except ValueError:
        array = np.array(None)
    if array.dtype.kind not in "if" or array.ndim != 2:
        raise ValueError(f"the committed actions of '{key}' must be rows of as many numbers each")
    with np.errstate(over="ignore"):
        return array.astype(np.float32)


@dataclass(frozen=True)
class ActionChunk:
    """The policy's answer to one observation.

    Attributes:
        actions: Action key to targets in physical units, float32, shape (steps, D).
        stamp_ns: The observation's stamp in nanoseconds.
        time_from_start_s: When each step is due, in seconds after `stamp_ns`, float64, shape
            (steps,): the checkpoint's action `delta_indices` times the action period.
        action_pred: The model's normalised answer before decoding, float32, shape
            (action horizon, max_action_dim).
        seed: Seed of the noise, or None where the caller gave the noise itself.
        timings_s: Stage name to wall time in seconds.
        committed: The rows that the policy was given, or None: it was free.
    """

    actions: Mapping[str, Float32Array]
    stamp_ns: int
    time_from_start_s: Float64Array
    action_pred: Float32Array
    seed: int | None
    timings_s: Mapping[str, float] = field(default_factory=dict)
    committed: CommittedActions | None = None
