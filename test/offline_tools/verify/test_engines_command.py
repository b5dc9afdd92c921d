"""Hazards of comparing engines: a wrong one that passes, and a report that outlives its engines.

TensorRT and a GPU are not here. ONNX Runtime answers in the engines' place, from the same graphs
or from damaged ones; everything else is what runs on a device.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from groot_int8_ros.errors import EngineError
from groot_int8_ros.policy.bundle import open_bundle
from groot_int8_ros.policy.engines import engine_report, tensorrt_engine
from groot_int8_ros.policy.engines.cuda import Device
from groot_int8_ros.policy.engines.engine_report import (
    EngineReport,
    EnginesHere,
    engines_here,
    read_engine_report,
    report_path,
)
from groot_int8_ros.policy.engines.onnxruntime_engine import OnnxRuntimeEngine
from groot_int8_ros.policy.engines.tensorrt_manifest import EngineManifest, engine_folder
from groot_int8_ros.policy.policy import Policy
from offline_tools.cli import main
from offline_tools.verify import engines_command

Reseal = Callable[[Path], None]

HASHES = {"backbone": "a" * 64, "action_head": "b" * 64}
DEVICE = Device("Orin", "8.7", 8, 16 << 30, integrated=True)


def _manifest(name: str, sha256: str, option: str) -> EngineManifest:
    return EngineManifest(
        graph=f"onnx/{name}.onnx",
        graph_sha256={f"onnx/{name}.onnx": "0" * 64},
        engine_sha256=sha256,
        engine_bytes=6,
        device_memory_bytes=0,
        precision="fp16",
        quantization="none",
        layer_precision={},
        calibration={},
        library="tensorrt",
        library_version="10.3.0",
        device=DEVICE,
        inputs={},
        outputs={},
        build_options=("--graph", name, option),
        build_flags=(),
        seconds=1.0,
        peak_memory_bytes=1,
    )


def _here(bundle: Path) -> EnginesHere:
    manifests = {name: _manifest(name, sha256, "--exact") for name, sha256 in HASHES.items()}
    return EnginesHere(bundle / "engines" / "10.3.0-orin-sm87", "a stand-in", manifests)


@pytest.fixture
def found_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the bundle have engines for a device that seems to be here."""
    for module in (engines_command, engine_report):
        monkeypatch.setattr(module, "engines_here", lambda bundle: _here(bundle.folder))


