"""Hazards of exchanging a graph's types: float16 left behind, other values, another interface."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator

from groot_int8_ros.policy.bundle import open_bundle
from groot_int8_ros.policy.engines.onnxruntime_engine import OnnxRuntimeEngine
from offline_tools.engine.bfloat16_form import write_as_bfloat16

_TOKENS = 9


def test_graph_in_bfloat16_computes_the_same_within_its_rounding(
    fp16_bundle: Path, tmp_path: Path
) -> None:
    graph = open_bundle(fp16_bundle, verify_hashes=False).graph_path("dit")
    target = tmp_path / graph.name
    assert write_as_bfloat16(graph, target) > 10
    engine = OnnxRuntimeEngine(graph, threads=1)
    random, feed = np.random.RandomState(0), {}
    for name, spec in engine.inputs.items():
        shape = [axis if isinstance(axis, int) else _TOKENS for axis in (1, *spec.shape[1:])]
        feed[name] = random.standard_normal(shape).astype(spec.dtype)
    feed["image_mask"] = np.arange(_TOKENS)[None] >= 4
    feed["backbone_attention_mask"] = np.ones((1, _TOKENS), np.bool_)
    expected = engine.run(feed)["output"].astype(np.float64)
    engine.close()
    # ONNX Runtime's CPU has few kernels for bfloat16; the standard's own evaluator has all.
    evaluator: Any = ReferenceEvaluator(str(target))
    (found,) = evaluator.run(None, feed)
    assert found.dtype == np.float16
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    # bfloat16 keeps 8 bits of a product: less would mean that nothing was exchanged.
    assert 1e-3 < error < 0.03


def test_no_float16_is_left_but_where_the_graph_meets_its_caller(
    fp16_bundle: Path, tmp_path: Path
) -> None:
    for name in ("backbone", "dit"):
        graph = open_bundle(fp16_bundle, verify_hashes=False).graph_path(name)
        target = tmp_path / graph.name
        write_as_bfloat16(graph, target)
        onnx.checker.check_model(str(target), full_check=True)
        before, after = onnx.load(str(graph)).graph, onnx.load(str(target)).graph
        for mine, own in ((after.input, before.input), (after.output, before.output)):
            assert [(v.name, v.type) for v in mine] == [(v.name, v.type) for v in own]
        half = TensorProto.FLOAT16
        assert not [one.name for one in after.initializer if one.data_type == half]
        ends = {value.name for value in after.output}
        casts = [
            node.output[0]
            for node in after.node
            for attribute in node.attribute
            if (attribute.name == "to" and attribute.i == half)
            or (attribute.HasField("t") and attribute.t.data_type == half)
        ]
        assert set(casts) <= ends
        kept = [
            one.name
            for one in after.value_info
            if one.type.tensor_type.elem_type == half and one.name not in ends
        ]
        assert kept == []
