"""Graphs small enough to reason about, and the calibration feeds of the tiny bundles."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from groot_int8_ros.policy.engines import Tensors
from groot_int8_ros.policy.types import Observation

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


@pytest.fixture(scope="session")
def capture_into() -> Callable[[Path, Path, int, Path], Path]:
    """Captures a float bundle's inputs on a dataset into a store, through the real policy."""
    pytest.importorskip("torch", reason="the tiny bundles are exported with torch")
    from groot_int8_ros.capture.sample import (
        BackboneInputs,
        CapturedChunk,
        CaptureSample,
        DitInputs,
    )
    from groot_int8_ros.capture.store import CaptureMeta, CaptureWriter
    from groot_int8_ros.policy.policy import Policy, draw_noise
    from offline_tools.dataset.lerobot import LeRobotDataset

    def capture(bundle: Path, dataset: Path, count: int, store: Path) -> Path:
        policy = Policy.load(bundle)
        recorded = LeRobotDataset.open(dataset).episode(0)
        cameras = [camera.key for camera in policy.robot.cameras]
        streams = zip(*(recorded.frames(key) for key in cameras), strict=True)
        wanted = set(np.linspace(0, len(recorded) - 1, count).round().astype(int).tolist())
        meta = CaptureMeta.of_bundle(policy.manifest, "tiny", seed=0, engine="onnxruntime")
        with CaptureWriter(store, meta) as writer:
            for index, frames in enumerate(streams):
                if index not in wanted:
                    continue
                observation = Observation(
                    images=dict(zip(cameras, frames, strict=True)),
                    state={key: values[index] for key, values in recorded.state.items()},
                    instruction=recorded.instructions[index],
                    stamp_ns=index,
                )
                noise = draw_noise(0, index, policy.noise_shape)
                runs: dict[str, list[Tensors]] = {}

                def note(name: str, feeds: Tensors, runs: dict[str, list[Tensors]] = runs) -> None:
                    runs.setdefault(name, []).append(feeds)

                with policy.observed(note):
                    chunk = policy.infer(observation, noise=noise)
                backbone, dit = runs["backbone"][0], runs["dit"]
                writer.add(
                    CaptureSample(
                        instruction=observation.instruction,
                        stamp_ns=index,
                        source=f"frame {index}",
                        state=dict(observation.state),
                        noise=noise,
                        seed=0,
                        chunk=CapturedChunk(chunk.actions, chunk.action_pred),
                        backbone=BackboneInputs(
                            input_ids=backbone["input_ids"][0],
                            attention_mask=backbone["attention_mask"][0],
                            pixel_values=backbone["pixel_values"],
                        ),
                        dit=DitInputs(
                            vl_embs=dit[0]["vl_embs"][0],
                            image_mask=dit[0]["image_mask"][0],
                            backbone_attention_mask=dit[0]["backbone_attention_mask"][0],
                            sa_embs=np.concatenate([step["sa_embs"] for step in dit]),
                            timestep=np.concatenate([step["timestep"] for step in dit]),
                        ),
                        normalised_state=runs["conditioner"][0]["state"][0],
                    )
                )
        policy.close()
        return store

    return capture


@pytest.fixture(scope="session")
def store(
    capture_into: Callable[[Path, Path, int, Path], Path],
    fp16_bundle: Path,
    tiny_dataset: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Eight captured samples for `fp16_bundle`. Tests only read it."""
    return capture_into(fp16_bundle, tiny_dataset, 8, tmp_path_factory.mktemp("capture") / "store")
