"""Hazards of a TensorRT engine on the robot: of another device, version or graph, cut short.

Refusals are decided before anything is allocated, so they are shown here without a GPU; loading
and running is shown on one by `groot-int8 gpu-proof` (docs/verification.md).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from groot_int8_ros.errors import EngineError
from groot_int8_ros.policy.engines import TensorSpec, load_engine
from groot_int8_ros.policy.engines.cuda import Cuda, CudaError, Device
from groot_int8_ros.policy.engines.tensorrt_manifest import (
    EngineManifest,
    EngineTensor,
    check_engine_fits,
    engine_folder,
    read_engine_manifest,
)
from groot_int8_ros.policy.policy import Policy

_ORIN_NX = Device(
    "NVIDIA Jetson Orin NX Engineering Reference Developer Kit", "8.7", 8, 16 << 30, True
)
_PLAN = b"a serialised engine"
_GRAPH = {"onnx/dit_model.onnx": "a" * 64}


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    folder = engine_folder(tmp_path, "10.3.0", _ORIN_NX)
    folder.mkdir(parents=True)
    path = folder / "dit_model.engine"
    path.write_bytes(_PLAN)
    path.with_suffix(".json").write_text(_manifest().to_json())
    return path


def _manifest() -> EngineManifest:
    shape = ((1, 1, 4), (1, 5, 4), (1, 9, 4))
    return EngineManifest(
        graph="onnx/dit_model.onnx",
        graph_sha256=_GRAPH,
        engine_sha256=hashlib.sha256(_PLAN).hexdigest(),
        engine_bytes=len(_PLAN),
        device_memory_bytes=7,
        precision="int8",
        quantization="qdq",
        layer_precision={"block.0": "INT8"},
        calibration={"samples_sha256": "b" * 64},
        library="tensorrt",
        library_version="10.3.0",
        device=_ORIN_NX,
        inputs={"x": EngineTensor(TensorSpec("float16", ("batch", "sequence", 4)), shape)},
        outputs={"y": EngineTensor(TensorSpec("float32", (1, 4)), None)},
        build_options=("--graph", "dit", "--low-memory"),
        build_flags=("strongly typed",),
        seconds=1.5,
        peak_memory_bytes=3,
    )


def _check(engine: Path, **changes: Any) -> None:
    arguments: dict[str, Any] = {
        "library_version": "10.3.0",
        "device": _ORIN_NX,
        "recorded_sha256": _GRAPH,
        **changes,
    }
    bundle = engine.parents[2]
    manifest = read_engine_manifest(engine.with_suffix(".json"), bundle)
    check_engine_fits(manifest, engine, bundle, **arguments)


def test_manifest_comes_back_as_it_was_written(engine: Path) -> None:
    assert engine.parent.name == "10.3.0-jetson-orin-nx-engineering-sm87"
    assert read_engine_manifest(engine.with_suffix(".json"), engine.parents[2]) == _manifest()
    _check(engine)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"library_version": "10.7.0"}, "built with TensorRT 10.3.0, and this is 10.7.0"),
        # Both boards call their GPU `Orin`, both are sm_87, and engines do not move between them.
        (
            {"device": replace(_ORIN_NX, name="NVIDIA Jetson AGX Orin Developer Kit")},
            r"built for NVIDIA Jetson Orin NX .*sm_87.* and this is NVIDIA Jetson AGX Orin",
        ),
        # Another power mode switches multiprocessors off.
        ({"device": replace(_ORIN_NX, multiprocessors=4)}, "4 multiprocessors.*nvpmodel -q"),
        ({"device": replace(_ORIN_NX, memory_bytes=8 << 30)}, r"8\.0 GiB"),
        ({"recorded_sha256": {"onnx/dit_model.onnx": "c" * 64}}, "from another onnx/dit_model"),
        ({"recorded_sha256": {}}, "from another onnx/dit_model"),
    ],
)
def test_engine_that_does_not_fit_is_refused_with_the_command_that_rebuilds_it(
    engine: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(EngineError, match=message) as raised:
        _check(engine, **changes)
    command = f"groot-int8 build --bundle {engine.parents[2]} --graph dit --low-memory"
    assert str(raised.value).endswith(command)


def test_firmware_may_take_a_little_memory(engine: Path) -> None:
    _check(engine, device=replace(_ORIN_NX, memory_bytes=15 << 30))


def test_truncated_and_changed_engines_are_refused(engine: Path) -> None:
    engine.write_bytes(_PLAN[:-4])
    with pytest.raises(EngineError, match="has 15 bytes instead of 19: it is truncated"):
        _check(engine, verify_hash=False)
    engine.write_bytes(_PLAN[::-1])
    _check(engine, verify_hash=False)
    with pytest.raises(EngineError, match="SHA-256 differs"):
        _check(engine)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no manifest"),
        ("{", "is damaged"),
        ("{}", "is damaged: no entry 'schema_version'"),
        ('{"schema_version": 99}', "its schema version is 99, not 1"),
        ('{"schema_version": 1}', "is damaged: no entry 'graph'"),
        ("[]", "is damaged"),
    ],
)
def test_damaged_manifest_is_refused(engine: Path, content: str | None, message: str) -> None:
    path = engine.with_suffix(".json")
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(EngineError, match=message) as raised:
        read_engine_manifest(path, engine.parents[2])
    assert "groot-int8 build --bundle" in str(raised.value)


def test_profile_of_another_rank_is_damage(engine: Path) -> None:
    path = engine.with_suffix(".json")
    content = json.loads(path.read_text())
    content["inputs"]["x"]["profile"] = [[1], [2]]
    path.write_text(json.dumps(content))
    with pytest.raises(EngineError, match="is damaged"):
        read_engine_manifest(path, engine.parents[2])


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is installed here"
)
def test_missing_tensorrt_is_named_with_the_way_to_get_it(tiny_bundle: Path) -> None:
    with pytest.raises(EngineError, match=r"TensorRT cannot be imported.*JetPack"):
        load_engine("tensorrt", tiny_bundle / "onnx" / "dit_model.onnx")
    with pytest.raises(EngineError, match="TensorRT cannot be imported"):
        Policy.load(tiny_bundle, engine="tensorrt")


def test_missing_gpu_or_cuda_python_is_named() -> None:
    try:
        Cuda()
    except EngineError as error:
        missing = "no NVIDIA" if isinstance(error, CudaError) else "pip install cuda-python"
        found = str(error)
    else:
        pytest.skip("there is a GPU here")
    assert missing in found
