"""What `/diagnostics` says must be what happened."""

from __future__ import annotations

import pytest

pytest.importorskip("rclpy", reason="needs the ROS 2 Python packages")

from diagnostic_msgs.msg import DiagnosticStatus

from groot_int8_ros.ros import diagnostics
from groot_int8_ros.ros.diagnostics import (
    InferenceRecord,
    InstructionCheck,
    NodeReport,
    diagnostic_array,
)
from groot_int8_ros.ros.observation_buffer import Hold, Stream, StreamStatus

NOW = 1_700_000_000_500_000_000


def statuses(
    record: InferenceRecord,
    failure: str | None = None,
    streams: tuple[StreamStatus, ...] = (),
    instruction: str = "",
) -> dict[str, DiagnosticStatus]:
    report = NodeReport(
        node_name="arm/policy_node",
        now_ns=NOW,
        lifecycle="active",
        failure=failure,
        engine={"bundle": "/b"},
        streams=streams,
        max_age_s=0.5,
        instruction=instruction,
        committed_topic="chunk_executor/committed",
        inference=record.report(),
    )
    array = diagnostic_array(report)
    assert (array.header.stamp.sec, array.header.stamp.nanosec) == (1_700_000_000, 500_000_000)
    prefix = "arm/policy_node: "
    assert all(status.name.startswith(prefix) for status in array.status)
    return {status.name.removeprefix(prefix): status for status in array.status}


def values(status: DiagnosticStatus) -> dict[str, str]:
    return {entry.key: entry.value for entry in status.values}


def test_failed_transition_is_an_error_although_an_engine_is_loaded() -> None:
    status = statuses(InferenceRecord(), failure="activating failed: why")["engine"]
    assert status.level == DiagnosticStatus.ERROR
    assert "why" in status.message


def test_latency_is_kept_per_stage_and_holds_are_counted_by_reason() -> None:
    record = InferenceRecord()
    for seconds in (0.030, 0.010, 0.020):
        record.published({"backbone": seconds})
    for reason in ("stale", "stale", "skewed"):
        record.held(Hold(reason, "which"))
    status = statuses(record)["inference"]
    assert status.level == DiagnosticStatus.WARN
    assert "skewed: which" in status.message
    found = values(status)
    assert (found["chunks"], found["holds: stale"], found["holds: skewed"]) == ("3", "2", "1")
    stage = [float(found[f"backbone {kind} ms"]) for kind in ("last", "mean", "max")]
    assert stage == pytest.approx([20.0, 20.0, 30.0])


def test_histogram_counts_every_inference_in_the_bucket_of_its_time() -> None:
    record = InferenceRecord()
    for seconds in (0.0010, 0.0011, 0.020, 0.0201, 0.4, 7.0, 90.0):
        record.published({"total": seconds})
    found = values(statuses(record)["inference"])["total histogram ms"]
    assert found == "<=1: 1, <=2: 1, <=20: 1, <=50: 1, <=500: 1, <=inf: 2"


def test_inference_that_does_not_return_is_an_error_and_one_that_has_is_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    record = InferenceRecord()
    record.published({})
    monkeypatch.setattr(diagnostics, "HUNG_AFTER_S", 0.0)
    with record.inferring():
        status = statuses(record)["inference"]
        assert status.level == DiagnosticStatus.ERROR
        assert "hung" in status.message
        assert record.report().is_hung
    assert statuses(record)["inference"].level == DiagnosticStatus.OK
    assert not record.report().is_hung


def test_hold_ends_with_the_next_chunk() -> None:
    record = InferenceRecord()
    record.held(Hold("stale", "which"))
    record.published({})
    assert statuses(record)["inference"].level == DiagnosticStatus.OK


def test_each_stream_is_judged_by_its_own_age() -> None:
    front, wrist = Stream("camera front", "/front", True), Stream("camera wrist", "/wrist", True)
    found = statuses(
        InferenceRecord(),
        streams=(
            StreamStatus(front, 9, 0.1, NOW - 100_000_000),
            StreamStatus(wrist, 4, 2.0, NOW - 2_000_000_000),
        ),
    )
    assert found["camera front"].level == DiagnosticStatus.OK
    assert found["camera wrist"].level == DiagnosticStatus.ERROR
    assert "/wrist" in found["camera wrist"].message
    assert values(found["camera wrist"])["seconds since last message"] == "2.000"


def test_verdict_on_another_instruction_is_not_passed_off_as_this_ones() -> None:
    record = InferenceRecord()
    record.checked_instruction = InstructionCheck("old")
    assert statuses(record, instruction="new")["instruction"].level == DiagnosticStatus.STALE
    record.checked_instruction = InstructionCheck("new", "too long")
    status = statuses(record, instruction="new")["instruction"]
    assert (status.level, status.message) == (DiagnosticStatus.ERROR, "too long")


@pytest.mark.parametrize(
    ("enough_s", "policy_s", "period_s", "words"),
    [
        (0.5, 0.2, 0.2, ["2 x 0.200 + 0.100 = 0.500 s", "0.499 s"]),
        # A policy of 20 ms that may run twice a second.
        (0.62, 0.02, 0.5, ["0.500 + 0.020 + 0.100 = 0.620 s", "Raise inference_rate_hz"]),
    ],
)
def test_chunks_that_end_before_the_next_one_can_be_there_are_told_with_the_numbers(
    enough_s: float, policy_s: float, period_s: float, words: list[str]
) -> None:
    record = InferenceRecord()
    record.published({})
    record.paced(enough_s + 0.001, policy_s, 0.1, period_s)
    assert statuses(record)["chunk length"].level == DiagnosticStatus.OK
    record.paced(enough_s - 0.001, policy_s, 0.1, period_s)
    status = statuses(record)["chunk length"]
    assert status.level == DiagnosticStatus.WARN
    for text in words:
        assert text in status.message


def test_committed_rows_that_were_clipped_are_counted_and_told() -> None:
    record = InferenceRecord()
    record.published({}, 5, 2)
    status = statuses(record)["commitment"]
    assert status.level == DiagnosticStatus.WARN
    assert "2 of 5 committed rows" in status.message
    record.published({}, 5, 0)
    status = statuses(record)["commitment"]
    assert status.level == DiagnosticStatus.OK
    assert values(status)["chunks with clipped rows"] == "1"


def test_a_commitment_that_cannot_be_used_is_named_until_one_can() -> None:
    record = InferenceRecord()
    record.published({}, 3)
    assert statuses(record)["commitment"].level == DiagnosticStatus.OK
    for _ in range(2):
        record.commitment_fault = "it lacks jaw"
        record.published({}, 0)
    status = statuses(record)["commitment"]
    assert status.level == DiagnosticStatus.WARN
    assert "lacks jaw" in status.message
    assert values(status)["commitments not used"] == "2"
    assert values(status)["chunks with committed rows"] == "1"
    record.commitment_fault = None
    assert statuses(record)["commitment"].level == DiagnosticStatus.OK
