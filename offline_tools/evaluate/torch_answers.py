"""What PyTorch answers to the observations of an open-loop evaluation, in float32 and bfloat16.

Owns: the two reference policies that need a checkpoint and torch. They see the bundle's own
preprocessed inputs and its noise, so that what differs is the network's arithmetic alone. float32
is computed a half of the model at a time; bfloat16 holds the whole model (6 GB at true size).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from groot_int8_ros.errors import CheckpointError
from groot_int8_ros.policy.bundle import Bundle
from groot_int8_ros.policy.policy import Policy, draw_noise
from offline_tools.compare_quantization.bfloat16 import bfloat16_actions
from offline_tools.evaluate.open_loop import PYTORCH_BFLOAT16, Answers, Trajectory
from offline_tools.model.checkpoint import CheckpointReader
from offline_tools.model.configuration import load_model_config
from offline_tools.verify.checks import refuse_other_checkpoint
from offline_tools.verify.torch_reference import run_action_head, run_backbone


def torch_answers(
    bundle: Bundle,
    checkpoint: Path,
    eagle_config: Path | None,
    trajectories: Sequence[Trajectory],
    *,
    seed: int,
    denoising_steps: int | None,
) -> tuple[Answers, Answers]:
    """Answer every observation with the checkpoint itself.

    Args:
        bundle: Made from the checkpoint; preprocesses the observations.
        checkpoint: The checkpoint.
        eagle_config: As it was given to the export.
        trajectories: What to ask.
        seed: Seed of the noise.
        denoising_steps: Euler steps; the bundle's own if None.

    Returns:
        The answers in float32 and in bfloat16, without timings: a CPU's times of a network that
        is deployed elsewhere say nothing.

    Raises:
        CheckpointError: The bundle was made from another checkpoint, or the checkpoint gives
            values that are not finite.
    """
    config, _ = load_model_config(checkpoint, eagle_config)
    reader = CheckpointReader(checkpoint)
    refuse_other_checkpoint(bundle, checkpoint, reader)
    steps = denoising_steps or bundle.manifest.denoising_steps
    policy = Policy(bundle, {})
    preprocess = bundle.preprocessor()
    inputs, noise = [], []
    for trajectory in trajectories:
        for observation in trajectory.observations():
            inputs.append(preprocess(observation))
            noise.append(draw_noise(seed, observation.stamp_ns, policy.noise_shape))
    embodiment = bundle.processor.embodiment_id
    heads = run_action_head(
        reader,
        config,
        run_backbone(reader, config, inputs),
        inputs,
        noise,
        embodiment_id=embodiment,
        steps=steps,
    )
    bfloat16 = bfloat16_actions(
        checkpoint,
        eagle_config,
        inputs,
        noise,
        embodiment_id=embodiment,
        denoising_steps=steps,
    )
    float32 = tuple(head.action_pred for head in heads)
    answers = (
        Answers("PyTorch float32", "PyTorch on the CPU", steps, float32),
        Answers(PYTORCH_BFLOAT16, "PyTorch on the CPU", steps, bfloat16),
    )
    for one in answers:
        if not all(np.isfinite(prediction).all() for prediction in one.action_pred):
            raise CheckpointError(
                f"{checkpoint} gives actions that are not finite in {one.name}: the checkpoint is "
                "damaged, or this precision cannot hold its values"
            )
    return answers
