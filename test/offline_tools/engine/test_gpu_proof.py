"""Hazards of using the work folder of a proof again; the proof itself needs a GPU."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import pytest

from groot_int8_ros.errors import ConfigurationError
from offline_tools.engine.gpu_proof import Variant, configure, variants_of


def _variants(work: Path, *bundles: Path) -> list[Variant]:
    parser = argparse.ArgumentParser()
    configure(parser)
    also = [word for bundle in bundles[1:] for word in ("--also", str(bundle))]
    args = parser.parse_args(["--bundle", str(bundles[0]), "--work", str(work), *also])
    return list(variants_of(args, with_calibrator=True))


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "fp32"))


def test_copies_of_a_bundle_that_has_not_changed_keep_their_engines(
    bundle: Path, tmp_path: Path
) -> None:
    (bundle / "engines").mkdir()
    found = _variants(tmp_path / "work", bundle)
    assert [variant.name for variant in found] == ["fp32", "fp32-calibrator"]
    assert not any((variant.bundle / "engines").exists() for variant in found)
    engine = found[1].bundle / "engines" / "8.6.1-test-sm90" / "dit_model.engine"
    engine.parent.mkdir(parents=True)
    engine.write_bytes(b"plan")
    assert _variants(tmp_path / "work", bundle) == found
    assert engine.read_bytes() == b"plan"


def test_copy_of_what_the_bundle_was_before_is_refused_and_left(
    bundle: Path, tmp_path: Path
) -> None:
    copy = _variants(tmp_path / "work", bundle)[0].bundle
    old = (copy / "manifest.json").read_bytes()
    content = json.loads(old)
    content["files"]["onnx/dit_model.onnx"]["sha256"] = "0" * 64
    (bundle / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ConfigurationError, match=f"{copy} is no copy of {bundle} as it is now"):
        _variants(tmp_path / "work", bundle)
    assert (copy / "manifest.json").read_bytes() == old


def test_bundle_does_not_take_the_copy_of_another_of_the_same_name(
    bundle: Path, int8_bundle: Path, tmp_path: Path
) -> None:
    other = tmp_path / "int8" / bundle.name
    other.parent.mkdir()
    with pytest.raises(ConfigurationError, match="has the name of another"):
        _variants(tmp_path / "work", bundle, int8_bundle.rename(other))


def test_half_a_copy_is_refused(bundle: Path, tmp_path: Path) -> None:
    copy = _variants(tmp_path / "work", bundle)[0].bundle
    (copy / "manifest.json").unlink()
    with pytest.raises(ConfigurationError, match="remove the copy with its engines"):
        _variants(tmp_path / "work", bundle)
