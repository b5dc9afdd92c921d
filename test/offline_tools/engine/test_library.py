"""Hazards of several TensorRT versions: a flag that this one lacks, weights that it does not take.

`recorded/api_names.json` holds, of the names that versions differ in, those that the Python
bindings of each version have (`tensorrt_bindings` and `tensorrt-cu12-bindings` on PyPI, imported
over empty libraries). Only 8.6.1 has run.
"""

from __future__ import annotations

import importlib.util
import json
import types
from pathlib import Path
from typing import Any

import onnx_ir
import pytest

from groot_int8_ros.errors import EngineError
from groot_int8_ros.policy.bundle import open_bundle
from groot_int8_ros.policy.engines import TensorSpec
from offline_tools.engine.builder import (
    BuilderSettings,
    Calibration,
    GraphBuild,
    build_plan,
    configure_precision,
)
from offline_tools.engine.library import RTX, Library, open_library

_NAMES: dict[str, list[str]] = json.loads(
    (Path(__file__).parent / "recorded" / "api_names.json").read_text()
)
_EXPLICIT_BATCH, _STRONGLY_TYPED = 0, 1


def _library(version: str) -> Library:
    module: Any = types.SimpleNamespace()
    for name in _NAMES[version]:
        owner, _, member = name.rpartition(".")
        if owner and not hasattr(module, owner):
            setattr(module, owner, types.SimpleNamespace())
        setattr(getattr(module, owner) if owner else module, member, object())
    flags = module.NetworkDefinitionCreationFlag
    for number, name in enumerate(("EXPLICIT_BATCH", "STRONGLY_TYPED")):
        if hasattr(flags, name):
            setattr(flags, name, number)
    return Library("tensorrt", module, version)


@pytest.mark.parametrize(
    ("version", "strong", "weak", "calibrators", "progress"),
    [
        ("8.6.1", False, True, True, False),
        ("10.0.1", True, True, True, True),
        ("10.3.0", True, True, True, True),
        ("10.14.1", True, True, True, True),
        ("11.0.0", True, False, False, True),
        ("11.4.0", True, False, False, True),
    ],
)
def test_each_version_is_asked_for_what_it_has(
    version: str, strong: bool, weak: bool, calibrators: bool, progress: bool
) -> None:
    library = _library(version)
    names = _NAMES[version]
    assert library.strongly_typed == strong
    assert library.stores_int8_weights == strong
    assert (library.weakly_typed, library.has_calibrators) == (weak, calibrators)
    assert library.has_progress_monitor == progress
    # What the decisions lead to is there: flags of a network, of weak types, of BF16 with them.
    if strong:
        assert library.network_flags(strongly_typed=True) == 1 << _STRONGLY_TYPED
    weak_flags = 1 << _EXPLICIT_BATCH if version.startswith("8") else 0
    assert library.network_flags(strongly_typed=False) == weak_flags
    wanted = {"BuilderFlag.FP16", "BuilderFlag.INT8", "BuilderFlag.OBEY_PRECISION_CONSTRAINTS"}
    assert wanted <= set(names) if weak else not wanted & set(names)
    if weak:
        assert library.has_bfloat16 == ("BuilderFlag.BF16" in names)
    assert "BuilderFlag.TF32" in names, "it is switched off in every build"


def _build(precision: str, graph_precision: str) -> GraphBuild:
    spec = {"x": TensorSpec("float32", (1, 4))}
    return GraphBuild(Path("dit.onnx"), graph_precision, precision, spec, {})


