"""Hazards of a calibration cache: damaged, of another graph, of other samples."""

from __future__ import annotations

from pathlib import Path

import pytest

from groot_int8_ros.errors import CalibrationError
from offline_tools.engine.calibration_cache import (
    CacheRecord,
    check_cache,
    read_cache,
    scales_of_tensors,
    write_cache,
)

_CONTENT = b"TRT-8600-EntropyCalibration2\nx: 3c010a14\na: b: 3f800000\n"


def test_scales_are_big_endian_floats_and_names_may_hold_a_colon(tmp_path: Path) -> None:
    path = tmp_path / "calibration.cache"
    path.write_bytes(_CONTENT)
    cache = read_cache(path)
    assert (cache.tensorrt_version, cache.algorithm) == ("8600", "EntropyCalibration2")
    assert cache.scales == {"x": pytest.approx(1 / 127, rel=1e-3), "a: b": 1.0}


def test_cache_of_a_real_backbone_is_read(shared_data_dir: Path) -> None:
    path = shared_data_dir / "data" / "n1d6_backbone_calibration" / "calibration.cache"
    if not path.is_file():
        pytest.skip(f"no {path}")
    cache = read_cache(path)
    assert cache.tensorrt_version == "101401"
    # Normalised pixels reach 1, and the massive activation of the second layer 1.9e4.
    assert cache.scales["pixel_values"] * 127 == pytest.approx(1.0, rel=1e-3)
    reach = {name: scale * 127 for name, scale in cache.scales.items() if "layers.2/mlp" in name}
    assert max(reach.values()) == pytest.approx(1.9e4, rel=0.05)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no calibration cache.*''"),
        (b"x: 3c010a14\n", "is no calibration cache"),
        (b"TRT-8600-EntropyCalibration2\n", "holds no scales"),
        (b"TRT-8600-EntropyCalibration2\nx: 3c010a140\n", "line 2: 'x: 3c010a140'"),
        (b"TRT-8600-EntropyCalibration2\nx: 3c010a1z\n", "line 2"),
        (b"TRT-8600-EntropyCalibration2\nx: 7fc00000\n", "line 2: the scale of x is nan"),
        (b"TRT-8600-EntropyCalibration2\nx: bf800000\n", r"line 2: the scale of x is -1\.0"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_damaged_cache_is_refused_by_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "calibration.cache"
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match=message):
        read_cache(path)


def test_scale_that_another_graphs_cache_lacks_is_named(tmp_path: Path) -> None:
    path = tmp_path / "calibration.cache"
    path.write_bytes(_CONTENT + b"dead: 00000000\n")
    cache = read_cache(path)
    assert scales_of_tensors(cache, ["a: b"], "the cache") == {"a: b": 1.0}
    for name in ("y", "dead"):
        with pytest.raises(CalibrationError, match=rf"no scale for 1 of 2 tensors \({name}\)"):
            scales_of_tensors(cache, ["x", name], "the cache")


def test_cache_is_used_for_its_own_graph_and_samples_alone(tmp_path: Path) -> None:
    path = tmp_path / "calibration.cache"
    record = CacheRecord(graph_sha256="a" * 64, samples_sha256="b" * 64, batches=3)
    write_cache(path, _CONTENT, record)
    assert check_cache(path, "a" * 64, None) == record
    assert check_cache(path, "a" * 64, "b" * 64) == record
    with pytest.raises(CalibrationError, match="another ONNX graph: it is stale"):
        check_cache(path, "c" * 64, None)
    with pytest.raises(CalibrationError, match="made from other samples"):
        check_cache(path, "a" * 64, "c" * 64)


def test_cache_of_unknown_origin_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "calibration.cache"
    path.write_bytes(_CONTENT)
    with pytest.raises(CalibrationError, match=r"nothing says which graph .* was made from"):
        check_cache(path, "a" * 64, None)
