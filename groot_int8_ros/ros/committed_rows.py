"""The executor's commitment as the policy takes it: real-time chunking's way back.

Owns: `CommittedReader`. Must not import rclpy or an engine. The executor publishes what it will
execute (`control.commitment`, in the units of `JointState`); the policy wants the rows of its
coming chunk, key by key, in its own units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from groot_int8_ros.policy.committed import committed_actions
from groot_int8_ros.policy.types import CommittedActions, Float64Array, JointSpec
from groot_int8_ros.ros.executor_messages import commitment_of

_NANOSECONDS = 1_000_000_000


class CommittedReader:
    """Lays published commitments onto the rows of a chunk to come.

    Args:
        action_joints: Action key to its joints, in the order of the key's dimensions.
        time_from_start_s: When each row of a chunk is due after its observation, float64, shape
            (H,): `ActionChunk.time_from_start_s`.
    """

    def __init__(
        self, action_joints: Mapping[str, Sequence[JointSpec]], time_from_start_s: Float64Array
    ) -> None:
        self._joints = {key: tuple(joints) for key, joints in action_joints.items()}
        self._after_ns = np.round(time_from_start_s * _NANOSECONDS).astype(np.int64)

    def read(self, message: Any, observation_ns: int) -> CommittedActions | None:
        """Return the committed rows of the chunk for an observation.

        Args:
            message: The newest `trajectory_msgs/JointTrajectory` from the executor's
                `~/committed`.
            observation_ns: The observation's stamp.

        Returns:
            The rows, at least one and never all of them; None where the commitment is over or
            begins only after the observation: the chunk is computed freely then, as it is while
            the executor holds.

        Raises:
            ObservationError: The message is malformed, lacks a joint, or leaves the policy no row.
        """
        commitment = commitment_of(message)
        targets, mask = commitment.on_rows(observation_ns + self._after_ns)
        return committed_actions(self._joints, commitment.joint_names, targets, mask)
