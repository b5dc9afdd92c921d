"""Golden observations and random checkpoints as backbones and heads of every stage take them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from groot_int8_ros.policy.preprocess import pixel_values
from groot_int8_ros.policy.processor import ImageChain, load_processor
from groot_int8_ros.policy.token_layout import TokenLayout, layout_of, padded_left, split_prompt
from groot_int8_ros.policy.types import CameraSpec, Int64Array, UInt8Array
from offline_tools.demo.random_checkpoint import SIZES
from offline_tools.export.deployed_backbone import backbone_graph
from offline_tools.export.deployed_stages import StageGraph
from offline_tools.export.graph import WeightSource
from offline_tools.export.graphs import ReferenceGraph
from offline_tools.model.action_head import embodiment_row, time_bucket
from offline_tools.model.backbone import Backbone
from offline_tools.model.checkpoint import CheckpointReader, expected_keys, load_weights
from offline_tools.model.configuration import (
    DiTConfig,
    LanguageConfig,
    ModelConfig,
    VisionConfig,
    load_model_config,
)
from offline_tools.model.deployed.backbone import BackboneCase, BackboneParts
from offline_tools.model.deployed.constants import fill_constants
from offline_tools.model.deployed.head_parts import PrefixTextKeysValues
from offline_tools.model.deployed.head_weights import HeadWeights
from offline_tools.model.deployed.prefix import Prefix, compute_prefixes

IMAGE = 60


@dataclass(frozen=True)
class HeadCase:
    """A checkpoint's head and one observation.

    Attributes:
        config: Sizes of the model.
        checkpoint: Gives a tensor by its key in the released layout.
        embodiment_id: Row of the category-specific weights.
        ids: Token ids of the prompt, without padding.
        features: The backbone's output for them, shape (1, S, cross width).
        state: Normalised state, shape (1, max_state_dim).
        noise: Shape (1, H, max_action_dim).
        actions: Recorded actions by number of steps, if there are any.
    """

    config: ModelConfig
    checkpoint: WeightSource
    embodiment_id: int
    ids: np.ndarray[tuple[int], np.dtype[np.int64]]
    features: Tensor
    state: Tensor
    noise: Tensor
    actions: Mapping[int, Tensor]

    def layout(self, prefix_length: int | None = None) -> TokenLayout:
        """Return the prompt's layout; the prefix has room for two tokens more than needed."""
        image = self.config.language.image_token_id
        needed = len(split_prompt(self.ids, image)[0])
        return layout_of(self.ids.tolist(), image, prefix_length or needed + 2)

    def weights(self, steps: int) -> HeadWeights:
        """Return the source of an unrolled head's weights."""
        return HeadWeights(self.config, self.checkpoint, self.embodiment_id, steps)

    def inputs(self, layout: TokenLayout, committed: int = 0) -> dict[str, Tensor]:
        """Return everything that a head of any stage may take, but `features`."""
        real = len(self.ids) - layout.live_length
        padding = layout.prefix_length - real
        image_mask = torch.from_numpy(self.ids == self.config.language.image_token_id)[None]
        keys, values = self._prefix(real)
        generator = torch.Generator().manual_seed(11)
        mask = torch.zeros(self.noise.shape[:2], dtype=torch.bool)
        mask[:, :committed] = True
        return {
            "image_mask": _padded(image_mask, padding),
            "backbone_attention_mask": _padded(torch.ones_like(image_mask), padding),
            "prefix_mask": torch.arange(layout.prefix_length) >= padding,
            "prefix_text_keys": _padded(keys, padding, axis=2),
            "prefix_text_values": _padded(values, padding, axis=2),
            "state": self.state,
            "noise": self.noise,
            "committed_actions": torch.randn(self.noise.shape, generator=generator),
            "committed_mask": mask,
            "embodiment_id": torch.tensor([self.embodiment_id]),
            "live_features": self.features[:, real:],
            "all_features": _padded(self.features, padding),
        }

    def _prefix(self, real: int) -> tuple[Tensor, Tensor]:
        module = PrefixTextKeysValues(self.config)
        fill(module, self.weights(1))
        with torch.no_grad():
            keys, values = module(self.features[:, :real])
        return keys, values

    def run(
        self,
        graphs: tuple[StageGraph, ...],
        steps: int,
        layout: TokenLayout | None = None,
        **changes: Tensor,
    ) -> Tensor:
        """Run a stage in PyTorch, graph by graph as a robot would, and return its actions."""
        inputs = {**self.inputs(layout or self.layout()), **changes}
        if len(graphs) == 1:
            spec = graphs[0].spec
            module = self.module(graphs[0], steps)
            live = "prefix_text_keys" in spec.inputs
            inputs["features"] = inputs["live_features" if live else "all_features"]
            with torch.no_grad():
                result: Tensor = module(*(inputs[name] for name in spec.inputs))
            return result
        conditioner, encoder, dit, decoder = (self.module(graph, steps) for graph in graphs)
        row = [inputs[name] for name in graphs[0].spec.inputs if name == "embodiment_id"]
        actions = inputs["noise"]
        with torch.no_grad():
            vl_embs, token = conditioner(inputs["all_features"], inputs["state"], *row)
            for step in range(steps):
                time = torch.tensor([time_bucket(step, steps, self.config.timestep_buckets)])
                tokens = encoder(token, actions, time, *row)
                masks = inputs["image_mask"], inputs["backbone_attention_mask"]
                actions = actions + decoder(dit(tokens, vl_embs, time, *masks), *row) / steps
        return actions

    def module(self, graph: StageGraph, steps: int) -> nn.Module:
        """Build a stage's module and fill it."""
        module = graph.spec.build().eval()
        unrolled = self.weights(steps)

        def source(name: str) -> Tensor:
            if graph.name == "action_head":
                return unrolled(name)
            prefix = "model." if graph.name == "dit" else ""
            tensor = self.checkpoint(f"action_head.{prefix}{name}")
            if "embodiment_id" in graph.spec.inputs:
                return tensor
            return embodiment_row(name, tensor, self.embodiment_id)

        fill(module, source)
        return module


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
        room = len(self.prefix_ids) + padding
        return compute_prefixes(self.config, self.checkpoint, [self.prefix_ids], room)[0]

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

    def module(self, graph: ReferenceGraph) -> nn.Module:
        """Build a graph's module and fill it."""
        module = graph.spec.build().eval()
        fill(module, graph.weights)
        return module

    def run(self, parts: BackboneParts, padding: int, **changes: NDArray[np.generic]) -> Tensor:
        """Run a backbone of any parts in PyTorch and return the live tokens' features."""
        graph = backbone_graph(self.case(padding), self.checkpoint, parts, "fp32")
        given = {**self.inputs(padding), **changes}
        with torch.no_grad():
            result: Tensor = self.module(graph)(
                *(torch.from_numpy(given[name]) for name in graph.spec.inputs)
            )
        return self.live(result)

    @staticmethod
    def relative_error(found: Tensor | NDArray[np.generic], expected: Tensor) -> float:
        """Return the largest difference, relative to the largest value."""
        difference = torch.as_tensor(np.asarray(found, np.float32)) - expected
        return float(difference.abs().max() / expected.abs().max())

    def error(self, found: Tensor | NDArray[np.generic]) -> float:
        """Return how far live features are from the reference's, relative to the largest."""
        return self.relative_error(found, self.live(self.reference))


