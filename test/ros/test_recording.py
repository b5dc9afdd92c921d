"""Hazards of recording: a slot held by nothing, a bug that ends the thread, a pause that leaks."""

from __future__ import annotations

import logging
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("diagnostic_msgs", reason="needs the ROS 2 message packages")

from groot_int8_ros.capture.store import CaptureMeta, CaptureStore, CaptureWriter
from groot_int8_ros.errors import CaptureError, ObservationError
from groot_int8_ros.policy.bundle import Bundle, open_bundle
from groot_int8_ros.policy.types import Float32Array, Observation, UInt8Array
from groot_int8_ros.ros.chunk_pairing import Paired
from groot_int8_ros.ros.observation_buffer import Snapshot
from groot_int8_ros.ros.recording import Conversions, Recording, RecordingWorker

SECOND = 1_000_000_000


class Bench:
    """A recording whose messages are made up and whose store is real."""

    def __init__(
        self, bundle: Bundle, folder: Path, samples: int, frame: UInt8Array | None = None
    ) -> None:
        self._bundle = bundle
        self._frame = np.zeros((4, 4, 3), np.uint8) if frame is None else frame
        self.broken_images: set[int] = set()
        self.nan_states: set[int] = set()
        manifest = bundle.manifest
        self.conversions = 0
        self.recording = Recording(
            CaptureWriter(folder, CaptureMeta.of_bundle(manifest, "live"), samples_per_shard=3),
            samples,
            Conversions(
                read_state=self._state,
                read=self._read,
                read_chunk=lambda chunk: chunk,
                check_instruction=self._check,
                processor=bundle.processor,
                noise_shape=(manifest.action_horizon, bundle.processor.max_action_dim),
            ),
        )

    def _state(self, snapshot: Snapshot) -> dict[str, Float32Array]:
        random = np.random.RandomState(snapshot.stamp_ns // SECOND)
        state = {}
        for key in self._bundle.processor.state_keys:
            assert key.low is not None
            assert key.high is not None
            state[key.key] = random.uniform(key.low, key.high).astype(np.float32)
            if snapshot.stamp_ns // SECOND in self.nan_states:
                state[key.key][0] = np.nan
        return state

    def _read(self, snapshot: Snapshot, instruction: str) -> Observation:
        self.conversions += 1
        if snapshot.stamp_ns // SECOND in self.broken_images:
            raise ObservationError("image on /a: truncated")
        images = {camera.key: self._frame.copy() for camera in self._bundle.manifest.robot.cameras}
        return Observation(images, self._state(snapshot), instruction, snapshot.stamp_ns)

    @staticmethod
    def _check(instruction: str) -> None:
        if not instruction:
            raise ObservationError("the instruction '' is empty")

    def offer(
        self, number: int, instruction: str = "pick", chunk: Any = None, committed: Any = None
    ) -> None:
        snapshot = Snapshot({}, number * SECOND, 0)
        self.recording.offer(Paired(snapshot, chunk, 3, instruction, committed))


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return open_bundle(tiny_bundle, verify_hashes=False)


@pytest.fixture
def bench(bundle: Bundle, tmp_path: Path) -> Bench:
    return Bench(bundle, tmp_path / "store", samples=5)


def stamps(folder: Path) -> list[int]:
    return sorted(sample.stamp_ns // SECOND for sample in CaptureStore.open(folder).samples())


def test_store_holds_the_budget_whatever_was_unusable(bench: Bench, tmp_path: Path) -> None:
    bench.broken_images = {4, 5, 30, 31, 60}
    bench.nan_states = {6, 40}
    for number in range(1, 100):
        bench.offer(number)
    report = bench.recording.report()
    assert report.kept == 5
    # Two broken states are met before the choice; broken images only where they were chosen.
    assert 2 <= report.unusable <= 7
    assert report.failure == ""
    assert bench.recording.finish().startswith("5 samples of ")
    kept = stamps(tmp_path / "store")
    assert len(kept) == 5
    assert not set(kept) & (bench.broken_images | bench.nan_states)


def test_images_are_converted_for_kept_observations_alone(bench: Bench) -> None:
    for number in range(1, 10):
        for _ in range(20):
            bench.offer(number)
    assert bench.conversions <= 9


def test_memory_holds_a_shard_and_not_the_run(bundle: Bundle, tmp_path: Path) -> None:
    bench = Bench(bundle, tmp_path / "store", 40, np.zeros((256, 256, 3), np.uint8))
    peaks = []
    tracemalloc.start()
    try:
        for numbers in (range(1, 10), range(10, 200)):
            tracemalloc.reset_peak()
            for number in numbers:
                bench.offer(number)
            peaks.append(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()
    assert bench.recording.report().kept == 40
    assert bench.conversions > 80, "nothing was replaced"
    assert peaks[1] < 1.2 * peaks[0]


def test_unusable_observation_is_named(bench: Bench) -> None:
    bench.offer(1, instruction="")
    assert bench.recording.report().fault == "the instruction '' is empty"
    bench.broken_images = {2}
    bench.offer(2)
    assert bench.recording.report().fault == "image on /a: truncated"
    bench.offer(3, chunk={"single_arm": np.full((2, 5), np.nan, np.float32)})
    assert "actions/single_arm holds NaN" in bench.recording.report().fault
    assert bench.recording.report().kept == 0


def committed(**changes: Any) -> dict[str, Any]:
    """What a policy node writes of two committed rows, of JSON's types."""
    content = {"rows": [0, 1], "actions": {"single_arm": [[0.1] * 5] * 2, "gripper": [[0.2]] * 2}}
    return {name: value for name, value in (content | changes).items() if value is not ...}


def gripper(*rows: Any) -> dict[str, Any]:
    actions: dict[str, Any] = committed()["actions"]
    return actions | {"gripper": list(rows)}


def test_committed_rows_are_stored_to_the_bit(bench: Bench, tmp_path: Path) -> None:
    exact = [[float(np.float32(0.1))], [-0.0]]
    bench.offer(1, committed=committed(rows=[3, 1], actions=gripper(*exact)))
    bench.offer(2)
    assert bench.recording.report().fault == ""
    bench.recording.finish()
    given, free = sorted(
        CaptureStore.open(tmp_path / "store").samples(), key=lambda sample: sample.stamp_ns
    )
    assert free.committed is None
    assert given.committed is not None
    assert list(given.committed.rows) == [3, 1]
    assert given.committed.actions["gripper"].tobytes() == np.array(exact, np.float32).tobytes()
    assert given.committed.actions["single_arm"].shape == (2, 5)


@pytest.mark.parametrize(
    "content",
    [
        "null",
        7,
        [],
        {},
        committed(rows=...),
        committed(mask=[True]),
        committed(rows=[]),
        committed(rows=[], actions={}),
        committed(rows=[0, 0]),
        committed(rows=[0, 99]),
        committed(rows=[-1, 0]),
        committed(rows=[0, 10**30]),
        committed(rows=[0.0, 1.0]),
        committed(rows=[False, True]),
        committed(rows="01"),
        committed(actions=[[0.1]]),
        committed(actions={"gripper": [[0.2]] * 2}),
        committed(actions=gripper([0.2], [0.2]) | {"tail": [[0.0]] * 2}),
        committed(actions=gripper([0.2])),
        committed(actions=gripper([0.2], [0.2, 0.3])),
        committed(actions=gripper(["0.2"], ["0.2"])),
        committed(actions=gripper([None], [0.2])),
        committed(actions=gripper([float("nan")], [0.2])),
        committed(actions=gripper([1e300], [0.2])),
        committed(actions=gripper([10**400], [0.2])),
    ],
)
def test_chunk_with_committed_rows_that_cannot_be_is_dropped_and_counted(
    bench: Bench, content: Any
) -> None:
    bench.offer(1, committed=content)
    report = bench.recording.report()
    assert (report.kept, report.unusable, report.failure) == (0, 1, "")
    assert report.fault.startswith("`committed` of the chunk info cannot be used: ")
    bench.offer(2, committed=committed())
    assert bench.recording.report().kept == 1


def test_nothing_is_recorded_while_paused_or_after_the_end(bench: Bench, tmp_path: Path) -> None:
    bench.offer(1)
    bench.recording.pause()
    bench.offer(2)
    bench.recording.resume()
    bench.offer(3)
    bench.recording.finish()
    bench.offer(4)
    assert stamps(tmp_path / "store") == [1, 3]
    with pytest.raises(CaptureError, match="is finished"):
        bench.recording.resume()
    assert bench.recording.finish().startswith("2 samples of 2 ")


def test_bug_in_the_source_is_logged_and_the_worker_goes_on(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    numbers = iter(range(1, 4))

    def following(timeout_s: float) -> Paired | None:
        number = next(numbers, None)
        if number == 2:
            raise ZeroDivisionError("made for this test")
        if number is None:
            time.sleep(0.01)
            return None
        return Paired(Snapshot({}, number * SECOND, 0), None, 3, "pick")

    worker = RecordingWorker(following, bench.recording, logging.getLogger("recording"))
    worker.start()
    end = time.monotonic() + 60
    while bench.recording.report().kept < 2:
        assert time.monotonic() < end
        time.sleep(0.01)
    worker.stop()
    assert "made for this test" in caplog.text
