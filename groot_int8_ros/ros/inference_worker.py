"""The one thread that runs the policy.

Owns: when an inference happens, why it does not, and that a chunk is published only for what the
node still wants. Must not import rclpy: publishing, time and logging are handed in, so that the
node alone knows of topics.

Lifecycle: `start` begins the thread, which runs the policy once on a made-up observation so that
the first real one is not slow, and then answers observations at most at the wanted rate. `stop`
ends it. From the moment `stop` returns nothing is published, even while a last inference is still
under way. The pace is kept on the steady clock, ages are judged in ROS time: with `use_sim_time`
a paused bag gives no new frames and so no chunks.
"""

from __future__ import annotations

import dataclasses
import math
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from groot_int8_ros.errors import FrozenImageError, GrootError, ObservationError
from groot_int8_ros.policy.policy import Policy
from groot_int8_ros.policy.postprocess import clipped_rows
from groot_int8_ros.policy.types import ActionChunk, CommittedActions, Observation
from groot_int8_ros.ros.diagnostics import InferenceRecord
from groot_int8_ros.ros.instruction_gate import InstructionGate
from groot_int8_ros.ros.observation_buffer import (
    FROZEN,
    LONGEST_GATHERING_S,
    USED,
    Hold,
    ObservationBuffer,
    Snapshot,
)
from groot_int8_ros.ros.parameters import NodeParameters

# While nothing arrives the worker looks again this often, to notice that inputs went stale.
_IDLE_CHECK_S = 0.5
_REPEAT_LOG_S = 10.0

INSTRUCTION = "instruction"
OBSERVATION = "observation"
FAILED = "inference failed"
OVERTAKEN = "overtaken"


class Logger(Protocol):
    """What the worker needs of rclpy's logger."""

    def info(self, message: str) -> object:
        """Log normal events."""

    def warning(self, message: str) -> object:
        """Log what the node recovers from by itself."""

    def error(self, message: str) -> object:
        """Log what needs a person."""


@dataclass(frozen=True)
class Host:
    """What the worker asks of the node; everything here is called from the worker's thread.

    Attributes:
        parameters: The parameters in force.
        instruction: The instruction in force.
        now_ns: ROS time.
        read: Converts a snapshot, or raises `ObservationError`.
        committed: The executor's commitment for an observation's stamp, None where there is none,
            or raises `ObservationError`.
        publish: Publishes a chunk, the snapshot it was made from, the instruction, and how many
            chunks there were before.
    """

    parameters: Callable[[], NodeParameters]
    instruction: Callable[[], str]
    now_ns: Callable[[], int]
    read: Callable[[Snapshot, str], Observation]
    committed: Callable[[int], CommittedActions | None]
    publish: Callable[[ActionChunk, Snapshot, str, int], None]


