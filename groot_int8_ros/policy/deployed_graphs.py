"""Running the deployed family: two graphs, fed with what changes and nothing else.

Owns: what goes into the two graphs. Must not import ROS or torch.

No image is touched on the CPU: the frames that the caller holds are the engine's inputs, and where
an engine runs on host memory there is no copy at all between the two. Of the instruction only its
precomputed prefix is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from groot_int8_ros.errors import BundleError
from groot_int8_ros.policy.bundle import Bundle
from groot_int8_ros.policy.engines import Engine
from groot_int8_ros.policy.families import LANGUAGE_PREFIX, PREFIX_MASK, TEXT_PREFIX, image_input
from groot_int8_ros.policy.graph_runs import CommittedRows, PolicyGraphs
from groot_int8_ros.policy.preprocess import normalize_state
from groot_int8_ros.policy.prompt_bank import PromptBank
from groot_int8_ros.policy.token_layout import layout_of, split_prompt
from groot_int8_ros.policy.types import Float32Array, Int64Array, Observation, UInt8Array


@dataclass(frozen=True, eq=False)
class DeployedInputs:
    """What the two graphs need of one observation.

    Attributes:
        frames: Input name to RGB frame, uint8 (height, width, 3); the caller's own arrays.
        prefix: The instruction's prefix: `prefix_mask` and the four prefix tensors.
        state: Normalised state, float32 (1, max_state_dim).
    """

    frames: Mapping[str, UInt8Array]
    prefix: Mapping[str, NDArray[Any]]
    state: Float32Array


class DeployedGraphs(PolicyGraphs[DeployedInputs, NDArray[Any]]):
    """The two deployed graphs of a bundle and its bank of instructions.

    Attributes:
        bank: The instructions whose prefix is there.
    """

    def __init__(self, bundle: Bundle, engines: Mapping[str, Engine]) -> None:
        """Wire a bundle to its engines.

        Raises:
            BundleError: A prefix of the bank does not belong to the graphs, or the tokenizer does
                not.
        """
        super().__init__(engines, bundle.preprocessor())
        manifest = bundle.manifest
        assert manifest.prompts is not None
        self._processor = bundle.processor
        self._refuse_other_tokens(bundle)
        self._nothing_committed = CommittedRows(
            np.zeros(
                (1, manifest.action_horizon, bundle.processor.max_action_dim), dtype=np.float32
            ),
            np.zeros((1, manifest.action_horizon), np.bool_),
        )
        self.bank = PromptBank(
            bundle.folder,
            manifest.prompts,
            checkpoint_sha256=manifest.checkpoint_sha256,
            specs={
                **manifest.graphs["backbone"].inputs,
                **manifest.graphs["action_head"].inputs,
            },
            has_prefix_model=manifest.has_prefix_model,
            encode=self.prefix_ids,
            make_again=bundle.make_again,
        )

    def prefix_ids(self, instruction: str) -> Int64Array:
        """Return the token ids before the first image token, int64 (n,).

        Raises:
            ObservationError: The instruction cannot be used.
        """
        ids = self._preprocess.prompt_ids(instruction)
        return split_prompt(ids, self._preprocess.image_token_id)[0]

    def check_instruction(self, instruction: str) -> None:
        """Raise if an instruction cannot be used, or not yet.

        Raises:
            UnknownInstructionError: Its prefix is not there.
            ObservationError: It cannot be used.
        """
        self.bank.check(self.prefix_ids(instruction))

    def preprocess(self, observation: Observation) -> DeployedInputs:
        """Check an observation, normalise its state and look up its prefix; copies no frame."""
        prefix = self.bank.feeds(self.prefix_ids(observation.instruction))
        return self._inputs(observation, prefix)

    def blank(self, observation: Observation) -> DeployedInputs:
        """Return the inputs for an observation as if its instruction had no token at all."""
        return self._inputs(observation, self.bank.blank())

    def features(self, inputs: DeployedInputs) -> NDArray[Any]:
        """Run the backbone.

        Returns:
            Features of the live tokens, floating (1, L, D).
        """
        return self._run("backbone", self.backbone_feeds(inputs))["features"]

    def backbone_feeds(self, inputs: DeployedInputs) -> dict[str, NDArray[Any]]:
        """Return the inputs of the backbone's graph."""
        prefix = {name: inputs.prefix[name] for name in (*LANGUAGE_PREFIX, PREFIX_MASK)}
        return {**inputs.frames, **prefix}

    def actions(
        self,
        inputs: DeployedInputs,
        features: NDArray[Any],
        noise: Float32Array,
        committed: CommittedRows | None = None,
    ) -> Float32Array:
        """Run the action head; see `PolicyGraphs.actions`."""
        answer = self._run("action_head", self.head_feeds(inputs, features, noise, committed))
        action_pred: Float32Array = answer["action_pred"][0]
        return action_pred

    def head_feeds(
        self,
        inputs: DeployedInputs,
        features: NDArray[Any],
        noise: Float32Array,
        committed: CommittedRows | None = None,
    ) -> dict[str, NDArray[Any]]:
        """Return the inputs of the action head's graph; see `PolicyGraphs.actions`."""
        committed = committed or self._nothing_committed
        return {
            "features": features,
            **{name: inputs.prefix[name] for name in (*TEXT_PREFIX, PREFIX_MASK)},
            "state": inputs.state,
            "noise": noise[None],
            "committed_actions": committed.actions,
            "committed_mask": committed.mask,
        }

    def _inputs(
        self, observation: Observation, prefix: Mapping[str, NDArray[Any]]
    ) -> DeployedInputs:
        frames = self._preprocess.frames(observation.images)
        return DeployedInputs(
            frames={
                image_input(camera.key): frame
                for camera, frame in zip(self._preprocess.cameras, frames, strict=True)
            },
            prefix=prefix,
            state=normalize_state(self._processor, observation.state),
        )

    def _refuse_other_tokens(self, bundle: Bundle) -> None:
        # What comes behind the prefix is the same for every instruction and built into the graph.
        ids = self._preprocess.prompt_ids("task")
        layout = layout_of(ids.tolist(), self._preprocess.image_token_id, 1)
        built = bundle.manifest.graphs["backbone"].outputs["features"].shape[1]
        if built != layout.live_length:
            raise BundleError(
                f"{bundle.folder}: the backbone was exported for {built} tokens behind the "
                f"instruction, and its tokenizer and cameras give {layout.live_length}. "
                + bundle.make_again
            )
