"""Modules that hold computed constants beside the weights of a checkpoint.

Owns: how such a constant is declared, so that a graph can be traced without values and filled when
it is written. Must not import the export or the rest of the model.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn


class ConstantModule(nn.Module):
    """A module some of whose tensors are computed here and read from no checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self._values: dict[str, NDArray[Any]] = {}

    def add_constant(
        self, name: str, value: NDArray[Any], dtype: torch.dtype | None = torch.float32
    ) -> None:
        """Declare a constant, to be used as the attribute `name`.

        The attribute has the constant's shape and no values, until `fill_constants`.

        Args:
            name: Name of the attribute.
            value: The constant.
            dtype: Its type in the graph; None is the type of the module's weights.
        """
        self._values[name] = value
        self.register_buffer(name, torch.empty(value.shape, dtype=dtype), persistent=False)


def constants(module: nn.Module) -> dict[str, Tensor]:
    """Return the values of all constants inside a module, by their full names."""
    return {
        f"{path}.{name}" if path else name: torch.from_numpy(np.ascontiguousarray(value))
        for path, owner in module.named_modules()
        if isinstance(owner, ConstantModule)
        for name, value in owner._values.items()
    }


def fill_constants(module: nn.Module) -> None:
    """Give every constant inside a module its value, in the type that it was declared with."""
    for path, value in constants(module).items():
        owner, _, name = path.rpartition(".")
        parent = module.get_submodule(owner)
        setattr(parent, name, value.to(getattr(parent, name).dtype))
