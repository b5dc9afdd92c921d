"""The instructions that a deployed bundle is exported for, and the prefix of each.

Owns: which instructions those are, how much room the graphs get for them, and computing prefixes
with the checkpoint's own weights in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from groot_int8_ros.errors import ConfigurationError, ExportError, ObservationError
from groot_int8_ros.policy.preprocess import Preprocessor
from groot_int8_ros.policy.prompt_bank import PromptPrefix, PromptRecord
from groot_int8_ros.policy.token_layout import TokenLayout, layout_of, split_prompt
from groot_int8_ros.policy.types import Int64Array
from offline_tools.dataset.lerobot import LeRobotDataset
from offline_tools.export.graph import WeightSource
from offline_tools.model.configuration import ModelConfig
from offline_tools.model.deployed.prefix import compute_prefixes

# The room is rounded up to a multiple of this, which is kind to kernels and to the next, slightly
# longer instruction.
_ROOM_STEP = 8


@dataclass(frozen=True)
class Instructions:
    """Instructions with the token ids of their prefixes, each prefix once."""

    texts: tuple[str, ...]
    prefix_ids: tuple[Int64Array, ...]

    @property
    def longest(self) -> int:
        """Number of tokens of the longest prefix; 0 without any."""
        return max((ids.size for ids in self.prefix_ids), default=0)


def given_instructions(texts: Sequence[str], preprocessor: Preprocessor) -> Instructions:
    """Tokenise the instructions that the user named.

    Raises:
        ObservationError: One of them cannot be used.
    """
    by_ids: dict[bytes, tuple[str, Int64Array]] = {}
    for text in texts:
        ids, _ = split_prompt(preprocessor.prompt_ids(text), preprocessor.image_token_id)
        by_ids.setdefault(ids.tobytes(), (text, ids))
    return Instructions(
        tuple(text for text, _ in by_ids.values()), tuple(ids for _, ids in by_ids.values())
    )


def dataset_instructions(
    dataset: Path, preprocessor: Preprocessor, report: Callable[[str], None]
) -> Instructions:
    """Tokenise a dataset's tasks; what is no instruction there is left out and told."""
    usable = []
    for text in LeRobotDataset.open(dataset).tasks.values():
        try:
            preprocessor.check_instruction(text)
        except ObservationError as error:
            report(f"note: the dataset's task {text!r:.80} is left out: {error}")
        else:
            usable.append(text)
    return given_instructions(usable, preprocessor)


def plan_layout(
    instructions: Instructions,
    preprocessor: Preprocessor,
    *,
    max_prefix_tokens: int | None,
    prefix_model: bool,
) -> TokenLayout:
    """Choose the room for prefixes, and place the live tokens behind it.

    Args:
        instructions: What the bundle has to know.
        preprocessor: The observation chain.
        max_prefix_tokens: The room; that of the longest instruction if None.
        prefix_model: Whether new instructions can be computed on the robot.

    Raises:
        ConfigurationError: There is nothing to make room for, or an instruction does not fit.
    """
    if not instructions.texts and not prefix_model:
        raise ConfigurationError(
            "the bundle would know no instruction: name them with --instruction, or pass "
            "--dataset for its tasks, or --prefix-model so that the robot can compute them"
        )
    room = max_prefix_tokens or -(-instructions.longest // _ROOM_STEP) * _ROOM_STEP
    if not room:
        raise ConfigurationError(
            "without any instruction the room for them has to be said: add --max-prefix-tokens "
            "(an instruction of ten words takes about 30)"
        )
    if room < instructions.longest:
        raise ConfigurationError(
            f"--max-prefix-tokens {room} is less than the {instructions.longest} tokens of the "
            "longest instruction"
        )
    ids = preprocessor.prompt_ids("task")
    return layout_of(ids.tolist(), preprocessor.image_token_id, room)


def checkpoint_prefixes(
    config: ModelConfig,
    checkpoint: WeightSource,
    prefix_ids: Sequence[Int64Array],
    room: int,
    checkpoint_sha256: str,
) -> list[PromptPrefix]:
    """Compute prefixes with a checkpoint's weights in float32.

    Args:
        config: Sizes of the model.
        checkpoint: Gives a tensor by its key in the released layout.
        prefix_ids: Token ids of each prefix.
        room: P, the graphs' room in tokens.
        checkpoint_sha256: Of the checkpoint.

    Raises:
        ExportError: The weights give values that are not finite.
    """
    found = []
    for ids, prefix in zip(
        prefix_ids, compute_prefixes(config, checkpoint, prefix_ids, room), strict=True
    ):
        if not all(np.isfinite(tensor).all() for tensor in vars(prefix).values()):
            raise ExportError(
                "an instruction's prefix holds NaN or infinity: the checkpoint is damaged"
            )
        found.append(PromptPrefix(ids, checkpoint_sha256, room - ids.size, vars(prefix)))
    return found


def write_prompts(
    instructions: Instructions, prefixes: Sequence[PromptPrefix], folder: Path
) -> tuple[PromptRecord, ...]:
    """Write prefixes into a bundle's folder and return their entries for the manifest."""
    records = []
    for text, prefix in zip(instructions.texts, prefixes, strict=True):
        path = folder / prefix.file
        path.parent.mkdir(exist_ok=True)
        prefix.write(path)
        records.append(PromptRecord(text, prefix.file, prefix.input_ids.size))
    return tuple(records)
