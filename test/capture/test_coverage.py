"""The coverage report: what is thin is named, and nothing else is."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from groot_int8_ros.capture.coverage import Coverage, measure_coverage
from groot_int8_ros.capture.sample import BackboneInputs, CaptureSample, DitInputs
from groot_int8_ros.capture.store import CaptureMeta, CaptureStore, CaptureWriter
from groot_int8_ros.errors import OutputError
from groot_int8_ros.policy.bundle import Bundle, Manifest, open_bundle
from groot_int8_ros.policy.processor import Processor, StateKey
from groot_int8_ros.policy.prompt_bank import PromptRecord, PromptRecords

from ..full_disk import file_size_limit

COUNT = 40


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return open_bundle(tiny_bundle, verify_hashes=False)


def limits(key: StateKey) -> tuple[np.ndarray, np.ndarray]:
    if key.usual_low is not None and key.usual_high is not None:
        return key.usual_low, key.usual_high
    if key.low is not None and key.high is not None:
        return key.low, key.high
    assert key.mean is not None
    assert key.std is not None
    return key.mean - 2 * key.std, key.mean + 2 * key.std


def good_samples(bundle: Bundle) -> list[CaptureSample]:
    """Samples that cover everything: full ranges, changing light, two instructions."""
    samples = []
    for number in range(COUNT):
        part = number / (COUNT - 1)
        state = {}
        for key in bundle.processor.state_keys:
            low, high = limits(key)
            state[key.key] = (low + part * (high - low)).astype(np.float32)
        random = np.random.RandomState(number)
        images = {
            camera: np.clip(random.normal(80 + 60 * part, 30, (24, 32, 3)), 0, 255).astype(
                np.uint8
            )
            for camera in bundle.processor.cameras
        }
        steps = bundle.manifest.denoising_steps
        dit = DitInputs(
            np.zeros((3, 2), np.float32),
            np.zeros(3, np.bool_),
            np.ones(3, np.bool_),
            np.zeros((steps, 2, 2), np.float32),
            np.arange(steps) * 500,
        )
        samples.append(
            CaptureSample(
                f"task {number % 2}", number, f"frame {number}", state, images=images, dit=dit
            )
        )
    return samples


def measure(
    bundle: Bundle,
    folder: Path,
    samples: list[CaptureSample],
    *,
    processor: Processor | None = None,
    manifest: Manifest | None = None,
) -> Coverage:
    with CaptureWriter(folder, CaptureMeta.of_bundle(bundle.manifest, "test")) as writer:
        for sample in samples:
            writer.add(sample)
        writer.flush(1000)
    return measure_coverage(
        CaptureStore.open(folder), processor or bundle.processor, manifest or bundle.manifest
    )


def test_report_that_a_full_disk_refuses_says_that_the_samples_are_there_and_how_to_get_it(
    bundle: Bundle, tmp_path: Path
) -> None:
    folder = tmp_path / "store"
    coverage = measure(bundle, folder, good_samples(bundle))
    with file_size_limit(100), pytest.raises(OutputError, match=r"cannot write .*json") as told:
        coverage.write(folder)
    assert f"The samples in {folder} are whole and can be used" in str(told.value)
    assert f"groot-int8 calibration-data report {folder} --bundle BUNDLE" in str(told.value)
    assert "Nothing was left behind" not in str(told.value)


def test_set_that_covers_everything_has_nothing_thin(bundle: Bundle, tmp_path: Path) -> None:
    coverage = measure(bundle, tmp_path / "store", good_samples(bundle))
    assert coverage.thin == ()
    assert "nothing is thin" in coverage.to_text()
    assert (coverage.samples, coverage.offered) == (COUNT, 1000)
    assert coverage.timesteps == {0: COUNT, 500: COUNT}
    assert coverage.instructions == {"task 0": COUNT // 2, "task 1": COUNT // 2}
    assert len(coverage.joints) == sum(key.dim for key in bundle.processor.state_keys)
    for joint in coverage.joints:
        assert joint.covered == pytest.approx(1.0, abs=1e-5)
        assert joint.outside == 0.0
    names = [j.name for joints in bundle.manifest.robot.state_joints.values() for j in joints]
    assert [joint.joint for joint in coverage.joints] == names


def test_each_gap_is_named_and_nothing_else(bundle: Bundle, tmp_path: Path) -> None:
    key = bundle.processor.state_keys[0]
    joint = bundle.manifest.robot.state_joints[key.key][0].name
    low, high = limits(key)
    camera = bundle.processor.cameras[0]

    def stiff(sample: CaptureSample) -> CaptureSample:
        state = {name: values.copy() for name, values in sample.state.items()}
        state[key.key][0] = low[0] + (state[key.key][0] - low[0]) * 0.2
        return replace(sample, state=state)

    def shifted(sample: CaptureSample) -> CaptureSample:
        state = {name: values.copy() for name, values in sample.state.items()}
        state[key.key][0] += (high[0] - low[0]) * 0.3
        return replace(sample, state=state)

    def grey(sample: CaptureSample, level: int) -> CaptureSample:
        assert sample.images is not None
        image = np.full_like(sample.images[camera], level)
        return replace(sample, images={**sample.images, camera: image})

    good = good_samples(bundle)
    cases: dict[str, tuple[list[CaptureSample], list[str]]] = {
        "stiff": ([stiff(s) for s in good], [rf"{joint} \({key.key}\) visited 20 %"]),
        "shifted": ([shifted(s) for s in good], [f"{joint} .*outside of its recorded range"]),
        "few": (good[::4], ["10 samples, fewer than 32"]),
        "covered": (
            [*good[:-1], grey(good[-1], 0)],
            [f"camera {camera} has images as dark as 0", f"camera {camera} .*nearly one colour"],
        ),
        "glare": (
            [*good[:-1], grey(good[-1], 255)],
            [f"camera {camera} has images as bright as 255", "nearly one colour"],
        ),
        "one light": (
            [replace(s, images=good[20].images) for s in good],
            [f"camera {name} saw one light only" for name in bundle.processor.cameras],
        ),
        "no dit": (
            [replace(s, dit=None) for s in good],
            ["no sample has inputs of the action head"],
        ),
        "no images": ([replace(s, images=None) for s in good], ["the samples have no images"]),
    }
    for name, (samples, wanted) in cases.items():
        thin = list(measure(bundle, tmp_path / name, samples).thin)
        assert len(thin) == len(wanted), (name, thin)
        for pattern, text in zip(wanted, thin, strict=True):
            assert re.search(pattern, text), (name, text)


def test_rare_instruction_is_named(bundle: Bundle, tmp_path: Path) -> None:
    samples = [replace(s, instruction="pick") for s in good_samples(bundle) for _ in (0, 1)]
    samples[7] = replace(samples[7], instruction="place")
    (thin,) = measure(bundle, tmp_path / "store", samples).thin
    assert thin == "the instruction 'place' has 1 of 80 samples"


def test_instructions_of_the_bundle_that_no_sample_was_told_are_named(
    bundle: Bundle, tmp_path: Path
) -> None:
    texts = ("Task 0!", "stack the cubes", "task 1", "open the door")
    bank = PromptRecords(32, tuple(PromptRecord(text, f"{text}.npz", 8) for text in texts))
    manifest = replace(bundle.manifest, prompts=bank)
    samples = good_samples(bundle)
    for name, formalize, untold, counted in (
        ("as written", False, ("Task 0!", "stack the cubes", "open the door"), "task 0"),
        # Where the policy drops case and punctuation these two are one instruction.
        ("formalized", True, ("stack the cubes", "open the door"), "Task 0!"),
    ):
        processor = replace(bundle.processor, formalize_language=formalize)
        coverage = measure(
            bundle, tmp_path / name, samples, processor=processor, manifest=manifest
        )
        listed = ", ".join(map(repr, untold))
        assert coverage.thin == (
            f"of the bundle's instructions {len(untold)} have no sample: {listed}",
        )
        assert coverage.instructions[counted] == COUNT // 2
        assert all(coverage.instructions[text] == 0 for text in untold)


def test_stray_moments_of_the_training_need_not_be_visited(bundle: Bundle, tmp_path: Path) -> None:
    """A set that covers what 98 % of the training data did is not called thin for its extremes."""

    def strayed(key: StateKey) -> StateKey:
        low, high = limits(key)
        room = high - low
        return StateKey(
            key.key, key.dim, "min_max", low - room, high + room, None, None, low, high
        )

    keys = tuple(strayed(key) for key in bundle.processor.state_keys)
    for name, known, thin in (
        ("percentiles", keys, 0),
        (
            "extremes alone",
            tuple(replace(key, usual_low=None, usual_high=None) for key in keys),
            sum(key.dim for key in keys),
        ),
    ):
        processor = replace(bundle.processor, state_keys=known)
        coverage = measure(bundle, tmp_path / name, good_samples(bundle), processor=processor)
        assert len(coverage.thin) == thin, (name, coverage.thin)
        assert all(joint.outside == 0.0 for joint in coverage.joints)


def test_light_is_read_from_network_images_where_no_frames_are_stored(
    bundle: Bundle, tmp_path: Path
) -> None:
    cameras = len(bundle.processor.cameras)
    levels = np.array([60.0, 200.0])[:cameras]
    pixels = np.empty((cameras, 3, 4, 4), np.float32)
    pixels[...] = ((levels - 127.5) / 127.5).astype(np.float32)[:, None, None, None]
    backbone = BackboneInputs(np.ones(3, np.int64), np.ones(3, np.int64), pixels)
    sample = replace(good_samples(bundle)[0], images=None, backbone=backbone)
    coverage = measure(bundle, tmp_path / "store", [sample])
    assert [camera.camera for camera in coverage.cameras] == list(bundle.processor.cameras)
    for camera, level in zip(coverage.cameras, levels, strict=True):
        assert camera.brightness == pytest.approx((level, level, level), abs=1e-3)


def test_report_is_written_as_json_and_text(bundle: Bundle, tmp_path: Path) -> None:
    coverage = measure(bundle, tmp_path / "store", good_samples(bundle)[:3])
    coverage.write(tmp_path / "store")
    report = json.loads((tmp_path / "store" / "coverage.json").read_text())
    assert report["samples"] == 3
    assert report["thin"] == list(coverage.thin)
    text = (tmp_path / "store" / "coverage.txt").read_text()
    assert all(f"THIN: {line}" in text for line in coverage.thin)
    # The report lies inside the store and is no part of it.
    assert CaptureStore.open(tmp_path / "store").content_sha256 == coverage.content_sha256
