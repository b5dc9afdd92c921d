"""Golden observations and random checkpoints as heads of every stage take them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from groot_int8_ros.policy.token_layout import TokenLayout, layout_of, padded_left, split_prompt
from offline_tools.export.deployed_stages import StageGraph
from offline_tools.export.graph import WeightSource
from offline_tools.model.action_head import embodiment_row, time_bucket
from offline_tools.model.checkpoint import CheckpointReader, load_weights
from offline_tools.model.configuration import ModelConfig, load_model_config
from offline_tools.model.deployed.head_parts import PrefixTextKeysValues
from offline_tools.model.deployed.head_weights import HeadWeights


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
            if name.startswith("action_head."):
                return self.checkpoint(name)
            if graph.name == "action_head":
                return unrolled(name)
            prefix = "model." if graph.name == "dit" else ""
            tensor = self.checkpoint(f"action_head.{prefix}{name}")
            return embodiment_row(name, tensor, self.embodiment_id)

        fill(module, source)
        return module


def fill(module: nn.Module, source: WeightSource) -> None:
    """Give every parameter of a module its value in float32."""
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
