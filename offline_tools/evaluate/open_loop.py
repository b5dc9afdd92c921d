"""Open-loop evaluation: what a policy answers to recorded observations, beside what was recorded.

Owns: which frames are asked, how chunks become one line of targets, and the errors against the
recording. Must not import torch or ROS: any bundle is evaluated where it runs. The procedure is
that of the public GR00T script (Isaac-GR00T, `gr00t/eval/open_loop_eval.py`, commit e29d8fc): a
chunk is asked for every `action_horizon` frames, the answered rows are joined, and their mean
squared and mean absolute error against the recorded actions is taken over all frames and joints.

Unlike there, the noise is drawn from the seed and the frame, so that every policy of a run
answers the same observations from the same noise and a run can be repeated to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from groot_int8_ros.errors import (
    ConfigurationError,
    DatasetError,
    EngineError,
    ObservationError,
)
from groot_int8_ros.policy.bundle import Bundle
from groot_int8_ros.policy.families import LARGE_GRAPHS
from groot_int8_ros.policy.policy import Policy
from groot_int8_ros.policy.postprocess import decode_actions
from groot_int8_ros.policy.preprocess import normalize_state
from groot_int8_ros.policy.processor import Processor
from groot_int8_ros.policy.robot import RobotDescription
from groot_int8_ros.policy.types import Float32Array, Float64Array, JointUnit, Observation
from offline_tools.calibration.dataset_source import DatasetSource
from offline_tools.dataset.lerobot import Episode, LeRobotDataset

# As the public script has it: of a longer trajectory the beginning is evaluated.
DEFAULT_STEPS = 200


@dataclass(frozen=True)
class Trajectory:
    """One recorded episode and the frames of it at which the policy is asked.

    Attributes:
        episode: The recording.
        frames: How many frames of it are evaluated, from the first on.
        starts: Frames whose observation is answered, `action_horizon` apart.
        source: Decodes those frames.
    """

    episode: Episode
    frames: int
    starts: tuple[int, ...]
    source: DatasetSource

    def observations(self) -> Iterator[Observation]:
        """Decode the observations at `starts`, holding one at a time."""
        for recorded in self.source.observations(frozenset(self.starts)):
            yield recorded.read()

    def states(self) -> list[Mapping[str, Float32Array]]:
        """Return the recorded state at each of `starts`."""
        return [{k: v[start] for k, v in self.episode.state.items()} for start in self.starts]


PYTORCH_BFLOAT16 = "PyTorch bfloat16"


@dataclass(frozen=True)
class Answers:
    """What one policy answered to every observation of a run.

    Attributes:
        name: What tables and pictures call it.
        runs_on: What computed it, for a person: engine and precisions of the two large graphs.
        denoising_steps: Euler steps.
        action_pred: Normalised actions, float32 (horizon, max_action_dim), one for each
            observation, trajectory by trajectory.
        timings_s: Stage to wall time in seconds, one for each observation; empty if not measured.
    """

    name: str
    runs_on: str
    denoising_steps: int
    action_pred: tuple[Float32Array, ...]
    timings_s: tuple[Mapping[str, float], ...] = ()


@dataclass(frozen=True)
class JointErrors:
    """How far one joint's predicted targets are from the recorded ones.

    Attributes:
        key: Action key.
        joint: Name of the joint.
        unit: Unit of the policy's values.
        mse: Mean squared error, in the unit squared.
        mae: Mean absolute error, in the unit.
    """

    key: str
    joint: str
    unit: JointUnit
    mse: float
    mae: float


@dataclass(frozen=True)
class RecordedErrors:
    """How far the predicted targets of one trajectory are from the recorded ones.

    Attributes:
        trajectory: Number of the episode.
        mse: Over all joints. It is the public script's figure and good for nothing but comparing
            with it where joints have several units: those of `joints` never mix.
        mae: Likewise.
        joints: Of each joint.
    """

    trajectory: int
    mse: float
    mae: float
    joints: tuple[JointErrors, ...]


def plan_trajectories(
    bundle: Bundle,
    dataset: Path,
    traj_ids: Sequence[int],
    *,
    action_horizon: int | None = None,
    steps: int = DEFAULT_STEPS,
    instruction_key: str | None = None,
) -> list[Trajectory]:
    """Choose the frames of a run and refuse what cannot be evaluated, before anything is loaded.

    Args:
        bundle: Whose cameras, joints and chunk length; its engines are not needed yet.
        dataset: LeRobot dataset with recorded actions.
        traj_ids: Numbers of the episodes.
        action_horizon: Frames between two questions; the whole chunk if None.
        steps: Frames of a trajectory to evaluate at most.
        instruction_key: See `LeRobotDataset.episode`.

    Raises:
        ConfigurationError: The horizon is longer than the chunk, or the chunk leaves frames out.
        DatasetError: An episode is missing, or the dataset has other cameras or joints, or an
            instruction or a state that the policy cannot take; episode and frame are named.
    """
    horizon = _horizon(bundle.processor, action_horizon)
    probe = Policy(bundle, {})  # observation chain alone
    opened = LeRobotDataset.open(dataset)
    found = []
    for index in dict.fromkeys(traj_ids):
        source = DatasetSource(dataset, probe, [index], instruction_key)
        episode = opened.episode(index, instruction_key)
        _check_joints(bundle, episode, dataset)
        frames = min(steps, len(episode))
        starts = tuple(range(0, frames, horizon))
        for start in starts:
            state = {key: values[start] for key, values in episode.state.items()}
            try:
                probe.check_instruction(episode.instructions[start])
                normalize_state(bundle.processor, state)
            except ObservationError as error:
                raise DatasetError(
                    f"{dataset}, episode {index}, frame {start}: {error}"
                ) from error
        found.append(Trajectory(episode, frames, starts, source))
    return found


def answer(
    policy: Policy, name: str, engine: str, trajectories: Sequence[Trajectory], seed: int
) -> Answers:
    """Run a loaded policy over every observation.

    Args:
        policy: The policy.
        name: See `Answers`.
        engine: The kind of engine that it was loaded with.
        trajectories: What to ask.
        seed: Seed of the noise; with it and the frame's stamp the noise is the same for all.

    Raises:
        EngineError: A graph failed or gave values that are not finite; the frame is named.
    """
    predictions, timings = [], []
    for trajectory in trajectories:
        for start, observation in zip(trajectory.starts, trajectory.observations(), strict=True):
            try:
                chunk = policy.infer(observation, seed=seed)
            except EngineError as error:
                raise EngineError(
                    f"{name}, trajectory {trajectory.episode.index}, frame {start}: {error}"
                ) from error
            predictions.append(chunk.action_pred)
            timings.append(chunk.timings_s)
    manifest = policy.manifest
    precisions = ", ".join(
        f"{graph} {manifest.graphs[graph].precision}" for graph in LARGE_GRAPHS[manifest.family]
    )
    return Answers(
        name=name,
        runs_on=f"{engine}, {manifest.family} graphs, {precisions}",
        denoising_steps=manifest.denoising_steps,
        action_pred=tuple(predictions),
        timings_s=tuple(timings),
    )


def predicted_actions(
    processor: Processor, trajectory: Trajectory, predictions: Sequence[Float32Array]
) -> dict[str, Float64Array]:
    """Join chunks into one line of targets.

    Args:
        processor: Decodes normalised actions and says which frame each row is for.
        trajectory: What was asked.
        predictions: `action_pred` of each of its `starts`.

    Returns:
        Action key to targets in the policy's units, float64, shape (frames, D).
    """
    row_of = {delta: row for row, delta in enumerate(processor.delta_indices)}
    ends = (*trajectory.starts[1:], trajectory.frames)
    parts: dict[str, list[Float32Array]] = {}
    for start, end, prediction, state in zip(
        trajectory.starts, ends, predictions, trajectory.states(), strict=True
    ):
        rows = [row_of[delta] for delta in range(end - start)]
        for key, value in decode_actions(processor, prediction, state).items():
            parts.setdefault(key, []).append(value[rows])
    return {key: np.concatenate(value).astype(np.float64) for key, value in parts.items()}


def recorded_errors(
    robot: RobotDescription, trajectory: Trajectory, predicted: Mapping[str, Float64Array]
) -> RecordedErrors:
    """Compare joined chunks with the recorded actions.

    Args:
        robot: Names joints and units.
        trajectory: The recording.
        predicted: What `predicted_actions` gave.
    """
    joints = []
    for key, specs in robot.action_joints.items():
        recorded = trajectory.episode.action[key][: trajectory.frames].astype(np.float64)
        error = predicted[key] - recorded
        joints += [
            JointErrors(
                key=key,
                joint=spec.name,
                unit=spec.unit,
                mse=float(np.mean(error[:, column] ** 2)),
                mae=float(np.mean(np.abs(error[:, column]))),
            )
            for column, spec in enumerate(specs)
        ]
    return RecordedErrors(
        trajectory=trajectory.episode.index,
        mse=float(np.mean([joint.mse for joint in joints])),
        mae=float(np.mean([joint.mae for joint in joints])),
        joints=tuple(joints),
    )


def _horizon(processor: Processor, wanted: int | None) -> int:
    deltas = set(processor.delta_indices)
    longest = 0
    while longest in deltas:
        longest += 1
    if not longest:
        raise ConfigurationError(
            "the checkpoint's chunks have no row for the observation's own frame (delta_indices "
            f"{list(processor.delta_indices)}), so they cannot be joined to a trajectory"
        )
    horizon = longest if wanted is None else wanted
    if horizon > longest:
        raise ConfigurationError(
            f"--action-horizon {horizon} is longer than the chunk: the bundle answers "
            f"{longest} consecutive frames at a time; use at most {longest}"
        )
    return horizon


def _check_joints(bundle: Bundle, episode: Episode, dataset: Path) -> None:
    for modality, keys, recorded in (
        ("state", bundle.processor.state_keys, episode.state),
        ("action", bundle.processor.action_keys, episode.action),
    ):
        for key in keys:
            found = recorded.get(key.key)
            if found is None or found.shape[1] != key.dim:
                what = "none" if found is None else f"one of {found.shape[1]} dimensions"
                raise DatasetError(
                    f"the policy has the {modality} key '{key.key}' of {key.dim} dimensions and "
                    f"{dataset} has {what}; its {modality} keys are "
                    f"{', '.join(recorded) or 'none'}. Name the dataset that the policy was "
                    "fine-tuned on."
                )
