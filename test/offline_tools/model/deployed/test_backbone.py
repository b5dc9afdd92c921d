"""Hazards of a backbone that computes less: another feature after any of its transformations."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from groot_int8_ros.policy.preprocess import pixel_values
from groot_int8_ros.policy.processor import ImageChain, load_processor
from groot_int8_ros.policy.token_layout import layout_of, padded_left, split_prompt
from groot_int8_ros.policy.types import CameraSpec, Int64Array, UInt8Array
from offline_tools.export.deployed_backbone import backbone_graph, prefix_model
from offline_tools.export.graph import GraphSpec, WeightSource
from offline_tools.model.backbone import Backbone
from offline_tools.model.checkpoint import CheckpointReader, expected_keys, load_weights
from offline_tools.model.configuration import (
    DiTConfig,
    LanguageConfig,
    ModelConfig,
    VisionConfig,
    load_model_config,
)
from offline_tools.model.deployed.backbone import BackboneCase, BackboneParts, backbone_parts
from offline_tools.model.deployed.constants import fill_constants
from offline_tools.model.deployed.prefix import OUTPUTS, Prefix, compute_prefix

IMAGE = 60
STAGES = tuple(backbone_parts())


@dataclass(frozen=True)
class Scene:
    """A checkpoint, cameras and one observation of each.

    Attributes:
        config: Sizes of the model.
        checkpoint: Gives a tensor by its key in the released layout.
        cameras: In the order in which the network sees them.
        chain: Scaling and cropping of the frames.
        frames: One of each camera.
        ids: Token ids of the prompt, without padding.
    """

    config: ModelConfig
    checkpoint: WeightSource
    cameras: tuple[CameraSpec, ...]
    chain: ImageChain
    frames: tuple[UInt8Array, ...]
    ids: Int64Array

    @property
    def prefix_ids(self) -> Int64Array:
        return split_prompt(self.ids, self.config.language.image_token_id)[0]

    def case(self, padding: int) -> BackboneCase:
        image, length = self.config.language.image_token_id, len(self.prefix_ids) + padding
        layout = layout_of(self.ids.tolist(), image, length)
        return BackboneCase(self.config, self.cameras, self.chain, layout)

    def prefix(self, padding: int) -> Prefix:
        return compute_prefix(self.config, self.checkpoint, self.prefix_ids, padding)

    def inputs(self, padding: int) -> dict[str, NDArray[np.generic]]:
        """Return everything that a backbone of any stage may take."""
        length = len(self.prefix_ids) + padding
        prefix = self.prefix(padding)
        return {
            "pixel_values": pixel_values(self.frames, self.chain),
            **{
                f"image_{camera.key}": frame
                for camera, frame in zip(self.cameras, self.frames, strict=True)
            },
            "input_ids": padded_left(self.ids, len(self.ids) + padding, 0)[None],
            "attention_mask": padded_left(np.ones_like(self.ids), len(self.ids) + padding, 0)[
                None
            ],
            "live_ids": self.ids[None, len(self.prefix_ids) :],
            "prefix_keys": padded_left(prefix.prefix_keys, length, 2),
            "prefix_values": padded_left(prefix.prefix_values, length, 2),
            "prefix_mask": np.arange(length) >= padding,
        }

    @cached_property
    def reference(self) -> Tensor:
        """Features of all tokens as the reference model computes them, without padding."""
        with torch.device("meta"):
            backbone = Backbone(self.config)
        backbone.language.restore_buffers()
        names = [name for name, _ in backbone.named_parameters()]
        weights = ((name, self.checkpoint(f"backbone.{name}")) for name in names)
        load_weights(backbone, weights, torch.float32)
        ids = torch.from_numpy(self.ids)[None]
        pixels = torch.from_numpy(pixel_values(self.frames, self.chain))
        with torch.no_grad():
            features: Tensor = backbone(ids, torch.ones_like(ids), pixels)[0]
        return features

    def live(self, features: Tensor) -> Tensor:
        """Return the features of the live tokens, of all tokens or of these alone."""
        return features[:, -(len(self.ids) - len(self.prefix_ids)) :]


def fill(spec: GraphSpec, weights: WeightSource) -> nn.Module:
    """Build a graph's module with its weights and constants in float32."""
    module = spec.build().eval()
    fill_constants(module)
    names = [name for name, _ in module.named_parameters()]
    load_weights(module, ((name, weights(name)) for name in names), torch.float32)
    return module


def run(
    scene: Scene, parts: BackboneParts, padding: int, **changes: NDArray[np.generic]
) -> Tensor:
    graph = backbone_graph(scene.case(padding), scene.checkpoint, parts, "fp32")
    given = {**scene.inputs(padding), **changes}
    with torch.no_grad():
        result: Tensor = fill(graph.spec, graph.weights)(
            *(torch.from_numpy(given[name]) for name in graph.spec.inputs)
        )
    return scene.live(result)


def relative_error(found: Tensor | NDArray[np.generic], expected: Tensor) -> float:
    difference = torch.as_tensor(np.asarray(found, np.float32)) - expected
    return float(difference.abs().max() / expected.abs().max())


