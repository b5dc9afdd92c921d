"""What every inference engine offers, and nothing more.

Owns: `Engine`, `TensorSpec`. Must not import any engine library.

Lifecycle: an engine is loaded by its constructor, which checks the file before it allocates; it
runs any number of times from one thread at a time; `close` releases it, and running it afterwards
is a bug.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from groot_int8_ros.errors import EngineError

Tensors = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph.

    Attributes:
        dtype: NumPy's name of the element type, such as `float16`.
        shape: Length of each axis; a name stands for an axis whose length may vary.
    """

    dtype: str
    shape: tuple[int | str, ...]

    def describe(self) -> str:
        """Return the spec as one reads it in an error message."""
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"

    @property
    def varies(self) -> bool:
        """Whether an axis has no fixed length."""
        return any(isinstance(axis, str) for axis in self.shape)

    def accepts(self, array: NDArray[Any]) -> bool:
        """Whether an array has this dtype and fits this shape."""
        return array.dtype == np.dtype(self.dtype) and self.fits(array.shape)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a shape agrees with every axis of fixed length."""
        return len(shape) == len(self.shape) and all(
            isinstance(want, str) or want == have
            for want, have in zip(self.shape, shape, strict=True)
        )


class Engine(Protocol):
    """A loaded graph."""

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """Specs by input name."""

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        """Specs by output name."""

    @property
    def remarks(self) -> Sequence[str]:
        """What whoever runs the engine should know of how it was loaded, a sentence each."""

    def run(self, feeds: Tensors) -> dict[str, NDArray[Any]]:
        """Run the graph once.

        Args:
            feeds: One array for each input; floating arrays are cast to the input's dtype.

        Returns:
            One array for each output.

        Raises:
            EngineError: An input is missing, misshapen or of another kind, or the run failed.
        """

    def close(self) -> None:
        """Release the engine's memory."""


def is_unchanged(array: NDArray[Any], last: NDArray[Any] | None) -> bool:
    """Whether an array is the very one of the last run and cannot have changed since.

    An instruction's prefix is such an array. An engine that copies its inputs may leave it where
    it is: at true size that is more than all frames of four cameras.
    """
    return array is last and array.flags.owndata and not array.flags.writeable


def checked_feeds(
    name: str, inputs: Mapping[str, TensorSpec], feeds: Tensors
) -> dict[str, NDArray[Any]]:
    """Return feeds as an engine takes them, floating arrays cast to the input's dtype.

    Args:
        name: The engine's name, for the message.
        inputs: Its inputs.
        feeds: What the caller gave.

    Raises:
        EngineError: An input is missing, unknown, misshapen or of another kind.
    """
    if set(feeds) != set(inputs):
        raise EngineError(f"{name} takes {sorted(inputs)}, but was given {sorted(feeds)}")
    checked = {}
    for key, spec in inputs.items():
        array = feeds[key]
        if np.issubdtype(array.dtype, np.floating) and spec.dtype.startswith("float"):
            array = array.astype(spec.dtype, copy=False)
        if not spec.accepts(array):
            raise EngineError(
                f"{name}: input {key} must be {spec.describe()}, not "
                f"{array.dtype}{list(array.shape)}"
            )
        checked[key] = array
    return checked
