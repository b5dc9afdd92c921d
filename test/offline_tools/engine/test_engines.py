"""Hazards of a bundle's build: options that contradict, a build that fails halfway.

TensorRT-RTX stands in for the builder, since it builds without a GPU: what runs here is the code
of `groot-int8 build`, parser, profiles, strong typing and progress monitor included.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir
import pytest

from groot_int8_ros.errors import CalibrationError, ConfigurationError, EngineError
from groot_int8_ros.policy.bundle import open_bundle
from groot_int8_ros.policy.engines.cuda import Device
from groot_int8_ros.policy.engines.onnxruntime_engine import OnnxRuntimeEngine
from groot_int8_ros.policy.engines.tensorrt_manifest import (
    check_engine_fits,
    engine_folder,
    read_engine_manifest,
)
from groot_int8_ros.policy.quantization import LayerScheme
from offline_tools.cli import main
from offline_tools.engine import build_command
from offline_tools.engine.builder import (
    BuilderSettings,
    GraphBuild,
    build_plan,
    use_timing_cache,
)
from offline_tools.engine.calibration_cache import CacheRecord, hash_of_graph, write_cache
from offline_tools.engine.child import ChildProcessBugError
from offline_tools.engine.engines import LOW_MEMORY, BuildOptions, build_engines
from offline_tools.engine.library import RTX, Library, open_library
from offline_tools.engine.profiles import lengths_of
from offline_tools.engine.weight_form import has_stored_int8_weights, write_with_float_weights
from offline_tools.quantize.layers import find_layers, load_graph
from offline_tools.quantize.qdq import quantize_graph

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec(RTX) is None,
    reason="TensorRT-RTX is not installed: pip install tensorrt-rtx-cu13 (Linux x86-64)",
)

_DEVICE = Device("NVIDIA Test Board", "8.6", 8, 16 << 30, integrated=False)


def _build(bundle: Path, **options: object) -> dict[str, object]:
    lines: list[str] = []
    built = build_engines(
        replace(BuildOptions(bundle), **options),  # type: ignore[arg-type]
        lines.append,
        library_name=RTX,
        device=_DEVICE,
    )
    assert len(lines) == 1 + 2 * len(built)
    return dict(built)


@pytest.fixture
def calibrators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets TensorRT-RTX say that it has calibrators; the processes that build know better."""
    monkeypatch.setattr(Library, "has_calibrators", True)


def _folder(bundle: Path) -> Path:
    return engine_folder(bundle, open_library(RTX).version, _DEVICE)


def test_engine_and_manifest_fit_each_other_and_the_bundle(bundle_copy: Path) -> None:
    built = _build(bundle_copy, graphs=("dit", "action_decoder"), words=("--max-seq-len", "90"))
    folder = _folder(bundle_copy)
    assert sorted(path.name for path in folder.iterdir()) == [
        "action_decoder.engine",
        "action_decoder.json",
        "dit_model.engine",
        "dit_model.json",
    ]
    manifest = read_engine_manifest(folder / "dit_model.json", bundle_copy)
    assert manifest == built["dit"]
    bundle = open_bundle(bundle_copy)
    assert {n: t.spec for n, t in manifest.inputs.items()} == bundle.manifest.graphs["dit"].inputs
    assert set(manifest.graph_sha256) == {"onnx/dit_model.onnx", "onnx/dit_model.onnx.data"}
    assert manifest.build_options == ("--graph", "dit", "--max-seq-len", "90")
    smallest, best, largest = manifest.inputs["vl_embs"].profile or ((), (), ())
    assert smallest[0] == largest[0] == 1
    assert smallest[1] == 1 < best[1] < largest[1]
    hashes = {name: sha256 for name, (sha256, _) in bundle.manifest.files.items()}
    check_engine_fits(
        manifest,
        folder / "dit_model.engine",
        bundle_copy,
        library_version=manifest.library_version,
        device=_DEVICE,
        recorded_sha256=hashes,
    )


