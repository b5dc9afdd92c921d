"""The network under training: N1.6's model, its first weights, its loss, and two auxiliary heads.

Owns: what is needed around `GrootN16` to train it. The loss is that of the public training code
(Isaac-GR00T, gr00t/model/gr00t_n1d6.py at e29d8fc): the velocity of a straight path from noise to
actions, at a time drawn from a Beta distribution that favours noise.

The auxiliary heads tell, from the image features alone, where all cubes and plates are, and from
the language model's answer, where the asked ones are. They teach the vision tower to measure,
which the action loss alone does slowly, and are not part of the policy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offline_tools.model.action_head import CategoryLinear
from offline_tools.model.configuration import ModelConfig
from offline_tools.model.dit import Block
from offline_tools.model.policy_model import GrootN16
from offline_tools.simulation.tasks import CUBES, PLATES, TASKS
from offline_tools.training.configuration import EMBODIMENT_ROW

_TIME_SCALE = 0.999
_TIME_ALPHA, _TIME_BETA = 1.5, 1.0
_HEAD_WIDTH = 128
_POSITION_DEVIATION = 0.5


@dataclass(frozen=True)
class Batch:
    """One step's observations, normalised.

    Attributes:
        images: Network images, uint8, shape (B, cameras, H, W, 3).
        state: Encoded states, shape (B, max_state_dim).
        actions: Encoded chunks, shape (B, horizon, max_action_dim).
        task: Index in `TASKS`, int64, shape (B,).
        truth: Standardised truth vectors, shape (B, 13).
    """

    images: Tensor
    state: Tensor
    actions: Tensor
    task: Tensor
    truth: Tensor


class TrainedPolicy(nn.Module):
    """The model with its prompts, and the auxiliary heads beside it.

    Attributes:
        prompts: Token ids of each task's prompt, int64, shape (tasks, S).
        image_rows: Where the image tokens stand in every prompt, int64.
        asked: Which entries of a truth vector a task is about, int64, shape (tasks, 5).
    """

    prompts: Tensor
    image_rows: Tensor
    asked: Tensor

    def __init__(self, config: ModelConfig, prompts: Sequence[Sequence[int]]) -> None:
        """Draw the first weights from torch's global generator.

        Args:
            config: Sizes of the model.
            prompts: Token ids of each task's prompt, all of one length.
        """
        super().__init__()
        self.model = GrootN16(config)
        self.register_buffer("prompts", torch.tensor(prompts, dtype=torch.int64), False)
        # The prompts are of one length, so the image tokens stand in the same places.
        image_rows = (self.prompts[0] == config.language.image_token_id).nonzero()[:, 0]
        self.register_buffer("image_rows", image_rows, False)
        width = len(image_rows) * config.language.hidden_size
        places = 3 * len(CUBES) + 2 * len(PLATES)
        self.see = _places_head(width, places)
        self.find = _places_head(width, 5)
        _initialize(self.model)
        asked = [
            [
                *(3 * CUBES.index(task.cube) + axis for axis in range(3)),
                *(3 * len(CUBES) + 2 * PLATES.index(task.plate) + axis for axis in range(2)),
            ]
            for task in TASKS
        ]
        self.register_buffer("asked", torch.tensor(asked), False)

    def backbone(self, images: Tensor, task: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return image features, backbone features, and the masks of valid and image tokens."""
        pixels = (images.flatten(0, 1).permute(0, 3, 1, 2).float() - 127.5) / 127.5
        ids = self.prompts[task]
        backbone = self.model.backbone
        seen = backbone.image_features(pixels)
        features = backbone.language(backbone.embed(ids, seen), torch.ones_like(ids))
        valid = torch.ones_like(ids, dtype=torch.bool)
        return seen, features, valid, ids == backbone.image_token_id

    def forward(self, batch: Batch, noises: int) -> tuple[Tensor, Tensor]:
        """Return the flow-matching loss and the auxiliary loss of one batch.

        Args:
            batch: The observations.
            noises: Noises and times drawn for each.
        """
        seen, features, valid, image = self.backbone(_varied(batch.images), batch.task)
        count = len(batch.task)
        everywhere = self.see(seen.reshape(count, -1))
        asked = self.find(features[:, self.image_rows].reshape(count, -1))
        auxiliary = F.mse_loss(everywhere.float(), batch.truth) + F.mse_loss(
            asked.float(), torch.gather(batch.truth, 1, self.asked[batch.task])
        )
        head = self.model.action_head
        rows = torch.full((count,), EMBODIMENT_ROW, device=image.device)
        vl_embs, state_features = head.condition(features, batch.state, rows)

        def repeated(x: Tensor) -> Tensor:
            return x.repeat_interleave(noises, dim=0)

        actions = repeated(batch.actions)
        noise = torch.randn_like(actions)
        drawn = _beta(len(actions), actions.device)
        time = ((_TIME_SCALE - drawn) / _TIME_SCALE).clamp(0.0, 1.0)
        noisy = (1.0 - time)[:, None, None] * noise + time[:, None, None] * actions
        bucket = (time * self.model.config.timestep_buckets).long()
        velocity = head.velocity(
            repeated(vl_embs),
            repeated(state_features),
            noisy,
            bucket,
            repeated(image),
            repeated(valid),
            repeated(rows),
        )
        return F.mse_loss(velocity.float(), actions - noise), auxiliary

    @torch.no_grad()
    def act(self, images: Tensor, state: Tensor, task: Tensor, steps: int) -> Tensor:
        """Return normalised actions for observations, (B, horizon, max_action_dim)."""
        _, features, valid, image = self.backbone(images, task)
        config, head = self.model.config, self.model.action_head
        rows = torch.full((len(task),), EMBODIMENT_ROW, device=image.device)
        vl_embs, state_features = head.condition(features, state, rows)
        noise = torch.randn(
            len(task), config.action_horizon, config.max_action_dim, device=image.device
        )
        return head.denoise(vl_embs, state_features, noise, image, valid, rows, steps)


