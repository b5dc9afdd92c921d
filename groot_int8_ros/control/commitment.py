"""What the executor promises to do until the policy's next answer: real-time chunking's prefix.

Owns: `Commitment`, the data that passes from the executor to the policy, and how it is laid onto
the rows of a chunk to come. Must not import ROS or the policy.

The executor says, in the units of the robot's messages, what each joint does at which time, up to
the time at which the next chunk is expected. The policy turns it into its own units, lays it onto
the rows of the chunk it is about to compute (`on_rows`) and gives rows and mask to the head, which
denoises the rest around them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from groot_int8_ros.control.chunks import Rows
from groot_int8_ros.control.types import BoolArray, Float64Array, Int64Array


@dataclass(frozen=True)
class Commitment:
    """What is executed, row by row.

    Attributes:
        made_ns: When it was made.
        joint_names: Name of each column.
        due_ns: Times, int64, shape (R,), increasing. The first lie in the past, so that a policy
            whose observation is older than the commitment finds them; the last is the time until
            which the executor has committed itself.
        targets: In the units of the robot's messages, float64, shape (R, J).
    """

    made_ns: int
    joint_names: tuple[str, ...]
    due_ns: Int64Array
    targets: Float64Array

    def on_rows(self, due_ns: Int64Array) -> tuple[Float64Array, BoolArray]:
        """Lay the commitment onto the rows of a chunk to come.

        Args:
            due_ns: When each of the chunk's rows is due, int64, shape (H,).

        Returns:
            The committed targets, float64, shape (H, J), 0 where nothing is committed; and the
            mask, bool, shape (H,), true for committed rows. Committed rows are a prefix: a row
            before the commitment's first time ends it before it begins.
        """
        mask = (due_ns >= self.due_ns[0]) & (due_ns <= self.due_ns[-1])
        mask &= np.logical_and.accumulate(mask)
        rows = Rows(self.due_ns, self.targets)
        targets = np.zeros((len(due_ns), len(self.joint_names)))
        for index in np.flatnonzero(mask):
            targets[index] = rows.at(int(due_ns[index]))
        return targets, mask
