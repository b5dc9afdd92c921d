"""The deployed graphs in INT8: unrolled weights, islands that stay float, and the whole road."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from groot_int8_ros.policy.bundle import open_bundle
from groot_int8_ros.policy.policy import Policy
from groot_int8_ros.policy.quantization import LayerScheme
from offline_tools.engine.rtx import check_build
from offline_tools.engine.verdicts import Precision
from offline_tools.engine.weight_form import write_with_float_weights
from offline_tools.quantize.arithmetic import rotation_block
from offline_tools.quantize.graph_audit import audit_bundle
from offline_tools.quantize.int8_bundle import QuantizeOptions, quantize_bundle
from offline_tools.quantize.layers import FLOAT_PARTS, find_layers, groups, load_graph
from offline_tools.quantize.qdq import quantize_graph
from offline_tools.quantize.search import section
from offline_tools.quantize.sensitivity import Group
from offline_tools.quantize.statistics import collect

# Operators of TensorRT 8.6 that quantising may add to those of the float graph.
_ADDED = {"Abs", "DequantizeLinear", "Div", "Max", "QuantizeLinear", "ReduceMax"}


def _operators(graph: Path) -> set[str]:
    return {node.op_type for node in load_graph(graph).graph}


@pytest.fixture(scope="module")
def store(
    capture_into: Callable[[Path, Path, int, Path], Path],
    fp16_deployed: Path,
    tiny_dataset: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Six captured samples for `fp16_deployed`. Tests only read it."""
    folder = tmp_path_factory.mktemp("capture") / "store"
    return capture_into(fp16_deployed, tiny_dataset, 6, folder)


