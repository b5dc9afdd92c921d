"""The whole policy in floating point: the robot's own observation chain around the PyTorch model.

Owns: what a parity check runs, and the choice of the embodiment that a recording belongs to. The
observation and action chain is `groot_int8_ros.policy`, the very code that the robot runs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from groot_int8_ros.errors import ConfigurationError, ProcessorError
from groot_int8_ros.policy.image_sizes import image_sizes
from groot_int8_ros.policy.preprocess import (
    PromptTokenizer,
    normalize_state,
    pixel_values,
    prompt_text,
)
from groot_int8_ros.policy.processor import (
    PROCESSOR_CONFIG_FILE,
    Processor,
    load_processor,
)
from offline_tools.model.policy_model import GrootN16, ModelInputs

Array = NDArray[Any]


def tensor(array: Array) -> Tensor:
    """Return a copy of an array as a tensor; recorded arrays stay as they are."""
    return torch.from_numpy(np.array(array))


@dataclass(frozen=True)
class RawObservation:
    """An observation as it was recorded.

    Attributes:
        images: Camera key to RGB frame, uint8, shape (height, width, 3).
        state: State key to physical values, shape (D,).
        instruction: Task as given.
    """

    images: Mapping[str, Array]
    state: Mapping[str, Array]
    instruction: str


@dataclass(frozen=True)
class Chain:
    """Everything between a raw observation and decoded actions.

    Attributes:
        model: The network.
        processors: Processor of each embodiment that can be used.
        refused: Tag of each other embodiment that the checkpoint describes, and why not.
        tokenizer: The checkpoint's tokenizer.
        window_size: Side of the windows, in patches, in whose order the reference's vision tower
            keeps its patches.
    """

    model: GrootN16
    processors: tuple[Processor, ...]
    refused: tuple[str, ...]
    tokenizer: PromptTokenizer
    window_size: int

    def processor(self, embodiment_id: int, observation: RawObservation) -> Processor:
        """Return the processor of a recorded embodiment row, camera set and state.

        Raises:
            ConfigurationError: The checkpoint describes no such embodiment, or one that cannot be
                used.
        """
        for processor in self.processors:
            if (
                processor.embodiment_id == embodiment_id
                and set(processor.cameras) == set(observation.images)
                and {key.key for key in processor.state_keys} <= set(observation.state)
            ):
                return processor
        known = "; ".join(
            f"{p.embodiment_tag}: row {p.embodiment_id}, cameras {', '.join(p.cameras)}, state "
            f"{', '.join(key.key for key in p.state_keys)}"
            for p in self.processors
        )
        raise ConfigurationError(
            f"the golden set was recorded with embodiment row {embodiment_id}, cameras "
            f"{', '.join(observation.images)}, state {', '.join(observation.state)}, which the "
            f"checkpoint does not describe ({known}). Compare it with the checkpoint it was "
            "recorded from." + "".join(f"\nNot usable: {reason}" for reason in self.refused)
        )

    def tokens_per_image(self, processor: Processor, observation: RawObservation) -> list[int]:
        """Return the number of image tokens of each camera."""
        frames = [observation.images[camera] for camera in processor.cameras]
        return [
            image_sizes(frame.shape[0], frame.shape[1], processor.image_chain).tokens
            for frame in frames
        ]

    def prompt(self, processor: Processor, observation: RawObservation) -> tuple[Array, Array]:
        """Return token ids and attention mask, int64, shape (1, S).

        The instruction is not checked: the reference also encodes what a robot refuses.
        """
        text = prompt_text(
            observation.instruction,
            self.tokens_per_image(processor, observation),
            processor.formalize_language,
        )
        ids = self.tokenizer.encode_prompt(text)
        return ids, np.ones_like(ids)

    def inputs(self, processor: Processor, observation: RawObservation) -> ModelInputs:
        """Preprocess one raw observation."""
        input_ids, attention_mask = self.prompt(processor, observation)
        frames = [observation.images[camera] for camera in processor.cameras]
        return ModelInputs(
            input_ids=tensor(input_ids),
            attention_mask=tensor(attention_mask),
            pixel_values=tensor(pixel_values(frames, processor.image_chain)),
            state=tensor(normalize_state(processor, observation.state)),
            embodiment_id=processor.embodiment_id,
        )


def _embodiment_tags(checkpoint: Path) -> list[str | None]:
    """Return the tags that the processor's configuration names.

    None stands for the only one: what is wrong with a file that names none, the processor says.
    """
    try:
        config = json.loads((checkpoint / PROCESSOR_CONFIG_FILE).read_bytes())
        return [*map(str, config["processor_kwargs"]["modality_configs"])] or [None]
    except (OSError, ValueError, KeyError, TypeError):
        return [None]


def load_processors(checkpoint: Path) -> tuple[tuple[Processor, ...], tuple[str, ...]]:
    """Load the processors of a checkpoint's embodiments.

    Args:
        checkpoint: Folder with the processor's files.

    Returns:
        Those that are complete and implemented, at least one, and for each other embodiment its
        tag and why it cannot be used.

    Raises:
        ProcessorError: None is usable; the message tells what is wrong with the first.
    """
    processors: list[Processor] = []
    problems: list[tuple[str, ProcessorError]] = []
    for tag in _embodiment_tags(checkpoint):
        try:
            processors.append(load_processor(checkpoint, tag))
        except ProcessorError as error:
            problems.append((str(tag), error))
    if not processors:
        raise problems[0][1]
    return tuple(processors), tuple(f"embodiment {tag!r}: {error}" for tag, error in problems)
