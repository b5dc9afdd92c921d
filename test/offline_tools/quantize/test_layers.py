"""Which products are layers, and which of them a user's patterns name."""

from __future__ import annotations

from pathlib import Path

import pytest

from groot_int8_ros.errors import QuantizationError
from offline_tools.quantize.layers import find_layers, groups, load_graph, select


def test_attention_products_are_no_layers_and_every_weight_is_one(tiny_bundle: Path) -> None:
    model = load_graph(tiny_bundle / "onnx" / "dit_model.onnx")
    layers = find_layers(model)
    products = [node for node in model.graph if node.op_type in ("MatMul", "Gemm")]
    without_weight = [
        node
        for node in products
        if node.inputs[1] is not None and not node.inputs[1].is_initializer()
    ]
    assert without_weight
    assert len(layers) == len(products) - len(without_weight)
    assert len({layer.name for layer in layers}) == len(layers)


def test_layers_behind_one_norm_are_one_group(tiny_bundle: Path) -> None:
    layers = find_layers(load_graph(tiny_bundle / "onnx" / "dit_model.onnx"))
    found = {layer.name: members for members in groups(layers).values() for layer in members}
    block = "transformer_blocks.1.attn1"
    names = {layer.name for layer in found[f"{block}.to_q"]}
    assert names == {f"{block}.to_q", f"{block}.to_k", f"{block}.to_v"}


def test_a_transposed_gemm_has_its_channels_the_right_way_round(tiny_bundle: Path) -> None:
    layers = find_layers(load_graph(tiny_bundle / "onnx" / "dit_model.onnx"))
    one = next(layer for layer in layers if layer.name.endswith("embedder.linear_1"))
    assert (one.operator, one.in_channels, one.out_channels, one.out_axis) == ("Gemm", 256, 96, 0)


def test_patterns_add_and_take_out_in_their_order(tiny_bundle: Path) -> None:
    layers = find_layers(load_graph(tiny_bundle / "onnx" / "dit_model.onnx"))
    everything = {layer.name for layer in layers}

    def chosen(*patterns: str) -> set[str]:
        return {layer.name for layer in select(layers, patterns, "the graph")}

    assert chosen() == everything
    queries = {name for name in everything if name.endswith("to_q")}
    assert chosen("*.to_q") == queries
    assert chosen("!*.to_q") == everything - queries
    assert chosen("*.attn1.*", "!*.to_q", "*.0.attn1.to_q") >= {"transformer_blocks.0.attn1.to_q"}


def test_a_pattern_that_matches_nothing_shows_what_a_name_looks_like(tiny_bundle: Path) -> None:
    layers = find_layers(load_graph(tiny_bundle / "onnx" / "dit_model.onnx"))
    with pytest.raises(QuantizationError, match=r"'blocks.\*' matches no layer of DIT; .*\."):
        select(layers, ("blocks.*",), "DIT")


def test_what_is_no_graph_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"no protobuf at all")
    with pytest.raises(QuantizationError, match="cannot be read as an ONNX graph"):
        load_graph(tmp_path / "a.onnx")