@dataclass(frozen=True)
class TrueWidth:
    """A model as wide as the public one, of few layers, whose weights are zeros.

    Attributes:
        config: Sizes of the model.
        checkpoint: Gives a tensor by its key in the released layout.
        case: One camera's.
    """

    config: ModelConfig
    checkpoint: WeightSource
    case: BackboneCase


def fill(module: nn.Module, source: WeightSource) -> None:
    """Give every parameter of a module its value in float32, and every constant its own."""
    fill_constants(module)
    names = [name for name, _ in module.named_parameters()]
    load_weights(module, ((name, source(name)) for name in names), torch.float32)


def _padded(tensor: Tensor, padding: int, axis: int = 1) -> Tensor:
    length = tensor.shape[axis] + padding
    return torch.from_numpy(padded_left(tensor.numpy(), length, axis))


@pytest.fixture(scope="session")
def golden_case(golden_dir: Path) -> HeadCase:
    """The golden checkpoint's head and its first observation, features as recorded."""
    eagle = golden_dir / "eagle_config.json"
    config, _ = load_model_config(golden_dir / "checkpoint", eagle)
    with np.load(golden_dir / "golden_obs0.npz") as arrays:
        return HeadCase(
            config=config,
            checkpoint=CheckpointReader(golden_dir / "checkpoint").tensor,
            embodiment_id=int(arrays["embodiment_id"][0]),
            ids=arrays["input_ids"][0],
            features=torch.from_numpy(arrays["backbone_features"]),
            state=torch.from_numpy(arrays["normalized_state"][0]),
            noise=torch.from_numpy(arrays["noise"]),
            actions={n: torch.from_numpy(arrays[f"n{n}.action_pred"]) for n in (1, 2, 4)},
        )


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def true_width() -> TrueWidth:
    """A layer of each kind. Tracing reads next to none of the weights."""
    full = SIZES["full"]
    config = replace(
        full,
        vision=replace(full.vision, layers=1),
        language=replace(full.language, layers=1),
        # Cross-attention to text, self-attention, cross-attention to images.
        dit=replace(full.dit, layers=3),
    )
    shapes = expected_keys(config)
    image = config.language.image_token_id
    # 256 x 256 pixels: 8 x 8 tokens.
    layout = layout_of([5, 9, 11, 5, 7, *[image] * 64, 8, 3, 4], image, 8)
    cameras = (CameraSpec("front", 256, 256),)
    return TrueWidth(
        config,
        lambda key: torch.zeros(shapes[key], dtype=torch.bfloat16),
        BackboneCase(config, cameras, ImageChain(256, 0.95), layout),
    )


@pytest.fixture(scope="session")
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
