"""What the node tells on `/diagnostics`.

Owns: counting what happened, and one status for each subsystem: the engine, every input stream,
the instruction, the inference, the executor's commitment and whether chunks are long enough. Must
not import the policy's engines. It stands in for `diagnostic_updater`, which is not on
PyPI; `rqt_robot_monitor` shows it alike.
"""

from __future__ import annotations

import bisect
import contextlib
import math
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue

from groot_int8_ros.control.latency import LatencyEstimate, LatencySettings
from groot_int8_ros.ros.joints import time_message
from groot_int8_ros.ros.observation_buffer import FROZEN, Hold, StreamStatus, stamp_fault

HARDWARE_ID = "groot_int8_ros"
# Upper edges; the slowest measured whole inference on a board is below half a second.
HISTOGRAM_EDGES_MS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, math.inf)
# An inference that takes longer than this is reported as hung; the node goes on waiting for it.
HUNG_AFTER_S = 10.0

OK: bytes = DiagnosticStatus.OK
WARN: bytes = DiagnosticStatus.WARN
ERROR: bytes = DiagnosticStatus.ERROR
STALE: bytes = DiagnosticStatus.STALE


@dataclass(frozen=True)
class Latency:
    """Wall time of one stage.

    Attributes:
        last_s: Of the newest inference.
        mean_s: Over all inferences.
        max_s: Slowest.
        histogram: Number of inferences by upper edge in milliseconds, of the edges that have any;
            the last edge is infinite.
    """

    last_s: float
    mean_s: float
    max_s: float
    histogram: Mapping[float, int] = field(default_factory=dict)


@dataclass(frozen=True)
class InstructionCheck:
    """What there is to say of an instruction.

    Attributes:
        instruction: Which; None if none was checked yet.
        fault: Why it cannot be answered, or None.
        pending: Whether that will mend itself: its prefix is being computed.
    """

    instruction: str | None
    fault: str | None = None
    pending: bool = False


@dataclass(frozen=True)
class Pace:
    """Whether chunks last until the next one: what the executor has to live on.

    The latencies are estimated as the executor does, `control.latency`.

    Attributes:
        chunk_s: From a chunk's observation to its last row.
        latency_s: From the start of an inference to its chunk.
        age_s: Of an observation when its inference starts.
        period_s: Least time between the starts of two inferences, `inference_rate_hz`.
    """

    chunk_s: float
    latency_s: float
    age_s: float
    period_s: float

    @property
    def needed_s(self) -> float:
        """How long a chunk must last: until the inference that begins after it has answered."""
        return max(self.latency_s, self.period_s) + self.latency_s + self.age_s


@dataclass(frozen=True)
class InferenceReport:
    """What the worker has done since it was made.

    Attributes:
        state: `stopped`, `warming up`, `waiting` for its first chunk, `running` or `holding`.
        chunks: Chunks published.
        holds: Reason to number of attempts that were held for it.
        errors: Exception type to number of inferences that failed with it.
        hold: Why the newest attempt gave no chunk, or None.
        checked_instruction: What was found of the instruction that was checked last.
        latencies: Stage to its wall times; the warm-up is not counted.
        busy_s: How long the inference under way has taken, or None if there is none.
        committed_rows: Committed rows of the newest chunk.
        committed_chunks: Chunks with committed rows.
        clipped_rows: Committed rows of the newest chunk that were clipped.
        clipped_chunks: Chunks with such rows.
        commitments_unread: Commitments that could not be used.
        commitment_fault: Why the newest could not, or None.
        pace: None before the first chunk.
    """

    state: str = "stopped"
    chunks: int = 0
    holds: Mapping[str, int] = field(default_factory=dict)
    errors: Mapping[str, int] = field(default_factory=dict)
    hold: Hold | None = None
    checked_instruction: InstructionCheck = InstructionCheck(None)
    latencies: Mapping[str, Latency] = field(default_factory=dict)
    busy_s: float | None = None
    committed_rows: int = 0
    committed_chunks: int = 0
    clipped_rows: int = 0
    clipped_chunks: int = 0
    commitments_unread: int = 0
    commitment_fault: str | None = None
    pace: Pace | None = None

    @property
    def is_hung(self) -> bool:
        """Whether the inference under way takes longer than any could."""
        return self.busy_s is not None and self.busy_s > HUNG_AFTER_S


