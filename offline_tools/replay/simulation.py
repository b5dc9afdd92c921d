"""A policy with a latency, simulated on a recorded motion and executed by the robot's executor.

Owns: the simulated policy, the roads by which its chunks reach the executor, and the loop over
control periods. Must not import torch, ROS or an engine. What is executed is `control.Executor`,
the class that the robot runs.

The simulated policy answers with the recorded motion from its observation on, as a good policy
would, plus a disagreement that is drawn anew for each chunk and grows along it: two answers of a
real policy to neighbouring observations differ, and differ most in the far future. With
committed rows it begins with those, and goes over from them to its own answer within its chunk.
That is what prefix-frozen denoising is asked for; how well a network does it is not shown here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from groot_int8_ros.control.chunks import Rows, TimedChunk
from groot_int8_ros.control.commitment import Commitment
from groot_int8_ros.control.executor import Executor
from groot_int8_ros.control.latency import LatencySettings
from groot_int8_ros.control.limits import JointLimits
from groot_int8_ros.control.seams import SEAM_KINDS, SeamKind, SeamSettings
from groot_int8_ros.control.settings import Channel, ExecutorSettings
from groot_int8_ros.control.types import NANOSECONDS, Float64Array, Int64Array

Road = Literal["wait", "row_0", "switch", "linear_blend", "temporal_ensemble", "rtc"]
ROADS: tuple[Road, ...] = get_args(Road)

_START_NS = 1_000 * NANOSECONDS
# The executor's timeouts are not what is looked at: dead time is to show, not to be cut short.
_FOREVER_S = 1e6
# Ranges of motion a second: a joint that happens to stand still in one episode may still move.
_SLOWEST = 0.1


@dataclass(frozen=True)
class LatencyModel:
    """How long the simulated policy takes.

    Attributes:
        median_s: Median of an inference, seconds.
        jitter: Standard deviation of its logarithm.
        outlier_share: Part of the inferences that take four times as long.
        warm_up_s: Time of the first inference, seconds.
        observation_age_s: Age of the newest observation when an inference begins, at least.
    """

    median_s: float = 0.3
    jitter: float = 0.1
    outlier_share: float = 0.02
    warm_up_s: float = 3.0
    observation_age_s: float = 0.03


@dataclass(frozen=True)
class PolicyModel:
    """What the simulated policy answers.

    Attributes:
        horizon: Rows of a chunk.
        disagreement: Standard deviation of a chunk's disagreement at its end, as a part of a
            joint's range of motion.
    """

    horizon: int = 30
    disagreement: float = 0.05


@dataclass(frozen=True)
class Motion:
    """A recorded motion.

    Attributes:
        name: For the report.
        period_s: Time between two rows, seconds.
        values: Each joint scaled to a range of 1, float64, shape (T, J).
    """

    name: str
    period_s: float
    values: Float64Array

    @property
    def rows(self) -> Rows:
        """The motion as a function of the simulation's time."""
        period_ns = round(self.period_s * NANOSECONDS)
        return Rows(_START_NS + period_ns * np.arange(len(self.values)), self.values)


@dataclass(frozen=True)
class Run:
    """One road on one motion.

    Attributes:
        times_ns: Time of each command, int64, shape (N,).
        commands: float64, shape (N, J).
        recorded: The recorded motion at these times, float64, shape (N, J).
        dead: Commands that were holds for want of rows, bool, shape (N,).
        seams: Indices of the commands at which a chunk was taken.
        late_chunks: Chunks that came after the rows before them had run out.
        prefix_mismatches: Chunks that did not begin as committed.
        rows_skipped: Mean number of rows of a chunk that were past on its arrival.
    """

    times_ns: Int64Array
    commands: Float64Array
    recorded: Float64Array
    dead: np.ndarray
    seams: tuple[int, ...]
    late_chunks: int
    prefix_mismatches: int
    rows_skipped: float


class SimulatedPolicy:
    """Answers observations with the recorded motion and a disagreement.

    Args:
        motion: What was recorded.
        model: How it answers.
        seed: Of the disagreements; the k-th chunk has the same on every road.
    """

    def __init__(self, motion: Motion, model: PolicyModel, seed: int) -> None:
        self._recorded = motion.rows
        self._period_ns = round(motion.period_s * NANOSECONDS)
        self._model = model
        self._seed = seed
        self._joints = motion.values.shape[1]
        self._count = 0

    def answer(self, stamp_ns: int, commitment: Commitment | None) -> TimedChunk:
        """Return the chunk for an observation, and count it.

        Args:
            stamp_ns: The observation's time.
            commitment: What is executed meanwhile, or None.
        """
        random = np.random.RandomState([self._seed, self._count])
        self._count += 1
        horizon = self._model.horizon
        due_ns = stamp_ns + self._period_ns * np.arange(horizon, dtype=np.int64)
        recorded = np.array([self._recorded.at(int(due)) for due in due_ns])
        along = np.arange(1, horizon + 1)[:, None] / horizon
        offset = random.standard_normal(self._joints) * self._model.disagreement * along
        if commitment is not None:
            promised, mask = commitment.on_rows(due_ns)
            count = int(mask.sum())
            if count:
                gap = promised[count - 1] - recorded[count - 1] - offset[count - 1]
                left = np.arange(1, horizon - count + 1)[:, None] / max(horizon - count, 1)
                offset[count:] += gap * (1.0 - left)
                offset[:count] = promised[:count] - recorded[:count]
        names = tuple(f"joint {index}" for index in range(self._joints))
        return TimedChunk(stamp_ns, names, due_ns, recorded + offset)


