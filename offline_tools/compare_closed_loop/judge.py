"""A policy that is watched: every few answers are compared with the float policy's own.

Owns: `JudgedPolicy`, the action error. Must not import torch. Both are asked the same question,
with the same noise, so what differs is the arithmetic of the network; the robot follows the judged
policy, so the questions are those that its own doings lead to.
"""

from __future__ import annotations

import numpy as np

from groot_int8_ros.policy.robot import RobotDescription, policy_to_joint
from groot_int8_ros.policy.types import ActionChunk, CommittedActions, Float64Array, Observation
from offline_tools.closed_loop.episode import ChunkPolicy


class JudgedPolicy:
    """Answers as one policy and remembers how far another one's answers lie.

    Args:
        judged: Whose answers count.
        reference: The other.
        every: Of so many answers one is compared, the first of each episode among them.
    """

    def __init__(self, judged: ChunkPolicy, reference: ChunkPolicy, every: int) -> None:
        self._judged = judged
        self._reference = reference
        self._every = every
        self._asked = 0
        self._errors_rad: list[Float64Array] = []

    @property
    def robot(self) -> RobotDescription:
        """Cameras, joints and action period."""
        return self._judged.robot

    def infer(
        self,
        observation: Observation,
        *,
        seed: int | None = None,
        committed: CommittedActions | None = None,
    ) -> ActionChunk:
        """Answer one observation; see `Policy.infer`."""
        answer = self._judged.infer(observation, seed=seed, committed=committed)
        if self._asked % self._every == 0:
            wanted = self._reference.infer(observation, seed=seed, committed=committed)
            joints = self.robot.action_joints
            for key, values in answer.actions.items():
                found, expected = (
                    policy_to_joint(joints[key], rows.astype(np.float64))
                    for rows in (values, wanted.actions[key])
                )
                self._errors_rad.append((found - expected).ravel())
        self._asked += 1
        return answer

    def take_errors(self) -> dict[str, float]:
        """Return root mean square and largest error of the joint targets since the last call."""
        errors = np.concatenate(self._errors_rad)
        self._errors_rad.clear()
        self._asked = 0
        return {
            "action_error_rad": float(np.sqrt(np.mean(errors**2))),
            "largest_action_error_rad": float(np.abs(errors).max()),
        }