class InferenceRecord:
    """Counts what the worker does; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._state = "stopped"
        self._checked_instruction = InstructionCheck(None)
        self._chunks = 0
        self._holds: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()
        self._hold: Hold | None = None
        self._latest_s: dict[str, float] = {}
        self._total_s: defaultdict[str, float] = defaultdict(float)
        self._max_s: dict[str, float] = {}
        self._histograms: defaultdict[str, Counter[float]] = defaultdict(Counter)
        self._busy_since_s: float | None = None
        self._committed_rows = self._committed_chunks = self._commitments_unread = 0
        self._clipped_rows = self._clipped_chunks = 0
        self._commitment_fault: str | None = None
        self._chunk_s = self._period_s = 0.0
        # The worker's own warm-up is not among them.
        self._latency = LatencyEstimate(LatencySettings(warm_up=0))
        self._age = LatencyEstimate(LatencySettings(warm_up=0))

    def enter(self, state: str) -> None:
        """Note what the worker is doing now."""
        with self._lock:
            self._state = state

    def held(self, hold: Hold) -> None:
        """Count an attempt that gave no chunk."""
        with self._lock:
            self._state = "holding"
            self._holds[hold.reason] += 1
            self._hold = hold

    def failed(self, error: Exception) -> None:
        """Count an inference that raised."""
        with self._lock:
            self._errors[type(error).__name__] += 1

    @contextlib.contextmanager
    def inferring(self) -> Iterator[None]:
        """Note that an inference is under way while the block lasts."""
        with self._lock:
            self._busy_since_s = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                self._busy_since_s = None

    @property
    def chunks(self) -> int:
        """Chunks published so far."""
        with self._lock:
            return self._chunks

    @property
    def checked_instruction(self) -> InstructionCheck:
        """What was found of the instruction that was checked last."""
        with self._lock:
            return self._checked_instruction

    @checked_instruction.setter
    def checked_instruction(self, checked: InstructionCheck) -> None:
        with self._lock:
            self._checked_instruction = checked

    @property
    def commitment_fault(self) -> str | None:
        """Why the newest commitment could not be used; setting a reason counts it."""
        with self._lock:
            return self._commitment_fault

    @commitment_fault.setter
    def commitment_fault(self, fault: str | None) -> None:
        with self._lock:
            self._commitment_fault = fault
            self._commitments_unread += fault is not None

    def paced(self, chunk_s: float, latency_s: float, age_s: float, period_s: float) -> None:
        """Note how long a chunk lasts and took; see `Pace`."""
        with self._lock:
            self._chunk_s, self._period_s = chunk_s, period_s
            self._latency.add(latency_s)
            self._age.add(max(0.0, age_s))

    def published(
        self, timings_s: Mapping[str, float], committed_rows: int = 0, clipped_rows: int = 0
    ) -> None:
        """Count a chunk, and of its committed rows those that were clipped."""
        with self._lock:
            self._committed_rows, self._clipped_rows = committed_rows, clipped_rows
            self._committed_chunks += committed_rows > 0
            self._clipped_chunks += clipped_rows > 0
            self._state = "running"
            self._hold = None
            self._chunks += 1
            for stage, seconds in timings_s.items():
                self._latest_s[stage] = seconds
                self._total_s[stage] += seconds
                self._max_s[stage] = max(seconds, self._max_s.get(stage, 0.0))
                edge = HISTOGRAM_EDGES_MS[bisect.bisect_left(HISTOGRAM_EDGES_MS, seconds * 1e3)]
                self._histograms[stage][edge] += 1

    def report(self) -> InferenceReport:
        """Return the counts so far."""
        with self._lock:
            latency_s, age_s = self._latency.expected_s(), self._age.expected_s()
            return InferenceReport(
                state=self._state,
                chunks=self._chunks,
                holds=dict(self._holds),
                errors=dict(self._errors),
                hold=self._hold,
                checked_instruction=self._checked_instruction,
                latencies={
                    stage: Latency(
                        seconds,
                        self._total_s[stage] / self._chunks,
                        self._max_s[stage],
                        dict(sorted(self._histograms[stage].items())),
                    )
                    for stage, seconds in self._latest_s.items()
                },
                busy_s=(
                    None if self._busy_since_s is None else time.monotonic() - self._busy_since_s
                ),
                committed_rows=self._committed_rows,
                committed_chunks=self._committed_chunks,
                clipped_rows=self._clipped_rows,
                clipped_chunks=self._clipped_chunks,
                commitments_unread=self._commitments_unread,
                commitment_fault=self._commitment_fault,
                pace=(
                    None
                    if latency_s is None or age_s is None
                    else Pace(self._chunk_s, latency_s, age_s, self._period_s)
                ),
            )


@dataclass(frozen=True)
class NodeReport:
    """Everything that one `DiagnosticArray` is made of.

    Attributes:
        node_name: Fully qualified, without the leading slash.
        now_ns: ROS time.
        lifecycle: Label of the lifecycle state, or what the node is doing to it.
        failure: Why the last transition failed, or None.
        engine: Facts about bundle and engine; empty where none is loaded.
        streams: State of every input.
        max_age_s: The parameter.
        instruction: In force.
        committed_topic: The parameter.
        inference: What the worker did.
    """

    node_name: str
    now_ns: int
    lifecycle: str
    failure: str | None
    engine: Mapping[str, str]
    streams: Sequence[StreamStatus]
    max_age_s: float
    instruction: str
    committed_topic: str
    inference: InferenceReport


def diagnostic_array(report: NodeReport) -> DiagnosticArray:
    """Return the report as a message for `/diagnostics`."""
    statuses = [
        _engine(report),
        *(stream_status(status, report.now_ns, report.max_age_s) for status in report.streams),
        _instruction(report),
        _inference(report.inference),
        _commitment(report),
        _pace(report.inference.pace),
    ]
    return status_array(report.node_name, report.now_ns, statuses)


def status_message(
    name: str, level: bytes, message: str, values: Mapping[str, Any] | None = None
) -> DiagnosticStatus:
    """Return one status of this package's hardware id; values are written as text."""
    return DiagnosticStatus(
        name=name,
        level=level,
        message=message,
        hardware_id=HARDWARE_ID,
        values=[KeyValue(key=key, value=str(value)) for key, value in (values or {}).items()],
    )