@pytest.fixture(scope="module", params=["static-max", "row-smooth"])
def int8(
    request: pytest.FixtureRequest,
    fp16_deployed: Path,
    store: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Every layer in INT8, by a scheme that needs statistics of each step."""
    output = tmp_path_factory.mktemp("int8") / "bundle"
    options = QuantizeOptions(
        fp16_deployed, store, output, scheme=request.param, budget=None, threads=1
    )
    quantize_bundle(options, lambda _: None)
    return output


def test_layers_are_the_networks_and_nothing_around_it(fp16_deployed: Path) -> None:
    bundle = open_bundle(fp16_deployed)
    by_graph = {
        name: find_layers(load_graph(bundle.graph_path(name)))
        for name in ("backbone", "action_head")
    }
    for layers in by_graph.values():
        assert all(FLOAT_PARTS.isdisjoint(layer.name.split(".")) for layer in layers)
        # None is named by a tracer's counter.
        assert all("." in layer.name and "node_" not in layer.name for layer in layers)
    assert {len(layer.nodes) for layer in by_graph["backbone"]} == {1}
    uses = {layer.name: len(layer.nodes) for layer in by_graph["action_head"]}
    assert uses["context.text.kv"] == uses["context.image.kv"] == 1
    blocks = [name for name in uses if name.startswith("transformer_blocks.")]
    assert len(blocks) == len(uses) - 2
    assert {uses[name] for name in blocks} == {bundle.manifest.denoising_steps}
    sections = {
        section(Group(graph, tuple(members), {}))
        for graph, layers in by_graph.items()
        for members in groups(layers).values()
    }
    assert sections == {
        "backbone.backbone.model.vision_model",
        "backbone.backbone.model.mlp1",
        "backbone.backbone.model.language_model",
        "action_head.context.text.kv",
        "action_head.context.image.kv",
        "action_head.transformer_blocks",
    }


@pytest.mark.parametrize("graph", ["backbone", "action_head"])
def test_quantising_adds_operators_of_tensorrt_8_6_alone(
    int8: Path, fp16_deployed: Path, graph: str, tmp_path: Path
) -> None:
    before = _operators(open_bundle(fp16_deployed, verify_hashes=False).graph_path(graph))
    quantised = open_bundle(int8, verify_hashes=False).graph_path(graph)
    assert "QuantizeLinear" in _operators(quantised) <= before | _ADDED
    # The form that 8.6 is given.
    write_with_float_weights(quantised, tmp_path / quantised.name)
    assert _operators(tmp_path / quantised.name) <= before | _ADDED


def test_every_layer_is_int8_in_every_step_and_what_carries_pixels_and_actions_is_float(
    int8: Path, fp16_deployed: Path
) -> None:
    found = audit_bundle(open_bundle(int8))
    source = open_bundle(fp16_deployed)
    for graph, verdicts in found.items():
        layers = find_layers(load_graph(source.graph_path(graph)))
        by_name = {verdict.layer: verdict for verdict in verdicts}
        for layer in layers:
            verdict = by_name[layer.name]
            assert verdict.verdict is Precision.INT8
            assert verdict.products == len(layer.nodes)
        assert {v.layer for v in verdicts if v.verdict is Precision.INT8} == {
            layer.name for layer in layers
        }
        others = {part for v in verdicts for part in v.layer.split(".") if part in FLOAT_PARTS}
        wanted = {"backbone": {"image_chain"}, "action_head": FLOAT_PARTS - {"image_chain"}}
        assert others <= wanted[graph]
    head = onnx.load(str(open_bundle(int8).graph_path("action_head")), load_external_data=False)
    codes = [t for t in head.graph.initializer if t.data_type == onnx.TensorProto.INT8 and t.dims]
    assert len(codes) == sum(v.verdict is Precision.INT8 for v in found["action_head"])


def test_int8_bundle_answers_near_the_float_one_with_the_same_bank(
    int8: Path, fp16_deployed: Path, tiny_dataset: Path
) -> None:
    from offline_tools.calibration.dataset_source import DatasetSource

    answers = []
    for folder in (fp16_deployed, int8):
        policy = Policy.load(folder, threads=1)
        one = next(DatasetSource(tiny_dataset, policy).observations(frozenset({20})))
        answers.append(policy.infer(one.read(), seed=1).action_pred)
        assert policy.instructions == ("Put the red cube into the green bowl.",)
        policy.close()
    error = np.linalg.norm(answers[1] - answers[0]) / np.linalg.norm(answers[0])
    assert 0.0 < error < 0.05
    record = open_bundle(int8).manifest.graphs["action_head"].quantization
    assert record is not None
    assert record.errors["relative_l2"] < 0.05


@pytest.mark.parametrize("graph", ["backbone", "action_head"])
def test_tensorrt_rtx_builds_the_int8_graphs(int8: Path, graph: str) -> None:
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt_rtx is not installed")
    bundle = open_bundle(int8)
    result = check_build(bundle.graph_path(graph), bundle.manifest.graphs[graph], {})
    assert result.engine_bytes > 0


@pytest.mark.parametrize("graph", ["backbone", "action_head"])
@pytest.mark.parametrize(
    ("fixture", "scheme", "rotated"),
    [
        # What the demonstration ships: its float bundle is float32.
        ("deployed_bundle", LayerScheme("row", None, 0.5), False),
        # What `auto` may choose and no fixed scheme does.
        ("fp16_deployed", LayerScheme("row"), True),
    ],
)
def test_tensorrt_rtx_builds_what_is_migrated_from_float32_and_what_is_rotated(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    fixture: str,
    scheme: LayerScheme,
    rotated: bool,
    graph: str,
) -> None:
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt_rtx is not installed")
    bundle = open_bundle(request.getfixturevalue(fixture), verify_hashes=False)
    source, record = bundle.graph_path(graph), bundle.manifest.graphs[graph]
    layers = find_layers(load_graph(source))
    random = np.random.RandomState(0)
    feed = {
        name: random.randint(0, 2, spec.shape).astype(spec.dtype)  # type: ignore[arg-type]
        for name, spec in record.inputs.items()
    }
    plan = {
        layer.name: replace(scheme, rotation=rotation_block(layer.in_channels))
        if rotated
        else scheme
        for layer in layers
    }
    target = tmp_path / source.name
    statistics = None if rotated else collect(source, lambda: iter([feed]), threads=1)
    quantize_graph(source, target, plan, statistics)
    assert not rotated or any(one.rotation for one in plan.values())
    assert _operators(target) <= _operators(source) | _ADDED
    result = check_build(target, replace(record, precision="int8"), {})
    assert result.engine_bytes > 0


def test_auto_keeps_a_budget_and_judges_sections_of_both_graphs(
    fp16_deployed: Path, store: Path, tmp_path: Path
) -> None:
    lines: list[str] = []
    options = QuantizeOptions(
        fp16_deployed,
        store,
        tmp_path / "auto",
        budget=0.02,
        search_samples=1,
        judge_samples=1,
        max_evaluations=2,
        threads=1,
    )
    result = quantize_bundle(options, lines.append)
    assert result.errors.relative_l2 <= 0.02
    assert any(line.startswith("action_head.transformer_blocks: alone") for line in lines)
    assert not any(
        verdict.failed
        for found in audit_bundle(open_bundle(options.output)).values()
        for verdict in found
    )