class InferenceWorker:
    """Runs the policy in a thread of its own.

    Args:
        policy: Used by this worker's thread alone until it has ended.
        buffer: Where observations come from.
        host: The node.
        record: Counts what happens.
        logger: The node's.
    """

    def __init__(
        self,
        policy: Policy,
        buffer: ObservationBuffer,
        host: Host,
        record: InferenceRecord,
        logger: Logger,
    ) -> None:
        self._policy = policy
        self._buffer = buffer
        self._host = host
        self._record = record
        self._logger = logger
        self._instructions = InstructionGate(policy, logger.info)
        self._stopping = threading.Event()
        self._warm = threading.Event()
        self._warm_up_error: Exception | None = None
        # Held while publishing, so that `stop` cannot return between the check and the message.
        self._gate = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)
        # When the present hold was counted last, or began; steady time.
        self._blocked_s: float | None = None
        # When each reason (None: a chunk was published) was logged last, and the newest one.
        self._logged_s: dict[str | None, float] = {}
        self._state: str | None = ""

    def start(self) -> None:
        """Begin, and return when the policy is warm.

        Raises:
            GrootError: The warm-up failed; the thread has ended.
        """
        self._thread.start()
        self._warm.wait()
        if self._warm_up_error:
            self._thread.join()
            raise self._warm_up_error

    def stop(self, timeout_s: float) -> bool:
        """End the worker; nothing is published after this returns.

        Args:
            timeout_s: How long to wait for an inference that is under way.

        Returns:
            Whether the thread has ended. Where it has not, the policy is still in use.
        """
        with self._gate:
            self._stopping.set()
        self._buffer.wake()
        self._thread.join(timeout_s)
        if not self._thread.is_alive():
            self._record.enter("stopped")
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._record.enter("warming up")
            self._policy.warm_up(self._host.instruction())
        except Exception as error:
            self._warm_up_error = error
            self._record.enter("stopped")
            return
        finally:
            self._warm.set()
        self._record.enter("waiting")
        try:
            self._answer_until_stopped()
        finally:
            self._instructions.close()

    def _answer_until_stopped(self) -> None:
        version, due_s = 0, time.monotonic()
        while not self._stopping.is_set():
            version = self._buffer.wait(version, _IDLE_CHECK_S)
            # Frames that arrive during this pause are not lost: the newest is read after it.
            if self._stopping.wait(max(0.0, due_s - time.monotonic())):
                break
            self._buffer.wait_for_others(LONGEST_GATHERING_S)
            started_s = time.monotonic()
            period_s = 1.0 / self._host.parameters().inference_rate_hz
            if self._attempt(started_s, period_s):
                due_s = started_s + period_s

    def _attempt(self, now_s: float, period_s: float) -> bool:
        """Run the policy if there is something to run it on; return whether it was tried."""
        instruction = self._host.instruction()
        checked = self._instructions.check(instruction)
        self._record.checked_instruction = checked
        if (fault := checked.fault) is not None:
            self._wait_for_better(Hold(INSTRUCTION, fault), now_s, period_s)
            return False
        parameters = self._host.parameters()
        found = self._buffer.assemble(
            self._host.now_ns(),
            parameters.max_observation_age_s,
            parameters.max_observation_skew_s,
        )
        if isinstance(found, Hold):
            self._wait_for_better(found, now_s, period_s)
            return False
        self._blocked_s = None
        # Whatever becomes of it: what failed once on these messages fails on them again.
        self._buffer.mark_used(found)
        try:
            with self._record.inferring():
                hold = self._infer_and_publish(found, instruction, parameters.seed, period_s)
        except FrozenImageError as error:
            hold = Hold(FROZEN, str(error))
        except ObservationError as error:
            hold = Hold(OBSERVATION, str(error))
        except Exception as error:
            hold = Hold(FAILED, f"{type(error).__name__}: {error}")
            self._record.failed(error)
            if not isinstance(error, GrootError):
                self._logger.error(f"bug in the inference:\n{traceback.format_exc()}")
        if hold:
            self._record.held(hold)
        self._log(hold)
        return True

    def _wait_for_better(self, hold: Hold, now_s: float, period_s: float) -> None:
        # Between the frames of two cameras there is nothing to complain about; a hold counts,
        # once a period, when it has lasted as long as a chunk would have.
        if hold.reason == USED:
            self._blocked_s = None
        elif self._blocked_s is None:
            self._blocked_s = now_s
        elif now_s - self._blocked_s >= period_s:
            self._blocked_s = now_s
            self._record.held(hold)
            self._log(hold)

    def _infer_and_publish(
        self, snapshot: Snapshot, instruction: str, seed: int, period_s: float
    ) -> Hold | None:
        newest_s = max(
            snapshot.samples[stream.name].arrival_s
            for stream in self._buffer.streams
            if stream.is_camera
        )
        wait_s = time.monotonic() - newest_s
        started_s = time.perf_counter()
        age_s = (self._host.now_ns() - snapshot.stamp_ns) * 1e-9
        observation = self._host.read(snapshot, instruction)
        read_s = time.perf_counter() - started_s
        committed = self._committed(snapshot)
        rows = len(committed.rows) if committed else 0
        clipped = (
            clipped_rows(self._policy.processor, committed, observation.state) if committed else 0
        )
        chunk = self._policy.infer(observation, seed=seed, committed=committed)
        timings_s = {"wait": wait_s, "read": read_s, **chunk.timings_s}
        chunk = dataclasses.replace(chunk, timings_s=timings_s)
        with self._gate:
            if self._stopping.is_set():
                return None
            if self._host.instruction() != instruction:
                return Hold(OVERTAKEN, "the instruction changed while the policy ran")
            if self._buffer.epoch != snapshot.epoch:
                return Hold(OVERTAKEN, "time jumped back while the policy ran")
            self._host.publish(chunk, snapshot, instruction, self._record.chunks)
            latency_s = time.perf_counter() - started_s
            self._record.published(chunk.timings_s, rows, clipped)
            self._record.paced(float(chunk.time_from_start_s[-1]), latency_s, age_s, period_s)
        return None

    def _committed(self, snapshot: Snapshot) -> CommittedActions | None:
        try:
            committed = self._host.committed(snapshot.stamp_ns)
        except ObservationError as error:
            # The executor blends to a chunk that does not begin as it had committed itself.
            self._record.commitment_fault = str(error)
            return None
        self._record.commitment_fault = None
        return committed

    def _log(self, hold: Hold | None) -> None:
        # What is new is told at once, the same thing again only now and then, also when it comes
        # and goes. That all is well is told once.
        reason, now_s = hold.reason if hold else None, time.monotonic()
        well_already = reason is None and self._state is None
        self._state = reason
        if well_already or now_s - self._logged_s.get(reason, -math.inf) < _REPEAT_LOG_S:
            return
        self._logged_s[reason] = now_s
        if hold is None:
            self._logger.info("publishing action chunks")
            return
        text = f"holding, no chunk is published: {hold.reason}: {hold.message}"
        # rclpy allows one severity for each line of code.
        if hold.reason == FAILED:
            self._logger.error(text)
        else:
            self._logger.warning(text)
