"""The error of a layer alone must be that of the layer in the INT8 graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from groot_int8_ros.policy.engines.onnxruntime_engine import OnnxRuntimeEngine
from offline_tools.quantize.layers import find_layers, load_graph
from offline_tools.quantize.qdq import quantize_graph
from offline_tools.quantize.sensitivity import candidate_schemes, measure
from offline_tools.quantize.statistics import collect


def test_local_errors_are_those_that_the_graph_makes(
    two_products: Callable[..., Path], tmp_path: Path
) -> None:
    random = np.random.RandomState(0)
    weights = [random.standard_normal((32, n)).astype(np.float32) for n in (5, 7)]
    source = two_products(*weights, np.zeros(7, np.float32))
    x = (random.standard_normal((40, 32)) * random.uniform(0.1, 5.0, 32)).astype(np.float32)
    seen = collect(source, lambda: iter([{"x": x}]), rows=100)
    (group,) = measure("dit", source, find_layers(load_graph(source)), seen)
    assert set(group.errors) == set(candidate_schemes(32))
    wanted = np.hstack([x @ weight for weight in weights])
    for index, (scheme, error) in enumerate(group.errors.items()):
        target = tmp_path / str(index) / "graph.onnx"
        quantize_graph(source, target, dict.fromkeys(("first", "second"), scheme), seen)
        engine = OnnxRuntimeEngine(target)
        outputs = engine.run({"x": x})
        engine.close()
        gap = np.hstack([outputs["y1"], outputs["y2"]]) - wanted
        shares = np.sum(gap**2, axis=1) / np.sum(wanted**2, axis=1)
        assert error == pytest.approx(float(np.sqrt(shares.mean())), rel=0.02), scheme.name


def test_a_layer_that_never_gives_anything_costs_nothing_to_quantise(
    two_products: Callable[..., Path],
) -> None:
    weights = [np.ones((16, n), np.float32) for n in (5, 7)]
    source = two_products(*weights, np.zeros(7, np.float32))
    seen = collect(source, lambda: iter([{"x": np.zeros((4, 16), np.float32)}]))
    (group,) = measure("dit", source, find_layers(load_graph(source)), seen)
    assert set(group.errors.values()) == {0.0}