def _beta(count: int, device: torch.device) -> Tensor:
    # Beta(a, 1) has the distribution function x ** a, so a uniform draw's power has it.
    assert _TIME_BETA == 1.0
    return torch.rand(count, device=device) ** (1.0 / _TIME_ALPHA)


def _varied(images: Tensor) -> Tensor:
    """Vary each image's contrast, colour balance and brightness, and add a little noise.

    Another renderer, or a camera, does not give the same bytes as the one that was trained with.

    Args:
        images: uint8, shape (B, cameras, H, W, 3).

    Returns:
        float32 of the same shape, in [0, 255].
    """
    shape = (*images.shape[:2], 1, 1, 3)
    gain = torch.empty(shape, device=images.device).uniform_(0.93, 1.07)
    gain = gain * torch.empty((*shape[:-1], 1), device=images.device).uniform_(0.85, 1.15)
    shift = torch.empty((*shape[:-1], 1), device=images.device).uniform_(-12.0, 12.0)
    varied = (images.float() - 127.5) * gain + 127.5 + shift
    return (varied + 3.0 * torch.randn_like(varied)).clamp(0.0, 255.0)


def _places_head(width: int, places: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, _HEAD_WIDTH), nn.GELU(), nn.Linear(_HEAD_WIDTH, places))


def _initialize(model: GrootN16) -> None:
    """Draw the weights for which the modules' own start is zero or unfit."""
    for module in model.action_head.modules():
        if isinstance(module, CategoryLinear):
            nn.init.normal_(module.W, std=1.0 / math.sqrt(module.W.shape[-2]))
    table = model.action_head.position_embedding
    assert table is not None
    nn.init.normal_(table.weight, std=_POSITION_DEVIATION)
    # Blocks start as plain residual blocks: no modulation by the time yet.
    for block in model.action_head.model.transformer_blocks:
        assert isinstance(block, Block)
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
