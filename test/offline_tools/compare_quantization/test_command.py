"""Hazards of the comparison: schemes that look alike, a verdict that flatters, half a report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="variants and bfloat16 need torch")
pytest.importorskip("transformers", reason="the model needs transformers")

from groot_int8_ros.errors import QuantizationError
from offline_tools.cli import EXIT_USER_ERROR, main
from offline_tools.compare_quantization.comparison import Refusal, Row
from offline_tools.compare_quantization.schemes import SCHEMES
from offline_tools.compare_quantization.table import verdicts
from offline_tools.evaluate.action_metrics import ActionErrors


def _compare(output: Path, *options: object) -> int:
    words = ["compare-quantization", "--output", output, *options]
    return main([str(word) for word in words])


def _rows(output: Path) -> dict[str, dict[str, Any]]:
    report = json.loads((output / "comparison.json").read_text())
    return {row["scheme"]: row for row in report["rows"]}


@pytest.fixture(scope="module")
def compared(
    minimal_checkpoint: Path, tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The comparison on a checkpoint with channel outliers, with recorded observations."""
    output = tmp_path_factory.mktemp("compared") / "report"
    options = ("--calibration-samples", 4, "--evaluation-samples", 2, "--denoising-steps", 2)
    schemes = ("static-max", "row", "row-smooth", "auto", "onnxruntime-max")
    code = _compare(
        output,
        *("--checkpoint", minimal_checkpoint, "--dataset", tiny_dataset),
        *("--variants", "channels", "--schemes", *schemes),
        *options,
    )
    assert code == 0
    return output


def test_row_fails_on_channel_outliers_and_migration_mends_it(compared: Path) -> None:
    error = {name: row["errors"]["relative_l2"] for name, row in _rows(compared).items()}
    assert error["row"] > 2.0 * error["row-smooth"]
    assert error["static-max"] > 2.0 * error["row"]
    assert error["fp16"] < error["bf16"] < error["row-smooth"]


def test_auto_reaches_bfloat16_where_no_scheme_for_all_layers_does(compared: Path) -> None:
    rows = _rows(compared)
    error = {name: row["errors"]["relative_l2"] for name, row in rows.items()}
    # Its budget is bfloat16's error on other observations, and these are four.
    limit = error["bf16"]
    assert error["auto"] < limit < min(error[n] for n in ("static-max", "row", "row-smooth"))
    assert 0 < rows["auto"]["int8_layers"] < rows["auto"]["layers"]


def test_our_static_maximum_is_onnxruntimes(compared: Path) -> None:
    # Two implementations of one definition: a difference would be a mistake of one of them.
    rows = _rows(compared)
    ours, theirs = (rows[n]["errors"]["relative_l2"] for n in ("static-max", "onnxruntime-max"))
    assert ours == pytest.approx(theirs, rel=0.1)


def test_every_quantised_layer_is_counted_and_judged(compared: Path) -> None:
    rows = _rows(compared)
    for name in ("static-max", "row", "onnxruntime-max"):
        assert rows[name]["int8_layers"] == rows[name]["layers"] == len(rows[name]["layer_errors"])
        assert rows[name]["int8_share"] == 1.0
    for layer, found in rows["row"]["layer_errors"].items():
        assert 0.0 < found["relative_l2"] < 1.0, layer
    assert rows["fp16"]["layers"] == 0


def test_the_report_says_who_is_above_bfloat16_and_by_how_much(compared: Path) -> None:
    report = json.loads((compared / "comparison.json").read_text())
    rows = _rows(compared)
    times = rows["row"]["errors"]["relative_l2"] / rows["bf16"]["errors"]["relative_l2"]
    assert f"row: above bfloat16 on channels {times:.1f} x" in report["verdicts"]
    assert sorted(path.name for path in compared.iterdir()) == [
        "comparison.json",
        "comparison.png",
    ]
    assert (compared / "comparison.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("family", ["reference", "deployed"])
def test_a_bundle_alone_is_compared_without_a_verdict(
    request: pytest.FixtureRequest,
    tiny_dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    family: str,
) -> None:
    bundle = request.getfixturevalue("tiny_bundle" if family == "reference" else "deployed_bundle")
    sizes = ("--calibration-samples", 4, "--evaluation-samples", 1)
    # The search runs the policy many times, whatever the family.
    better = "auto" if family == "reference" else "row-rotated"
    options = ("--bundle", bundle, "--dataset", tiny_dataset, "--schemes", "row", better, *sizes)
    assert _compare(tmp_path / "out", *options) == 0
    assert "no verdict" in capsys.readouterr().out
    rows = _rows(tmp_path / "out")
    assert 0.0 < rows[better]["errors"]["relative_l2"] < rows["row"]["errors"]["relative_l2"]
    assert 0 < rows["row"]["int8_layers"] == rows["row"]["layers"]
    if better == "auto":
        assert 0 < rows["auto"]["int8_layers"] < rows["auto"]["layers"]


def test_variants_of_a_bundle_are_refused(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--bundle", tiny_bundle, "--variants", "channels")
    assert _compare(tmp_path / "out", *options) == EXIT_USER_ERROR
    assert "give --checkpoint" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_half_precision_bundle_is_no_reference(
    fp16_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _compare(tmp_path / "out", "--bundle", fp16_bundle) == EXIT_USER_ERROR
    assert "--precision fp32" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_report_is_not_overwritten(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "comparison.json").write_text("mine")
    assert _compare(tmp_path, "--bundle", tiny_bundle) == EXIT_USER_ERROR
    assert "name a new folder" in capsys.readouterr().err
    assert (tmp_path / "comparison.json").read_text() == "mine"


def test_a_scheme_without_a_graph_on_one_model_is_not_said_to_hold_on_all() -> None:
    def row(model: str, scheme: str, relative_l2: float) -> Row:
        errors = ActionErrors(1, 1.0, relative_l2, relative_l2, {})
        layers = 0 if scheme == "bf16" else 3
        return Row(model, scheme, layers, layers, 1.0, errors, {}, 0.0)

    rows = [row("plain", "bf16", 0.01), row("live", "bf16", 0.01), row("plain", "auto", 0.005)]
    refusals = [Refusal("live", "auto", "nothing holds the budget")]
    assert verdicts(rows, refusals) == ["auto: above bfloat16 on live (no graph)"]


def test_a_scheme_that_refuses_a_model_does_not_end_the_comparison(
    minimal_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: object) -> dict[str, Path]:
        raise QuantizationError("nothing holds the budget")

    monkeypatch.setitem(SCHEMES, "auto", refuse)
    # Without a dataset, as the recorded checkpoint is compared: generated observations.
    robot = tmp_path / "robot.yaml"
    robot.write_text(
        "action_period_s: 0.05\n"
        "cameras: {front: {width: 640, height: 480}, wrist: {width: 640, height: 480}}\n"
    )
    code = _compare(
        tmp_path / "report",
        *("--checkpoint", minimal_checkpoint, "--robot", robot, "--variants", "plain"),
        *("--graphs", "reference"),
        *("--schemes", "auto", "static-max"),
        *("--calibration-samples", 2, "--evaluation-samples", 1, "--denoising-steps", 1),
    )
    assert code == 0
    assert "| plain | auto | none: nothing holds the budget |" in capsys.readouterr().out
    report = json.loads((tmp_path / "report/comparison.json").read_text())
    assert report["refusals"] == [
        {"model": "plain", "scheme": "auto", "reason": "nothing holds the budget"}
    ]
    assert "static-max" in _rows(tmp_path / "report")
