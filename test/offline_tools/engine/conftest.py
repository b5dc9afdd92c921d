"""Fixtures of the engine tests: a graph with Q/DQ, as `groot-int8 quantize` writes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from groot_int8_ros.policy.bundle import open_bundle


@pytest.fixture
def int8_graph(tiny_bundle: Path) -> Callable[[str, Path], Path]:
    """Writes a graph of the tiny bundle, every layer INT8 and scaled row by row."""
    from groot_int8_ros.policy.quantization import LayerScheme
    from offline_tools.quantize.layers import find_layers, load_graph
    from offline_tools.quantize.qdq import quantize_graph

    def write(name: str, folder: Path) -> Path:
        source = open_bundle(tiny_bundle, verify_hashes=False).graph_path(name)
        plan = {layer.name: LayerScheme("row") for layer in find_layers(load_graph(source))}
        target = folder / source.name
        quantize_graph(source, target, plan, None)
        return target

    return write
