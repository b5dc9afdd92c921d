"""Hazards of the traced backbone and prefix model: another result than PyTorch's, lost types.

The backbone for three cameras of two sizes is traced once in each precision, read back from disk
and run for instructions of several lengths.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto

from groot_int8_ros.policy.bundle import GraphRecord
from groot_int8_ros.policy.engines.onnxruntime_engine import OnnxRuntimeEngine
from offline_tools.engine.known_faults import wrong_forms
from offline_tools.engine.rtx import check_build
from offline_tools.export.deployed_backbone import deployed_backbone, prefix_model
from offline_tools.export.graph import save, trace, weight_bytes
from offline_tools.model.deployed.prefix import OUTPUTS
from offline_tools.quantize.layers import find_layers, load_graph

if TYPE_CHECKING:
    from test.offline_tools.model.deployed.conftest import Scene, TrueWidth

PADDING = 3

# Operators of TensorRT 8.6 that the backbone may use; none has a shape that depends on values.
_ALLOWED = {
    "Add", "Cast", "Clip", "Concat", "Div", "Erf", "Floor", "Gather", "LayerNormalization",
    "MatMul", "Mul", "Not", "Pow", "Reciprocal", "ReduceMean", "Reshape", "Round", "Sigmoid",
    "Slice", "Softmax", "Split", "Sqrt", "Sub", "Tanh", "Transpose", "Unsqueeze",
}  # fmt: skip


@dataclass(frozen=True)
class Traced:
    path: Path
    precision: str
    scene: Scene

    def run(self, scene: Scene, padding: int) -> NDArray[np.generic]:
        engine = OnnxRuntimeEngine(self.path, threads=2)
        given = scene.inputs(padding)
        real = {"fp32": np.float32, "fp16": np.float16}[self.precision]
        feeds = {
            name: given[name].astype(real) if given[name].dtype == np.float32 else given[name]
            for name in engine.inputs
        }
        return engine.run(feeds)["features"]

    @property
    def graph(self) -> onnx.GraphProto:
        return onnx.load(self.path, load_external_data=False).graph


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def traced(
    request: pytest.FixtureRequest, random_scene: Scene, tmp_path_factory: pytest.TempPathFactory
) -> Traced:
    precision: str = request.param
    graph = deployed_backbone(
        random_scene.config,
        random_scene.checkpoint,
        cameras=random_scene.cameras,
        image_chain=random_scene.chain,
        layout=random_scene.case(PADDING).layout,
        precision=precision,
    )
    path = tmp_path_factory.mktemp(precision) / "backbone.onnx"
    save(trace(graph.spec, graph.weights), path)
    return Traced(path, precision, random_scene)


@pytest.mark.parametrize("dropped", [0, 2, -PADDING])
def test_graph_gives_the_reference_s_features_for_instructions_of_every_length(
    traced: Traced, dropped: int
) -> None:
    # Fewer tokens than the room in the graph, or as many, by tokens taken away or put before.
    ids = traced.scene.ids
    ids = ids[dropped:] if dropped >= 0 else np.concatenate([[8, 3, 50], ids])
    scene = replace(traced.scene, ids=ids)
    found = traced.run(scene, PADDING + dropped)
    assert found.dtype == {"fp32": np.float32, "fp16": np.float16}[traced.precision]
    # Half precision: 2e-3 to 4e-3 of the largest feature were seen.
    assert scene.error(found) < {"fp32": 1e-5, "fp16": 2e-2}[traced.precision]


def test_graph_has_the_contract_of_the_deployed_family(traced: Traced) -> None:
    onnx.checker.check_model(str(traced.path), full_check=True)
    real = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16}[traced.precision]
    language, layout = traced.scene.config.language, traced.scene.case(PADDING).layout
    prefix = (real, [language.layers, language.kv_heads, layout.prefix_length, language.head_dim])
    graph = traced.graph
    values = {
        value.name: (
            value.type.tensor_type.elem_type,
            [axis.dim_value for axis in value.type.tensor_type.shape.dim],
        )
        for value in (*graph.input, *graph.output)
    }
    assert values == {
        "image_front": (TensorProto.UINT8, [112, 168, 3]),
        "image_wrist": (TensorProto.UINT8, [60, 90, 3]),
        "image_top": (TensorProto.UINT8, [112, 168, 3]),
        "prefix_keys": prefix,
        "prefix_values": prefix,
        "prefix_mask": (TensorProto.BOOL, [layout.prefix_length]),
        "features": (real, [1, layout.live_length, language.hidden_size]),
    }
    assert {node.op_type for node in graph.node} <= _ALLOWED
    # No table of tokens: 1.2 GB at true size in float32.
    stored = [list(tensor.dims) for tensor in graph.initializer]
    assert not [shape for shape in stored if traced.scene.config.language.vocab_size in shape]
    # TensorRT takes uint8 only as the input of a cast.
    frames = {name for name in values if name.startswith("image_")}
    readers = [node for node in graph.node if frames & set(node.input)]
    assert {node.op_type for node in readers} == {"Cast"}


def test_true_width_brings_no_other_operator(true_width: TrueWidth) -> None:
    # What is computed from constants is folded up to 1024 elements only: wider than any of the
    # graphs that are traced above.
    case = true_width.case
    graph = deployed_backbone(
        case.config,
        true_width.checkpoint,
        cameras=case.cameras,
        image_chain=case.image_chain,
        layout=case.layout,
        precision="fp16",
    )
    model = trace(graph.spec, graph.weights)
    assert {node.op_type for node in model.graph} <= _ALLOWED
    assert not list(wrong_forms(model))


def test_fused_query_key_and_value_are_split_as_tensorrt_8_6_computes_it_rightly(
    traced: Traced,
) -> None:
    # Seen with 8.6.1, FP32 and FP16, 8x48 to 32x48 and 16x72.
    model = load_graph(traced.path)
    graph: Any = model.graph
    splits = [node for node in graph if node.op_type == "Split"]
    fused = [node for node in splits if "qkv_proj" in str(node.inputs[0].producer())]
    assert len(fused) == traced.scene.config.vision.layers, "the tower's; the others have norms"
    assert not list(wrong_forms(model))


def test_layers_are_the_checkpoint_s_with_fused_ones_by_their_names(traced: Traced) -> None:
    layers = find_layers(load_graph(traced.path))
    tower = "backbone.model.vision_model.vision_model"
    vision, language = traced.scene.config.vision, traced.scene.config.language
    expected = [f"{tower}.embeddings.patch_embedding"]
    expected += [
        f"{tower}.encoder.layers.{number}.{layer}"
        for number in range(vision.layers)
        for layer in ("self_attn.qkv_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
    ]
    expected += ["backbone.model.mlp1.1", "backbone.model.mlp1.3"]
    expected += [
        f"backbone.model.language_model.model.layers.{number}.{layer}"
        for number in range(language.layers)
        for layer in (
            "self_attn.qkv_proj",
            "self_attn.o_proj",
            "mlp.gate_up_proj",
            "mlp.down_proj",
        )
    ]
    assert [layer.name for layer in layers] == expected
    # The image chain's products are none: never quantised.
    others = [node for node in traced.graph.node if node.op_type == "MatMul"]
    assert len([node for node in others if "image_chain" in "".join(node.input)]) >= 2


@pytest.mark.parametrize("traced", ["fp16"], indirect=True)
def test_half_precision_leaves_the_image_chain_and_the_norms_in_float32(traced: Traced) -> None:
    model = onnx.shape_inference.infer_shapes(
        onnx.load(traced.path, load_external_data=False), strict_mode=True, data_prop=True
    )
    graph = model.graph
    kept = {t.name for t in graph.initializer if t.data_type == TensorProto.FLOAT and t.dims}
    islands = ("image_chain.", ".qk_gain", ".rotary_")
    assert all(any(part in name for part in islands) for name in kept), kept
    types = {
        value.name: value.type.tensor_type.elem_type
        for value in (*graph.value_info, *graph.input, *graph.output)
    }
    means = [node.input[0] for node in graph.node if node.op_type == "ReduceMean"]
    # Two norms of a layer, one of query and key together; the last norm.
    assert len(means) == 3 * traced.scene.config.language.layers + 1
    assert {types[name] for name in means} == {TensorProto.FLOAT}
    # The pixels before their cast: where a check of the image chain can read them.
    pixels = [len(traced.scene.cameras), 3, 56, 84]
    shapes = {
        value.name: [axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in graph.value_info
    }
    assert [n for n, shape in shapes.items() if shape == pixels and types[n] == TensorProto.FLOAT]


@pytest.mark.skipif(
    subprocess.run(
        [sys.executable, "-c", "import tensorrt_rtx"], capture_output=True, check=False
    ).returncode
    != 0,
    reason="TensorRT-RTX cannot be imported: pip install tensorrt-rtx-cu13 (Linux x86-64)",
)
def test_graph_is_parsed_and_built_by_tensorrt(traced: Traced) -> None:
    engine = OnnxRuntimeEngine(traced.path)
    record = GraphRecord(traced.path.name, traced.precision, engine.inputs, engine.outputs)
    assert check_build(traced.path, record, {}).layers > 200


def test_no_matrix_is_read_before_it_is_written(random_scene: Scene, tmp_path: Path) -> None:
    read: list[str] = []

    def source(key: str) -> torch.Tensor:
        read.append(key)
        return random_scene.checkpoint(key)

    graph = deployed_backbone(
        random_scene.config,
        source,
        cameras=random_scene.cameras,
        image_chain=random_scene.chain,
        layout=random_scene.case(0).layout,
        precision="fp32",
    )
    model = trace(graph.spec, graph.weights)
    # What is small may be folded into the graph while it is traced.
    assert max(random_scene.checkpoint(key).numel() for key in read) <= 1024
    read.clear()
    save(model, tmp_path / "backbone.onnx")
    assert len(read) == len(set(read))


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def prefix_graph(
    request: pytest.FixtureRequest, random_scene: Scene, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    graph = prefix_model(
        random_scene.config, random_scene.checkpoint, precision_of_storage=request.param
    )
    path = tmp_path_factory.mktemp("prefix") / f"prefix_{request.param}.onnx"
    save(trace(graph.spec, graph.weights), path)
    matrices = sum(
        parameter.numel() for parameter in graph.spec.build().parameters() if parameter.dim() > 1
    )
    assert weight_bytes(graph.spec) < {"fp32": 4.2, "fp16": 2.2}[request.param] * matrices
    return path


def test_prefix_graph_gives_the_bank_s_prefix_for_every_length(
    prefix_graph: Path, random_scene: Scene
) -> None:
    engine = OnnxRuntimeEngine(prefix_graph, threads=1, keep_graph_as_written=True)
    # bfloat16 weights are exact in float16 but where they are tiny.
    for dropped, padding in ((0, 0), (1, 9), (3, 2)):
        scene = replace(random_scene, ids=random_scene.ids[dropped:])
        found = engine.run(
            {
                "input_ids": scene.prefix_ids[None],
                "first_position": np.array([padding]),
            }
        )
        prefix = scene.prefix(padding)
        assert list(found) == list(OUTPUTS)
        for name, value in found.items():
            assert scene.relative_error(value, torch.from_numpy(getattr(prefix, name))) < 2e-6


@pytest.mark.parametrize("prefix_graph", ["fp16"], indirect=True)
def test_stored_halves_are_cast_where_they_are_used_and_tables_after_the_look_up(
    prefix_graph: Path,
) -> None:
    graph = onnx.load(prefix_graph, load_external_data=False).graph
    halves = {t.name for t in graph.initializer if t.data_type == TensorProto.FLOAT16}
    whole = [t for t in graph.initializer if t.data_type == TensorProto.FLOAT and len(t.dims) > 1]
    assert not whole
    table = next(name for name in halves if "embed_tokens" in name)
    casts = {node.input[0] for node in graph.node if node.op_type == "Cast"} & halves
    # A cast of the whole table would take 1.2 GB at true size.
    assert casts == halves - {table}
    for node in graph.node:
        if node.op_type == "MatMul":
            assert not set(node.input) & halves
