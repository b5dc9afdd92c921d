"""Hazards of an audit: passing what is not INT8, and failing what is.

`recorded/` holds what TensorRT 8.6.1 said on an H200 about engines of one generated checkpoint
(`groot-int8 gpu-proof`), and the kernels that Nsight Compute saw in one run of each.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from groot_int8_ros.errors import EngineError
from offline_tools.engine.inspector import EngineLayer, judge, parse_inspection, read_kernels
from offline_tools.engine.verdicts import LayerVerdict, Precision, count

_RECORDED = Path(__file__).parent / "recorded"


def _recorded(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((_RECORDED / f"{name}.json").read_text())
    return content


# Tensors that the products of the recorded DiT multiply: keys and values, for one, share theirs.
_DIT_LAUNCHES = 21


def _judge(name: str, asked: Precision, *, with_kernels: bool) -> list[LayerVerdict]:
    content = _recorded(name)
    inspection = content["inspection"]
    text = inspection if isinstance(inspection, str) else json.dumps(inspection)
    wanted = dict.fromkeys(content["layers"], asked)
    assert wanted
    return judge(
        parse_inspection(text, name),
        wanted,
        content["kernels"] if with_kernels else (),
        content["products"] - len(wanted) * (asked is Precision.INT8),
        _DIT_LAUNCHES,
    )


def test_regions_that_are_not_opened_are_unknown_and_never_a_pass() -> None:
    verdicts = _judge("qdq_dit", Precision.INT8, with_kernels=False)
    assert {verdict.verdict for verdict in verdicts} == {Precision.UNKNOWN}
    assert all(verdict.failed for verdict in verdicts)
    assert "ForeignNode" in verdicts[0].evidence


def test_an_unrolled_layer_is_int8_only_if_the_product_of_every_step_is() -> None:
    def product(step: int, kernel: str) -> EngineLayer:
        number = f"_{step}" if step else ""
        node = f"blocks.0.to_q/MatMul{number}"
        return EngineLayer(node, "Gemm", (), (), kernel, (node,))

    region = EngineLayer("{ForeignNode[a...b]}", "Myelin", (), (), "", ())
    wanted, products = {"blocks.0.to_q": Precision.INT8}, {"blocks.0.to_q": 2}
    int8, floating = product(0, "sm80_xmma_gemm_i8i8_i8i32"), product(1, "sm80_gemm_f16f16")
    for layers, verdict in (
        ([int8, product(1, int8.kernel)], Precision.INT8),
        ([int8, floating], Precision.FLOAT),
        ([int8, region], Precision.UNKNOWN),
        ([int8], Precision.UNKNOWN),
    ):
        assert judge(layers, wanted, products=products)[0].verdict is verdict


def test_kernels_that_ran_prove_an_engine_with_qdq() -> None:
    verdicts = _judge("qdq_dit", Precision.INT8, with_kernels=True)
    assert count(verdicts) == {Precision.INT8: 32, Precision.FLOAT: 0, Precision.UNKNOWN: 0}
    assert "21 int8 and 8 floating products ran" in verdicts[0].evidence


def test_calibrated_engine_without_int8_kernels_fails_in_every_layer() -> None:
    verdicts = _judge("calibrator_dit", Precision.INT8, with_kernels=True)
    assert count(verdicts)[Precision.FLOAT] == len(verdicts) == 32
    assert all(verdict.failed for verdict in verdicts)


def test_fp16_engine_is_float_and_passes_where_nothing_else_was_asked_for() -> None:
    verdicts = _judge("fp16_dit", Precision.FLOAT, with_kernels=True)
    assert count(verdicts)[Precision.FLOAT] == len(verdicts)
    assert not any(verdict.failed for verdict in verdicts)


def _kernels(*, int8: int, floating: int) -> list[str]:
    """Return that many products of the recorded run of a DiT with Q/DQ: 21 and 8 are all of it."""
    ran = _recorded("qdq_dit")["kernels"]
    names = [
        next(kernel for kernel in ran if kind in kernel) for kind in ("gemm_i8f32", "gemm_f32f32")
    ]
    return [names[0]] * int8 + [names[1]] * floating


@pytest.mark.parametrize(
    ("int8", "floating", "proven"),
    [(21, 8, True), (21, 9, False), (21, 7, False), (20, 8, False), (1, 8, False), (1, 0, False)],
    ids=["all", "float too many", "float missing", "int8 missing", "one int8", "one kernel"],
)
def test_a_list_that_lacks_a_product_or_has_one_too_many_proves_nothing(
    int8: int, floating: int, proven: bool
) -> None:
    content = _recorded("qdq_dit")
    verdicts = judge(
        parse_inspection(json.dumps(content["inspection"]), "qdq_dit"),
        dict.fromkeys(content["layers"], Precision.INT8),
        _kernels(int8=int8, floating=floating),
        content["products"] - len(content["layers"]),
        _DIT_LAUNCHES,
    )
    expected = Precision.INT8 if proven else Precision.UNKNOWN
    assert count(verdicts)[expected] == len(verdicts)


def test_the_first_kernels_of_a_run_prove_nothing() -> None:
    content = _recorded("qdq_dit")
    verdicts = judge(
        parse_inspection(json.dumps(content["inspection"]), "qdq_dit"),
        dict.fromkeys(content["layers"], Precision.INT8),
        content["kernels"][:12],
        content["products"] - len(content["layers"]),
        _DIT_LAUNCHES,
    )
    assert count(verdicts)[Precision.UNKNOWN] == len(verdicts)


def test_the_sum_of_a_product_in_parts_is_no_product_of_its_own() -> None:
    layers = [EngineLayer("{ForeignNode[a...b]}", "Myelin", (), (), "", ())]
    wanted = {"blocks.0.to_q": Precision.INT8}
    # As TensorRT 8.6 launched them on an H100, in this order.
    int8 = "sm80_xmma_gemm_i8f32_i8i32_f32_tn_n_tilesize32x64x64_execute_kernel_trt"
    floating = "sm80_xmma_gemm_f32f32_f32f32_f32_nn_n_tilesize32x32x8_ffma"
    parts, total = f"{floating}_execute_kernel_trt", f"{floating}_execute_split_k_kernel_trt"
    for ran, verdict in (
        ([int8, parts, total], Precision.INT8),
        ([int8, parts, total, parts], Precision.UNKNOWN),
        ([int8, total, total], Precision.UNKNOWN),
    ):
        assert judge(layers, wanted, ran, float_products=1)[0].verdict is verdict


def test_layers_outside_of_regions_are_judged_by_their_own_kernel() -> None:
    verdicts = _judge("fp32_action_encoder", Precision.FLOAT, with_kernels=False)
    assert {verdict.verdict for verdict in verdicts} == {Precision.FLOAT}
    assert "f32f32" in verdicts[0].evidence


def _layer(**changes: Any) -> EngineLayer:
    fields: dict[str, Any] = {
        "name": "block.0.fc1/MatMul",
        "kind": "CaskGemmConvolution",
        "input_formats": ("Row major linear FP16 format",),
        "output_formats": ("Row major linear FP16 format",),
        "kernel": "",
        "nodes": ("block.0.fc1/MatMul",),
    }
    return EngineLayer(**{**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, Precision.FLOAT),
        ({"input_formats": ("Int8 NC/32HW32",)}, Precision.INT8),
        # That the next layer starts from int8 says nothing about this one.
        ({"output_formats": ("Int8 NC/32HW32",)}, Precision.FLOAT),
        # A kernel that converts its int8 input and multiplies in FP16.
        (
            {"input_formats": ("Int8 NC/32HW32",), "kernel": "sm80_xmma_gemm_f16f16_f16f16_f16"},
            Precision.FLOAT,
        ),
        ({"kernel": "sm80_xmma_gemm_i8f32_i8i32_f32_tn_n_tilesize32x64x64"}, Precision.INT8),
        ({"kernel": "ampere_h16816gemm_128x64_ldg8_stages_32x6_tn_v1"}, Precision.FLOAT),
        ({"kernel": "ampere_i16832gemm_int8_128x128_ldg16_relu_stages_64x3_tn"}, Precision.INT8),
        ({"input_formats": ("N/A due to dynamic shapes",)}, Precision.UNKNOWN),
        ({"kind": "PointWiseV2", "input_formats": ("Int8 NC/32HW32",)}, Precision.UNKNOWN),
        ({"kind": "Myelin", "name": "{ForeignNode[a...b]}"}, Precision.UNKNOWN),
    ],
)
def test_precision_comes_from_operands_and_kernel(
    changes: dict[str, Any], expected: Precision
) -> None:
    assert _layer(**changes).precision is expected


def test_conversion_in_front_of_a_product_decides_nothing() -> None:
    reformat = _layer(kind="Reformat", input_formats=("Int8 NC/32HW32",))
    product = _layer(input_formats=("Int8 NC/32HW32",))
    (verdict,) = judge([reformat, product], {"block.0.fc1": Precision.INT8})
    assert verdict.verdict is Precision.INT8
    (alone,) = judge([reformat], {"block.0.fc1": Precision.INT8})
    assert alone.verdict is Precision.UNKNOWN


def test_what_is_fused_with_a_product_is_told() -> None:
    fused = _layer(nodes=("block.0.fc1/MatMul", "block.0.fc1/Add", "block.0.gelu"))
    (verdict,) = judge([fused, _layer()], {"block.0.fc1": Precision.FLOAT})
    assert verdict.fused == ("block.0.fc1/Add", "block.0.gelu")


def test_layer_that_the_engine_does_not_name_is_unknown() -> None:
    (verdict,) = judge([_layer()], {"another": Precision.INT8})
    assert verdict.failed
    assert "no layer of the engine names it" in verdict.evidence


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no inspection"),
        ('{"Bindings": []}', "is no inspection"),
        ('{"Layers": ["fc1", "fc2"]}', "without detailed profiling verbosity"),
    ],
)
def test_text_that_is_no_inspection_is_refused(text: str, message: str) -> None:
    with pytest.raises(EngineError, match=f"the file {message}|the file names.*{message}"):
        parse_inspection(text, "the file")


def test_broken_json_of_8_6_is_read() -> None:
    text = '{"Layers": [{"Name": "a\tb", "LayerType": "NoOp",\n},\n], "Bindings": []}'
    assert [layer.kind for layer in parse_inspection(text, "x")] == ["NoOp"]


def test_kernels_are_read_from_ncu_nsys_and_plain_lists() -> None:
    ncu = '==PROF== Connected\n"ID","Kernel Name","x"\n"0","k<int, 4>","1"\n"1","gemm","2"\n'
    nsys = "Start (ns),Name\n1,first\n2,second\n"
    assert read_kernels(ncu) == ["k<int, 4>", "gemm"]
    assert read_kernels(nsys) == ["first", "second"]
    assert read_kernels("one\n\ntwo\n") == ["one", "two"]
