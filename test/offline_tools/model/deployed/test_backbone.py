"""Hazards of a backbone that computes less: another feature after any of its transformations."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import Tensor

from offline_tools.export.deployed_backbone import prefix_model
from offline_tools.model.deployed.backbone import DEPLOYED_BACKBONE, backbone_parts
from offline_tools.model.deployed.prefix import OUTPUTS, compute_prefixes

if TYPE_CHECKING:
    from test.offline_tools.model.deployed.conftest import Scene

STAGES = tuple(backbone_parts())


@pytest.fixture(scope="module")
def features(random_scene: Scene) -> Callable[[str], Tensor]:
    """Features of the live tokens after a transformation, each computed once."""
    known = {"reference": random_scene.live(random_scene.reference)}

    def of(stage: str) -> Tensor:
        if stage not in known:
            known[stage] = random_scene.run(backbone_parts()[stage], padding=3)
        return known[stage]

    return of


@pytest.mark.parametrize(
    ("before", "after"), list(zip(("reference", *STAGES), STAGES, strict=False))
)
def test_a_transformation_changes_no_feature_of_the_model_before_it(
    random_scene: Scene, features: Callable[[str], Tensor], before: str, after: str
) -> None:
    assert random_scene.relative_error(features(after), features(before)) < 1e-5


@pytest.mark.parametrize("padding", [0, 1, 40])
def test_room_for_a_longer_instruction_changes_no_feature(
    random_scene: Scene, padding: int
) -> None:
    found = random_scene.run(DEPLOYED_BACKBONE, padding)
    assert random_scene.error(found) < 1e-5


def test_deployed_features_are_the_recorded_ones(golden_scene: Scene, golden_dir: Path) -> None:
    found = golden_scene.run(DEPLOYED_BACKBONE, padding=6)
    with np.load(golden_dir / "golden_obs1.npz") as golden:
        recorded = torch.from_numpy(golden["backbone_features"])
    # Two images of 108 tokens and their ends, five tokens and a start before the second, the end.
    assert found.shape == (1, 2 * 109 + 6 + 2, 48)
    assert golden_scene.relative_error(found, golden_scene.live(recorded)) < 1e-5


def test_what_stands_in_the_padding_is_never_read(random_scene: Scene) -> None:
    inputs = random_scene.inputs(padding=5)
    parts = DEPLOYED_BACKBONE
    changed = {name: inputs[name].copy() for name in ("prefix_keys", "prefix_values")}
    for value in changed.values():
        value[:, :, :5] = 77.0
    before = random_scene.run(parts, 5)
    assert torch.equal(random_scene.run(parts, 5, **changed), before)
    # The mask alone hides it.
    shown = random_scene.run(parts, 5, **changed, prefix_mask=np.ones_like(inputs["prefix_mask"]))
    assert not torch.allclose(shown, before, atol=1e-3)


def test_the_instruction_is_not_lost(random_scene: Scene) -> None:
    inputs, parts = random_scene.inputs(padding=0), DEPLOYED_BACKBONE
    before = random_scene.run(parts, 0)
    for name in ("prefix_keys", "prefix_values"):
        assert not torch.allclose(
            random_scene.run(parts, 0, **{name: np.negative(inputs[name])}), before, atol=1e-3
        )


def test_prefix_for_the_action_head_is_what_its_text_blocks_compute(
    golden_scene: Scene, golden_dir: Path
) -> None:
    prefix = golden_scene.prefix(padding=0)
    count = len(golden_scene.prefix_ids)
    with np.load(golden_dir / "golden_obs1.npz") as golden:
        normed = torch.from_numpy(golden["vlln_out"])[0, :count]
    dit = golden_scene.config.dit
    blocks = range(0, dit.layers, 2 * dit.text_period)
    assert prefix.prefix_text_keys.shape == (len(blocks), dit.heads, count, dit.head_dim)
    for index, block in enumerate(blocks):
        for part, stored in (("k", prefix.prefix_text_keys), ("v", prefix.prefix_text_values)):
            name = f"action_head.model.transformer_blocks.{block}.attn1.to_{part}"
            weight, bias = (
                golden_scene.checkpoint(f"{name}.{leaf}").float() for leaf in ("weight", "bias")
            )
            expected = torch.nn.functional.linear(normed, weight, bias)
            expected = expected.reshape(count, dit.heads, dit.head_dim).transpose(0, 1)
            assert golden_scene.relative_error(stored[index], expected) < 1e-5


def test_bank_and_exported_prefix_model_compute_the_same(random_scene: Scene) -> None:
    graph = prefix_model(random_scene.config, random_scene.checkpoint, precision_of_storage="fp32")
    module = random_scene.module(graph)
    ids = torch.from_numpy(random_scene.prefix_ids)[None]
    prefix = random_scene.prefix(padding=9)
    with torch.no_grad():
        found = module(ids, torch.tensor([9]))
    for name, value in zip(OUTPUTS, found, strict=True):
        expected = torch.from_numpy(getattr(prefix, name))
        assert value.shape == expected.shape
        assert random_scene.relative_error(value, expected) < 1e-6


def test_a_prefix_is_computed_with_one_layer_in_memory_at_a_time(random_scene: Scene) -> None:
    alive: set[int] = set()
    most = 0

    def counting(key: str) -> Tensor:
        nonlocal most
        # The tensor's memory belongs to the array, so the array dies with the last use of both.
        array = random_scene.checkpoint(key).float().numpy()
        number = len(seen)
        seen.append(key)
        alive.add(number)
        weakref.finalize(array, alive.discard, number)
        most = max(most, len(alive))
        return torch.from_numpy(array)

    seen: list[str] = []
    prefixes = [random_scene.prefix_ids, random_scene.prefix_ids[:-1]]
    compute_prefixes(random_scene.config, counting, prefixes, prefixes[0].size)
    one_layer = [key for key in seen if ".model.layers.1." in key]
    assert len(one_layer) == 11
    assert len(seen) > 3 * len(one_layer)
    assert most <= len(one_layer)
    assert not alive
