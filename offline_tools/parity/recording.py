"""A file of recorded arrays that knows which of them were compared.

Owns: reading golden `.npz` and `.json` files. Must not import torch or the model.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from groot_int8_ros.errors import ConfigurationError


class Recording:
    """Arrays of one golden file by name.

    Attributes:
        name: The file's name without its ending.
    """

    def __init__(self, path: Path) -> None:
        self.name = path.stem
        try:
            # Opened here: np.load leaves a damaged file open.
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
                self._arrays = {name: stored[name] for name in stored.files}
        except (
            OSError,
            ValueError,
            EOFError,
            MemoryError,
            zipfile.BadZipFile,
            zlib.error,
        ) as error:
            raise ConfigurationError(
                f"{path} cannot be read as recorded arrays ({error}). Nothing can be compared "
                "with it: copy the golden set again."
            ) from error
        self._used: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __getitem__(self, name: str) -> NDArray[Any]:
        """Return an array and remember that it was used."""
        if name not in self._arrays:
            raise ConfigurationError(
                f"{self.name}.npz holds no array '{name}', without which nothing else in it can "
                "be compared. Use a complete golden set."
            )
        array: NDArray[Any] = self._arrays[name]
        self._used.add(name)
        return array

    @property
    def unused(self) -> tuple[str, ...]:
        """Names of the arrays that nothing asked for."""
        return tuple(name for name in self._arrays if name not in self._used)

    def with_prefix(self, prefix: str) -> dict[str, NDArray[Any]]:
        """Return the arrays whose names start with a prefix, by the rest of their names."""
        return {
            name.removeprefix(prefix): self[name]
            for name in self._arrays
            if name.startswith(prefix)
        }


def read_json(path: Path) -> Any:
    """Read a golden set's description.

    Raises:
        ConfigurationError: It is missing or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"{path} cannot be read ({error}). The arrays that it describes cannot be compared "
            "without it: copy the golden set again."
        ) from error
