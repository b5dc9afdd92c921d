"""The inference worker with the real policy, driven without DDS."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="needs the ROS 2 Python packages")
pytest.importorskip("onnxruntime", reason="needs ONNX Runtime")

from groot_int8_ros.errors import ObservationError
from groot_int8_ros.policy.policy import Policy
from groot_int8_ros.policy.types import ActionChunk, CommittedActions, Observation
from groot_int8_ros.ros import inference_worker
from groot_int8_ros.ros.diagnostics import InferenceRecord
from groot_int8_ros.ros.inference_worker import Host, InferenceWorker
from groot_int8_ros.ros.observation_buffer import ObservationBuffer, Snapshot, Stream
from groot_int8_ros.ros.parameters import PARAMETERS, NodeParameters

DEADLINE_S = 120.0


@pytest.fixture(scope="module")
def policy(tiny_bundle: Path) -> Iterator[Policy]:
    loaded = Policy.load(tiny_bundle, threads=1)
    yield loaded
    loaded.close()


class Bench:
    """The inference worker with the real policy, driven without DDS."""

    def __init__(self, policy: Policy, cameras: Sequence[str] = ("camera",)) -> None:
        self.instruction = "pick up the cube"
        self.published: list[tuple[ActionChunk, str, int]] = []
        self.before_read: Callable[[], None] = lambda: None
        self.committed: Callable[[int], CommittedActions | None] = lambda stamp_ns: None
        self.snapshots: list[Snapshot] = []
        self.buffer = ObservationBuffer(
            [
                *(Stream(name, f"/{name}", True) for name in cameras),
                Stream("joints", "/joints", False),
            ]
        )
        self.record = InferenceRecord()
        self._policy = policy
        self._parameters = NodeParameters(
            **{name.replace(".", "_"): entry.default for name, entry in PARAMETERS.items()}
            | {"inference_rate_hz": 100.0}
        )
        self.worker = InferenceWorker(
            policy,
            self.buffer,
            Host(
                parameters=lambda: self._parameters,
                instruction=lambda: self.instruction,
                now_ns=time.time_ns,
                read=self._read,
                committed=lambda stamp_ns: self.committed(stamp_ns),
                publish=lambda chunk, snapshot, instruction, number: self.published.append(
                    (chunk, instruction, number)
                ),
            ),
            self.record,
            logging.getLogger("bench"),
        )

    def _read(self, snapshot: Snapshot, instruction: str) -> Observation:
        self.before_read()
        self.snapshots.append(snapshot)
        robot = self._policy.robot
        return Observation(
            {c.key: np.zeros((c.height, c.width, 3), np.uint8) for c in robot.cameras},
            {key: np.zeros(len(j), np.float32) for key, j in robot.state_joints.items()},
            instruction,
            snapshot.stamp_ns,
        )

    def feed(self) -> None:
        stamp = time.time_ns()
        self.buffer.store("joints", None, stamp)
        self.buffer.store("camera", None, stamp)

    def until(self, met: Callable[[], Any], publish: bool = True) -> None:
        end = time.monotonic() + DEADLINE_S
        while not met():
            assert time.monotonic() < end
            if publish:
                self.feed()
            time.sleep(0.02)


@pytest.fixture
def bench(policy: Policy) -> Iterator[Bench]:
    made = Bench(policy)
    made.worker.start()
    yield made
    made.before_read = lambda: None
    assert made.worker.stop(DEADLINE_S)


def test_chunk_of_an_instruction_that_changed_meanwhile_is_dropped(bench: Bench) -> None:
    def change() -> None:
        bench.instruction += "!"

    bench.before_read = change
    bench.until(lambda: bench.record.report().holds.get("overtaken", 0) >= 3)
    assert not bench.published
    bench.before_read = lambda: None
    bench.until(lambda: bench.published)
    assert bench.published[0][1] == bench.instruction


def test_chunk_from_before_a_time_jump_is_dropped(bench: Bench) -> None:
    bench.before_read = bench.buffer.clear
    bench.until(lambda: bench.record.report().holds.get("overtaken", 0) >= 3)
    assert not bench.published


def test_nothing_is_published_after_stop_though_an_inference_is_under_way(bench: Bench) -> None:
    reading, release = threading.Event(), threading.Event()

    def hang() -> None:
        reading.set()
        assert release.wait(DEADLINE_S)

    bench.before_read = hang
    bench.until(reading.is_set)
    assert not bench.worker.stop(0.05), "a worker that hangs must not count as ended"
    release.set()
    assert bench.worker.stop(DEADLINE_S)
    assert not bench.published
    assert bench.record.report().state == "stopped"


def test_bug_in_the_inference_is_counted_and_survived(bench: Bench) -> None:
    def fail() -> None:
        raise ZeroDivisionError("made for this test")

    bench.before_read = fail
    bench.until(lambda: bench.record.report().errors.get("ZeroDivisionError", 0) >= 2)
    report = bench.record.report()
    assert report.hold is not None
    assert "made for this test" in report.hold.message
    bench.before_read = lambda: None
    bench.until(lambda: bench.published)
    assert bench.record.report().hold is None


def test_frames_of_one_moment_are_answered_together(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As long as a busy machine may take between two frames.
    monkeypatch.setattr(inference_worker, "LONGEST_GATHERING_S", DEADLINE_S)
    bench = Bench(policy, ("left", "right"))
    bench._parameters = dataclasses.replace(bench._parameters, max_observation_age_s=3600.0)
    start = time.time_ns()
    moments = [start + 33_000_000 * tick for tick in range(5)]
    for moment in moments[:2]:
        for name in ("joints", "left", "right"):
            bench.buffer.store(name, None, moment)
    bench.worker.start()

    def answered(count: int) -> bool:
        return len(bench.published) == count

    for number, moment in enumerate(moments[2:], 1):
        bench.until(partial(answered, number), publish=False)
        bench.buffer.store("joints", None, moment)
        bench.buffer.store("left", None, moment)
        time.sleep(0.05)
        bench.buffer.store("right", None, moment)
    bench.until(partial(answered, 4), publish=False)
    assert bench.worker.stop(DEADLINE_S)
    stamps = [
        {sample.stamp_ns for sample in snapshot.samples.values()} for snapshot in bench.snapshots
    ]
    assert stamps == [{moment} for moment in moments[1:]]


def test_rate_is_a_limit_and_every_chunk_is_numbered(policy: Policy) -> None:
    bench = Bench(policy)
    bench._parameters = dataclasses.replace(bench._parameters, inference_rate_hz=4.0)
    bench.worker.start()
    start = time.monotonic()
    bench.until(lambda: len(bench.published) >= 4)
    elapsed = time.monotonic() - start
    assert bench.worker.stop(DEADLINE_S)
    assert [number for _, _, number in bench.published] == list(range(len(bench.published)))
    assert elapsed >= 3 / 4.0 * 0.95


def test_a_commitment_that_cannot_be_used_is_counted_and_the_chunk_is_free(bench: Bench) -> None:
    def refuse(stamp_ns: int) -> CommittedActions | None:
        raise ObservationError("it lacks jaw")

    bench.committed = refuse
    bench.until(lambda: bench.record.report().commitments_unread >= 2)
    bench.until(lambda: len(bench.published) >= 2)
    assert all(chunk.committed is None for chunk, _, _ in bench.published)
    assert bench.record.report().commitment_fault == "it lacks jaw"
    bench.committed = lambda stamp_ns: None
    bench.until(lambda: bench.record.report().commitment_fault is None)


def test_committed_rows_are_those_for_the_observation_and_come_back_in_the_chunk(
    bench: Bench, policy: Policy
) -> None:
    asked: list[int] = []
    zeros = {
        key: np.zeros((2, len(joints)), np.float32)
        for key, joints in policy.robot.action_joints.items()
    }

    def commit(stamp_ns: int) -> CommittedActions:
        asked.append(stamp_ns)
        return CommittedActions([0, 1], zeros)

    bench.committed = commit
    bench.until(lambda: bench.record.report().committed_chunks >= 2)
    given = {c.stamp_ns: c.committed.rows for c, _, _ in bench.published if c.committed}
    assert given.keys() <= set(asked)
    assert list(given.values())[:2] == [[0, 1], [0, 1]]
    assert bench.record.report().committed_rows == 2
