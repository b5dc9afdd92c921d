"""Where the tokens of a deployed prompt stand: the instruction's prefix, then the live tokens.

Owns: the split of a prompt at its first image token, and what follows from it. Must not import
torch or ROS: exporter, robot and cost count use this one copy.

The language model is causal and the prompt has its text first, so everything before the first
image token depends on the instruction alone. What comes after it is the same for every
instruction: image tokens, the delimiters between the images, the end of the message.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from groot_int8_ros.errors import ProcessorError
from groot_int8_ros.policy.types import Int64Array


@dataclass(frozen=True)
class TokenLayout:
    """Positions of a deployed prompt.

    Attributes:
        prefix_length: P, the room for the instruction's prefix, which is padded on the left.
        live_ids: Token ids from the first image token on.
        image_token_id: Id of the token that image features replace.
    """

    prefix_length: int
    live_ids: tuple[int, ...]
    image_token_id: int

    @property
    def live_length(self) -> int:
        """L, the number of live tokens."""
        return len(self.live_ids)

    @property
    def image_positions(self) -> Int64Array:
        """Places of the image tokens among the live tokens, int64."""
        return np.flatnonzero(np.array(self.live_ids) == self.image_token_id).astype(np.int64)

    @property
    def text_positions(self) -> Int64Array:
        """Places of the other live tokens, int64."""
        return np.flatnonzero(np.array(self.live_ids) != self.image_token_id).astype(np.int64)

    @property
    def runs(self) -> tuple[tuple[bool, int, int], ...]:
        """Stretches of one kind as (is image, start, stop), in order, over all live tokens."""
        is_image = np.array(self.live_ids) == self.image_token_id
        bounds = [0, *(np.flatnonzero(np.diff(is_image)) + 1).tolist(), self.live_length]
        return tuple(
            (bool(is_image[start]), start, stop) for start, stop in itertools.pairwise(bounds)
        )


def split_prompt(input_ids: Int64Array, image_token_id: int) -> tuple[Int64Array, Int64Array]:
    """Split a prompt at its first image token.

    Args:
        input_ids: Token ids of the whole prompt, int64 (S,).
        image_token_id: Id of the token that image features replace.

    Returns:
        Ids of the prefix and ids of the live tokens, int64 each.

    Raises:
        ProcessorError: There is no image token, or nothing stands before it.
    """
    places = np.flatnonzero(input_ids == image_token_id)
    if not places.size or places[0] == 0:
        raise ProcessorError(
            "the prompt must have text before its first image token, and an image token: the "
            "tokenizer is not the one of GR00T N1.6"
        )
    return input_ids[: places[0]], input_ids[places[0] :]


def padded_left(values: NDArray[Any], length: int, axis: int) -> NDArray[Any]:
    """Return an array with zeros put before it on one axis, up to a length.

    Args:
        values: Any array, at most `length` long on `axis`.
        length: The length wanted.
        axis: Which axis.
    """
    widths = [(0, 0)] * values.ndim
    widths[axis] = (length - values.shape[axis], 0)
    return np.pad(values, widths)


def layout_of(prompt_ids: Sequence[int], image_token_id: int, prefix_length: int) -> TokenLayout:
    """Return the layout of one prompt's live tokens behind a prefix of a given room."""
    _, live = split_prompt(np.asarray(prompt_ids, np.int64), image_token_id)
    return TokenLayout(prefix_length, tuple(live.tolist()), image_token_id)
