"""Graphs small enough to reason about, and the calibration feeds of the tiny bundles."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from groot_int8_ros.policy.policy import Policy

onnx = pytest.importorskip("onnx", reason="quantisation needs the extra 'offline'")

Feed = Mapping[str, NDArray[Any]]
Feeds = Callable[[], Iterator[Feed]]


@pytest.fixture(scope="session")
def dit_feeds() -> Feeds:
    """Feeds of the tiny checkpoints' DiT: random features at four denoising steps."""

    def feeds() -> Iterator[Feed]:
        random = np.random.RandomState(0)
        tokens = 60
        for step in range(4):
            yield {
                "sa_embs": random.standard_normal((1, 17, 96)).astype(np.float32),
                "vl_embs": random.standard_normal((1, tokens, 64)).astype(np.float32),
                "timestep": np.array([250 * step], np.int64),
                "image_mask": (np.arange(tokens) > 20)[None],
                "backbone_attention_mask": np.ones((1, tokens), np.bool_),
            }

    return feeds


@pytest.fixture
def two_products(tmp_path: Path) -> Callable[..., Path]:
    """Writes `y = (x W1, x W2 + b)`, a MatMul and a Gemm that share their input."""

    def write(first: NDArray[Any], second: NDArray[Any], bias: NDArray[Any]) -> Path:
        helper, dtype = onnx.helper, onnx.helper.np_dtype_to_tensor_dtype(first.dtype)
        rows = helper.make_tensor_value_info("x", dtype, ["rows", first.shape[0]])
        outputs = [
            helper.make_tensor_value_info(name, dtype, ["rows", width])
            for name, width in (("y1", first.shape[1]), ("y2", second.shape[1]))
        ]
        nodes = [
            helper.make_node("MatMul", ["x", "first.weight"], ["y1"], name="first/MatMul"),
            helper.make_node(
                "Gemm",
                ["x", "second.weight", "second.bias"],
                ["y2"],
                name="second/Gemm",
                transB=1,
            ),
        ]
        weights = {"first.weight": first, "second.weight": second.T, "second.bias": bias}
        graph = helper.make_graph(
            nodes,
            "two_products",
            [rows],
            outputs,
            [onnx.numpy_helper.from_array(np.ascontiguousarray(v), n) for n, v in weights.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        path = tmp_path / "float" / "graph.onnx"
        path.parent.mkdir()
        onnx.save(model, str(path))
        return path

    return write


@pytest.fixture
def unrolled(tmp_path: Path) -> Callable[[NDArray[Any], int], Path]:
    """Writes `x += 3 tanh(x W)`, so many times with the one W, as unrolled Euler steps do."""

    def write(weight: NDArray[Any], steps: int) -> Path:
        helper, dtype = onnx.helper, onnx.TensorProto.FLOAT
        nodes, before = [], "x"
        for step in range(steps):
            after = "y" if step == steps - 1 else f"x{step + 1}"
            name = f"step.proj/MatMul_{step}" if step else "step.proj/MatMul"
            names = [f"product{step}", f"tanh{step}", f"change{step}"]
            nodes += [
                helper.make_node("MatMul", [before, "step.proj.weight"], names[:1], name=name),
                helper.make_node("Tanh", names[:1], names[1:2]),
                helper.make_node("Mul", [names[1], "gain"], names[2:]),
                helper.make_node("Add", [before, names[2]], [after]),
            ]
            before = after
        rows = helper.make_tensor_value_info("x", dtype, [9, len(weight)])
        graph = helper.make_graph(
            nodes,
            "unrolled",
            [rows],
            [helper.make_tensor_value_info("y", dtype, [9, len(weight)])],
            [
                onnx.numpy_helper.from_array(weight, "step.proj.weight"),
                onnx.numpy_helper.from_array(np.float32(3.0), "gain"),
            ],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        path = tmp_path / "float" / "graph.onnx"
        path.parent.mkdir()
        onnx.save(onnx.shape_inference.infer_shapes(model), str(path))
        return path

    return write


@pytest.fixture(scope="session")
def capture_into() -> Callable[[Path, Path, int, Path], Path]:
    """Captures a float bundle's inputs on a dataset into a store, as `calibrate` does."""
    pytest.importorskip("av", reason="reading a dataset needs PyAV")
    from offline_tools.calibration.dataset_source import DatasetSource
    from offline_tools.calibration.run import capture

    def capture_dataset(bundle: Path, dataset: Path, count: int, store: Path) -> Path:
        policy = Policy.load(bundle)
        source = DatasetSource(dataset, policy)
        capture(policy, source, store, samples=count, seed=0, report=lambda _: None)
        policy.close()
        return store

    return capture_dataset


@pytest.fixture(scope="session")
def store(
    capture_into: Callable[[Path, Path, int, Path], Path],
    fp16_bundle: Path,
    tiny_dataset: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Eight captured samples for `fp16_bundle`. Tests only read it."""
    return capture_into(fp16_bundle, tiny_dataset, 8, tmp_path_factory.mktemp("capture") / "store")
