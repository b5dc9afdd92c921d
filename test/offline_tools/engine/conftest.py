"""Fixtures of the engine tests: a graph with Q/DQ, as `groot-int8 quantize` writes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from groot_int8_ros.policy.bundle import open_bundle


@pytest.fixture
def int8_graph(tiny_bundle: Path) -> Callable[..., Path]:
    """Writes (name, folder, bundle) a graph, every layer INT8 and scaled row by row.

    It is the tiny bundle's where none is given.
    """
    from groot_int8_ros.policy.quantization import LayerScheme
    from offline_tools.quantize.layers import find_layers, load_graph
    from offline_tools.quantize.qdq import quantize_graph

    def write(name: str, folder: Path, bundle: Path = tiny_bundle) -> Path:
        source = open_bundle(bundle, verify_hashes=False).graph_path(name)
        plan = {layer.name: LayerScheme("row") for layer in find_layers(load_graph(source))}
        target = folder / source.name
        quantize_graph(source, target, plan, None)
        return target

    return write


@pytest.fixture
def int8_bundle(
    tiny_bundle: Path, write_int8: Callable[[Path, Path, Sequence[str]], Path], tmp_path: Path
) -> Path:
    """A bundle whose DiT is INT8 in every layer, and says so."""
    return write_int8(tmp_path / "bundle", tiny_bundle, ["dit"])