@pytest.fixture(scope="module")
def random_scene() -> Scene:
    """Three cameras, two of one size around one of another, and odd sizes everywhere."""
    config = ModelConfig(
        vision=VisionConfig(hidden_size=24, layers=2, heads=3, mlp_size=20, positions=16),
        language=LanguageConfig(
            hidden_size=16,
            layers=3,
            heads=6,
            kv_heads=2,
            head_dim=10,
            mlp_size=28,
            vocab_size=64,
            image_token_id=IMAGE,
        ),
        dit=DiTConfig(layers=6, heads=2, head_dim=8, output_dim=8, cross_dim=16),
    )
    generator = torch.Generator().manual_seed(7)
    weights = {
        key: (0.4 * torch.randn(shape, generator=generator)).to(torch.bfloat16)
        for key, shape in expected_keys(config).items()
    }
    cameras = (
        CameraSpec("front", 112, 168),
        CameraSpec("wrist", 60, 90),
        CameraSpec("top", 112, 168),
    )
    random = np.random.RandomState(3)
    # 56 x 84 pixels: 2 x 3 tokens of each image.
    ids = [5, 9, 11, 5, *([7, *[IMAGE] * 6, 8] * len(cameras)), 3, 4]
    return Scene(
        config,
        weights.__getitem__,
        cameras,
        ImageChain(56, 0.95),
        tuple(
            random.randint(0, 256, (camera.height, camera.width, 3)).astype(np.uint8)
            for camera in cameras
        ),
        np.array(ids),
    )


@pytest.fixture(scope="module")
def golden_scene(golden_dir: Path) -> Scene:
    processor = load_processor(golden_dir / "checkpoint")
    config, _ = load_model_config(golden_dir / "checkpoint", golden_dir / "eagle_config.json")
    with np.load(golden_dir / "golden_obs1.npz") as golden:
        frames = tuple(golden[f"image.{key}"] for key in processor.cameras)
        ids = golden["input_ids"][0]
    cameras = tuple(
        CameraSpec(key, frame.shape[0], frame.shape[1])
        for key, frame in zip(processor.cameras, frames, strict=True)
    )
    read = CheckpointReader(golden_dir / "checkpoint").tensor
    return Scene(config, read, cameras, processor.image_chain, frames, ids)


@pytest.fixture(scope="module")
def features(random_scene: Scene) -> Callable[[str], Tensor]:
    """Features of the live tokens after a transformation, each computed once."""
    known = {"reference": random_scene.live(random_scene.reference)}

    def of(stage: str) -> Tensor:
        if stage not in known:
            known[stage] = run(random_scene, backbone_parts()[stage], padding=3)
        return known[stage]

    return of


@pytest.mark.parametrize(
    ("before", "after"), list(zip(("reference", *STAGES), STAGES, strict=False))
)
def test_a_transformation_changes_no_feature_of_the_model_before_it(
    features: Callable[[str], Tensor], before: str, after: str
) -> None:
    assert relative_error(features(after), features(before)) < 1e-5


@pytest.mark.parametrize("padding", [0, 1, 40])
def test_room_for_a_longer_instruction_changes_no_feature(
    random_scene: Scene, padding: int
) -> None:
    found = run(random_scene, backbone_parts()[STAGES[-1]], padding)
    assert relative_error(found, random_scene.live(random_scene.reference)) < 1e-5


def test_deployed_features_are_the_recorded_ones(golden_scene: Scene, golden_dir: Path) -> None:
    found = run(golden_scene, backbone_parts()[STAGES[-1]], padding=6)
    with np.load(golden_dir / "golden_obs1.npz") as golden:
        recorded = torch.from_numpy(golden["backbone_features"])
    # Two images of 108 tokens and their ends, five tokens and a start before the second, the end.
    assert found.shape == (1, 2 * 109 + 6 + 2, 48)
    assert relative_error(found, golden_scene.live(recorded)) < 1e-5


def test_what_stands_in_the_padding_is_never_read(random_scene: Scene) -> None:
    inputs = random_scene.inputs(padding=5)
    parts = backbone_parts()[STAGES[-1]]
    changed = {name: inputs[name].copy() for name in ("prefix_keys", "prefix_values")}
    for value in changed.values():
        value[:, :, :5] = 77.0
    before = run(random_scene, parts, 5)
    assert torch.equal(run(random_scene, parts, 5, **changed), before)
    # The mask alone hides it.
    shown = run(random_scene, parts, 5, **changed, prefix_mask=np.ones_like(inputs["prefix_mask"]))
    assert not torch.allclose(shown, before, atol=1e-3)


def test_the_instruction_is_not_lost(random_scene: Scene) -> None:
    inputs, parts = random_scene.inputs(padding=0), backbone_parts()[STAGES[-1]]
    before = run(random_scene, parts, 0)
    for name in ("prefix_keys", "prefix_values"):
        assert not torch.allclose(
            run(random_scene, parts, 0, **{name: np.negative(inputs[name])}), before, atol=1e-3
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
            assert relative_error(stored[index], expected) < 1e-5


def test_bank_and_exported_prefix_model_compute_the_same(random_scene: Scene) -> None:
    graph = prefix_model(random_scene.config, random_scene.checkpoint, precision_of_storage="fp32")
    module = fill(graph.spec, graph.weights)
    ids = torch.from_numpy(random_scene.prefix_ids)[None]
    prefix = random_scene.prefix(padding=9)
    with torch.no_grad():
        found = module(ids, torch.tensor([9]))
    for name, value in zip(OUTPUTS, found, strict=True):
        expected = torch.from_numpy(getattr(prefix, name))
        assert value.shape == expected.shape
        assert relative_error(value, expected) < 1e-6


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
    compute_prefix(random_scene.config, counting, random_scene.prefix_ids, 0)
    one_layer = [key for key in seen if ".model.layers.1." in key]
    assert len(one_layer) == 11
    assert len(seen) > 3 * len(one_layer)
    assert most <= len(one_layer)
    assert not alive
