"""The file that the finished episodes of one setup are kept in, one JSON line each.

Owns: `Results`, and the hash that tells a model in a setup. Must not import torch. The first line
says what was run; results of anything else are refused, so that an interrupted run can be gone on
with and two setups are never mixed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from groot_int8_ros.errors import ConfigurationError
from groot_int8_ros.policy.bundle import MANIFEST_FILE
from groot_int8_ros.policy.files import sha256_of_file
from offline_tools.model.configuration import SINGLE_FILE


class Results:
    """Episodes by the seed of their scene.

    Args:
        path: The file; it is begun if it does not exist.
        setup: What tells these episodes from others.

    Raises:
        ConfigurationError: The file is of another setup.
    """

    def __init__(self, path: Path, setup: Mapping[str, Any]) -> None:
        self._path = path
        head = json.dumps({"setup": setup}, sort_keys=True)
        if not path.exists():
            path.write_text(head + "\n", encoding="utf-8")
        whole, _, cut = path.read_text(encoding="utf-8").rpartition("\n")
        lines = whole.splitlines()
        if not lines or lines[0] != head:
            raise ConfigurationError(
                f"{path} holds results of another bundle or of other options. Give another "
                "--output, or delete it."
            )
        if cut:  # a kill in the middle of a line
            path.write_text(whole + "\n", encoding="utf-8")
        self.episodes: dict[int, dict[str, Any]] = {
            episode["seed"]: episode for episode in map(json.loads, lines[1:])
        }

    def add(self, episode: dict[str, Any]) -> None:
        """Keep a finished episode."""
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(episode) + "\n")
        self.episodes[episode["seed"]] = episode


def read_results(path: Path) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
    """Return the setup and the whole episodes of a file, which may be written to meanwhile.

    Raises:
        ConfigurationError: It is no file of results.
    """
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0]
    try:
        head, *episodes = map(json.loads, whole.splitlines())
        return head["setup"], {episode["seed"]: episode for episode in episodes}
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"{path} is no file of closed-loop results ({error!r}): delete it"
        ) from error


def digest_of_model(folder: Path) -> str:
    """Return the hash that tells a model in a setup: of a bundle's manifest, or of the weights."""
    manifest = folder / MANIFEST_FILE
    return sha256_of_file(manifest if manifest.exists() else folder / SINGLE_FILE)
