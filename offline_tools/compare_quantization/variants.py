"""The models that schemes are compared on: a checkpoint and its variants with outliers.

Owns: names and weight edits of the variants. Must not import torch at import time: the names are
asked for where a bundle is compared without its checkpoint. The checkpoint may be a trained
policy, a generated one or the recorded one; what a variant adds is the same for all.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from groot_int8_ros.errors import CheckpointError
from groot_int8_ros.policy.bundle import TOKENIZER_FILE
from groot_int8_ros.policy.preprocess import PromptTokenizer
from groot_int8_ros.policy.processor import Processor
from offline_tools.model.configuration import ModelConfig

if TYPE_CHECKING:
    from offline_tools.compare_quantization.outliers import Edits

PLAIN = "plain"
CHANNELS = "channels"
MASSIVE_PREFIX = "massive-prefix"
MASSIVE_LIVE = "massive-live"
VISION = "vision"

VARIANTS = {
    PLAIN: "the checkpoint as it is",
    CHANNELS: "function-preserving channel outliers of the real calibration's magnitudes",
    MASSIVE_PREFIX: "a massive activation on a token of the constant prefix",
    MASSIVE_LIVE: "a massive activation on the delimiter in front of each image",
    VISION: "the vision tower's outliers behind its GELU and in its residual stream",
}

_ANY_INSTRUCTION = "pick up the cube"


@dataclass(frozen=True)
class PromptTokens:
    """Tokens of a policy's prompt that a massive activation can sit on.

    Attributes:
        prefix: The first token that every prompt has exactly once, before the instruction.
        live: The delimiter in front of each image.
    """

    prefix: int
    live: int


def prompt_tokens(processor: Processor, tokenizer: Path) -> PromptTokens:
    """Find the tokens in the prompt that a tokenizer makes.

    Args:
        processor: The embodiment's conventions.
        tokenizer: `tokenizer.json`, or a folder that holds it.

    Raises:
        CheckpointError: The tokenizer makes a prompt in which no token stands alone.
    """
    path = tokenizer / TOKENIZER_FILE if tokenizer.is_dir() else tokenizer
    loaded = PromptTokenizer.from_file(path)
    # Which tokens there are does not depend on how many stand for an image.
    one_each = (1,) * len(processor.cameras)
    encoded, _ = loaded.encode(_ANY_INSTRUCTION, one_each, formalize=processor.formalize_language)
    ids = encoded[0].tolist()
    first_image = ids.index(loaded.image_token_id)
    single = [token for token in ids[: first_image - 1] if ids.count(token) == 1]
    if not single:
        raise CheckpointError(
            f"{path} makes a prompt in which every token is repeated; pass the "
            "tokenizer of the training code"
        )
    return PromptTokens(prefix=single[0], live=ids[first_image - 1])


def plan_variant(variant: str, config: ModelConfig, tokens: PromptTokens, seed: int) -> Edits:
    """Return the weight edits of a variant; none for the checkpoint as it is."""
    from offline_tools.compare_quantization.outliers import (
        channel_outliers,
        massive_token,
        vision_outliers,
    )

    if variant == CHANNELS:
        return channel_outliers(config, seed=seed)
    if variant == MASSIVE_PREFIX:
        return massive_token(config, tokens.prefix, seed=seed)
    if variant == MASSIVE_LIVE:
        return massive_token(config, tokens.live, seed=seed)
    if variant == VISION:
        return vision_outliers(config, seed=seed)
    return {}
