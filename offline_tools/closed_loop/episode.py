"""One episode: simulated robot, policy and the robot's own executor, stepped in simulated time.

Owns: `run_episode`. Must not import torch or ROS. The policy is a bundle's, or PyTorch on the
checkpoint; what follows its chunks is `control.Executor`, the class that the robot runs. Time is
the simulation's: an inference takes as long as it is told to, whatever this machine needs for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from groot_int8_ros.control.chunks import TimedChunk
from groot_int8_ros.control.executor import Executor
from groot_int8_ros.control.seams import SeamSettings
from groot_int8_ros.control.settings import ExecutorSettings
from groot_int8_ros.policy.committed import committed_actions
from groot_int8_ros.policy.robot import RobotDescription, policy_to_joint
from groot_int8_ros.policy.types import (
    ActionChunk,
    CommittedActions,
    Float64Array,
    Observation,
    UInt8Array,
)
from offline_tools.closed_loop.channels import CHANNELS
from offline_tools.simulation.environment import CONTROL_PERIOD_S, Tabletop
from offline_tools.simulation.kinematics import JOINTS
from offline_tools.simulation.robot import JOINT_KEYS, by_key, degrees
from offline_tools.simulation.smoothness import jerk_rad_s3, largest_step_rad
from offline_tools.simulation.tasks import Task

_PERIOD_NS = round(CONTROL_PERIOD_S * 1e9)
# Stamps are positive in ROS; the episode's seed makes them, and so the noise, its own.
_FIRST_STAMP_NS = 1_000_000_000
_SEED_STAMP_NS = 1_000_000_000_000
_LOOK_EVERY = 5


class ChunkPolicy(Protocol):
    """What an episode needs of a policy: `Policy` has it, and `TorchPolicy`."""

    @property
    def robot(self) -> RobotDescription:
        """Cameras, joints and action period."""

    def infer(
        self,
        observation: Observation,
        *,
        seed: int | None = None,
        committed: CommittedActions | None = None,
    ) -> ActionChunk:
        """Answer one observation; see `Policy.infer`."""


@dataclass(frozen=True)
class LoopSettings:
    """How an episode is run.

    Attributes:
        inference_period_s: Time from one observation to the next, at least.
        latency_s: From an observation to the arrival of its chunk.
        seam: How the executor goes over from one chunk to the next.
        limit_s: When an episode ends without success.
        seed: Seed of the flow's noise.
        stop_at_success: Whether an episode ends once the asked task is fulfilled.
    """

    inference_period_s: float = 0.2
    latency_s: float = 0.0
    seam: SeamSettings = field(default_factory=SeamSettings)
    limit_s: float = 12.0
    seed: int = 0
    stop_at_success: bool = True


@dataclass(frozen=True)
class EpisodeResult:
    """How an episode went.

    Attributes:
        success: Whether the asked task was fulfilled.
        told_success: Whether the task of the instruction was.
        time_s: Simulated time to the asked task's success, or the limit.
        inferences: Number of chunks that were asked for.
        largest_step_rad: Largest change of a joint's command in one control period.
        jerk_rad_s3: Root mean square of the third derivative of the measured joints.
        held_s: Simulated time in which the executor held for want of rows or another reason.
        seam_jump_rad: Largest difference between a new chunk and what was planned for its time,
            before any blend or limit.
        prefix_mismatches: With `rtc`, chunks that did not begin as was promised.
    """

    success: bool
    told_success: bool
    time_s: float
    inferences: int
    largest_step_rad: float
    jerk_rad_s3: float
    held_s: float
    seam_jump_rad: float
    prefix_mismatches: int


def run_episode(
    simulation: Tabletop,
    policy: ChunkPolicy,
    seed: int,
    asked: Task,
    told: Task,
    settings: LoopSettings,
    on_frames: Callable[[Mapping[str, UInt8Array]], None] | None = None,
) -> EpisodeResult:
    """Run one episode.

    Args:
        simulation: Reset by this.
        policy: Answers each observation.
        seed: Seed of the scene.
        asked: Task that success is judged by.
        told: Task whose instruction the policy is given.
        settings: The rest.
        on_frames: Called with the frames of each observation.
    """
    simulation.reset(seed)
    executor = Executor(_executor_settings(settings))
    now_ns = first_ns = _FIRST_STAMP_NS + seed * _SEED_STAMP_NS
    pending: tuple[int, TimedChunk] | None = None
    observed_ns: int | None = None
    answer: ActionChunk | None = None
    inferences, held, step = 0, 0, 0
    commands: list[Float64Array] = []
    measured: list[Float64Array] = []
    fulfilled = told_fulfilled = False
    limit = round(settings.limit_s / CONTROL_PERIOD_S)
    while step < limit:
        joints = simulation.joints_rad()
        executor.on_joint_state(JOINTS, joints.tolist(), now_ns, now_ns, now_ns)
        if step == 0:
            executor.enable(now_ns, now_ns)
        due = observed_ns is None or now_ns - observed_ns >= round(
            settings.inference_period_s * 1e9
        )
        if pending is None and due:
            frames = simulation.frames()
            if on_frames is not None:
                on_frames(frames)
            observation = Observation(
                images=frames,
                state=by_key(degrees(joints)),
                instruction=told.instruction,
                stamp_ns=now_ns,
            )
            committed = (
                _promised(executor, policy, answer, now_ns)
                if settings.seam.kind == "rtc"
                else None
            )
            answer = policy.infer(observation, seed=settings.seed, committed=committed)
            arrival_ns = now_ns + round(settings.latency_s * 1e9)
            pending = (arrival_ns, timed_chunk(policy, answer))
            observed_ns = now_ns
            inferences += 1
        if pending is not None and pending[0] <= now_ns:
            executor.on_chunk(pending[1], now_ns, now_ns)
            pending = None
        channels = executor.step(now_ns, now_ns).channels
        held += any(channel.hold is not None for channel in channels)
        commands.append(np.concatenate([channel.values for channel in channels]))
        measured.append(joints)
        simulation.step(commands[-1])
        step += 1
        now_ns += _PERIOD_NS
        if step % _LOOK_EVERY == 0 or step == limit:
            truth = simulation.truth()
            fulfilled = truth.on_plate(asked.cube, asked.plate)
            told_fulfilled = truth.on_plate(told.cube, told.plate)
            if fulfilled and settings.stop_at_success:
                break
    return EpisodeResult(
        success=fulfilled,
        told_success=told_fulfilled,
        time_s=(now_ns - first_ns) / 1e9,
        inferences=inferences,
        largest_step_rad=largest_step_rad(commands),
        jerk_rad_s3=jerk_rad_s3(measured, CONTROL_PERIOD_S),
        held_s=held * CONTROL_PERIOD_S,
        seam_jump_rad=executor.counters.seam_jump_max,
        prefix_mismatches=executor.counters.prefix_mismatches,
    )


def timed_chunk(policy: ChunkPolicy, chunk: ActionChunk) -> TimedChunk:
    """Turn a policy's answer into what the executor takes: radians by joint name and time."""
    joints = policy.robot.action_joints
    targets = [
        policy_to_joint(joints[key], chunk.actions[key].astype(np.float64)) for key in JOINT_KEYS
    ]
    return TimedChunk(
        chunk.stamp_ns,
        tuple(joint.name for key in JOINT_KEYS for joint in joints[key]),
        chunk.stamp_ns + np.round(chunk.time_from_start_s * 1e9).astype(np.int64),
        np.concatenate(targets, axis=1),
    )


def _promised(
    executor: Executor, policy: ChunkPolicy, last: ActionChunk | None, now_ns: int
) -> CommittedActions | None:
    """Return what is executed until the coming chunk is there, as its rows.

    Args:
        executor: Promises nothing before it knows the policy's latency.
        policy: Whose chunk it is.
        last: The chunk before, whose rows are due as far apart.
        now_ns: Time of the observation.
    """
    commitment = executor.commitment(now_ns)
    if commitment is None or last is None:
        return None
    due_ns = now_ns + np.round(last.time_from_start_s * 1e9).astype(np.int64)
    targets, mask = commitment.on_rows(due_ns)
    return committed_actions(policy.robot.action_joints, commitment.joint_names, targets, mask)


def _executor_settings(settings: LoopSettings) -> ExecutorSettings:
    return ExecutorSettings(
        CHANNELS,
        control_period_s=CONTROL_PERIOD_S,
        seam=settings.seam,
        chunk_timeout_s=max(1.0, 2.0 * (settings.latency_s + settings.inference_period_s)),
    )
