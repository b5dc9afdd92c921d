"""Hazards of derived sets: more than their one gap, sets not nested, frames as before."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from groot_int8_ros.capture.coverage import measure_coverage
from groot_int8_ros.capture.inference import run_on
from groot_int8_ros.capture.store import CaptureMeta, CaptureStore, CaptureWriter
from groot_int8_ros.errors import CaptureError
from groot_int8_ros.policy.bundle import open_bundle
from groot_int8_ros.policy.policy import Policy
from offline_tools.compare_calibration.sets import SampleSet, exposed, plan_sets, write_set
from offline_tools.compare_quantization.samples import generated_observations

_INSTRUCTIONS = ("pick up the cube", "put it down")
_RUNS, _PER_RUN, _PERIOD_NS, _RUN_NS = 5, 4, 400_000_000, 60_000_000_000


@pytest.fixture(scope="module")
def policy(small_deployed: Path) -> Iterator[Policy]:
    loaded = Policy.load(small_deployed, threads=1)
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def store(policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> CaptureStore:
    """Five runs of 1.2 s, the first three of the one task. Not in the order of their stamps."""
    bundle = open_bundle(policy.folder)
    samples = []
    for number, one in enumerate(generated_observations(bundle, _RUNS * _PER_RUN, seed=0)):
        run, step = divmod(number, _PER_RUN)
        stamp_ns = 1_000_000_000 + run * _RUN_NS + step * _PERIOD_NS
        told = replace(one, instruction=_INSTRUCTIONS[run >= 3], stamp_ns=stamp_ns)
        samples.append(run_on(policy, told, f"live {stamp_ns}", seed=3, keep_images=True))
    folder = tmp_path_factory.mktemp("captured") / "store"
    with CaptureWriter(folder, CaptureMeta.of_bundle(policy.manifest, "live")) as writer:
        for sample in reversed(samples):
            writer.add(sample)
    return CaptureStore.open(folder)


@pytest.fixture(scope="module")
def sets(store: CaptureStore, policy: Policy) -> dict[str, SampleSet]:
    return {one.name: one for one in plan_sets(store, policy.processor, [15, 6], 5)}


def test_smaller_sets_lie_within_larger_ones(sets: dict[str, SampleSet]) -> None:
    large, small = sets["15-samples"], sets["6-samples"]
    assert (len(large.positions), len(small.positions)) == (15, 6)
    assert set(small.positions) < set(large.positions)
    assert not large.warning
    assert not small.warning


def test_a_bad_set_lacks_the_one_thing_and_no_other(
    store: CaptureStore, sets: dict[str, SampleSet]
) -> None:
    records = store.records()

    def stamps(name: str) -> list[int]:
        found = [records[position].stamp_ns for position in sets[name].positions]
        assert found == sorted(found)
        return found

    told = {records[p].instruction for p in sets["one-instruction"].positions}
    assert told == {_INSTRUCTIONS[0]}
    assert len(sets["one-instruction"].positions) == 5
    since_ns = [(stamp - 1_000_000_000) % _RUN_NS for stamp in stamps("first-second")]
    assert max(since_ns) == 2 * _PERIOD_NS
    assert len({stamp // _RUN_NS for stamp in stamps("first-second")}) > 2
    for name in ("dark-camera", "bright-camera", "covered-camera"):
        assert len(stamps(name)) == 5
        assert {records[p].instruction for p in sets[name].positions} == set(_INSTRUCTIONS)
    assert len(sets["two-samples"].positions) == 2


def test_a_store_with_too_few_samples_is_refused(store: CaptureStore, policy: Policy) -> None:
    with pytest.raises(CaptureError, match=r"holds 20 samples, and a set of 21"):
        plan_sets(store, policy.processor, [6, 21], 5)


def test_good_sets_are_written_as_they_were_captured(
    store: CaptureStore, policy: Policy, sets: dict[str, SampleSet], tmp_path: Path
) -> None:
    one = sets["6-samples"]
    written = write_set(policy, store, one, tmp_path / "set")
    hashes = [record.sha256 for record in store.records()]
    assert {record.sha256 for record in written.records()} == {hashes[p] for p in one.positions}
    assert (written.meta, written.index.offered) == (store.meta, 20)


def test_changed_light_reaches_the_network_and_the_report(
    store: CaptureStore, policy: Policy, sets: dict[str, SampleSet], tmp_path: Path
) -> None:
    one = sets["covered-camera"]
    written = write_set(policy, store, one, tmp_path / "set")
    before = {sample.stamp_ns: sample for sample in store.samples()}
    changed, *others = policy.processor.cameras
    for sample in written.samples():
        source = before[sample.stamp_ns]
        assert sample.images is not None
        assert source.images is not None
        assert sample.images[changed].max() <= 11
        for camera in others:
            np.testing.assert_array_equal(sample.images[camera], source.images[camera])
        np.testing.assert_array_equal(sample.noise, source.noise)
        assert sample.features is not None
        assert source.features is not None
        assert np.abs(sample.features - source.features).max() > 0.0
    thin = measure_coverage(written, policy.processor, policy.manifest).thin
    assert any(one.warning in text for text in thin)


def test_a_stop_is_a_factor_of_two_in_light() -> None:
    frame = np.array([[0, 50, 100, 200]], np.uint8)
    assert exposed(frame, 0.0).tolist() == frame.tolist()
    # Of a display's grey levels, whose square is about the light.
    assert exposed(frame, 2.2).tolist() == [[0, 100, 200, 255]]
    assert exposed(frame, -2.2).tolist() == [[0, 25, 50, 100]]
