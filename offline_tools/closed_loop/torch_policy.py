"""PyTorch on the checkpoint itself, as a policy for the closed loop.

Owns: `TorchPolicy`. It shares the robot's observation and action chain and its noise, so that what
differs from a bundle's policy is the network's arithmetic alone.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from groot_int8_ros.errors import ConfigurationError
from groot_int8_ros.policy.policy import DEFAULT_SEED, draw_noise
from groot_int8_ros.policy.postprocess import decode_actions
from groot_int8_ros.policy.preprocess import Preprocessor, PromptTokenizer
from groot_int8_ros.policy.processor import load_processor
from groot_int8_ros.policy.robot import RobotDescription
from groot_int8_ros.policy.types import ActionChunk, CommittedActions, Observation
from offline_tools.model.checkpoint import load_model
from offline_tools.model.policy_model import ModelInputs


class TorchPolicy:
    """A checkpoint in float32 on the CPU."""

    def __init__(
        self, checkpoint: Path, robot: RobotDescription, denoising_steps: int | None = None
    ) -> None:
        """Load the checkpoint.

        Args:
            checkpoint: Its folder, with `tokenizer.json`.
            robot: Cameras, joints and action period.
            denoising_steps: Euler steps; the checkpoint's own number if None.

        Raises:
            CheckpointError: A file of the network is missing or wrong.
            ProcessorError: A file of the processor is missing or wrong.
        """
        self._model, self._config, _ = load_model(checkpoint)
        self._processor = load_processor(checkpoint)
        self._preprocess = Preprocessor(
            self._processor,
            PromptTokenizer.from_file(checkpoint / "tokenizer.json"),
            robot.cameras,
        )
        self._robot = robot
        self.denoising_steps = denoising_steps or self._config.denoising_steps

    @property
    def robot(self) -> RobotDescription:
        """Cameras, joints and action period."""
        return self._robot

    def infer(
        self,
        observation: Observation,
        *,
        seed: int | None = None,
        committed: CommittedActions | None = None,
    ) -> ActionChunk:
        """Answer one observation; see `Policy.infer`.

        Raises:
            ConfigurationError: Rows are committed, which only graphs take.
        """
        if committed is not None:
            raise ConfigurationError(
                "PyTorch on the checkpoint takes no committed rows: export it, and run the bundle "
                "with the seam rtc"
            )
        inputs = self._preprocess(observation)
        used = DEFAULT_SEED if seed is None else seed
        shape = (self._config.action_horizon, self._config.max_action_dim)
        action_pred = self._model.get_action(
            ModelInputs(
                torch.from_numpy(inputs.input_ids),
                torch.from_numpy(inputs.attention_mask),
                torch.from_numpy(inputs.pixel_values),
                torch.from_numpy(inputs.state),
                self._processor.embodiment_id,
            ),
            torch.from_numpy(draw_noise(used, observation.stamp_ns, shape))[None],
            self.denoising_steps,
        )[0].numpy()
        return ActionChunk(
            actions=decode_actions(self._processor, action_pred, observation.state),
            stamp_ns=observation.stamp_ns,
            time_from_start_s=self._robot.action_period_s
            * np.array(self._processor.delta_indices, np.float64),
            action_pred=action_pred,
            seed=used,
        )
