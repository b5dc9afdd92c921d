"""Hazards of a cost that is counted: three counts that disagree, work that is not seen.

The same work is counted in three ways (from a configuration, from a module, from its ONNX graph)
and by hand.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from groot_int8_ros.errors import BundleError
from offline_tools.cost.onnx_count import count_graph
from offline_tools.cost.reference_work import reference_backbone, reference_head
from offline_tools.cost.work import (
    REDUCTION,
    GraphWork,
    Launch,
    as_half,
    as_int8,
    by_kind,
    kind_of,
    observation,
    total,
    with_row_maxima,
)

pytest.importorskip("torch", reason="modules are counted with torch")

from groot_int8_ros.policy.quantization import LayerScheme
from offline_tools.cost.stages import Setup, cost_lines
from offline_tools.cost.torch_count import count_stage
from offline_tools.demo.random_checkpoint import SIZES
from offline_tools.export.deployed_stages import backbone_stages, head_stages
from offline_tools.export.graph import save, trace
from offline_tools.model.deployed.transformations import BACKBONE, HEAD
from offline_tools.quantize.qdq import quantize_graph

SETUP = Setup(cameras=2, frame=(40, 40), text_tokens=20, steps=2)
TINY = replace(SIZES["tiny"], dit=replace(SIZES["tiny"].dit, layers=3))


def _flops(graphs: list[GraphWork]) -> dict[str, int]:
    return {kind: sums.flops for kind, sums in by_kind(observation(graphs)).items() if sums.flops}


def test_reference_work_of_a_configuration_is_what_the_modules_do() -> None:
    layout = SETUP.case(TINY).layout
    tokens = layout.prefix_length + layout.live_length
    stages = head_stages(TINY, layout, SETUP.steps, "fp16")["embodiment_slice"]
    counted = [count_stage(graph) for graph in stages]
    computed = list(reference_head(TINY, tokens, TINY.action_horizon, SETUP.steps))
    assert _flops(computed) == _flops(counted)
    assert total(observation(computed)) == total(observation(counted))

    case = SETUP.case(TINY)
    backbones = backbone_stages(case, "fp16")
    counted = [count_stage(graph) for graph in backbones["reference"]]
    computed = [reference_backbone(TINY, SETUP.cameras, case.image_shape, tokens)]
    assert _flops(computed) == _flops(counted)
    for field in ("weight_bytes", "launches"):
        found, expected = (getattr(total(observation(x)), field) for x in (computed, counted))
        assert found == expected, field


def test_graph_and_module_are_counted_alike(tmp_path: Path) -> None:
    import torch

    layout = SETUP.case(TINY).layout
    graph = list(head_stages(TINY, layout, SETUP.steps, "fp16").values())[-1][0]
    shapes = {name: p.shape for name, p in graph.spec.build().named_parameters()}
    save(trace(graph.spec, lambda name: torch.rand(shapes[name])), tmp_path / "head.onnx")
    of_graph = count_graph(tmp_path / "head.onnx", "action_head", 1, {})
    of_module = count_stage(graph)
    # Kind by kind: operations, bytes, launches.
    assert by_kind(of_graph.launches) == by_kind(of_module.launches)
    # The graph also stores shapes and other small constants.
    assert 0 <= of_graph.stored_bytes - of_module.stored_bytes < 10_000


def test_operations_are_two_for_each_parameter_and_token() -> None:
    layout = SETUP.case(TINY).layout
    graphs = head_stages(TINY, layout, 1, "fp16")["embodiment_slice"]
    decoder = next(graph for graph in graphs if graph.name == "action_decoder")
    horizon = TINY.action_horizon
    matrices = TINY.dit.output_dim * TINY.mlp_size + TINY.mlp_size * TINY.max_action_dim
    assert total(count_stage(decoder).launches).flops == 2 * horizon * matrices


@pytest.mark.parametrize(("steps", "goal"), [(2, 2.2), (4, 2.8)])
def test_deployed_head_at_true_size_does_a_fraction_of_the_operations(
    steps: int, goal: float
) -> None:
    config = SIZES["full"]
    stages = list(head_stages(config, Setup().case(config).layout, steps, "fp16").values())
    first, last = (
        total(observation([count_stage(graph) for graph in stages[index]])) for index in (0, -1)
    )
    assert first.flops / last.flops >= goal


def test_every_line_of_the_table_costs_no_more_than_the_one_before_it() -> None:
    lines = cost_lines(TINY, SETUP)
    sums = [total(observation(line.graphs)) for line in lines]
    names = [line.name for line in lines]
    assert names == ["reference", *BACKBONE, *HEAD]
    for before, after, name in zip(sums[:-1], sums[1:], names[1:], strict=True):
        if name == "image_chain":
            continue  # takes in what the host did before
        # An unrolled graph computes the time code with constants of its own.
        assert after.flops <= 1.001 * before.flops, name
        assert after.launches <= before.launches, name
    first, last = (total(observation(lines[index].head)) for index in (0, -1))
    assert last.flops < 0.9 * first.flops


def test_backbone_without_a_table_of_tokens_is_smaller_by_all_but_the_live_text() -> None:
    stages = backbone_stages(SETUP.case(TINY), "fp16")
    before, after = (
        count_stage(*stages[name]).stored_bytes
        for name in ("prompt_prefix", "constant_embeddings")
    )
    language, texts = TINY.language, len(SETUP.case(TINY).layout.text_positions)
    assert before - after == 2 * language.hidden_size * (language.vocab_size - texts)


def _graph(tmp_path: Path, dtype: int = TensorProto.FLOAT) -> Path:
    random = np.random.RandomState(0)
    element = helper.tensor_dtype_to_np_dtype(dtype)
    weight = random.standard_normal((8, 6)).astype(element)
    node = helper.make_node
    graph = helper.make_graph(
        [
            node("MatMul", ["x", "w"], ["xw"], name="layer/MatMul"),
            node("Add", ["xw", "b"], ["xwb"]),
            node("LayerNormalization", ["xwb", "ones"], ["n"]),
            node("Relu", ["n"], ["r"]),
            node("Transpose", ["r"], ["t"], perm=[0, 2, 1]),
            node("MatMul", ["r", "t"], ["s"], name="scores"),
            node("Softmax", ["s"], ["y"]),
        ],
        "graph",
        [helper.make_tensor_value_info("x", dtype, ["batch", 5, 8])],
        [helper.make_tensor_value_info("y", dtype, ["batch", 5, 5])],
        [
            numpy_helper.from_array(weight, "w"),
            numpy_helper.from_array(np.zeros(6, element), "b"),
            numpy_helper.from_array(np.ones(6, element), "ones"),
        ],
    )
    path = tmp_path / "graph.onnx"
    imports = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=8), path)
    return path


def test_launches_bytes_and_operations_of_a_graph_are_those_counted_by_hand(
    tmp_path: Path,
) -> None:
    work = count_graph(_graph(tmp_path), "graph", 3, {"batch": 2})
    product, norm, scores, softmax = work.launches
    assert product.flops == 2 * (2 * 5) * 8 * 6
    assert product.weight_bytes == 4 * 8 * 6
    assert product.activation_bytes == 4 * (2 * 5) * (8 + 6)
    assert scores.flops == 2 * 2 * 5 * 6 * 5
    assert scores.weight_bytes == 0
    assert (norm.flops, softmax.flops) == (0, 0)
    assert softmax.activation_bytes == 2 * 4 * 2 * 5 * 5
    assert work.stored_bytes == 4 * (8 * 6 + 6 + 6)
    assert total(observation([work])).launches == 3 * 4


def test_int8_layer_is_seen_by_its_operands(tmp_path: Path) -> None:
    source, target = _graph(tmp_path), tmp_path / "int8.onnx"
    quantize_graph(source, target, {"layer": LayerScheme("row")}, None)
    work = count_graph(target, "graph", 1, {"batch": 1})
    layer, scores = (launch for launch in work.launches if launch.flops)
    assert layer.is_int8
    assert layer.flops == total(work.launches).int8_flops == 2 * 5 * 8 * 6
    assert layer.weight_bytes == 8 * 6
    # Codes of one byte come in, products in float32 go out.
    assert layer.activation_bytes == 5 * 8 + 4 * 5 * 6
    assert not scores.is_int8


def test_int8_is_counted_alike_in_a_quantised_graph_and_from_its_float_one(
    tmp_path: Path,
) -> None:
    source, target = _graph(tmp_path, TensorProto.FLOAT16), tmp_path / "int8.onnx"
    quantize_graph(source, target, {"layer": LayerScheme("row")}, None)
    exact, found = (count_graph(path, "graph", 2, {"batch": 3}) for path in (source, target))
    expected = as_int8(exact, frozenset())
    kinds = by_kind(found.launches)
    assert kinds == by_kind(with_row_maxima(expected).launches)
    # Static scales need all but the row maxima.
    assert kinds.pop(REDUCTION).launches == 1
    assert kinds == by_kind(expected.launches)
    assert total(expected.launches).int8_flops == 2 * (3 * 5) * 8 * 6
    # And back again: what INT8 saves is found from either.
    assert by_kind(as_half(expected.launches)) == by_kind(exact.launches)


def test_graph_whose_shapes_are_unknown_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"the shape of .* cannot be inferred"):
        count_graph(_graph(tmp_path), "graph", 1, {})
    (tmp_path / "none.onnx").write_text("no graph")
    with pytest.raises(BundleError, match="cannot be read as an ONNX graph"):
        count_graph(tmp_path / "none.onnx", "graph", 1, {})


def test_layers_in_int8_halve_what_they_read_and_no_others() -> None:
    graph = GraphWork(
        "graph",
        2,
        (
            Launch("DiT MLP", 100, 20, 7, "a", input_bytes=4),
            Launch("DiT MLP", 100, 20, 7, "a", input_bytes=4),
            Launch("attention products", 10, 0, 7, input_bytes=4),
            Launch("encoders, decoder", 50, 40, 7, "b", input_bytes=4),
        ),
        other_bytes=3,
    )
    assert graph.stored_bytes == 20 + 40 + 3
    quantised = as_int8(graph)
    assert quantised.stored_bytes == 10 + 40 + 3
    assert [launch.activation_bytes for launch in quantised.launches] == [5, 5, 7, 7]
    assert total(observation([quantised])).int8_share == pytest.approx(200 / 260)


def test_kinds_follow_the_names_of_both_families() -> None:
    assert kind_of("transformer_blocks.4.attn1.to_k.weight") == "cross keys and values"
    assert kind_of("transformer_blocks.5.attn1.to_k.weight") == "DiT attention"
    assert kind_of("context.image.kv.weight.transposed") == "cross keys and values"
    assert kind_of("transformer_blocks.3.norm1.linear.weight") == "time and AdaLN"
    assert kind_of("backbone.language.model.layers.0.mlp.up_proj.weight") == "language MLP"
    assert kind_of("action_encoder.W12") == "encoders, decoder"
