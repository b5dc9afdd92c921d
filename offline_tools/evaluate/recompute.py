"""Computing a published chunk again from the episode that was played.

Owns: pairing a chunk's stamps with an episode's frames, and the comparison in joint units. Must
not import torch or rclpy. The frames come from the dataset, not from the bag: an error anywhere
on the road through bag, DDS and message conversion shows up as a difference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from groot_int8_ros.policy.policy import Policy
from groot_int8_ros.policy.robot import policy_to_joint
from groot_int8_ros.policy.types import (
    ActionChunk,
    CommittedActions,
    Float64Array,
    Int64Array,
    Observation,
    UInt8Array,
)
from offline_tools.dataset.lerobot import Episode
from offline_tools.evaluate.node_processes import LiveChunk

_CAMERA_PREFIX = "camera "
_JOINT_STATE = "joint_state"


@dataclass(frozen=True)
class Recomputed:
    """One published chunk beside the one computed again.

    Attributes:
        published: As it came over DDS.
        max_error: Largest absolute difference of a joint target from what `Policy.infer` gives for
            the same frames, in the units of ROS messages.
    """

    published: LiveChunk
    max_error: float


def recompute(
    policy: Policy, episode: Episode, start_time_ns: int, chunks: Sequence[LiveChunk]
) -> list[Recomputed]:
    """Run the policy on the frames that each chunk was made from.

    Args:
        policy: The bundle that the node ran.
        episode: The episode that the bag was made from.
        start_time_ns: Stamp of the episode's time 0 in the bag.
        chunks: What the node published.

    Raises:
        KeyError: A chunk names a stamp that is not in the episode.
    """
    index = frame_index(episode, start_time_ns)
    wanted = {
        (key, index[chunk.info["streams"][_CAMERA_PREFIX + key]["stamp_ns"]])
        for chunk in chunks
        for key in policy.processor.cameras
    }
    frames = dict(_frames(episode, wanted))
    results = []
    for chunk in chunks:
        streams = chunk.info["streams"]
        row = index[streams[_JOINT_STATE]["stamp_ns"]]
        observation = Observation(
            images={
                key: frames[key, index[streams[_CAMERA_PREFIX + key]["stamp_ns"]]]
                for key in policy.processor.cameras
            },
            state={key: values[row] for key, values in episode.state.items()},
            instruction=chunk.info["instruction"],
            stamp_ns=chunk.stamp_ns,
        )
        committed = chunk.info["committed"]
        computed = policy.infer(
            observation,
            seed=chunk.info["seed"],
            committed=CommittedActions.from_dict(committed) if committed else None,
        )
        error = np.abs(_joint_targets(policy, computed) - chunk.positions)
        # np.max keeps a NaN, which then fails every tolerance.
        results.append(Recomputed(published=chunk, max_error=float(np.max(error))))
    return results


def _joint_targets(policy: Policy, chunk: ActionChunk) -> Float64Array:
    """Return a chunk as joint positions in the units of ROS messages, (steps, joints)."""
    return np.concatenate(
        [
            policy_to_joint(joints, chunk.actions[key].astype(np.float64))
            for key, joints in policy.robot.action_joints.items()
        ],
        axis=1,
    )


def stamps_ns(episode: Episode, start_time_ns: int) -> Int64Array:
    """Return the stamp of each frame of an episode in its bag, int64, shape (T,)."""
    offsets: Int64Array = np.round(episode.timestamps_s * 1e9).astype(np.int64)
    return offsets + start_time_ns


def frame_index(episode: Episode, start_time_ns: int) -> dict[int, int]:
    """Return stamp in nanoseconds to frame index."""
    stamps = stamps_ns(episode, start_time_ns)
    return {int(stamp): frame for frame, stamp in enumerate(stamps)}


def _frames(
    episode: Episode, wanted: set[tuple[str, int]]
) -> Iterator[tuple[tuple[str, int], UInt8Array]]:
    for camera in {key for key, _ in wanted}:
        for frame, image in enumerate(episode.frames(camera)):
            if (camera, frame) in wanted:
                yield (camera, frame), image
