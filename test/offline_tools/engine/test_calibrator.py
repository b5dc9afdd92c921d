"""Hazards of calibration: no samples, samples that do not fit or that TensorRT never took."""

from __future__ import annotations

import types
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from groot_int8_ros.errors import CalibrationError
from groot_int8_ros.policy.engines.base import TensorSpec
from offline_tools.engine.calibrator import (
    CalibrationBatches,
    CalibrationResult,
    describe_batches,
    make_entropy_calibrator,
)

_SPECS = {"x": TensorSpec("float32", ("batch", "sequence", 2))}


def _batches(*lengths: int, last: float = 1.0) -> CalibrationBatches:
    feeds: list[dict[str, NDArray[Any]]] = [
        {"x": np.full((1, length, 2), last, np.float32)} for length in lengths
    ]
    return describe_batches(_SPECS, lambda: feeds, "the store")


def test_shorter_samples_are_padded_on_the_left_to_the_longest() -> None:
    batches = _batches(2, 5, 3)
    assert (batches.count, batches.shapes) == (3, {"x": (1, 5, 2)})
    padded = [feed["x"][0, :, 0].tolist() for feed in batches]
    assert padded == [[0, 0, 0, 1, 1], [1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]


def test_empty_set_is_refused() -> None:
    with pytest.raises(
        CalibrationError, match=r"the store holds no samples.*groot-int8 calibrate"
    ):
        _batches()


def test_sample_without_an_input_is_named() -> None:
    with pytest.raises(CalibrationError, match="sample 0 has no x"):
        describe_batches(_SPECS, lambda: [{"y": np.zeros(1)}], "the store")


def test_samples_of_two_robots_are_refused() -> None:
    feeds = [{"x": np.zeros((1, 3, 2), np.float32)}, {"x": np.zeros((1, 3, 4), np.float32)}]
    with pytest.raises(CalibrationError, match=r"x of sample 1 has the shape \[1, 3, 4\]"):
        describe_batches(_SPECS, lambda: feeds, "the store")


def test_sample_that_is_not_finite_is_named() -> None:
    with pytest.raises(CalibrationError, match="sample 0: x holds NaN or infinity"):
        list(_batches(2, last=float("nan")))


def test_batches_that_tensorrt_did_not_take_fail_the_build() -> None:
    batches = _batches(2, 2, 2)
    CalibrationResult(consumed=3).check(batches)
    CalibrationResult(consumed=0).check(None)
    with pytest.raises(CalibrationError, match="took 2 of 3 captured batches"):
        CalibrationResult(consumed=2).check(batches)


def test_what_a_batch_raises_inside_tensorrt_is_raised_after_the_build() -> None:
    # TensorRT's own base class is not here; what it would call is.
    trt = types.SimpleNamespace(IInt8EntropyCalibrator2=object)
    broken = _batches(2, 2, last=float("inf"))
    calibrator, result = make_entropy_calibrator(trt, None, broken, None, {})
    assert calibrator.get_batch(["x"]) is None
    with pytest.raises(CalibrationError, match=r"calibration failed at batch 0: .*infinity"):
        result.check(broken)


def test_cache_replaces_batches_and_what_is_written_is_kept() -> None:
    trt = types.SimpleNamespace(IInt8EntropyCalibrator2=object)
    calibrator, result = make_entropy_calibrator(trt, None, None, b"known", {})
    assert calibrator.read_calibration_cache() == b"known"
    assert calibrator.get_batch(["x"]) is None
    calibrator.write_calibration_cache(memoryview(b"new"))
    assert result.cache == b"new"
    assert not result.errors
