"""Fixtures of the engine tests: a graph with Q/DQ, as `groot-int8 quantize` writes it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from groot_int8_ros.policy.bundle import open_bundle

from ...int8_record import quantization_record


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
    bundle_copy: Path, int8_graph: Callable[[str, Path], Path], reseal: Callable[[Path], None]
) -> Path:
    """A bundle whose DiT is INT8 in every layer, and says so."""
    from offline_tools.quantize.graph_audit import audit_graph

    graph = int8_graph("dit", bundle_copy / "onnx")
    path = bundle_copy / "manifest.json"
    content = json.loads(path.read_text())
    content["graphs"]["dit"]["precision"] = "int8"
    content["graphs"]["dit"]["quantization"] = quantization_record(
        verdict.layer for verdict in audit_graph(graph, None)
    )
    path.write_text(json.dumps(content))
    reseal(bundle_copy)
    return bundle_copy
