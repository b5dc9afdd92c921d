"""Hazards of judging on samples: a few are not all observations, and some cannot be answered."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from groot_int8_ros.capture.sample import CaptureSample
from groot_int8_ros.capture.store import CaptureStore
from groot_int8_ros.errors import QuantizationError
from groot_int8_ros.policy.bundle import open_bundle
from groot_int8_ros.policy.types import Float64Array
from offline_tools.quantize.evaluation import ActionErrors, ActionRunner, relative_l2_bound


def _errors(squares: Float64Array) -> ActionErrors:
    error = float(np.sqrt(squares[:, 0].sum() / squares[:, 1].sum()))
    return ActionErrors(error, 1.0, {}, {}, 1.0, squares)


def _draw(random: np.random.RandomState, count: int) -> Float64Array:
    """Squared errors as skewed as a policy's, in proportion to the actions' squares."""
    norms = random.uniform(0.5, 1.5, count)
    return np.stack([1e-4 * norms * random.chisquare(4, count) / 4, norms], axis=1)


@pytest.mark.parametrize(("judged", "searched"), [(4, 8), (16, 8), (4, 0)])
def test_the_bound_holds_on_the_observations_to_come(judged: int, searched: int) -> None:
    random = np.random.RandomState(0)
    held = []
    for _ in range(2000):
        spread = [_errors(_draw(random, searched))] if searched else []
        bound = relative_l2_bound(_errors(_draw(random, judged)), spread)
        held.append(bound >= 1e-2)
    # Of few and skewed errors Student's t holds less often than 95 %.
    assert 0.86 <= np.mean(held) <= 0.99


def test_more_samples_bring_the_bound_nearer() -> None:
    random = np.random.RandomState(1)
    few, many = (relative_l2_bound(_errors(_draw(random, n))) for n in (8, 800))
    assert 1e-2 < many < 1.05e-2 < few


def test_one_sample_says_nothing_of_the_spread_and_nothing_hides_infinity() -> None:
    one = _errors(np.array([[4e-4, 1.0]]))
    assert relative_l2_bound(one) == one.relative_l2
    broken = ActionErrors(np.inf, 0.0, {}, {}, np.inf, np.full((2, 2), np.inf))
    assert relative_l2_bound(broken) == np.inf


def test_sample_that_lacks_inputs_is_sent_to_the_command_that_can_help(
    fp16_bundle: Path, store: Path
) -> None:
    bundle = open_bundle(fp16_bundle, verify_hashes=False)
    sample = next(CaptureStore.open(store).samples())

    def advice(lacking: CaptureSample) -> str:
        with pytest.raises(QuantizationError, match="lacks backbone inputs") as caught:
            ActionRunner(bundle, [lacking])
        return str(caught.value)

    frames = {
        camera.key: np.zeros((2, 2, 3), np.uint8) for camera in bundle.manifest.robot.cameras
    }
    assert "--complete STORE" in advice(replace(sample, backbone=None, images=frames))
    # As an import of the DiT's inputs is.
    imported = advice(replace(sample, backbone=None, noise=None, images=None))
    assert "--complete" not in imported
    assert "capture again, groot-int8 calibrate --bundle BUNDLE --dataset" in imported