def status_array(
    node_name: str, now_ns: int, statuses: Sequence[DiagnosticStatus]
) -> DiagnosticArray:
    """Return statuses as a node's message for `/diagnostics`.

    Args:
        node_name: Fully qualified, without the leading slash; put before every status' name.
        now_ns: ROS time.
        statuses: Their names are changed.
    """
    for status in statuses:
        status.name = f"{node_name}: {status.name}"
    array = DiagnosticArray(status=list(statuses))
    array.header.stamp = time_message(now_ns)
    return array


def _engine(report: NodeReport) -> DiagnosticStatus:
    values = {"lifecycle": report.lifecycle, **report.engine}
    if report.failure:
        return status_message("engine", ERROR, report.failure, values)
    if not report.engine:
        return status_message("engine", STALE, f"{report.lifecycle}: no bundle is loaded", values)
    return status_message("engine", OK, report.lifecycle, values)


def stream_status(status: StreamStatus, now_ns: int, max_age_s: float) -> DiagnosticStatus:
    """Return what is to be told of one input stream.

    Args:
        status: From `ObservationBuffer.status`.
        now_ns: ROS time.
        max_age_s: See `ObservationBuffer.assemble`.
    """
    silence = "never" if status.silence_s is None else f"{status.silence_s:.3f}"
    values = {
        "topic": status.stream.topic,
        "messages": status.count,
        "seconds since last message": silence,
        "stamp_ns": "none" if status.stamp_ns is None else status.stamp_ns,
    }
    if status.stream.is_camera:
        values["seconds of the same pixels"] = f"{status.same_pixels_s:.3f}"
        values["frame_id"] = status.frame_id
    fault = stamp_fault(status.stream, status.stamp_ns, now_ns, max_age_s)
    if fault is None and status.is_frozen:
        fault = Hold(FROZEN, f"{status.stream.topic} shows the same pixels again and again")
    if fault:
        return status_message(
            status.stream.name, ERROR, f"{fault.reason}: {fault.message}", values
        )
    if status.mistake:
        return status_message(status.stream.name, WARN, status.mistake, values)
    return status_message(status.stream.name, OK, "fresh", values)