def test_failed_build_leaves_the_engine_that_was_there(bundle_copy: Path) -> None:
    _build(bundle_copy, graphs=("action_decoder",))
    folder = _folder(bundle_copy)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    graph = bundle_copy / "onnx" / "action_decoder.onnx"
    graph.write_bytes(graph.read_bytes()[:-20])
    # The bundle itself is opened first and refuses a changed graph; resealed, the parser does.
    manifest = bundle_copy / "manifest.json"
    content = json.loads(manifest.read_text())
    content["files"]["onnx/action_decoder.onnx"] = {
        "sha256": hashlib.sha256(graph.read_bytes()).hexdigest(),
        "bytes": graph.stat().st_size,
    }
    manifest.write_text(json.dumps(content))
    with pytest.raises(EngineError, match="cannot parse"):
        _build(bundle_copy, graphs=("action_decoder",))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_exact_shapes_build_and_are_recorded(bundle_copy: Path) -> None:
    built = _build(bundle_copy, graphs=("conditioner",), max_seq_len=270, exact=True)
    record = built["conditioner"].inputs["hidden_states"].profile  # type: ignore[attr-defined]
    assert record == ((1, 270, 64),) * 3


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"graphs": ("nothing",)},
            ConfigurationError,
            "no graph 'nothing' for an engine; it has backbone",
        ),
        ({"exact": True}, ConfigurationError, "--exact needs --max-seq-len"),
        ({"opt_sa_seq": 5}, ConfigurationError, r"--opt-sa-seq 5: .* run 17 tokens \(1 state"),
        (
            {"max_seq_len": 240, "opt_seq_len": 250},
            ConfigurationError,
            "--opt-seq-len 250 must be from 1 to --max-seq-len 240",
        ),
        *(
            (
                {"max_seq_len": length, "exact": exact},
                ConfigurationError,
                rf"--max-seq-len {length} has no .* 216 tokens, .* Give 264 for .*, 344 for a l",
            )
            for length, exact in ((10, False), (216, True))
        ),
        ({"quantization": "qdq"}, EngineError, "has no Q/DQ: quantise the bundle first"),
        (
            {"quantization": "calibrator", "precision": "fp16"},
            ConfigurationError,
            "calibrator builds INT8 engines, not fp16",
        ),
        (
            {"quantization": "calibrator", "graphs": ("conditioner",)},
            ConfigurationError,
            "applies to backbone and dit",
        ),
        ({"precision": "bf16"}, EngineError, "export the bundle with --precision fp16"),
        ({"precision": "fp16"}, EngineError, "export the bundle with --precision fp16"),
        ({"precision": "int8"}, EngineError, "is a float graph: quantise the bundle first"),
    ],
)
def test_options_that_cannot_be_are_refused_and_nothing_is_written(
    bundle_copy: Path, options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        _build(bundle_copy, **options)
    assert not list((bundle_copy / "engines").glob("*/*.engine"))


def test_deployed_graphs_are_built_at_their_own_shapes_and_the_prefix_model_never(
    deployed_bundle: Path, fp16_deployed: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(fp16_deployed, tmp_path / "bundle"))
    built = _build(copy)
    manifest = open_bundle(copy).manifest
    assert list(built) == ["backbone", "action_head"]
    for name in built:
        found = read_engine_manifest(_folder(copy) / f"{name}.json", copy)
        assert {n: t.spec for n, t in found.inputs.items()} == manifest.graphs[name].inputs
        assert {
            tensor.profile for tensor in (*found.inputs.values(), *found.outputs.values())
        } == {None}
    assert {spec.dtype for spec in manifest.graphs["backbone"].inputs.values()} == {
        "uint8",
        "float16",
        "bool",
    }
    for options, message in (
        ({"max_seq_len": 90}, "whose shapes are fixed: leave out --max-seq-len"),
        ({"exact": True}, "whose shapes are fixed"),
        ({"graphs": ("prefix",)}, "no graph 'prefix' for an engine; it has backbone, action_head"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            _build(deployed_bundle, **options)
    assert not (deployed_bundle / "engines").exists()


@pytest.mark.parametrize("with_captures", [False, True])
@pytest.mark.parametrize("with_calibrators", [False, True])
def test_what_no_calibrator_can_do_is_refused_before_captures_are_asked_for_or_read(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    with_captures: bool,
    with_calibrators: bool,
) -> None:
    # Reading it would raise a CaptureError.
    captures = tmp_path / "nowhere" if with_captures else None
    if with_calibrators:
        request.getfixturevalue("calibrators")
    else:
        for name in ("tiny_bundle", "fp16_deployed"):
            with pytest.raises(EngineError, match=r"no INT8 calibrators.*--quantization qdq"):
                _build(request.getfixturevalue(name), quantization="calibrator", captures=captures)
    int8 = request.getfixturevalue("int8_bundle")
    with pytest.raises(EngineError, match=r"graph dit already has explicit Q/DQ.*the float"):
        _build(int8, quantization="calibrator", captures=captures)


def test_captures_are_asked_for_where_there_are_calibrators(
    tiny_bundle: Path, fp16_deployed: Path, calibrators: None
) -> None:
    for bundle in (tiny_bundle, fp16_deployed):
        with pytest.raises(CalibrationError, match=r"backbone\.cache, so --captures is needed"):
            _build(bundle, quantization="calibrator")


def test_progress_is_reported_while_it_builds(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = open_bundle(tiny_bundle, verify_hashes=False)
    record = bundle.manifest.graphs["action_encoder"]
    build = GraphBuild(
        bundle.graph_path("action_encoder"),
        "fp32",
        "fp32",
        record.inputs,
        lengths_of(bundle).profiles(record.inputs),
    )
    built = build_plan(build, LOW_MEMORY, open_library(RTX), show_progress=True)
    # A bar with the time that is left, from TensorRT's own steps.
    assert re.search(r"action_encoder: .*/\d+ \[\d\d:\d\d<", capsys.readouterr().err)
    wanted = {"strongly typed", "workspace 256 MiB", "tactic_dram 1024 MiB", "level 2"}
    assert wanted <= set(built.flags)


def test_build_that_will_not_fit_is_refused_before_any_engine_is_built(
    bundle_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Small:
        """A board whose memory is taken."""

        def device(self) -> Device:
            return replace(_DEVICE, integrated=True)

        def free_bytes(self) -> int:
            return 1 << 30

    monkeypatch.setattr("offline_tools.engine.engines.Cuda", Small)
    lines: list[str] = []
    options = BuildOptions(bundle_copy, graphs=("action_decoder",))
    with pytest.raises(EngineError, match=r"GiB of shared memory, and 1\.0 GiB are free"):
        build_engines(options, lines.append, library_name=RTX)
    assert "forecast:" in lines[-1]
    assert not list((bundle_copy / "engines").glob("*/*"))
    build_engines(replace(options, ignore_forecast=True), lines.append, library_name=RTX)
    assert len(list((bundle_copy / "engines").glob("*/*.engine"))) == 1


def test_rebuild_options_are_those_that_say_what_and_not_where() -> None:
    parser = argparse.ArgumentParser()
    build_command.configure(parser)
    given = ["--graph", "dit", "--low-memory", "--max-seq-len", "300", "--exact"]
    args = parser.parse_args(["--bundle", "b", *given, "--builder-level", "0"])
    options = build_command.options_of(args)
    words = ("--max-seq-len", "300", "--exact", "--builder-level", "0", "--low-memory")
    assert options.words == words
    assert (options.settings.workspace_mb, options.settings.level) == (256, 0)
    again = build_command.options_of(parser.parse_args(["--bundle", "b", *options.words]))
    assert (again.settings, again.exact, again.max_seq_len) == (options.settings, True, 300)


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is installed here"
)
def test_missing_tensorrt_is_named_with_the_way_to_get_it(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", "--bundle", str(tiny_bundle)]) == 2
    assert "tensorrt is not installed: it comes with JetPack" in capsys.readouterr().err


@pytest.mark.parametrize(("given", "expected"), [(None, "LAZY"), ("EAGER", "EAGER")])
def test_kernels_are_loaded_when_they_are_used_unless_the_user_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str | None, expected: str
) -> None:
    monkeypatch.setenv("CUDA_MODULE_LOADING", given or "")
    if given is None:
        monkeypatch.delenv("CUDA_MODULE_LOADING")
    assert main(["build", "--bundle", str(tmp_path)]) == 2
    # The processes that build inherit it.
    assert os.environ["CUDA_MODULE_LOADING"] == expected


@pytest.mark.parametrize("in_the_bundle", [False, True])
def test_a_capture_that_was_killed_is_told_once_before_it_calibrates(
    bundle_copy: Path,
    tiny_dataset: Path,
    kill_a_capture: Callable[[Path, Path, Path], None],
    calibrators: None,
    tmp_path: Path,
    in_the_bundle: bool,
) -> None:
    captured = bundle_copy / "calibration" if in_the_bundle else tmp_path / "store"
    options = BuildOptions(
        bundle_copy,
        quantization="calibrator",
        captures=None if in_the_bundle else captured,
    )

    def notes() -> list[str]:
        told: list[str] = []
        # As far as the builder, which has no INT8.
        with pytest.raises(ChildProcessBugError, match="no attribute 'INT8'"):
            build_engines(options, told.append, library_name=RTX, device=_DEVICE)
        return [line for line in told if line.startswith("note: ")]

    kill_a_capture(bundle_copy, tiny_dataset, captured)
    (note,) = notes()
    assert f"{captured} did not end, so its 16 samples are the first ones" in note
    assert "calibrate command with --resume finishes it" in note
    command = ["calibrate", "--bundle", str(bundle_copy), "--dataset", str(tiny_dataset)]
    command += ["--samples", "32", "--seed", "0", "--output", str(captured), "--resume"]
    assert main(command) == 0
    assert notes() == []


def test_cache_of_another_graph_is_refused_by_the_build(
    bundle_copy: Path, calibrators: None
) -> None:
    path = bundle_copy / "calibration" / "dit.cache"
    content = b"TRT-8600-EntropyCalibration2\nx: 3c010a14\n"
    options = {"quantization": "calibrator", "graphs": ("dit",)}
    write_cache(path, content, CacheRecord("c" * 64, "b" * 64, 3))
    with pytest.raises(CalibrationError, match=r"another ONNX graph: it is stale .* Remove"):
        _build(bundle_copy, **options)
    files = open_bundle(bundle_copy).manifest.files
    own = {name: sha256 for name, (sha256, _) in files.items() if "dit_model" in name}
    write_cache(path, content, CacheRecord(hash_of_graph(own), "b" * 64, 3))
    # Its own cache is taken, and it is the builder that lacks what INT8 needs.
    with pytest.raises(ChildProcessBugError, match="no attribute 'INT8'"):
        _build(bundle_copy, **options)


def test_one_cache_file_for_two_graphs_is_refused_before_either_is_built(
    bundle_copy: Path, tmp_path: Path, calibrators: None
) -> None:
    one = tmp_path / "one.cache"
    with pytest.raises(ConfigurationError, match=r"one\.cache is one file.*backbone and dit"):
        _build(bundle_copy, quantization="calibrator", calibration_cache=one)
    (tmp_path / "caches").mkdir()
    with pytest.raises(CalibrationError, match=r"caches/backbone\.cache, so --captures is needed"):
        _build(bundle_copy, quantization="calibrator", calibration_cache=tmp_path / "caches")


@pytest.mark.parametrize(("content", "same_device"), [(b"good", False), (b"damaged", True)])
def test_measured_kernels_of_elsewhere_are_not_taken(content: bytes, same_device: bool) -> None:
    # TensorRT-RTX measures nothing, so the builder's part is played here.
    taken: list[bytes] = []

    def take(cache: bytes, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if cache == b"good" and not same_device:
            return False
        taken.append(cache)
        return True

    config = types.SimpleNamespace(
        create_timing_cache=lambda data: None if data == b"damaged" else data or b"empty",
        set_timing_cache=take,
    )
    assert use_timing_cache(config, content) == [
        "timing cache of another device or damaged: begun anew"
    ]
    assert taken == [b"empty"]
    assert use_timing_cache(config, b"") == []


_WITHOUT_TORCH = """
import sys
from pathlib import Path
from groot_int8_ros.policy.engines.cuda import Device
from offline_tools.cli import main
from offline_tools.engine.builder import BuilderSettings
from offline_tools.engine.engines import LOW_MEMORY, BuildOptions, build_engines
bundle = sys.argv[1]
options = BuildOptions(
    Path(bundle), graphs=("dit",), settings=BuilderSettings(weight_form="float-pair")
)
build_engines(options, print, library_name=sys.argv[2], device=Device("B", "8.6", 8, 1, False))
sys.exit(main(["audit", "--bundle", bundle]))
"""


def test_building_and_auditing_run_where_torch_and_opencv_are_missing(
    int8_bundle: Path, repository_root: Path, tmp_path: Path
) -> None:
    # Modules that refuse to be imported, found before the real ones by the builder's process too.
    for name in ("torch", "transformers", "safetensors", "cv2"):
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError(name={name!r})\n")
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_TORCH, str(int8_bundle), RTX],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(repository_root)])},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "that should be are INT8" in done.stdout
    assert list(int8_bundle.glob("engines/*/dit_model.engine"))


@pytest.mark.parametrize("name", ["backbone", "dit"])
def test_quantised_graph_builds_in_both_forms_of_its_weights(
    int8_graph: Callable[[str, Path], Path], tmp_path: Path, tiny_bundle: Path, name: str
) -> None:
    graph = int8_graph(name, tmp_path)
    bundle = open_bundle(tiny_bundle, verify_hashes=False)
    record = bundle.manifest.graphs[name]
    profiles = lengths_of(bundle).profiles(record.inputs)
    for form, rewritten in (("int8", False), ("float-pair", True)):
        build = GraphBuild(graph, "int8", "int8", record.inputs, profiles)
        built = build_plan(build, BuilderSettings(weight_form=form), open_library(RTX))
        assert any("INT8 weights as float" in text for text in built.flags) == rewritten
        assert memoryview(built.plan).nbytes > 0


@pytest.mark.parametrize(
    ("fixture", "name"),
    [
        ("fp16_bundle", "backbone"),
        ("fp16_bundle", "dit"),
        ("fp16_deployed", "backbone"),
        ("fp16_deployed", "action_head"),
    ],
)
def test_half_precision_graph_builds_in_bfloat16(
    request: pytest.FixtureRequest, fixture: str, name: str
) -> None:
    bundle = open_bundle(request.getfixturevalue(fixture), verify_hashes=False)
    record = bundle.manifest.graphs[name]
    profiles = lengths_of(bundle).profiles(record.inputs)
    build = GraphBuild(bundle.graph_path(name), "fp16", "bf16", record.inputs, profiles)
    built = build_plan(build, BuilderSettings(level=0), open_library(RTX))
    assert any("FP16 weights as BF16" in text for text in built.flags)
    assert memoryview(built.plan).nbytes > 0


def test_weights_as_float_compute_the_same_bit_for_bit(
    int8_graph: Callable[[str, Path], Path], tmp_path: Path
) -> None:
    graph = int8_graph("dit", tmp_path)
    folder = tmp_path / "pairs"
    folder.mkdir()
    assert has_stored_int8_weights(graph)
    assert write_with_float_weights(graph, folder / graph.name) > 10
    assert not has_stored_int8_weights(folder / graph.name)
    engines = [OnnxRuntimeEngine(path, threads=1) for path in (graph, folder / graph.name)]
    random, feed = np.random.RandomState(0), {}
    for name, spec in engines[0].inputs.items():
        shape = [axis if isinstance(axis, int) else 9 for axis in (1, *spec.shape[1:])]
        values = random.standard_normal(shape)
        feed[name] = (values if spec.dtype == "float32" else np.ones(shape)).astype(spec.dtype)
    first, second = (engine.run(feed)["output"] for engine in engines)
    assert np.abs(first).max() > 0
    np.testing.assert_array_equal(first, second)


def test_each_product_of_an_unrolled_weight_gets_a_pair_of_its_own(
    deployed_bundle: Path, tmp_path: Path
) -> None:
    source = open_bundle(deployed_bundle, verify_hashes=False).graph_path("action_head")
    layers = find_layers(load_graph(source))
    graph, target = tmp_path / "shared" / source.name, tmp_path / "own" / source.name
    target.parent.mkdir()
    quantize_graph(source, graph, {layer.name: LayerScheme("row") for layer in layers}, None)
    assert write_with_float_weights(graph, target) == len(layers)
    uses = {
        node.outputs[0].name: [use.node.op_type for use in node.outputs[0].uses()]
        for node in onnx_ir.load(target).graph
        if node.op_type == "DequantizeLinear"
    }
    products = sum(len(layer.nodes) for layer in layers)
    assert products > len(layers)
    of_weights = [found for name, found in uses.items() if "weight" in str(name)]
    assert of_weights == [["MatMul"]] * products
    engines = [OnnxRuntimeEngine(path, threads=1) for path in (graph, target)]
    random = np.random.RandomState(0)
    feed = {
        name: random.standard_normal(spec.shape).astype(spec.dtype)  # type: ignore[arg-type]
        for name, spec in engines[0].inputs.items()
    }
    feed["committed_mask"][:] = False
    first, second = (engine.run(feed)["action_pred"] for engine in engines)
    assert np.abs(first).max() > 0
    np.testing.assert_array_equal(first, second)
