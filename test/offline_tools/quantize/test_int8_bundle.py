"""An INT8 bundle is whole, says what it is, keeps its promise of accuracy, or is not written."""

from __future__ import annotations

import errno
import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from groot_int8_ros.capture.store import LIVE, CaptureStore, CaptureWriter
from groot_int8_ros.errors import (
    BundleError,
    CaptureError,
    GrootError,
    OutputError,
    QuantizationError,
)
from groot_int8_ros.policy.bundle import open_bundle
from groot_int8_ros.policy.files import sha256_of_file
from groot_int8_ros.policy.policy import Policy
from offline_tools.cli import main
from offline_tools.engine.calibration_cache import CacheRecord, write_cache
from offline_tools.quantize import int8_bundle
from offline_tools.quantize.calibration_set import CalibrationSet
from offline_tools.quantize.graph_audit import audit_bundle
from offline_tools.quantize.int8_bundle import (
    DEFAULT_BUDGET,
    FIXED_SCHEMES,
    QuantizeOptions,
    QuantizeResult,
    quantize_bundle,
)
from offline_tools.quantize.layers import find_layers, load_graph
from offline_tools.quantize.statistics import collect


def _options(bundle: Path, store: Path, output: Path, **changes: Any) -> QuantizeOptions:
    base = QuantizeOptions(
        bundle, store, output, scheme="row", budget=None, search_samples=2, threads=1
    )
    return replace(base, **changes)


def _quantize(options: QuantizeOptions) -> QuantizeResult:
    return quantize_bundle(options, lambda _: None)


