"""Hazards of other tools: the source graph rewritten, other layers taken, a poisoned process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from groot_int8_ros.errors import ConfigurationError, QuantizationError
from groot_int8_ros.policy.bundle import open_bundle
from groot_int8_ros.policy.files import sha256_of_file
from offline_tools.compare_quantization.baselines import (
    missing_modelopt_modules,
    quantize_with_modelopt,
    quantize_with_onnxruntime,
)
from offline_tools.compare_quantization.samples import Feeds
from offline_tools.engine.verdicts import Precision
from offline_tools.quantize.graph_audit import audit_graph
from offline_tools.quantize.layers import find_layers, load_graph

Tool = Callable[[Path, Path, Feeds, list[str], str], None]


def _feeds(tokens: tuple[int, ...] = (40, 40)) -> Feeds:
    random = np.random.RandomState(0)
    return [
        {
            "sa_embs": random.standard_normal((1, 17, 96)).astype(np.float32),
            "vl_embs": random.standard_normal((1, length, 64)).astype(np.float32),
            "timestep": np.array([250], np.int64),
            "image_mask": (np.arange(length) > 20)[None],
            "backbone_attention_mask": np.ones((1, length), np.bool_),
        }
        for length in tokens
    ]


@pytest.fixture
def dit(tiny_bundle: Path) -> Path:
    return open_bundle(tiny_bundle, verify_hashes=False).graph_path("dit")


def _check(tool: Tool, method: str, dit: Path, tmp_path: Path) -> None:
    before = {path.name: sha256_of_file(path) for path in dit.parent.iterdir()}
    layers = [one for one in find_layers(load_graph(dit)) if one.operator == "MatMul"]
    target = tmp_path / "dit.onnx"
    tool(dit, target, _feeds(), [one.nodes[0] for one in layers], method)
    assert {path.name: sha256_of_file(path) for path in dit.parent.iterdir()} == before
    found = {one.layer for one in audit_graph(target, None) if one.verdict is Precision.INT8}
    assert found == {one.name for one in layers}
    options = ort.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.log_severity_level = 3
    wanted, got = (
        ort.InferenceSession(str(path), options).run(["output"], _feeds()[0])[0]
        for path in (dit, target)
    )
    error = np.linalg.norm(got - wanted) / np.linalg.norm(wanted)
    assert 1e-4 < error < 0.1


@pytest.mark.parametrize("method", ["max", "entropy", "percentile"])
def test_onnxruntime_quantises_the_same_layers_and_leaves_the_source_alone(
    dit: Path, tmp_path: Path, method: str
) -> None:
    _check(quantize_with_onnxruntime, method, dit, tmp_path)


def test_modelopt_does_too_and_onnxruntime_still_works_after_it(dit: Path, tmp_path: Path) -> None:
    missing = missing_modelopt_modules()
    if missing:
        pytest.skip(f"ModelOpt is an optional extra ('compare'); missing: {', '.join(missing)}")
    _check(quantize_with_modelopt, "entropy", dit, tmp_path)
    _check(quantize_with_onnxruntime, "max", dit, tmp_path)


def test_samples_of_several_lengths_are_refused_where_onnxruntime_cannot_take_them(
    dit: Path, tmp_path: Path
) -> None:
    layers = [one.nodes[0] for one in find_layers(load_graph(dit))]
    with pytest.raises(QuantizationError, match="different lengths"):
        quantize_with_onnxruntime(dit, tmp_path / "out.onnx", _feeds((40, 41)), layers, "entropy")
    quantize_with_onnxruntime(dit, tmp_path / "out.onnx", _feeds((40, 41)), layers, "max")


def test_a_missing_modelopt_is_named(
    dit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "offline_tools.compare_quantization.baselines._MODELOPT_MODULES", ("no_such_module",)
    )
    with pytest.raises(ConfigurationError, match=r"no_such_module missing.*\[compare\]"):
        quantize_with_modelopt(dit, tmp_path / "out.onnx", _feeds(), [], "max")
