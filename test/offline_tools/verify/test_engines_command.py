"""Hazards of comparing engines: a wrong one that passes, and a report that outlives its engines.

TensorRT and a GPU are not here. ONNX Runtime answers in the engines' place, from the same graphs
or from damaged ones; everything else is what runs on a device.
"""

from __future__ import annotations

import importlib.util
import shutil
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
from groot_int8_ros.policy.engines.engine_report import EngineReport, read_engine_report
from groot_int8_ros.policy.engines.onnxruntime_engine import OnnxRuntimeEngine
from groot_int8_ros.policy.engines.tensorrt_engine import TensorRTEngine
from groot_int8_ros.policy.policy import Policy
from offline_tools.cli import main
from offline_tools.verify import engines_command

Reseal = Callable[[Path], None]

HASHES = {"backbone": "a" * 64, "action_head": "b" * 64}


@pytest.fixture
def engines_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Let the graphs of some bundle answer in the place of the engines."""

    def put(other: Path) -> None:
        def run(
            function: Callable[..., Any], bundle: Path, kind: str, *rest: Any, what: str
        ) -> Any:
            return function(other if kind == "tensorrt" else bundle, "onnxruntime", *rest)

        monkeypatch.setattr(engines_command, "run_in_child", run)
        monkeypatch.setattr(engines_command, "engines_here", lambda _: ("a stand-in", HASHES))

    return put


def _verify(bundle: Path, *options: object) -> int:
    return main([str(word) for word in ("verify-engines", "--bundle", bundle, *options)])


def _change_scale(bundle: Path, value: float) -> None:
    """Weigh what the small head's features add to its actions by something else than 0.001."""
    path = bundle / "onnx" / "action_head.onnx"
    model = onnx.load(path)
    (scale,) = [node for node in model.graph.node if node.output[0] == "scale"]
    scale.attribute[0].f = value
    onnx.save(model, path)


def test_engines_that_answer_like_their_graphs_pass_and_the_report_names_them(
    small_copy: Path, engines_of: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    engines_of(small_copy)
    assert _verify(small_copy, "--samples", 2) == 0
    assert "PASS" in capsys.readouterr().out
    report = read_engine_report(small_copy)
    assert report is not None
    assert (report.engines, report.samples, report.passed) == (HASHES, 2, True)
    assert report.relative_l2 == 0.0


@pytest.mark.parametrize("scale", [-1.0, np.nan])
def test_engines_that_answer_otherwise_fail_and_are_not_to_be_run(
    small_copy: Path,
    engines_of: Callable[[Path], None],
    reseal: Reseal,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    scale: float,
) -> None:
    other = Path(shutil.copytree(small_copy, tmp_path / "other"))
    _change_scale(other, scale)
    reseal(other)
    engines_of(other)
    assert _verify(small_copy) == 1
    out = capsys.readouterr().out
    assert "Do not run them" in out
    assert f"groot-int8 build --bundle {small_copy}" in out
    report = read_engine_report(small_copy)
    assert report is not None
    assert report.passed is False
    assert (report.relative_l2 is None) == ("not finite" in out) == bool(np.isnan(scale))


def test_the_threshold_that_the_user_sets_decides(
    small_copy: Path, engines_of: Callable[[Path], None], reseal: Reseal, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(small_copy, tmp_path / "other"))
    _change_scale(other, 0.001001)
    reseal(other)
    engines_of(other)
    assert _verify(small_copy) == 0
    report = read_engine_report(small_copy)
    assert report is not None
    assert report.relative_l2
    assert _verify(small_copy, "--max-error", report.relative_l2 / 2) == 1


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is installed here"
)
def test_without_tensorrt_nothing_is_answered_and_nothing_written(
    small_copy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines_command, "answers", lambda *_: pytest.fail("it answered"))
    assert _verify(small_copy) == 2
    assert "JetPack" in capsys.readouterr().err
    assert read_engine_report(small_copy) is None


class _StandIn(TensorRTEngine):
    """ONNX Runtime under the name and with the hash of an engine."""

    def __init__(self, name: str, graph: Path) -> None:
        self._onnxruntime = OnnxRuntimeEngine(graph)
        self._manifest: Any = types.SimpleNamespace(engine_sha256=HASHES[name])

    def __getattribute__(self, name: str) -> Any:
        inside = object.__getattribute__(self, "__dict__").get("_onnxruntime")
        if inside is not None and name in {"inputs", "outputs", "run", "close"}:
            return getattr(inside, name)
        return object.__getattribute__(self, name)


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
    small_copy: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], refused: bool
) -> None:
    graphs = {open_bundle(small_copy).graph_path(name): name for name in HASHES}
    monkeypatch.setattr(
        "groot_int8_ros.policy.policy.load_engine",
        lambda kind, graph, **_: _StandIn(graphs[graph], graph),
    )
    Policy.load(small_copy, engine="tensorrt").close()
    right = EngineReport(HASHES, "a GPU", "noise", 3, 0.01, 0.03, passed=True)
    replace(right, **changed).write(small_copy)
    if refused:
        with pytest.raises(EngineError, match="are wrong: groot-int8 verify-engines") as found:
            Policy.load(small_copy, engine="tensorrt")
        assert f"groot-int8 build --bundle {small_copy}" in str(found.value)
        # What compares them again has to load them.
        Policy.load(small_copy, engine="tensorrt", failed_engines=True).close()
    else:
        Policy.load(small_copy, engine="tensorrt").close()
