"""Samples of every kind, small and different from each other."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from groot_int8_ros.capture.sample import (
    BackboneInputs,
    CapturedChunk,
    CaptureSample,
    DitInputs,
)
from groot_int8_ros.capture.store import CaptureMeta
from groot_int8_ros.policy.families import REFERENCE

STEPS = 2
HORIZON = 4

MakeSample = Callable[..., CaptureSample]


def _sample(number: int, *, tokens: int = 6) -> CaptureSample:
    random = np.random.RandomState(number)

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32)

    return CaptureSample(
        instruction=f"pick up cube {number % 2}",
        stamp_ns=1_000_000_000 + number * 50_000_000,
        source=f"episode 0 frame {number}",
        state={"arm": normal(3), "wrist.left": normal(1)},
        noise=normal(HORIZON, 5),
        seed=7,
        images={"front": random.randint(0, 256, (8, 10, 3)).astype(np.uint8)},
        chunk=CapturedChunk({"arm": normal(HORIZON, 3)}, normal(HORIZON, 5)),
        backbone=BackboneInputs(
            random.randint(0, 99, tokens).astype(np.int64),
            np.ones(tokens, np.int64),
            normal(2, 3, 4, 4),
        ),
        dit=DitInputs(
            vl_embs=normal(tokens, 7),
            image_mask=random.rand(tokens) > 0.5,
            backbone_attention_mask=np.ones(tokens, np.bool_),
            sa_embs=normal(STEPS, 1 + HORIZON, 6),
            timestep=np.array([0, 500], np.int64),
        ),
        normalised_state=normal(8),
    )


@pytest.fixture
def make_sample() -> MakeSample:
    """Makes sample `number`, the same at every call."""
    return _sample


@pytest.fixture
def meta() -> CaptureMeta:
    """What those samples were captured for."""
    return CaptureMeta("a" * 64, REFERENCE, "new_embodiment", HORIZON, STEPS, "test", seed=7)
