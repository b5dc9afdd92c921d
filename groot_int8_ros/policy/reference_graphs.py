"""Running the reference family: the community's tensor contracts, and what stands around them.

Owns: the order in which the five graphs run. Must not import ROS or torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from groot_int8_ros.policy.bundle import Bundle
from groot_int8_ros.policy.engines import Engine
from groot_int8_ros.policy.graph_runs import CommittedRows, PolicyGraphs
from groot_int8_ros.policy.preprocess import ModelInputs
from groot_int8_ros.policy.token_layout import split_prompt
from groot_int8_ros.policy.types import Float32Array, Observation

Arrays = dict[str, NDArray[Any]]


class ReferenceGraphs(PolicyGraphs[ModelInputs, Arrays]):
    """The five reference graphs of a bundle."""

    def __init__(self, bundle: Bundle, engines: Mapping[str, Engine]) -> None:
        """Wire a bundle to its engines."""
        super().__init__(engines, bundle.preprocessor())
        self._manifest = bundle.manifest
        self._any_prompt = self._preprocess.prompt_ids("task")

    def check_instruction(self, instruction: str) -> None:
        """Raise `ObservationError` if an instruction cannot be used."""
        self._preprocess.check_instruction(instruction)

    def describe_cost(self) -> str:
        """Say what these graphs compute again and again that deployed graphs do not."""
        prompt = self._any_prompt
        prefix, _ = split_prompt(prompt, self._preprocess.image_token_id)
        steps = self._manifest.denoising_steps
        cameras = len(self._preprocess.cameras)
        return (
            f"the bundle holds the reference graphs: every chunk takes {2 + 3 * steps} runs of "
            f"graphs instead of 2, the language model computes at least {prefix.size} of its "
            f"{prompt.size} tokens again although they depend on the instruction alone, the "
            f"action head projects all {prompt.size} tokens in each of {steps} denoising steps, "
            f"and {cameras} images are scaled on the CPU. For the robot export with groot-int8 "
            "export --graphs deployed"
        )

    def preprocess(self, observation: Observation) -> ModelInputs:
        """Return pixel values, token ids and state; see `Preprocessor`."""
        return self._preprocess(observation)

    def features(self, inputs: ModelInputs) -> Arrays:
        """Run the backbone.

        Returns:
            `hidden_states` (1, S, D) floating, `attn_mask` and `image_mask` bool (1, S).
        """
        return self._run("backbone", self.backbone_feeds(inputs))

    def backbone_feeds(self, inputs: ModelInputs) -> dict[str, NDArray[Any]]:
        """Return the inputs of the backbone's graph."""
        return {
            "input_ids": inputs.input_ids,
            "attention_mask": inputs.attention_mask,
            "pixel_values": inputs.pixel_values,
        }

    def actions(
        self,
        inputs: ModelInputs,
        features: Arrays,
        noise: Float32Array,
        committed: CommittedRows | None = None,
    ) -> Float32Array:
        """Integrate the flow; see `PolicyGraphs.actions`."""
        condition = self._run(
            "conditioner", {"hidden_states": features["hidden_states"], "state": inputs.state}
        )
        steps = self._manifest.denoising_steps
        actions: Float32Array = noise[None]
        for step, timestep in enumerate(self._manifest.timesteps):
            if committed is not None:
                time = np.float32(step / steps)
                on_the_way = (1 - time) * noise[None] + time * committed.actions
                actions = np.where(committed.mask[..., None], on_the_way, actions)
            velocity = self._velocity(condition, features, actions, timestep)
            actions = actions + velocity / np.float32(steps)
        if committed is not None:
            actions = np.where(committed.mask[..., None], committed.actions, actions)
        action_pred: Float32Array = actions[0]
        return action_pred

    def _velocity(
        self, condition: Arrays, features: Arrays, actions: Float32Array, timestep: int
    ) -> Float32Array:
        bucket = np.array([timestep], np.int64)
        encoded = self._run(
            "action_encoder",
            {
                "state_features": condition["state_features"],
                "actions": actions,
                "timestep": bucket,
            },
        )
        output = self._run(
            "dit",
            {
                "sa_embs": encoded["sa_embs"],
                "vl_embs": condition["vl_embs"],
                "timestep": bucket,
                "image_mask": features["image_mask"],
                "backbone_attention_mask": features["attn_mask"],
            },
        )
        decoded = self._run("action_decoder", {"dit_output": output["output"]})
        velocity: Float32Array = decoded["velocity"]
        return velocity
