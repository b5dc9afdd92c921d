"""One inference with everything that the two large graphs were given.

Owns: `run_on`, which offline capture and the recorder share where they run a policy themselves.
Must not import ROS or torch. The engines' own inside is not needed: what calibration wants is what
goes into the graphs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from groot_int8_ros.capture.sample import (
    BackboneInputs,
    CapturedChunk,
    CaptureSample,
    DitInputs,
)
from groot_int8_ros.policy.engines import Tensors
from groot_int8_ros.policy.families import DEPLOYED
from groot_int8_ros.policy.policy import Policy, draw_noise
from groot_int8_ros.policy.types import CommittedActions, Float32Array, Observation


def run_on(
    policy: Policy,
    observation: Observation,
    source: str,
    *,
    seed: int | None,
    noise: Float32Array | None = None,
    keep_images: bool,
    committed: CommittedActions | None = None,
) -> CaptureSample:
    """Run the policy once and return everything that its two large graphs were given.

    Args:
        policy: Whose graphs.
        observation: What to run it on.
        source: See `CaptureSample`.
        seed: Seed of the noise; with `noise` only noted.
        noise: Initial noise; None draws it from `seed` and the observation's stamp.
        keep_images: Whether the sample holds the frames although the graphs do not take them.
        committed: Rows of the chunk that are given, or None.

    Raises:
        ObservationError: The observation or the committed rows cannot be used.
        EngineError: A graph failed, or gave values that are not finite.
    """
    if noise is None:
        assert seed is not None
        noise = draw_noise(seed, observation.stamp_ns, policy.noise_shape)
    runs: dict[str, list[Tensors]] = {}

    def keep(name: str, feeds: Tensors) -> None:
        copies = {tensor: array.copy() for tensor, array in feeds.items()}
        runs.setdefault(name, []).append(copies)

    with policy.observed(keep):
        chunk = policy.infer(observation, noise=noise, committed=committed)
    deployed = policy.manifest.family == DEPLOYED
    sample = CaptureSample(
        instruction=observation.instruction,
        stamp_ns=observation.stamp_ns,
        source=source,
        state={key: np.asarray(value, np.float32) for key, value in observation.state.items()},
        noise=noise,
        seed=seed,
        # The deployed graphs' own inputs are the frames.
        images=dict(observation.images) if keep_images or deployed else None,
        chunk=CapturedChunk(chunk.actions, chunk.action_pred),
        committed=committed,
    )
    sample = with_graph_inputs(sample, policy.manifest.family, runs)
    small = runs["action_head" if deployed else "conditioner"]
    return replace(sample, normalised_state=small[0]["state"][0])


def with_graph_inputs(
    sample: CaptureSample, family: str, runs: Mapping[str, Sequence[Tensors]]
) -> CaptureSample:
    """Return a sample with what the large graphs were given.

    Args:
        sample: One observation; with its frames, if the graphs are deployed ones.
        family: Of the graphs.
        runs: Large graph to the inputs of each of its runs on that observation.
    """
    if family == DEPLOYED:
        (head,) = runs["action_head"]
        return replace(sample, features=head["features"][0])
    (backbone,), dit = runs["backbone"], runs["dit"]
    return replace(
        sample,
        backbone=BackboneInputs(
            input_ids=backbone["input_ids"][0],
            attention_mask=backbone["attention_mask"][0],
            pixel_values=backbone["pixel_values"],
        ),
        dit=DitInputs(
            vl_embs=dit[0]["vl_embs"][0],
            image_mask=dit[0]["image_mask"][0],
            backbone_attention_mask=dit[0]["backbone_attention_mask"][0],
            sa_embs=np.concatenate([step["sa_embs"] for step in dit]),
            timestep=np.concatenate([step["timestep"] for step in dit]),
        ),
    )
