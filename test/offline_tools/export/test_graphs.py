"""Hazards of the exported graphs: a contract that drifts, a shape that is frozen, half precision.

The graphs are those of one bundle in float32 and one in float16, as `groot-int8 export` wrote
them, read back from disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto

from groot_int8_ros.policy.bundle import Bundle, open_bundle
from groot_int8_ros.policy.engines.onnxruntime_engine import OnnxRuntimeEngine
from groot_int8_ros.policy.families import GRAPH_FILES, REFERENCE
from groot_int8_ros.policy.policy import Policy
from groot_int8_ros.policy.reference_graphs import ReferenceGraphs
from groot_int8_ros.policy.types import Observation
from offline_tools.model.checkpoint import expected_keys
from offline_tools.model.configuration import load_model_config

LARGEST_OPSET = 17  # TensorRT 8.6
LARGEST_IR = 8

# Operators whose output shape depends on values, or that hold graphs of their own: TensorRT takes
# them late, with limits, or not at all.
_VALUE_DEPENDENT = {
    "NonZero",
    "Compress",
    "Unique",
    "NonMaxSuppression",
    "If",
    "Loop",
    "Scan",
    "SequenceMap",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
}


@pytest.fixture(params=["fp32", "fp16"])
def bundle(request: pytest.FixtureRequest) -> Bundle:
    name = {"fp32": "tiny_bundle", "fp16": "fp16_bundle"}[request.param]
    return open_bundle(request.getfixturevalue(name), verify_hashes=False)


@pytest.fixture(params=GRAPH_FILES[REFERENCE])
def graph_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def _read(bundle: Bundle, name: str) -> onnx.ModelProto:
    return onnx.load(bundle.graph_path(name), load_external_data=False)


def _values(
    values: Any,
) -> dict[str, tuple[int, list[int | str]]]:
    return {
        value.name: (
            value.type.tensor_type.elem_type,
            [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim],
        )
        for value in values
    }


def test_backbone_has_the_tensor_contract_of_the_community(bundle: Bundle) -> None:
    graph = _read(bundle, "backbone").graph
    assert bundle.graph_path("backbone").name == "backbone_model.onnx"
    real = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16}[
        bundle.manifest.graphs["backbone"].precision
    ]
    assert _values(graph.input) == {
        "input_ids": (TensorProto.INT64, ["batch", "sequence"]),
        "attention_mask": (TensorProto.INT64, ["batch", "sequence"]),
        "pixel_values": (real, ["images", 3, 252, 336]),
    }
    outputs = _values(graph.output)
    assert list(outputs) == ["hidden_states", "attn_mask", "image_mask"]
    assert outputs["hidden_states"][0] == real
    assert len(outputs["hidden_states"][1]) == 3
    assert outputs["hidden_states"][1][2] == 64
    for mask in ("attn_mask", "image_mask"):
        assert outputs[mask][0] == TensorProto.BOOL
        assert len(outputs[mask][1]) == 2


def test_dit_has_the_tensor_contract_of_the_community(bundle: Bundle) -> None:
    graph = _read(bundle, "dit").graph
    assert bundle.graph_path("dit").name == "dit_model.onnx"
    real = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16}[
        bundle.manifest.graphs["dit"].precision
    ]
    assert _values(graph.input) == {
        "sa_embs": (real, ["batch", 17, 96]),
        "vl_embs": (real, ["batch", "sequence", 64]),
        "timestep": (TensorProto.INT64, ["batch"]),
        "image_mask": (TensorProto.BOOL, ["batch", "sequence"]),
        "backbone_attention_mask": (TensorProto.BOOL, ["batch", "sequence"]),
    }
    outputs = _values(graph.output)
    assert list(outputs) == ["output"]
    assert outputs["output"][0] == real
    assert outputs["output"][1][1:] == [17, 64]


def test_graph_is_plain_onnx_of_an_opset_that_old_parsers_read(
    bundle: Bundle, graph_name: str
) -> None:
    model = _read(bundle, graph_name)
    assert model.ir_version <= LARGEST_IR
    assert [(i.domain, i.version) for i in model.opset_import] == [("", LARGEST_OPSET)]
    assert not model.functions
    for node in model.graph.node:
        assert node.domain == "", node.op_type
        # Raises for an operator that this opset does not know.
        schema = onnx.defs.get_schema(node.op_type, LARGEST_OPSET)
        unknown = {attribute.name for attribute in node.attribute} - set(schema.attributes)
        assert not unknown, (node.op_type, unknown)
        assert node.op_type not in _VALUE_DEPENDENT, node.name


def test_graph_passes_the_onnx_checker_with_type_and_shape_inference(
    bundle: Bundle, graph_name: str
) -> None:
    onnx.checker.check_model(str(bundle.graph_path(graph_name)), full_check=True)


def test_weights_lie_in_external_data_beside_the_graph(bundle: Bundle, graph_name: str) -> None:
    path = bundle.graph_path(graph_name)
    external = 0
    for tensor in _read(bundle, graph_name).graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            assert entries["location"] == f"{path.name}.data"
            external += int(entries["length"])
        else:
            assert np.prod(tensor.dims, dtype=int) <= 1024, tensor.name
    data_bytes = path.with_name(f"{path.name}.data").stat().st_size
    # Alignment leaves gaps, but nothing is stored twice.
    assert external <= data_bytes < 1.1 * external + 65536


def _matrix_products(graph: onnx.GraphProto) -> Iterator[tuple[onnx.NodeProto, str]]:
    weights = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type in ("MatMul", "Gemm") and node.input[1] in weights:
            yield node, node.input[1]


def test_no_weight_is_transposed_at_run_time(bundle: Bundle, graph_name: str) -> None:
    graph = _read(bundle, graph_name).graph
    weights = {tensor.name for tensor in graph.initializer}
    assert not [
        node.name
        for node in graph.node
        if node.op_type == "Transpose" and node.input[0] in weights
    ]


@pytest.mark.parametrize(
    ("name", "prefix"), [("backbone", "backbone."), ("dit", "action_head.model.")]
)
def test_each_layer_of_the_checkpoint_is_one_matrix_product_of_its_name(
    tiny_bundle: Path, tiny_checkpoint: Path, name: str, prefix: str
) -> None:
    config, _ = load_model_config(tiny_checkpoint)
    tables = ("embed_tokens", "position_embedding")
    layers = {
        key.removesuffix(".weight").removeprefix("" if name == "backbone" else prefix)
        for key, shape in expected_keys(config).items()
        if key.startswith(prefix)
        and key.endswith(".weight")
        and len(shape) == 2
        and key.split(".")[-2] not in tables
    }
    assert len(layers) > 20
    bundle = open_bundle(tiny_bundle, verify_hashes=False)
    found = list(_matrix_products(_read(bundle, name).graph))
    names = [node.name for node, _ in found]
    assert len(names) == len(set(names))
    assert {node_name.rsplit("/", 1)[0] for node_name in names} == layers


def test_half_precision_graphs_hold_half_precision_weights(fp16_bundle: Path) -> None:
    bundle = open_bundle(fp16_bundle, verify_hashes=False)
    for name, record in bundle.manifest.graphs.items():
        large = [
            tensor
            for tensor in _read(bundle, name).graph.initializer
            if np.prod(tensor.dims, dtype=int) > 1024
        ]
        assert large
        wanted = TensorProto.FLOAT16 if name in ("backbone", "dit") else TensorProto.FLOAT
        assert record.precision == ("fp16" if name in ("backbone", "dit") else "fp32")
        assert {tensor.data_type for tensor in large} == {wanted}, name
    weights = "onnx/{}.data".format(GRAPH_FILES[REFERENCE]["dit"])
    count = sum(
        int(np.prod(shape))
        for key, shape in expected_keys(
            load_model_config(fp16_bundle.parent / "checkpoint")[0]
        ).items()
        if key.startswith("action_head.model.")
    )
    assert bundle.manifest.files[weights][1] < 2.2 * count


def test_squares_inside_norms_are_taken_in_float32(fp16_bundle: Path) -> None:
    # The real backbone's residual stream reaches 1e4; its square overflows half precision.
    bundle = open_bundle(fp16_bundle, verify_hashes=False)
    model = onnx.shape_inference.infer_shapes(
        _read(bundle, "backbone"), strict_mode=True, data_prop=True
    )
    types = {
        value.name: value.type.tensor_type.elem_type
        for value in (*model.graph.value_info, *model.graph.input, *model.graph.output)
    }
    means = [node for node in model.graph.node if node.op_type == "ReduceMean"]
    assert means
    assert {types[node.input[0]] for node in means} == {TensorProto.FLOAT}


def _observation(policy: Policy, instruction: str, seed: int) -> Observation:
    random = np.random.RandomState(seed)
    return Observation(
        images={
            camera.key: random.randint(0, 256, (camera.height, camera.width, 3), dtype=np.uint8)
            for camera in policy.robot.cameras
        },
        state={
            key.key: np.asarray(random.uniform(-1, 1, key.dim), np.float32)
            for key in policy.processor.state_keys
        },
        instruction=instruction,
    )


def _pad_left(rows: list[NDArray[Any]], value: int) -> NDArray[Any]:
    width = max(row.shape[1] for row in rows)
    return np.concatenate(
        [np.pad(row, ((0, 0), (width - row.shape[1], 0)), constant_values=value) for row in rows]
    )


def test_batch_of_different_lengths_gives_each_row_what_it_gets_alone(tiny_bundle: Path) -> None:
    policy = Policy.load(tiny_bundle, threads=2)
    bundle = open_bundle(tiny_bundle, verify_hashes=False)
    engines = {
        name: OnnxRuntimeEngine(bundle.graph_path(name), threads=2)
        for name in bundle.manifest.engine_graphs
    }
    graphs = policy.graphs
    assert isinstance(graphs, ReferenceGraphs)
    inputs = [
        graphs.preprocess(_observation(policy, "stop", 1)),
        graphs.preprocess(_observation(policy, "put the red cube into the green bowl", 2)),
    ]
    lengths = [one.input_ids.shape[1] for one in inputs]
    assert lengths[0] < lengths[1]

    alone = [graphs.features(one) for one in inputs]
    together = engines["backbone"].run(
        {
            "input_ids": _pad_left([one.input_ids for one in inputs], 0),
            "attention_mask": _pad_left([one.attention_mask for one in inputs], 0),
            "pixel_values": np.concatenate([one.pixel_values for one in inputs]),
        }
    )
    padded = lengths[1] - lengths[0]
    np.testing.assert_array_equal(together["attn_mask"][0, :padded], False)
    for row, one in enumerate(alone):
        valid = slice(lengths[1] - lengths[row], None)
        for mask in ("attn_mask", "image_mask"):
            np.testing.assert_array_equal(together[mask][row, valid], one[mask][0])
        np.testing.assert_allclose(
            together["hidden_states"][row, valid], one["hidden_states"][0], atol=2e-5
        )

    random = np.random.RandomState(3)
    noise = random.standard_normal((2, *policy.noise_shape)).astype(np.float32)
    expected = [
        graphs.actions(one, features, start)
        for features, one, start in zip(alone, inputs, noise, strict=True)
    ]
    found = _denoise(
        policy,
        engines,
        together,
        np.concatenate([one.state for one in inputs]),
        noise,
    )
    np.testing.assert_allclose(found, np.stack(expected), atol=5e-5)
    policy.close()


def _denoise(
    policy: Policy,
    engines: dict[str, OnnxRuntimeEngine],
    features: dict[str, NDArray[Any]],
    state: NDArray[Any],
    noise: NDArray[Any],
) -> NDArray[Any]:
    """Integrate a batch, as `Policy.denoise` does for one observation."""
    run: Callable[..., dict[str, NDArray[Any]]] = lambda name, **feeds: engines[name].run(feeds)  # noqa: E731
    condition = run("conditioner", hidden_states=features["hidden_states"], state=state)
    steps = policy.manifest.denoising_steps
    actions = noise
    for step in range(steps):
        timestep = np.full(len(noise), int(1000 * step / steps), np.int64)
        encoded = run(
            "action_encoder",
            state_features=condition["state_features"],
            actions=actions,
            timestep=timestep,
        )
        output = run(
            "dit",
            sa_embs=encoded["sa_embs"],
            vl_embs=condition["vl_embs"],
            timestep=timestep,
            image_mask=features["image_mask"],
            backbone_attention_mask=features["attn_mask"],
        )
        decoded = run("action_decoder", dit_output=output["output"])
        actions = actions + decoded["velocity"] / np.float32(steps)
    return actions