@pytest.fixture(scope="module")
def auto(fp16_bundle: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("auto") / "int8"
    _quantize(_options(fp16_bundle, store, output, scheme="auto", budget=DEFAULT_BUDGET))
    return output


def test_auto_stays_within_the_budget_with_most_weights_in_int8(
    auto: Path, fp16_bundle: Path, store: Path
) -> None:
    bundle = open_bundle(auto)
    records = [bundle.manifest.graphs[name].quantization for name in ("backbone", "dit")]
    assert all(record is not None for record in records)
    assert records[0] is not None
    assert records[0].errors["relative_l2"] <= DEFAULT_BUDGET
    sizes = [
        sum(folder.manifest.files[f"onnx/{name}.onnx.data"][1] for name in _LARGE)
        for folder in (bundle, open_bundle(fp16_bundle))
    ]
    assert sizes[0] < 0.8 * sizes[1]


_LARGE = ("backbone_model", "dit_model")


def test_the_recorded_error_is_what_the_policy_shows(
    auto: Path, fp16_bundle: Path, store: Path
) -> None:
    from groot_int8_ros.policy.preprocess import ModelInputs
    from groot_int8_ros.policy.reference_graphs import ReferenceGraphs

    held_out = CalibrationSet(CaptureStore.open(store), open_bundle(fp16_bundle)).split.held_out
    samples = [one for i, one in enumerate(CaptureStore.open(store).samples()) if i in held_out]
    answers = []
    used = 0
    for folder in (fp16_bundle, auto):
        policy = Policy.load(folder)
        for sample in samples:
            assert sample.backbone is not None
            assert sample.normalised_state is not None
            assert sample.noise is not None
            inputs = ModelInputs(
                pixel_values=sample.backbone.pixel_values,
                input_ids=sample.backbone.input_ids[None],
                attention_mask=sample.backbone.attention_mask[None],
                state=sample.normalised_state[None],
            )
            graphs = policy.graphs
            assert isinstance(graphs, ReferenceGraphs)
            answers.append(graphs.actions(inputs, graphs.features(inputs), sample.noise))
        used = sum(key.dim for key in policy.processor.action_keys)
        policy.close()
    half = len(samples)
    wanted, found = (np.stack(part)[..., :used] for part in (answers[:half], answers[half:]))
    record = open_bundle(auto).manifest.graphs["dit"].quantization
    assert record is not None
    error = float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
    assert error == pytest.approx(record.errors["relative_l2"], rel=0.05)


def test_the_audit_agrees_with_the_manifest_layer_by_layer(auto: Path) -> None:
    bundle = open_bundle(auto)
    for name, verdicts in audit_bundle(bundle).items():
        record = bundle.manifest.graphs[name].quantization
        assert (record is None) == (name in {"conditioner", "action_encoder", "action_decoder"})
        assert not any(verdict.failed for verdict in verdicts)
        found = {verdict.layer for verdict in verdicts if verdict.verdict.value == "INT8"}
        assert found == (set() if record is None else set(record.layers))


def test_nothing_but_the_bundle_is_left_and_the_float_bundle_stays_whole(
    auto: Path, fp16_bundle: Path
) -> None:
    assert {path.name for path in auto.iterdir()} == {
        *(path.name for path in fp16_bundle.iterdir()),
        "reports",
    }
    # A second name for external data is what ONNX takes for an attack.
    files = [*open_bundle(auto).manifest.files, *open_bundle(fp16_bundle).manifest.files]
    assert all((auto / name).stat().st_nlink == 1 for name in files)


@pytest.mark.parametrize("scheme", sorted(set(FIXED_SCHEMES) - {"static-cache"}))
def test_every_fixed_scheme_gives_a_bundle_that_opens(
    fp16_bundle: Path, store: Path, tmp_path: Path, scheme: str
) -> None:
    _quantize(_options(fp16_bundle, store, tmp_path / "int8", scheme=scheme))
    record = open_bundle(tmp_path / "int8").manifest.graphs["dit"].quantization
    assert record is not None
    assert set(record.layers.values()) == {FIXED_SCHEMES[scheme]}
    assert (record.calibration_sha256 is None) == (scheme == "row")
    assert record.errors["relative_l2"] < 0.1


@pytest.fixture(scope="module")
def dit_cache(fp16_bundle: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration cache in TensorRT's format, with the largest magnitudes as its ranges."""
    graph = open_bundle(fp16_bundle).graph_path("dit")
    layers = find_layers(load_graph(graph))
    feeds = CalibrationSet(CaptureStore.open(store), open_bundle(fp16_bundle)).fit_feeds("dit")
    seen = collect(graph, feeds, layers, rows=1, seed=0, threads=1)
    path = tmp_path_factory.mktemp("cache") / "dit.cache"
    lines = [
        f"{name}: {struct.pack('>f', one.channel_max.max() / 127).hex()}"
        for name, one in seen.inputs.items()
    ]
    path.write_text("\n".join(["TRT-101401-EntropyCalibration2", *lines]) + "\n")
    return path


def test_scales_of_a_tensorrt_cache_are_used_as_they_are(
    fp16_bundle: Path, store: Path, dit_cache: Path, tmp_path: Path
) -> None:
    options = _options(
        fp16_bundle,
        store,
        tmp_path / "cache",
        scheme="static-cache",
        calibration_caches={"dit": dit_cache},
    )
    _quantize(options)
    _quantize(
        replace(
            options,
            output=tmp_path / "max",
            scheme="static-max",
            calibration_caches={},
            layers=("transformer_blocks.*", "timestep_encoder.*", "proj_out*"),
        )
    )
    found, expected = (open_bundle(tmp_path / name) for name in ("cache", "max"))
    record = found.manifest.graphs["dit"].quantization
    assert record is not None
    assert record.calibration_sha256 == sha256_of_file(dit_cache)
    # A graph without a cache stays as it was, and the same ranges make the same graph.
    assert (
        found.manifest.graphs["backbone"] == open_bundle(fp16_bundle).manifest.graphs["backbone"]
    )
    file = found.manifest.graphs["dit"].file
    for name in (file, f"{file}.data"):
        assert (found.folder / name).read_bytes() == (expected.folder / name).read_bytes()


def test_cache_that_does_not_fit_the_graph_is_refused(
    fp16_bundle: Path, store: Path, dit_cache: Path, tmp_path: Path
) -> None:
    short, stale = tmp_path / "short.cache", tmp_path / "stale.cache"
    short.write_text("\n".join(dit_cache.read_text().splitlines()[:-1]) + "\n")
    write_cache(stale, dit_cache.read_bytes(), CacheRecord("0" * 64, "0" * 64, 3))
    for caches, message in (
        ({"dit": short}, "has no scale for 1 of"),
        ({"dit": stale}, "made from another ONNX graph: it is stale"),
        ({"dit": tmp_path / "nothing"}, "cannot be read as a calibration cache"),
        ({"head": dit_cache}, "the graphs that can be INT8 are backbone, dit"),
        ({}, "--calibration-cache go together"),
    ):
        with pytest.raises(GrootError, match=message):
            _quantize(
                _options(
                    fp16_bundle,
                    store,
                    tmp_path / "int8",
                    scheme="static-cache",
                    calibration_caches=caches,
                )
            )
        assert not (tmp_path / "int8").exists()


def test_layers_that_the_patterns_leave_out_stay_float(
    fp16_bundle: Path, store: Path, tmp_path: Path
) -> None:
    patterns = ("transformer_blocks.*", "!*.to_v")
    _quantize(_options(fp16_bundle, store, tmp_path / "int8", layers=patterns))
    graphs = open_bundle(tmp_path / "int8").manifest.graphs
    assert graphs["backbone"].precision == "fp16"
    record = graphs["dit"].quantization
    assert record is not None
    assert all(name.startswith("transformer_blocks.") for name in record.layers)
    assert not any(name.endswith(".to_v") for name in record.layers)


def test_a_scheme_that_misses_its_limit_is_written_only_when_accepted(
    fp16_bundle: Path, store: Path, tmp_path: Path
) -> None:
    options = _options(fp16_bundle, store, tmp_path / "int8", budget=1e-4)
    with pytest.raises(QuantizationError, match=r"times the limit, and nothing was written"):
        _quantize(options)
    assert list(tmp_path.iterdir()) == []
    result = _quantize(replace(options, accept=True))
    assert result.share is not None
    assert result.share > 1.0


def test_a_limit_in_joint_units_binds(fp16_bundle: Path, store: Path, tmp_path: Path) -> None:
    options = _options(fp16_bundle, store, tmp_path / "int8", max_joint_error={"gripper": 1e-6})
    with pytest.raises(QuantizationError, match="in joint units"):
        _quantize(options)


def test_a_limit_of_an_unknown_key_is_refused_before_anything_is_read(
    fp16_bundle: Path, tmp_path: Path
) -> None:
    options = _options(fp16_bundle, tmp_path / "no store yet", tmp_path / "int8")
    with pytest.raises(QuantizationError, match=r"names 'leg'.*single_arm, gripper"):
        _quantize(replace(options, max_joint_error={"gripper": 1.0, "leg": 1.0}))


def test_auto_keeps_a_limit_in_joint_units(fp16_bundle: Path, store: Path, tmp_path: Path) -> None:
    patterns = ("transformer_blocks.*",)
    every = _quantize(_options(fp16_bundle, store, tmp_path / "row", layers=patterns))
    limit = every.errors.max_error["single_arm"] / 2
    options = _options(fp16_bundle, store, tmp_path / "auto", scheme="auto", layers=patterns)
    result = _quantize(replace(options, max_joint_error={"single_arm": limit}))
    assert result.errors.max_error["single_arm"] <= limit
    record = result.manifest.graphs["dit"].quantization
    assert record is not None
    assert 0 < len(record.layers) < len(result.layers["dit"])


def test_a_budget_that_no_int8_layer_meets_is_refused_with_numbers(
    fp16_bundle: Path, store: Path, tmp_path: Path
) -> None:
    options = _options(
        fp16_bundle, store, tmp_path / "int8", scheme="auto", budget=1e-9, max_evaluations=2
    )
    with pytest.raises(QuantizationError, match=r"no plan with an INT8 layer .*--budget"):
        _quantize(options)
    assert list(tmp_path.iterdir()) == []


def test_a_quantised_bundle_is_not_quantised_again(
    auto: Path, store: Path, tmp_path: Path
) -> None:
    with pytest.raises(BundleError, match=r"quantised already .*scheme auto"):
        _quantize(_options(auto, store, tmp_path / "int8"))


def test_samples_of_another_checkpoint_are_refused(
    tiny_bundle: Path, store: Path, tmp_path: Path
) -> None:
    with pytest.raises(CaptureError, match="checkpoint_sha256"):
        _quantize(_options(tiny_bundle, store, tmp_path / "int8"))


def test_samples_that_an_int8_policy_saw_are_refused(
    fp16_bundle: Path, store: Path, tmp_path: Path
) -> None:
    captured = Path(shutil.copytree(store, tmp_path / "store"))
    index = json.loads((captured / "capture.json").read_text())
    index["meta"]["precision"]["dit"] = "int8"
    (captured / "capture.json").write_text(json.dumps(index))
    with pytest.raises(QuantizationError, match="captured with an INT8 policy"):
        _quantize(_options(fp16_bundle, captured, tmp_path / "int8"))


def test_a_set_too_small_to_judge_on_is_refused(
    capture_into: Callable[[Path, Path, int, Path], Path],
    fp16_bundle: Path,
    tiny_dataset: Path,
    tmp_path: Path,
) -> None:
    single = capture_into(fp16_bundle, tiny_dataset, 1, tmp_path / "single")
    with pytest.raises(QuantizationError, match=r"1 sample\(s\).*at least 2"):
        _quantize(_options(fp16_bundle, single, tmp_path / "int8"))


def test_a_small_set_is_told_and_goes_into_the_manifest(
    fp16_bundle: Path, store: Path, tmp_path: Path
) -> None:
    count = len(CaptureStore.open(store))
    assert count < 32
    told: list[str] = []
    options = _options(fp16_bundle, store, tmp_path / "int8", layers=("*.to_q",))
    result = quantize_bundle(options, told.append)
    assert f"note: only {count} calibration samples; static ranges are guesses" in told
    assert f"calibrated on {count} samples only" in result.manifest.notes


def test_a_capture_that_was_killed_is_told_until_it_is_resumed(
    fp16_bundle: Path,
    tiny_dataset: Path,
    kill_a_capture: Callable[[Path, Path, Path], None],
    tmp_path: Path,
) -> None:
    captured, told = tmp_path / "store", list[str]()

    def notes(name: str) -> list[str]:
        told.clear()
        options = _options(fp16_bundle, captured, tmp_path / name, layers=("*.to_q",))
        quantize_bundle(options, told.append)
        return [line for line in told if line.startswith("note: the ")]

    kill_a_capture(fp16_bundle, tiny_dataset, captured)
    assert notes("first") == [
        f"note: the capture into {captured} did not end, so its 16 samples are the first ones and "
        "not spread over the recording; the same groot-int8 calibrate command with --resume "
        "finishes it"
    ]
    command = ["calibrate", "--bundle", str(fp16_bundle), "--dataset", str(tiny_dataset)]
    command += ["--samples", "32", "--seed", "0", "--output", str(captured), "--resume"]
    assert main(command) == 0
    assert notes("resumed") == []


def test_a_recorders_store_is_flagged_where_it_was_not_finished_and_cannot_be_resumed(
    fp16_bundle: Path, store: Path, tmp_path: Path
) -> None:
    source = CaptureStore.open(store)
    writer = CaptureWriter(tmp_path / "live", replace(source.meta, origin=LIVE))
    for sample in source.samples():
        writer.add(sample)
    writer.flush()
    told: list[str] = []
    options = _options(fp16_bundle, writer.folder, tmp_path / "first", layers=("*.to_q",))
    quantize_bundle(options, told.append)
    (note,) = [line for line in told if "did not end" in line]
    assert "the recording into" in note
    assert "--resume" not in note
    writer.finish()
    told.clear()
    quantize_bundle(replace(options, output=tmp_path / "second"), told.append)
    assert not [line for line in told if "did not end" in line]


def test_an_empty_set_is_refused(fp16_bundle: Path, store: Path, tmp_path: Path) -> None:
    meta = CaptureStore.open(store).meta
    CaptureWriter(tmp_path / "empty", meta)
    with pytest.raises(CaptureError, match=r"holds no samples.*groot-int8 calibrate"):
        _quantize(_options(fp16_bundle, tmp_path / "empty", tmp_path / "int8"))
    with pytest.raises(CaptureError, match=r"no capture store.*groot-int8 calibrate"):
        _quantize(_options(fp16_bundle, tmp_path / "nothing", tmp_path / "int8"))
    assert not (tmp_path / "int8").exists()


def test_a_pattern_that_names_nothing_is_refused(
    fp16_bundle: Path, store: Path, tmp_path: Path
) -> None:
    with pytest.raises(QuantizationError, match=r"'\*\.nothing' matches no layer .*looks like"):
        _quantize(_options(fp16_bundle, store, tmp_path / "int8", layers=("*.nothing",)))


def test_an_occupied_output_is_left_alone(fp16_bundle: Path, store: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(OutputError, match="exists and is not empty"):
        _quantize(_options(fp16_bundle, store, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_full_disk_is_told_before_and_leaves_nothing_behind(
    fp16_bundle: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = _options(fp16_bundle, store, tmp_path / "int8")
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        with pytest.raises(OutputError, match="nothing was written"):
            _quantize(options)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(int8_bundle, "quantize_graph", full)
        with pytest.raises(OutputError, match="No space left"):
            _quantize(options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scheme": "magic"}, "unknown scheme 'magic'"),
        ({"scheme": "auto"}, "needs a --budget"),
        ({"budget": 0.0}, "must be positive"),
        ({"budget": float("nan")}, "must be positive"),
        ({"migration_alpha": 1.5}, "from 0 to 1"),
        ({"percentile": 0.9999}, "above 50"),
        ({"judge_samples": 0}, "at least 1"),
    ],
)
def test_options_out_of_range_are_refused(
    fp16_bundle: Path, store: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(QuantizationError, match=message):
        _quantize(_options(fp16_bundle, store, tmp_path / "int8", **changes))


def test_a_manifest_whose_record_is_damaged_is_refused(auto: Path, tmp_path: Path) -> None:
    content = json.loads((auto / "manifest.json").read_text())
    record = content["graphs"]["dit"]["quantization"]
    broken: list[tuple[Any, str]] = [
        (lambda: record["layers"].update(x={"activation": "magic"}), "'magic'"),
        (lambda: record.update(layers={}), "lists no layer"),
        (lambda: record.update(source_sha256="abc"), "not a SHA-256"),
        (lambda: content["graphs"]["dit"].pop("quantization"), "quantisation record"),
    ]
    original = json.dumps(content)
    for damage, message in broken:
        content = json.loads(original)
        record = content["graphs"]["dit"]["quantization"]
        damage()
        folder = tmp_path / message.strip("'")
        folder.mkdir()
        (folder / "manifest.json").write_text(json.dumps(content))
        with pytest.raises(BundleError, match=message):
            open_bundle(folder)


def test_the_command_prints_schemes_size_and_error(
    fp16_bundle: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--bundle", str(fp16_bundle), "--calibration", str(store), "--scheme", "row"]
    assert main(["quantize", *arguments, "--output", str(tmp_path / "int8")]) == 0
    printed = capsys.readouterr().out
    for wanted in ("row", "MB ->", "relative L2", "gripper: max"):
        assert wanted in printed


@pytest.mark.parametrize("limit", ["arm=wide", "arm=0", "-1", "nan", ""])
def test_a_joint_limit_that_is_no_number_above_zero_is_refused(
    fp16_bundle: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], limit: str
) -> None:
    arguments = ["--bundle", str(fp16_bundle), "--calibration", str(store)]
    output = ["--output", str(tmp_path / "int8"), "--max-joint-error", limit]
    assert main(["quantize", *arguments, *output]) == 2
    assert f"KEY=NUMBER, not {limit!r}" in capsys.readouterr().err