@dataclass(frozen=True)
class Options:
    """Everything of a simulation but motion and road.

    Attributes:
        latency: Of the policy.
        policy: Its answers.
        control_period_s: Of the executor, seconds.
        blend_s: Of its blends, seconds.
        limit_factor: The executor's limits on velocity and acceleration, as multiples of the
            largest that the recording has, joint by joint; infinite for none.
        seed: Of everything that is drawn.
    """

    latency: LatencyModel
    policy: PolicyModel
    control_period_s: float = 0.02
    blend_s: float = 0.2
    limit_factor: float = np.inf
    seed: int = 0


def simulate(motion: Motion, road: Road, options: Options) -> Run:
    """Execute a motion.

    Args:
        motion: What was recorded.
        road: A seam of the executor; or `row_0`, which plays each chunk from its first row on
            when it arrives, as nodes without stamps do; or `wait`, which also plays it to its end
            before the next inference begins.
        options: The rest.
    """
    joints = motion.values.shape[1]
    recorded, policy = motion.rows, SimulatedPolicy(motion, options.policy, options.seed)
    executor = Executor(_settings(motion, road, options))
    draw = np.random.RandomState([options.seed, 1])
    period_ns = round(options.control_period_s * NANOSECONDS)
    frame_ns = round(motion.period_s * NANOSECONDS)
    names = [f"joint {index}" for index in range(joints)]
    measured, now_ns = motion.values[0], _START_NS
    executor.on_joint_state(names, measured.tolist(), now_ns, now_ns, now_ns)
    executor.enable(now_ns, now_ns)
    pending: tuple[int, TimedChunk] | None = None
    busy_until_ns, inferences = now_ns, 0
    times: list[int] = []
    commands: list[Float64Array] = []
    dead: list[bool] = []
    seams: list[int] = []
    while now_ns < recorded.last_ns:
        if pending and pending[0] <= now_ns:
            chunk = _as_played(pending[1], road, now_ns)
            if executor.on_chunk(chunk, now_ns, now_ns) is None:
                seams.append(len(commands))
            busy_until_ns = int(chunk.due_ns[-1]) if road == "wait" else now_ns
            pending = None
        if pending is None and busy_until_ns <= now_ns:
            aged_ns = now_ns - round(options.latency.observation_age_s * NANOSECONDS)
            stamp_ns = max(_START_NS, aged_ns - (aged_ns - _START_NS) % frame_ns)
            commitment = executor.commitment(now_ns) if road == "rtc" else None
            latency_s = _latency_s(options.latency, draw, inferences)
            inferences += 1
            ready_ns = now_ns + round(latency_s * NANOSECONDS)
            pending = (ready_ns, policy.answer(stamp_ns, commitment))
        executor.on_joint_state(names, measured.tolist(), now_ns, now_ns, now_ns)
        (channel,) = executor.step(now_ns, now_ns).channels
        measured = channel.values
        times.append(now_ns)
        commands.append(channel.values)
        dead.append(channel.hold is not None)
        now_ns += period_ns
    counters = executor.counters
    return Run(
        times_ns=np.array(times, np.int64),
        commands=np.array(commands),
        recorded=np.array([recorded.at(time) for time in times]),
        dead=np.array(dead),
        seams=tuple(seams),
        late_chunks=counters.late_chunks,
        prefix_mismatches=counters.prefix_mismatches,
        rows_skipped=counters.rows_skipped / max(counters.chunks, 1),
    )


def _as_played(chunk: TimedChunk, road: Road, now_ns: int) -> TimedChunk:
    """Return a chunk with the times at which a road plays it."""
    if road in SEAM_KINDS:
        return chunk
    shift_ns = now_ns - chunk.stamp_ns
    return TimedChunk(now_ns, chunk.joint_names, chunk.due_ns + shift_ns, chunk.targets)


def _latency_s(model: LatencyModel, draw: np.random.RandomState, inferences: int) -> float:
    noise, outlier = draw.standard_normal(), draw.uniform() < model.outlier_share
    if inferences == 0:
        return model.warm_up_s
    return float(model.median_s * np.exp(model.jitter * noise) * (4.0 if outlier else 1.0))


def _limits(motion: Motion, factor: float) -> JointLimits:
    """Return multiples of the recording's own extremes."""
    joints = motion.values.shape[1]
    unlimited = JointLimits.of(joints)
    if not np.isfinite(factor):
        return unlimited
    velocity = np.diff(motion.values, axis=0) / motion.period_s
    acceleration = np.diff(velocity, axis=0) / motion.period_s
    return JointLimits(
        unlimited.lower,
        unlimited.upper,
        factor * np.maximum(np.abs(velocity).max(axis=0), _SLOWEST),
        factor * np.maximum(np.abs(acceleration).max(axis=0), _SLOWEST),
        unlimited.step,
    )


def _settings(motion: Motion, road: Road, options: Options) -> ExecutorSettings:
    joints = motion.values.shape[1]
    kinds: dict[str, SeamKind] = {kind: kind for kind in SEAM_KINDS}
    channel = Channel(
        "motion",
        tuple(f"joint {index}" for index in range(joints)),
        "position",
        _limits(motion, options.limit_factor),
        guard_distance=np.full(joints, np.inf),
        start_tolerance=np.zeros(joints),
    )
    return ExecutorSettings(
        (channel,),
        control_period_s=options.control_period_s,
        seam=SeamSettings(kinds.get(road, "switch"), options.blend_s),
        latency=LatencySettings(warm_up=1),
        chunk_timeout_s=_FOREVER_S,
        max_chunk_age_s=_FOREVER_S,
    )
