"""Hazards of an image chain inside the graph: another grey level, another camera's pixels."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from groot_int8_ros.policy.engines.onnxruntime_engine import OnnxRuntimeEngine
from groot_int8_ros.policy.image_sizes import image_sizes
from groot_int8_ros.policy.preprocess import pixel_values
from groot_int8_ros.policy.processor import ImageChain, load_processor
from groot_int8_ros.policy.types import CameraSpec, UInt8Array
from offline_tools.export.graph import GraphInput, GraphSpec, save, trace
from offline_tools.model.deployed.constants import constants, fill_constants
from offline_tools.model.deployed.image_chain import CameraFrames, FrameChain, _Neighbours
from offline_tools.quantize.layers import find_layers, load_graph

CHAIN = ImageChain(256, 0.95)
# Shrinking by broken, mixed and whole ratios, enlarging, one side unchanged, portrait, odd.
SIZES = (
    *((480, 640), (720, 1280), (1080, 1920), (512, 512), (512, 683), (768, 768), (481, 643)),
    *((240, 320), (120, 160), (255, 341), (256, 341), (256, 256), (300, 256), (97, 61)),
)


def _levels(pixels: NDArray[np.float32]) -> NDArray[np.int64]:
    return np.rint(pixels * np.float64(127.5) + 127.5).astype(np.int64)


def _frames(height: int, width: int) -> Iterable[UInt8Array]:
    """Yield noise, black and white alone (many averages in the middle), and a soft gradient."""
    random = np.random.RandomState(height * width)
    shape = (height, width, 3)
    yield random.randint(0, 256, shape).astype(np.uint8)
    yield (random.randint(0, 2, shape) * 255).astype(np.uint8)
    ramp = np.add.outer(np.arange(height), np.arange(width))[..., None] * (255 / (height + width))
    yield np.clip(ramp + random.standard_normal(shape), 0, 255).astype(np.uint8)


def _run(chain: ImageChain, frames: list[UInt8Array]) -> NDArray[Any]:
    height, width, _ = frames[0].shape
    module = FrameChain(height, width, chain)
    fill_constants(module)
    with torch.no_grad():
        result: NDArray[Any] = module(torch.from_numpy(np.stack(frames)).float()).numpy()
    return result


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_no_pixel_differs_from_the_robot_s_own_preprocessing(size: tuple[int, int]) -> None:
    frames = list(_frames(*size))
    expected = pixel_values(frames, CHAIN)
    found = _run(CHAIN, frames)
    assert found.dtype == np.float32
    # Every operation of the chain is exact or in the library's own order: no tolerance.
    np.testing.assert_array_equal(_levels(found), _levels(expected))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("edge", "fraction"), [(256, 1.0), (224, 0.9), (512, 0.95), (100, 0.5), (56, 1.0)]
)
def test_no_pixel_differs_with_another_edge_or_crop(edge: int, fraction: float) -> None:
    chain = ImageChain(edge, fraction)
    for size in ((240, 320), (180, 135)):
        frames = list(_frames(*size))
        np.testing.assert_array_equal(_run(chain, frames), pixel_values(frames, chain))


def test_steps_that_change_nothing_are_not_there() -> None:
    same = FrameChain(252, 336, ImageChain(252, 1.0))
    assert image_sizes(252, 336, ImageChain(252, 1.0)).network == (252, 336)
    assert not constants(same)
    frames = list(_frames(252, 336))
    expected = pixel_values(frames, ImageChain(252, 1.0))
    np.testing.assert_array_equal(_run(ImageChain(252, 1.0), frames), expected)
    assert len(FrameChain(480, 640, CHAIN).area) == 2
    assert len(FrameChain(480, 640, ImageChain(256, 1.0)).area) == 1


def test_recorded_frames_give_the_recorded_pixels(golden_dir: Path) -> None:
    with np.load(golden_dir / "golden_preprocess.npz") as golden:
        sizes = [name.removeprefix("raw_") for name in golden.files if name.startswith("raw_")]
        assert len(sizes) >= 5
        for size in sizes:
            frame = golden[f"raw_{size}"]
            found = _run(CHAIN, [frame])[0]
            np.testing.assert_array_equal(_levels(found), _levels(golden[f"pixel_values_{size}"]))
    processor = load_processor(golden_dir / "checkpoint")
    for index in range(3):
        with np.load(golden_dir / f"golden_obs{index}.npz") as golden:
            frames = [golden[f"image.{key}"] for key in processor.cameras]
            found = _run(processor.image_chain, frames)
            np.testing.assert_array_equal(_levels(found), _levels(golden["pixel_values"]))


def _contracted_sum(neighbours: _Neighbours, levels: Tensor, name: str) -> Tensor:
    """Sum as an engine with fused multiply-add does: one rounding for product and sum."""
    total = neighbours.pixels(levels, 0) * neighbours.factor(name, 0)
    for number in range(1, neighbours.count):
        pixels, factor = neighbours.pixels(levels, number), neighbours.factor(name, number)
        total = (total.double() + pixels.double() * factor.double()).float()
    return total


@pytest.mark.parametrize("size", [(480, 640), (360, 640)])
def test_an_engine_that_contracts_product_and_sum_decides_only_ties_the_other_way(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]
) -> None:
    monkeypatch.setattr(_Neighbours, "weighted_sum", _contracted_sum)
    frames = list(_frames(*size))
    difference = np.abs(_levels(_run(CHAIN, frames)) - _levels(pixel_values(frames, CHAIN)))
    assert 0 < (difference > 0).mean() < 5e-4
    # One level of the box average can become two behind the bicubic step's negative weights.
    assert (difference > 1).mean() < 1e-5
    assert difference.max() <= 2


CAMERAS = (
    CameraSpec("front", 480, 640),
    CameraSpec("wrist", 120, 160),
    CameraSpec("top", 480, 640),
)


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = GraphSpec(
        build=lambda: CameraFrames(CAMERAS, CHAIN),
        inputs={
            f"image_{camera.key}": GraphInput((camera.height, camera.width, 3), torch.uint8)
            for camera in CAMERAS
        },
        outputs=("pixel_values",),
        # Of the weights that stand behind the chain: the chain itself must stay in float32.
        dtype=torch.float16,
    )
    path = tmp_path_factory.mktemp("chain") / "chain.onnx"
    save(trace(spec, constants(CameraFrames(CAMERAS, CHAIN)).__getitem__), path)
    return path


def test_traced_chain_gives_every_camera_its_own_pixels_to_the_bit(traced: Path) -> None:
    frames = [next(iter(_frames(camera.height, camera.width))) for camera in CAMERAS]
    frames[2] = 255 - frames[2]
    engine = OnnxRuntimeEngine(traced, threads=2)
    found = engine.run(
        {f"image_{camera.key}": frame for camera, frame in zip(CAMERAS, frames, strict=True)}
    )["pixel_values"]
    np.testing.assert_array_equal(found, pixel_values(frames, CHAIN))


def test_chain_s_constants_are_no_layers_and_stay_in_float32(traced: Path) -> None:
    assert not find_layers(load_graph(traced))
    graph = onnx.load(traced, load_external_data=False).graph
    assert {node.op_type for node in graph.node} >= {"MatMul", "Gather", "Round", "Floor"}
    kinds = {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64}
    assert {tensor.data_type for tensor in graph.initializer} <= kinds
