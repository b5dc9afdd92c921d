"""Observations of a LeRobot dataset.

Owns: `DatasetSource`. Must not import torch or ROS.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from groot_int8_ros.capture.selection import Candidate, candidate
from groot_int8_ros.errors import DatasetError, ObservationError
from groot_int8_ros.policy.policy import Policy
from groot_int8_ros.policy.types import Observation
from offline_tools.calibration.run import Recorded, Skipped
from offline_tools.dataset.lerobot import Episode, LeRobotDataset

# Episodes have no common clock: each begins an hour after the one before it, so that no two frames
# share a stamp, on which the noise depends. The first begins at one hour: a stamp of 0 means that
# there is none.
EPISODE_SPACING_NS = 3_600_000_000_000


class DatasetSource:
    """The frames of some episodes, numbered through."""

    def __init__(
        self,
        path: Path,
        policy: Policy,
        episodes: Sequence[int] | None = None,
        instruction_key: str | None = None,
    ) -> None:
        """Open a dataset and see that it is one of the policy's robot.

        Args:
            path: The dataset's folder.
            policy: Which cameras and state keys are needed.
            episodes: Numbers of the episodes to use; None for all.
            instruction_key: See `LeRobotDataset.episode`.

        Raises:
            DatasetError: The dataset cannot be read, has no such episode, or has other cameras.
        """
        self._dataset = LeRobotDataset.open(path)
        self._policy = policy
        self._instruction_key = instruction_key
        known = [info.index for info in self._dataset.episodes]
        unknown = [index for index in episodes or () if index not in known]
        if unknown:
            raise DatasetError(f"{path} has no episode {unknown[0]}; it has {len(known)}.")
        self._episodes = known if episodes is None else list(dict.fromkeys(episodes))
        self.name = f"dataset {path.name}"
        for camera in policy.robot.cameras:
            found = self._dataset.cameras.get(camera.key)
            if found is None:
                raise DatasetError(
                    f"{path} has no camera '{camera.key}', which the bundle needs; it has "
                    f"{', '.join(self._dataset.cameras) or 'none'}. Name the dataset that the "
                    "policy was fine-tuned on."
                )
            if (found.height, found.width) != (camera.height, camera.width):
                raise DatasetError(
                    f"camera '{camera.key}' of {path} is {found.width}x{found.height}, but the "
                    f"bundle was exported for {camera.width}x{camera.height}. Export it with "
                    "--dataset, or record in that size."
                )

    def candidates(self, skipped: Skipped) -> Iterator[tuple[int, Candidate]]:
        """Yield the number and the features of every usable frame."""
        number = 0
        for episode in self._read():
            for row in range(len(episode)):
                observation = self._observation(episode, row, {})
                try:
                    self._policy.check_instruction(observation.instruction)
                    yield number, candidate(self._policy.processor, observation)
                except ObservationError as error:
                    skipped.note(_text(episode, row), error)
                number += 1

    def observations(self, chosen: frozenset[int]) -> Iterator[Recorded]:
        """Decode and yield the chosen frames."""
        first = 0
        for episode in self._read():
            rows = [number - first for number in sorted(chosen) if first <= number]
            rows = [row for row in rows if row < len(episode)]
            first += len(episode)
            if rows:
                yield from self._frames(episode, frozenset(rows), rows[-1])

    def _read(self) -> Iterator[Episode]:
        for index in self._episodes:
            yield self._dataset.episode(index, self._instruction_key)

    def _frames(self, episode: Episode, rows: frozenset[int], last: int) -> Iterator[Recorded]:
        keys = [camera.key for camera in self._policy.robot.cameras]
        with contextlib.ExitStack() as stack:
            streams = [
                stack.enter_context(contextlib.closing(cast("Any", episode.frames(key))))
                for key in keys
            ]
            for row, frames in enumerate(zip(*streams, strict=True)):
                if row in rows:
                    images = dict(zip(keys, frames, strict=True))
                    observation = self._observation(episode, row, images)
                    read = partial(_given, observation)
                    yield Recorded(_text(episode, row), observation.stamp_ns, read)
                if row == last:
                    return

    def _observation(self, episode: Episode, row: int, images: dict[str, Any]) -> Observation:
        offset_ns = round(float(episode.timestamps_s[row]) * 1e9)
        return Observation(
            images=images,
            state={
                key.key: episode.state[key.key][row]
                for key in self._policy.processor.state_keys
                if key.key in episode.state
            },
            instruction=episode.instructions[row],
            stamp_ns=(episode.index + 1) * EPISODE_SPACING_NS + offset_ns,
        )


def _given(observation: Observation) -> Observation:
    return observation


def _text(episode: Episode, row: int) -> str:
    return f"episode {episode.index} frame {row}"