@pytest.fixture
def engines_of(found_here: None, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Let the graphs of some bundle answer in the place of the engines."""

    def put(other: Path) -> None:
        def run(
            function: Callable[..., Any], bundle: Path, kind: str, *rest: Any, **_: Any
        ) -> Any:
            return function(other if kind == "tensorrt" else bundle, "onnxruntime", *rest)

        monkeypatch.setattr(engines_command, "run_in_child", run)

    return put


def _verify(bundle: Path, *options: object) -> int:
    return main([str(word) for word in ("verify-engines", "--bundle", bundle, *options)])


def _report(bundle: Path) -> EngineReport:
    report = read_engine_report(report_path(bundle, _here(bundle).folder))
    assert report is not None
    return report


def _change_scale(bundle: Path, value: float) -> None:
    """Weigh what the small head's features add to its actions by something else than 0.001."""
    path = bundle / "onnx" / "action_head.onnx"
    model = onnx.load(path)
    (scale,) = [node for node in model.graph.node if node.output[0] == "scale"]
    scale.attribute[0].f = value
    onnx.save(model, path)


@pytest.fixture
def engines_with(
    small_copy: Path, engines_of: Callable[[Path], None], reseal: Reseal, tmp_path: Path
) -> Callable[[float], None]:
    """Let a copy of the bundle with another scale answer in the place of the engines."""

    def put(scale: float) -> None:
        other = Path(shutil.copytree(small_copy, tmp_path / "other"))
        _change_scale(other, scale)
        reseal(other)
        engines_of(other)

    return put


@pytest.mark.parametrize(
    ("fixture", "recorded"),
    [
        pytest.param("tiny_bundle", True, id="reference graphs, recorded frames"),
        pytest.param("deployed_bundle", True, id="deployed graphs, recorded frames"),
        pytest.param("deployed_bundle", False, id="deployed graphs, noise"),
    ],
)
def test_engines_that_answer_like_their_graphs_pass_and_the_report_names_them(
    request: pytest.FixtureRequest,
    found_here: None,
    tiny_dataset: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    fixture: str,
    recorded: bool,
) -> None:
    pytest.importorskip("torch", reason="these bundles are exported from a checkpoint")
    bundle = Path(shutil.copytree(request.getfixturevalue(fixture), tmp_path / "bundle"))
    # In processes of their own, as on a device.
    monkeypatch.setattr(engines_command, "_KINDS", ("onnxruntime", "onnxruntime"))
    options = ["--dataset", tiny_dataset] if recorded else []
    assert _verify(bundle, "--samples", 2, *options) == 0
    assert "PASS" in capsys.readouterr().out
    report = _report(bundle)
    assert (report.engines, report.samples, report.passed) == (HASHES, 2, True)
    assert report.source == (tiny_dataset.name if recorded else "generated noise")
    assert report.relative_l2 == 0.0


@pytest.mark.parametrize("scale", [-1.0, np.nan])
def test_engines_that_answer_otherwise_fail_and_are_not_to_be_run(
    small_copy: Path,
    engines_with: Callable[[float], None],
    capsys: pytest.CaptureFixture[str],
    scale: float,
) -> None:
    engines_with(scale)
    assert _verify(small_copy) == 1
    out = capsys.readouterr().out
    assert "Do not run them" in out
    assert f"groot-int8 build --bundle {small_copy} --exact" in out
    report = _report(small_copy)
    assert report.passed is False
    assert (report.relative_l2 is None) == ("not finite" in out) == bool(np.isnan(scale))


def test_the_threshold_that_the_user_sets_decides(
    small_copy: Path, engines_with: Callable[[float], None]
) -> None:
    engines_with(0.001001)
    assert _verify(small_copy) == 0
    error = _report(small_copy).relative_l2
    assert error
    assert _verify(small_copy, "--max-error", error / 2) == 1


def test_graphs_that_overflow_by_themselves_say_nothing_of_the_engines(
    small_copy: Path,
    engines_of: Callable[[Path], None],
    reseal: Reseal,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _change_scale(small_copy, np.nan)
    reseal(small_copy)
    engines_of(small_copy)
    assert _verify(small_copy) == 2
    assert "nothing is said of the engines" in capsys.readouterr().err
    assert not (small_copy / "reports").exists()


@pytest.mark.parametrize(("scale", "code"), [(-1.0, 1), (0.001, 2)])
def test_a_verdict_that_cannot_be_kept_is_given_all_the_same(
    small_copy: Path,
    engines_with: Callable[[float], None],
    capsys: pytest.CaptureFixture[str],
    scale: float,
    code: int,
) -> None:
    engines_with(scale)
    (small_copy / "reports").write_text("a file where a folder is to be")
    assert _verify(small_copy) == code
    out = capsys.readouterr().out
    assert "the verdict was not kept" in out
    assert ("FAIL" in out) == (code == 1)


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is installed here"
)
def test_without_tensorrt_nothing_is_answered_and_nothing_written(
    small_copy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines_command, "answers", lambda *_: pytest.fail("it answered"))
    assert _verify(small_copy) == 2
    assert "JetPack" in capsys.readouterr().err
    assert not (small_copy / "reports").exists()


@pytest.mark.parametrize(
    ("words", "code"), [(["verify-engines"], 2), (["doctor", "--offline", "--no-hashes"], 1)]
)
def test_a_robot_without_onnx_runtime_is_told_so(
    small_deployed: Path, words: list[str], code: int
) -> None:
    # In an interpreter of its own: this one has imported it.
    program = (
        "import sys; sys.modules['onnxruntime'] = None; "
        "from offline_tools.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *words, "--bundle", str(small_deployed)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert "pip install onnxruntime" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The graphs that a policy asked engines of; ONNX Runtime runs them."""
    graphs: list[Path] = []

    def load(kind: str, graph: Path, **_: Any) -> OnnxRuntimeEngine:
        graphs.append(graph)
        return OnnxRuntimeEngine(graph)

    monkeypatch.setattr("groot_int8_ros.policy.policy.load_engine", load)
    return graphs


@pytest.mark.parametrize(
    ("changed", "refused"),
    [
        pytest.param({"passed": False, "relative_l2": 0.2}, True, id="wrong"),
        pytest.param({"passed": False, "relative_l2": None}, True, id="not finite"),
        pytest.param({"passed": True}, False, id="right"),
        pytest.param(
            {"passed": False, "engines": HASHES | {"backbone": "c" * 64}}, False, id="built again"
        ),
    ],
)
def test_engines_that_were_found_wrong_are_not_loaded_and_others_are(
    small_copy: Path,
    found_here: None,
    loaded: list[Path],
    changed: dict[str, Any],
    refused: bool,
) -> None:
    Policy.load(small_copy, engine="tensorrt").close()
    right = EngineReport(HASHES, "a GPU", "noise", 3, 0.01, 0.03, passed=True)
    path = report_path(small_copy, _here(small_copy).folder)
    replace(right, **changed).write(path)
    # What another device found says nothing of this one.
    replace(right, passed=False).write(path.with_name("8.6.1-h100-sm90.json"))
    loaded.clear()
    if refused:
        with pytest.raises(EngineError, match="are wrong: groot-int8 verify-engines") as found:
            Policy.load(small_copy, engine="tensorrt")
        assert f"groot-int8 build --bundle {small_copy} --exact" in str(found.value)
        assert not loaded
    else:
        Policy.load(small_copy, engine="tensorrt").close()
        assert loaded


def test_engines_whose_report_cannot_be_read_are_not_loaded(
    small_copy: Path, found_here: None, loaded: list[Path]
) -> None:
    # A folder in its place: a file that others may not read, root reads.
    report_path(small_copy, _here(small_copy).folder).mkdir(parents=True)
    with pytest.raises(EngineError, match="cannot be read"):
        Policy.load(small_copy, engine="tensorrt")
    assert not loaded
    Policy.load(small_copy, engine="onnxruntime").close()


def test_the_engines_of_the_device_that_is_here_are_found_and_a_missing_one_is_named(
    small_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensorrt = types.SimpleNamespace(__version__="10.3.0")
    cuda = types.SimpleNamespace(device=lambda: DEVICE)
    monkeypatch.setattr(tensorrt_engine, "import_tensorrt", lambda: tensorrt)
    monkeypatch.setattr(engine_report, "Cuda", lambda: cuda)
    bundle = open_bundle(small_copy)
    folder = engine_folder(small_copy, "10.3.0", DEVICE)
    folder.mkdir(parents=True)
    for name, sha256 in HASHES.items():
        with pytest.raises(EngineError, match=f"{name}.engine does not exist"):
            engines_here(bundle)
        manifest = _manifest(name, sha256, "--low-memory")
        (folder / f"{name}.engine").write_bytes(b"engine")
        (folder / f"{name}.json").write_text(manifest.to_json())
    here = engines_here(bundle)
    assert (here.hashes, here.folder) == (HASHES, folder)
    assert {manifest.build_options[2:] for manifest in here.manifests.values()} == {
        ("--low-memory",)
    }


def test_engines_built_with_different_options_are_to_be_built_again_with_their_own() -> None:
    bundle = Path("my bundle")
    assert (
        _here(bundle).rebuild_commands(bundle) == "groot-int8 build --bundle 'my bundle' --exact"
    )
    options = zip(HASHES, ("--low-memory", "--exact"), strict=True)
    manifests = {name: _manifest(name, HASHES[name], option) for name, option in options}
    first, second = EnginesHere(bundle, "", manifests).rebuild_commands(bundle).split("; ")
    assert first == "groot-int8 build --bundle 'my bundle' --graph backbone --low-memory"
    assert second == "groot-int8 build --bundle 'my bundle' --graph action_head --exact"
