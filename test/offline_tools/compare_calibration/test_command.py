"""Hazards of the comparison: a gap that nobody named, sets mixed up, judging on the captures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from groot_int8_ros.capture.inference import run_on
from groot_int8_ros.capture.store import CaptureMeta, CaptureStore, CaptureWriter
from groot_int8_ros.policy.bundle import open_bundle
from groot_int8_ros.policy.policy import Policy
from offline_tools.cli import main
from offline_tools.compare_quantization.samples import generated_observations

pytest.importorskip("onnx", reason="quantisation needs the extra 'offline'")

_GAPS = ("one-instruction", "covered-camera")


@pytest.fixture(scope="module")
def stores(fp16_deployed: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Captures and evaluation, of the bundle's one instruction."""
    bundle = open_bundle(fp16_deployed)
    assert bundle.manifest.prompts is not None
    (instruction, *_) = bundle.manifest.prompts.instructions
    folder = tmp_path_factory.mktemp("captured")
    policy = Policy.load(fp16_deployed, threads=1)
    for seed, name in enumerate(("captures", "evaluation")):
        meta = CaptureMeta.of_bundle(bundle.manifest, "test", seed=0)
        with CaptureWriter(folder / name, meta) as writer:
            for one in generated_observations(bundle, 4, seed):
                one = type(one)(one.images, one.state, instruction.text, one.stamp_ns)
                writer.add(run_on(policy, one, "drawn", seed=0, keep_images=True))
    policy.close()
    return [folder / "captures", folder / "evaluation"]


def _run(bundle: Path, stores: list[Path], output: Path, *more: str) -> int:
    captures, evaluation = map(str, stores)
    words = ["--bundle", str(bundle), "--captures", captures, "--evaluation", evaluation]
    words += ["--output", str(output), "--sizes", "3", "--bad-size", "3", "--threads", "1"]
    return main(["compare-calibration", *words, "--gaps", *_GAPS, *more])


def test_each_set_is_judged_and_a_gap_that_nobody_named_is_the_verdict(
    fp16_deployed: Path,
    stores: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # One run of one instruction: the report can name neither a task nor time that is missing.
    output = tmp_path / "out"
    assert _run(fp16_deployed, stores, output, "--schemes", "static-max") == 1
    printed = capsys.readouterr().out
    assert "does not name what is missing in one-instruction" in printed
    report = json.loads((output / "comparison.json").read_text())
    errors = {row["name"]: row["errors"] for row in report["rows"]}
    assert list(errors) == ["", "3-samples", *_GAPS]
    assert errors[""] is None
    found = {name: errors[name]["relative_l2"] for name in errors if name}
    assert all(0.0 < value < 1.0 for value in found.values())
    # Scales of other samples, so other actions.
    assert found["covered-camera"] != found["3-samples"]
    for name in found:
        bundle = open_bundle(output / "bundles" / f"{name}-static-max")
        record = bundle.manifest.graphs["action_head"].quantization
        assert record is not None
        store = CaptureStore.open(output / "sets" / name)
        assert record.calibration_sha256 == store.content_sha256
    lines = [line for line in printed.splitlines() if line.startswith("| covered-camera")]
    assert lines[0].startswith("| covered-camera | static-max | ")
    assert f"{100 * found['covered-camera']:.2f} %" in lines[0]

    # What is there is not made again, and other options are refused.
    times = {path: path.stat().st_mtime_ns for path in output.glob("bundles/*/manifest.json")}
    assert _run(fp16_deployed, stores, output, "--schemes", "static-max") == 1
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert "$ groot-int8 quantize" not in capsys.readouterr().out
    assert _run(fp16_deployed, stores, output, "--bad-size", "2") == 2
    assert "other captures or options" in capsys.readouterr().err


def test_judging_on_captured_samples_is_refused(
    fp16_deployed: Path, stores: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(fp16_deployed, [stores[0], stores[0]], tmp_path / "out") == 2
    assert "4 samples of" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
