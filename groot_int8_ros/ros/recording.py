"""Recording calibration samples while a robot runs, in a thread of its own.

Owns: `Recording`, which chooses and stores, and `RecordingWorker`, which feeds it. Must not import
rclpy: time, messages and logging are handed in. Conversion of images and writing to disk happen
in the worker's thread, so that the executor's stays free for messages.

A full disk stops the recording and not the node: what was written stays, and `resume` goes on
once there is room.
"""

from __future__ import annotations

import contextlib
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from groot_int8_ros.capture.sample import CapturedChunk, CaptureSample
from groot_int8_ros.capture.selection import Selector, candidate
from groot_int8_ros.capture.store import CaptureWriter
from groot_int8_ros.errors import CaptureError, GrootError, ObservationError
from groot_int8_ros.policy.policy import draw_noise
from groot_int8_ros.policy.postprocess import encode_actions
from groot_int8_ros.policy.processor import Processor
from groot_int8_ros.policy.types import CommittedActions, Float32Array, Observation
from groot_int8_ros.ros.chunk_pairing import Paired
from groot_int8_ros.ros.inference_worker import Logger
from groot_int8_ros.ros.observation_buffer import Snapshot

# How long the worker waits for an observation before it looks whether it is to stop.
_WAIT_S = 0.2


@dataclass(frozen=True)
class Conversions:
    """How messages become a sample; called from the worker's thread alone.

    Attributes:
        read_state: Joint state of a snapshot, or raises `ObservationError`.
        read: The whole observation, likewise.
        read_chunk: Action key to targets of a published chunk, likewise.
        check_instruction: Raises `ObservationError` if it cannot be used.
        processor: Conventions of the state.
        noise_shape: (action horizon, max_action_dim).
        run: Runs a policy on an observation with a seed and returns the whole sample; None where
            the recorder runs none.
    """

    read_state: Callable[[Snapshot], Mapping[str, Float32Array]]
    read: Callable[[Snapshot, str], Observation]
    read_chunk: Callable[[Any], Mapping[str, Float32Array]]
    check_instruction: Callable[[str], None]
    processor: Processor
    noise_shape: tuple[int, int]
    run: Callable[[Observation, str, int], CaptureSample] | None = None


@dataclass(frozen=True)
class RecordingReport:
    """What has been recorded.

    Attributes:
        kept: Samples in the store, those in memory included.
        offered: Observations that could have been kept.
        unusable: Observations that could not, or whose committed rows could not.
        fault: Why the newest unusable one was, or nothing.
        paused: Whether recording is paused.
        finished: Whether the store is finished.
        failure: Why recording stopped by itself, or nothing.
    """

    kept: int
    offered: int
    unusable: int
    fault: str
    paused: bool
    finished: bool
    failure: str