@pytest.mark.parametrize(
    ("version", "build", "message"),
    [
        ("8.6.1", _build("bf16", "fp32"), r"8\.6\.1 has no BF16: build with"),
        ("8.6.1", _build("bf16", "fp16"), r"8\.6\.1 has no BF16: build with"),
        ("11.0.0", _build("fp16", "fp32"), "the bundle with --precision fp16"),
        ("11.0.0", _build("bf16", "fp32"), "the bundle with --precision fp16"),
        ("10.3.0", _build("fp32", "fp16"), "cannot become fp32: export .* fp32"),
        ("10.3.0", _build("bf16", "int8"), "is int8 and cannot become bf16"),
    ],
)
def test_what_a_version_cannot_build_is_refused_with_what_it_can(
    version: str, build: GraphBuild, message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        build_plan(build, BuilderSettings(), _library(version))


class _Layer:
    """A layer of a stand-in network: its kind, and the value that it gives."""

    def __init__(self, kind: str, output: str) -> None:
        self.type, self.precision, self.held = kind, None, False
        self._output = types.SimpleNamespace(name=output)

    def get_output(self, index: int) -> Any:
        return self._output

    def set_output_type(self, index: int, dtype: str) -> None:
        self.held = dtype == "float32"


def _stand_in(
    graph: Path, kinds: dict[str, str]
) -> tuple[list[tuple[Any, _Layer]], types.SimpleNamespace, Library]:
    """Return a graph's nodes of some operators with their layers, in a network of TensorRT."""
    pairs = [
        (node, _Layer(kinds[node.op_type], str(value.name)))
        for node in onnx_ir.load(graph).graph
        for value in node.outputs
        if node.op_type in kinds
    ]
    layers = [layer for _, layer in pairs]
    network = types.SimpleNamespace(num_layers=len(layers), get_layer=layers.__getitem__)
    library = _library("8.6.1")
    library.trt.LayerType = types.SimpleNamespace(**{kind: kind for kind in kinds.values()})
    library.trt.float32 = "float32"
    for name in ("FP16", "INT8", "OBEY_PRECISION_CONSTRAINTS"):
        setattr(library.trt.BuilderFlag, name, name)
    return pairs, network, library


@pytest.mark.parametrize(("precision", "calibrated"), [("int8", True), ("fp16", False)])
def test_pixels_stay_float32_where_the_rest_of_a_float32_graph_may_be_fp16(
    deployed_bundle: Path, precision: str, calibrated: bool
) -> None:
    # Seen with 8.6.1: with the image chain in FP16 the features were 98 % off.
    graph = open_bundle(deployed_bundle, verify_hashes=False).graph_path("backbone")
    kinds = {"Floor": "UNARY", "Round": "UNARY", "MatMul": "MATRIX_MULTIPLY", "Softmax": "SOFTMAX"}
    pairs, network, library = _stand_in(graph, kinds)
    found: set[str] = set()
    build = GraphBuild(
        graph, "fp32", precision, {}, {}, Calibration(None, b"cache") if calibrated else None
    )
    configure_precision(types.SimpleNamespace(set_flag=found.add), network, build, library)
    assert "OBEY_PRECISION_CONSTRAINTS" in found
    for node, layer in pairs:
        pixels = node.op_type in ("Floor", "Round") or any(
            "image_chain" in str(value.name) for value in node.inputs
        )
        assert layer.held == pixels, node.name
    assert {"Floor", "MatMul"} <= {node.op_type for node, layer in pairs if layer.held}


@pytest.mark.parametrize(
    ("graph_precision", "precision", "calibrated", "flags"),
    [
        ("fp32", "fp32", False, set()),
        ("fp32", "fp16", False, {"FP16"}),
        ("fp16", "fp16", False, {"FP16", "OBEY_PRECISION_CONSTRAINTS"}),
        ("fp32", "int8", True, {"INT8", "FP16"}),
    ],
)
def test_weak_types_get_flags_and_what_is_float32_on_purpose_is_held(
    request: pytest.FixtureRequest,
    graph_precision: str,
    precision: str,
    calibrated: bool,
    flags: set[str],
) -> None:
    fixture = {"fp32": "tiny_bundle", "fp16": "fp16_bundle"}[graph_precision]
    bundle = open_bundle(request.getfixturevalue(fixture), verify_hashes=False)
    graph = bundle.graph_path("backbone")
    kinds = {"Pow": "ELEMENTWISE", "ReduceMean": "REDUCE", "MatMul": "MATRIX_MULTIPLY"}
    arithmetic, network, library = _stand_in(graph, {**kinds, "Reshape": "SHUFFLE"})
    found: set[str] = set()
    calibration = Calibration(None, b"cache") if calibrated else None
    build = GraphBuild(graph, graph_precision, precision, {}, {}, calibration)
    configure_precision(types.SimpleNamespace(set_flag=found.add), network, build, library)
    assert found == flags
    held = {node.op_type for node, layer in arithmetic if layer.held}
    # The square and the mean of RMSNorm, which leave FP16's range in the real model.
    assert held == ({"Pow", "ReduceMean"} if graph_precision == "fp16" else set())


def test_a_normalisation_is_not_held_for_it_takes_the_head_with_it(fp16_deployed: Path) -> None:
    # Seen with 8.6.1: three that were held turned a whole FP16 action head into FP32.
    graph = open_bundle(fp16_deployed, verify_hashes=False).graph_path("action_head")
    kinds = {"LayerNormalization": "NORMALIZATION", "MatMul": "MATRIX_MULTIPLY"}
    pairs, network, library = _stand_in(graph, kinds)
    build = GraphBuild(graph, "fp16", "fp16", {}, {})
    configure_precision(types.SimpleNamespace(set_flag=lambda _: None), network, build, library)
    float32 = [(n, layer) for n, layer in pairs if n.outputs[0].dtype == onnx_ir.DataType.FLOAT]
    assert {(node.op_type, layer.held) for node, layer in float32} == {
        ("LayerNormalization", False),
        ("MatMul", True),
    }


def test_the_one_that_runs_here_has_what_is_asked_of_it() -> None:
    if importlib.util.find_spec(RTX) is None:
        pytest.skip("TensorRT-RTX is not installed: pip install tensorrt-rtx-cu13 (Linux x86-64)")
    library = open_library(RTX)
    flag = 1 << int(library.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    assert library.network_flags(strongly_typed=True) == flag
    assert not library.has_calibrators
    assert library.has_progress_monitor
