"""The small policy: its sizes, its image chain, and how it is trained.

Owns: every number of the training. Must not import torch: the numbers can be asked for anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

from groot_int8_ros.policy.processor import ImageChain
from offline_tools.model.configuration import (
    DiTConfig,
    LanguageConfig,
    ModelConfig,
    VisionConfig,
)
from offline_tools.simulation.robot import FRAME_SIZES
from offline_tools.simulation.tasks import TASKS

HORIZON = 16
CAMERAS = tuple(FRAME_SIZES)
IMAGE_CHAIN = ImageChain(shortest_image_edge=112, crop_fraction=0.95)
RELATIVE_KEYS = ("single_arm",)
# The row of the category-specific weights that is trained; the other stays as it was drawn.
EMBODIMENT_ROW = 1

MODEL = ModelConfig(
    vision=VisionConfig(hidden_size=128, layers=6, heads=4, mlp_size=512, positions=64),
    language=LanguageConfig(
        hidden_size=192,
        layers=4,
        heads=6,
        kv_heads=2,
        head_dim=32,
        mlp_size=448,
        vocab_size=384,
    ),
    dit=DiTConfig(layers=8, heads=5, head_dim=32, output_dim=160, cross_dim=192),
    max_state_dim=8,
    max_action_dim=8,
    action_horizon=HORIZON,
    max_embodiments=2,
    mlp_size=160,
    max_seq_len=HORIZON,
)

# Words that occur in two sentences become one token each, so every task's prompt is as long.
SENTENCES = tuple(
    f"{role}\n{text}"
    for _ in range(2)
    for role, text in (
        ("system", "You are a helpful assistant."),
        *(("user", task.instruction.lower().rstrip(".") + "<image 1><image 2>") for task in TASKS),
    )
)


@dataclass(frozen=True)
class TrainingOptions:
    """How long, on what and how the policy is trained.

    Attributes:
        seed: Of weights, noise and the order of the samples; the seeds of the episodes follow.
        episodes: Demonstrations before the training.
        steps: Optimiser steps.
        batch: Observations of a step.
        noises: Noises and times drawn for each observation of a step.
        learning_rate: The largest; warmed up, then lowered along a cosine.
        warmup_steps: Steps of the warm-up.
        weight_decay: AdamW's.
        auxiliary_weight: Of the loss of the heads that tell cubes and plates, which are dropped
            after the training.
        average: Decay of the weights' moving average, which is what is saved.
        corrections: Rollouts of the policy in each round of corrections (Ross et al. 2011,
            DAgger, arXiv 1011.0686), in which the expert labels what the policy runs into.
        correction_rounds: Number of those rounds, spread over the training.
        first_correction: Part of the training before the first round.
        validation_episodes: Episodes of each evaluation during the training.
        workers: Simulator processes.
        compiled: Whether `torch.compile` is used.
    """

    seed: int = 0
    episodes: int = 2500
    steps: int = 4500
    batch: int = 384
    noises: int = 4
    learning_rate: float = 1e-3
    warmup_steps: int = 500
    weight_decay: float = 0.02
    auxiliary_weight: float = 0.2
    average: float = 0.999
    corrections: int = 384
    correction_rounds: int = 2
    first_correction: float = 0.35
    validation_episodes: int = 96
    workers: int = 16
    compiled: bool = True