class Recording:
    """One store being filled; safe to use from several threads.

    Args:
        writer: The store.
        samples: Samples to keep at most.
        conversions: From messages to samples.
    """

    def __init__(self, writer: CaptureWriter, samples: int, conversions: Conversions) -> None:
        self._writer = writer
        self._selector = Selector(samples)
        self._conversions = conversions
        # Held while a sample is converted and written, which may take a second: the executor's
        # thread must not wait for it, so `report` and `pause` do without.
        self._lock = threading.Lock()
        # Ticket of the selector to number of the writer.
        self._numbers: dict[int, int] = {}
        self._unusable = 0
        self._fault = ""
        self._paused = False
        self._finished = False
        self._failure = ""
        self._counted = self._count()

    def report(self) -> RecordingReport:
        """Return the counts after the newest observation; never waits."""
        return replace(self._counted, paused=self._paused)

    def _count(self) -> RecordingReport:
        return RecordingReport(
            kept=len(self._writer),
            offered=self._selector.offered,
            unusable=self._unusable,
            fault=self._fault,
            paused=self._paused,
            finished=self._finished,
            failure=self._failure,
        )

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        with self._lock:
            try:
                yield
            finally:
                self._counted = self._count()

    def offer(self, one: Paired) -> None:
        """Keep an observation if it adds to what is kept; nothing is raised for bad input."""
        with self._changing():
            if self._paused or self._finished or self._failure:
                return
            try:
                self._keep(one)
            except ObservationError as error:
                self._unusable += 1
                self._fault = str(error)
            except GrootError as error:
                self._failure = str(error)

    def pause(self) -> None:
        """Keep nothing more until `resume`; an observation under way is still kept."""
        self._paused = True

    def resume(self) -> None:
        """Go on, also after a failure.

        Raises:
            CaptureError: The store is finished already.
            OutputError: What is held still cannot be written.
        """
        with self._changing():
            if self._finished:
                raise CaptureError(
                    f"{self._writer.folder} is finished. Configure the node again with another "
                    "output to record more."
                )
            if self._failure:
                self._writer.flush(self._selector.offered)
            self._failure, self._paused = "", False

    def flush(self) -> None:
        """Write what is held.

        Raises:
            OutputError: It cannot be written.
        """
        with self._changing():
            if not self._finished:
                self._writer.flush(self._selector.offered)

    def finish(self) -> str:
        """Write what is held, mark the store as finished, and return what it holds in words.

        Raises:
            CaptureError: There is no sample.
            OutputError: It cannot be written; it is tried again at the next call.
        """
        with self._changing():
            if not self._finished:
                self._writer.finish(self._selector.offered)
                self._finished = True
            return (
                f"{len(self._writer)} samples of {self._selector.offered} observations in "
                f"{self._writer.folder}"
            )

    def _keep(self, one: Paired) -> None:
        convert = self._conversions
        snapshot, stamp_ns = one.snapshot, one.snapshot.stamp_ns
        convert.check_instruction(one.instruction)
        state = convert.read_state(snapshot)
        features = Observation({}, state, one.instruction, stamp_ns)
        committed = _committed(convert.processor, one.committed, state)
        decision = self._selector.offer(candidate(convert.processor, features))
        if decision.ticket is None:
            return
        if decision.evicted is not None:
            self._writer.discard(self._numbers.pop(decision.evicted))
        try:
            # Only what is kept pays for the conversion of its images.
            number = self._writer.hold(self._sample(one, committed))
        except (ObservationError, CaptureError) as error:
            self._selector.withdraw(decision.ticket)
            raise ObservationError(str(error)) from error
        self._numbers[decision.ticket] = number
        if self._writer.is_full:
            self._writer.flush(self._selector.offered)

    def _sample(self, one: Paired, committed: CommittedActions | None) -> CaptureSample:
        convert = self._conversions
        observation = convert.read(one.snapshot, one.instruction)
        source = f"live {observation.stamp_ns}"
        if convert.run is not None:
            return convert.run(observation, source, one.seed)
        return CaptureSample(
            instruction=one.instruction,
            stamp_ns=observation.stamp_ns,
            source=source,
            state=observation.state,
            noise=draw_noise(one.seed, observation.stamp_ns, convert.noise_shape),
            seed=one.seed,
            images=observation.images,
            chunk=None if one.chunk is None else CapturedChunk(convert.read_chunk(one.chunk)),
            committed=committed,
        )


def _committed(
    processor: Processor, content: Any, state: Mapping[str, Float32Array]
) -> CommittedActions | None:
    """Return the committed rows that a policy node named beside its chunk.

    Raises:
        ObservationError: They are not such rows, or do not fit the bundle.
    """
    if content is None:
        return None
    try:
        committed = CommittedActions.from_dict(content)
        # As the completion will: what it would refuse must not take a place in the store.
        encode_actions(processor, committed, state)
    except (ValueError, ObservationError) as error:
        raise ObservationError(f"`committed` of the chunk info cannot be used: {error}") from error
    keys = {key.key for key in processor.action_keys}
    if not committed.rows or committed.actions.keys() != keys:
        raise ObservationError(
            "`committed` of the chunk info cannot be used: it must have at least one row, and the "
            f"action keys {', '.join(sorted(keys))} alone"
        )
    return committed


class RecordingWorker:
    """Feeds a recording from a thread of its own.

    Args:
        following: Returns the next observation within the seconds given, or None.
        recording: What it goes to.
        logger: The node's.
    """

    def __init__(
        self,
        following: Callable[[float], Paired | None],
        recording: Recording,
        logger: Logger,
    ) -> None:
        self._following = following
        self._recording = recording
        self._logger = logger
        self._stopping = threading.Event()
        self._told = ""
        self._thread = threading.Thread(target=self._run, name="recording", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End, after the observation under way."""
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                one = self._following(_WAIT_S)
                if one is not None:
                    self._recording.offer(one)
            except Exception:
                self._logger.error(f"bug in the recording:\n{traceback.format_exc()}")
                # Whatever it is, it must not fill the log at full speed.
                self._stopping.wait(_WAIT_S)
            self._tell()

    def _tell(self) -> None:
        # What is new is told once; diagnostics tell it for as long as it lasts.
        report = self._recording.report()
        text = report.failure or report.fault
        if text and text != self._told:
            self._told = text
            if report.failure:
                self._logger.error(f"recording stopped: {text}")
            else:
                self._logger.warning(f"an observation could not be recorded: {text}")