def _instruction(report: NodeReport) -> DiagnosticStatus:
    values = {"instruction": report.instruction[:200]}
    checked = report.inference.checked_instruction
    if checked.instruction != report.instruction:
        return status_message("instruction", STALE, "not checked yet", values)
    if checked.fault:
        level = WARN if checked.pending else ERROR
        return status_message("instruction", level, checked.fault, values)
    return status_message("instruction", OK, "accepted", values)


def _inference(report: InferenceReport) -> DiagnosticStatus:
    values: dict[str, Any] = {"state": report.state, "chunks": report.chunks}
    values |= {f"holds: {reason}": count for reason, count in sorted(report.holds.items())}
    values |= {f"errors: {kind}": count for kind, count in sorted(report.errors.items())}
    for stage, latency in report.latencies.items():
        values[f"{stage} last ms"] = f"{latency.last_s * 1e3:.3f}"
        values[f"{stage} mean ms"] = f"{latency.mean_s * 1e3:.3f}"
        values[f"{stage} max ms"] = f"{latency.max_s * 1e3:.3f}"
        values[f"{stage} histogram ms"] = ", ".join(
            f"<={edge:g}: {count}" for edge, count in latency.histogram.items()
        )
    if report.is_hung:
        message = f"hung: the inference under way has not returned for {report.busy_s:.0f} s"
        return status_message("inference", ERROR, message, values)
    if report.hold:
        message = f"holding: {report.hold.reason}: {report.hold.message}"
        return status_message("inference", ERROR if report.errors else WARN, message, values)
    level = STALE if report.state == "stopped" else OK
    return status_message("inference", level, report.state, values)


def _commitment(report: NodeReport) -> DiagnosticStatus:
    inference = report.inference
    values = {
        "topic": report.committed_topic,
        "rows committed, newest chunk": inference.committed_rows,
        "chunks with committed rows": inference.committed_chunks,
        "rows clipped, newest chunk": inference.clipped_rows,
        "chunks with clipped rows": inference.clipped_chunks,
        "commitments not used": inference.commitments_unread,
    }
    if inference.commitment_fault:
        message = f"not used, chunks are computed freely: {inference.commitment_fault}"
        return status_message("commitment", WARN, message, values)
    if inference.clipped_rows:
        message = (
            f"{inference.clipped_rows} of {inference.committed_rows} committed rows lie beyond "
            "what the checkpoint can express for them and were clipped: the chunk does not begin "
            "as committed. The arm trails behind its commands, or the seam is none for this "
            "checkpoint"
        )
        return status_message("commitment", WARN, message, values)
    if not report.committed_topic:
        message = "off: chunks are computed freely"
    elif inference.committed_rows:
        message = "the newest chunk begins with what the executor had committed"
    else:
        message = "none: the newest chunk was computed freely"
    return status_message("commitment", OK, message, values)


def _pace(pace: Pace | None) -> DiagnosticStatus:
    if pace is None:
        return status_message("chunk length", STALE, "no chunk yet")
    values = {
        "chunk s": f"{pace.chunk_s:.3f}",
        "latency s": f"{pace.latency_s:.3f}",
        "observation age s": f"{pace.age_s:.3f}",
        "inference period s": f"{pace.period_s:.3f}",
        "needed s": f"{pace.needed_s:.3f}",
    }
    if pace.chunk_s >= pace.needed_s:
        return status_message("chunk length", OK, "long enough", values)
    if pace.period_s > pace.latency_s:
        until = (
            "the inference period, a latency and the observation's age, "
            f"{pace.period_s:.3f} + {pace.latency_s:.3f} + {pace.age_s:.3f}"
        )
        advice = "Raise inference_rate_hz, or export with more rows"
    else:
        until = (
            f"two latencies and the observation's age, 2 x {pace.latency_s:.3f} + {pace.age_s:.3f}"
        )
        advice = "Make the policy faster, or export with more rows"
    message = (
        f"chunks last {pace.chunk_s:.3f} s, less than {until} = {pace.needed_s:.3f} s: the "
        f"executor runs out of rows and holds. {advice}"
    )
    return status_message("chunk length", WARN, message, values)
