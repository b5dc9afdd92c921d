"""Promised joint targets as the rows of a chunk that the policy is given.

Owns: `committed_actions`. Must not import ROS or the executor: the node has the promise from a
message, the stepped closed loop from the executor itself, and both lay it out here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from groot_int8_ros.errors import ObservationError
from groot_int8_ros.policy.robot import joint_to_policy
from groot_int8_ros.policy.types import BoolArray, CommittedActions, Float64Array, JointSpec


def committed_actions(
    action_joints: Mapping[str, Sequence[JointSpec]],
    joint_names: Sequence[str],
    targets: Float64Array,
    mask: BoolArray,
) -> CommittedActions | None:
    """Turn promised targets into committed actions, key by key, in the policy's units.

    Args:
        action_joints: Action key to its joints, in the order of the key's dimensions.
        joint_names: Name of each column.
        targets: In the units of the robot's messages, float64, shape (H, J): a row for each of the
            coming chunk.
        mask: Which rows are promised, bool, shape (H,).

    Returns:
        The rows, at least one and never all of them; None where none is promised.

    Raises:
        ObservationError: A joint is missing, or every row is promised.
    """
    place = {name: index for index, name in enumerate(joint_names)}
    needed = [joint.name for joints in action_joints.values() for joint in joints]
    missing = [name for name in needed if name not in place]
    if missing:
        raise ObservationError(
            f"it lacks {', '.join(missing)}: give the executor channels for every action "
            "joint, or choose another seam"
        )
    rows = np.flatnonzero(mask)
    if rows.size == mask.size:
        raise ObservationError(
            f"it covers all {rows.size} rows of the chunk: the policy takes longer than its "
            "chunks last"
        )
    if not rows.size:
        return None
    return CommittedActions(
        rows=rows.tolist(),
        actions={
            key: np.stack(
                [
                    joint_to_policy(joints, row[[place[joint.name] for joint in joints]])
                    for row in targets[rows]
                ]
            ).astype(np.float32)
            for key, joints in action_joints.items()
        },
    )
