"""Hazards of running all steps: work done twice, stale results taken for new, a kill."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="exporting needs torch")
pytest.importorskip("transformers", reason="the model needs transformers")

from groot_int8_ros.policy.engines.engine_report import EngineReport, report_path
from offline_tools.cli import main
from offline_tools.pipeline.report import write_report
from offline_tools.pipeline.step import StepFailedError, run_subcommand

STEPS = ["export", "verify", "calibrate", "quantize", "audit"]

Pipeline = Callable[..., list[str]]


@pytest.fixture(scope="module")
def arguments(minimal_checkpoint: Path, tiny_dataset: Path) -> list[str]:
    return [
        *("--checkpoint", str(minimal_checkpoint), "--dataset", str(tiny_dataset)),
        *("--samples", "8", "--scheme", "row", "--denoising-steps", "1"),
    ]


@pytest.fixture(scope="module")
def output(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of one run. Tests that change them bring them back."""
    folder = tmp_path_factory.mktemp("pipeline") / "out"
    assert main(["pipeline", *arguments, "--output", str(folder)]) == 0
    return folder


@pytest.fixture
def again(
    output: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[list[str], str]]:
    """Runs it again and returns the subcommands that ran, and everything printed."""

    def run(*options: str) -> tuple[list[str], str]:
        assert main(["pipeline", *arguments, "--output", str(output), *options]) == 0
        printed = capsys.readouterr().out
        ran = [line.split()[2] for line in printed.splitlines() if line.startswith("$ groot-int8")]
        return ran, printed

    return run


def test_every_step_leaves_its_result_and_the_report_names_them(output: Path) -> None:
    report = json.loads((output / "report" / "report.json").read_text())
    assert report["verified"] is True
    assert 0 < report["bytes"]["int8"] < report["bytes"]["float"]
    assert set(report["audit"]) == {"backbone", "action_head"}
    # What stands around the DiT stays float32.
    assert set(report["audit"]["action_head"]) == {"INT8", "FLOAT"}
    assert set(report["audit"]["backbone"]) <= {"INT8", "FLOAT"}
    assert all(found["INT8"] > 10 for found in report["audit"].values())
    assert 0.0 < report["errors"]["relative_l2"] < 0.1
    assert report["calibration"]["samples"] == 8
    assert report["calibration"]["thin"], "eight samples cannot cover everything"
    page = (output / "report" / "report.md").read_text()
    for text in (f"{100 * report['errors']['relative_l2']:.3f} %", "THIN: "):
        assert text in page
    if "build" in report["left_out"]:
        assert "groot-int8 build --bundle int8" in report["left_out"]["build"]


def test_the_report_tells_what_the_engines_are_and_not_the_graphs_alone(
    output: Path, tmp_path: Path
) -> None:
    audit = output / "report" / "audit.json"
    engines = json.loads(audit.read_text())
    for layer in engines["action_head"]:
        layer["verdict"] = "UNKNOWN"
    (tmp_path / "engines.json").write_text(json.dumps(engines))
    page = write_report(
        tmp_path / "report",
        float_bundle=output / "float",
        int8_bundle=output / "int8",
        captures=output / "calibration",
        audit=audit,
        audit_of_engines=tmp_path / "engines.json",
        answers_of_engines=None,
        seconds={},
        left_out={},
    )
    asked = sum(layer["wanted"] == "INT8" for layer in engines["action_head"])
    assert 0 < asked < len(engines["action_head"])
    known = (
        "layers of {} known to be INT8, by the audit of its engine | | {} of {} that should be |"
    )
    assert known.format("action_head", 0, asked) in page
    assert f"Not known of action_head: {asked} layers that should be INT8" in page
    asked = sum(layer["wanted"] == "INT8" for layer in engines["backbone"])
    assert known.format("backbone", asked, asked) in page
    assert "Not known of backbone" not in page
    assert "audit of its engine" not in (output / "report" / "report.md").read_text()


@pytest.mark.parametrize(
    ("error", "says"),
    [(0.0042, "| 0.420 % |"), (0.11, "| 11.000 %: **too far"), (None, "| not finite: **too far")],
)
def test_the_report_tells_whether_the_engines_answer_like_their_graphs(
    output: Path, tmp_path: Path, error: float | None, says: str
) -> None:
    EngineReport(
        engines={"backbone": "a", "action_head": "b"},
        device="a GPU",
        source="a dataset",
        samples=3,
        relative_l2=error,
        max_error=0.03,
        passed=error is not None and error <= 0.03,
    ).write(tmp_path / "answers.json")
    page = write_report(
        tmp_path / "report",
        float_bundle=output / "float",
        int8_bundle=output / "int8",
        captures=output / "calibration",
        audit=output / "report" / "audit.json",
        audit_of_engines=None,
        answers_of_engines=tmp_path / "answers.json",
        seconds={},
        left_out={},
    )
    assert "engines against the same graphs" not in (output / "report" / "report.md").read_text()
    row = "| relative L2 of the actions, engines against the same graphs on ONNX Runtime | "
    assert row + says in page


def test_nothing_runs_again_while_nothing_changes(
    again: Callable[..., tuple[list[str], str]],
) -> None:
    ran, printed = again()
    assert ran == []
    assert printed.count("up to date") >= 2 * len(STEPS)


def test_the_plan_says_what_would_run_and_runs_nothing(
    again: Callable[..., tuple[list[str], str]],
) -> None:
    ran, printed = again("--plan", "--samples", "9")
    assert ran == []
    lines = {line.split()[0]: line for line in printed.splitlines() if line}
    assert "skip" in lines["export"]
    assert "what it is made from has changed (as the last time)" in lines["calibrate"]
    assert "calibrate runs before it" in lines["quantize"]
    assert re.search(r"^about \d+ (s|min) in all$", printed, re.MULTILINE)


def test_video_of_the_same_size_and_another_content_is_noticed(
    again: Callable[..., tuple[list[str], str]], tiny_dataset: Path, tmp_path: Path
) -> None:
    dataset = Path(shutil.copytree(tiny_dataset, tmp_path / "dataset"))
    options = ("--plan", "--dataset", str(dataset))
    _, printed = again(*options)
    assert "reading" in printed
    assert "has changed" not in printed, "it depends on where the dataset lies"
    video = sorted(dataset.rglob("*.mp4"))[-1]
    content = bytearray(video.read_bytes())
    content[-1] ^= 1
    video.write_bytes(content)
    _, printed = again(*options)
    assert "reading 1 new or changed videos" in printed
    (line,) = [one for one in printed.splitlines() if one.startswith("export")]
    assert "what it is made from has changed" in line


def test_the_first_plan_does_not_promise_a_true_size_model_in_minutes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Measured on two cores: `auto` 76 min with 16 samples, `row` 150 s, 188 s of capturing.
    (tmp_path / "checkpoint").mkdir()
    weights = tmp_path / "checkpoint" / "model.safetensors"
    weights.write_bytes(b"0")
    os.truncate(weights, 5_900_000_000)
    folders = ("--checkpoint", weights.parent, "--dataset", tmp_path, "--output", tmp_path / "o")
    minutes = {}
    for scheme in ("auto", "row"):
        options = ("--scheme", scheme, "--samples", "16", "--plan")
        assert main(["pipeline", *map(str, folders), *options]) == 0
        printed = capsys.readouterr().out
        for step, number, unit in re.findall(
            r"^(\w+) +run +(\d+) (s|min) ", printed, re.MULTILINE
        ):
            minutes[scheme, step] = float(number) / (60.0 if unit == "s" else 1.0)
    assert 76 <= minutes["auto", "quantize"] <= 120
    # Printed as whole minutes.
    assert 2 <= minutes["row", "quantize"] <= 10
    assert 3 <= minutes["row", "calibrate"] <= 10


def test_changed_option_runs_its_step_and_those_behind_it(
    again: Callable[..., tuple[list[str], str]], output: Path
) -> None:
    before = (output / "int8" / "manifest.json").read_bytes()
    ran, _ = again("--layers", "transformer_blocks.*")
    assert ran == ["quantize", "audit"]
    assert (output / "int8" / "manifest.json").read_bytes() != before
    ran, _ = again()
    assert ran == ["quantize", "audit"]
    assert (output / "int8" / "manifest.json").read_bytes() == before


def test_damaged_result_is_made_again(
    again: Callable[..., tuple[list[str], str]], output: Path
) -> None:
    data = output / "int8" / "onnx" / "action_head.onnx.data"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    ran, printed = again()
    assert ran == ["quantize"], "the same bundle was made again, so its audit still holds"
    assert "its output cannot be used" in printed


def test_refresh_runs_from_the_step_on(again: Callable[..., tuple[list[str], str]]) -> None:
    ran, _ = again("--refresh", "quantize")
    assert ran == ["quantize", "audit"]


def test_killed_run_is_gone_on_with_where_it_was(
    arguments: list[str], output: Path, tmp_path: Path
) -> None:
    words = [sys.executable, "-m", "offline_tools.cli", "pipeline", *arguments]
    words += ["--output", str(tmp_path / "out")]
    log = tmp_path / "log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            words, stdout=stream, stderr=subprocess.STDOUT, env={**os.environ}
        )
        end = time.monotonic() + 120.0
        while "== calibrate" not in log.read_text():
            assert time.monotonic() < end, log.read_text()
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
    found = subprocess.run(words, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert "== export: up to date" in found.stdout
    assert "   interrupted the last time" in found.stdout
    # The same inputs and options give the same bundle, whatever happened on the way.
    for name in ("float", "int8"):
        manifests = [(folder / name / "manifest.json") for folder in (tmp_path / "out", output)]
        assert manifests[0].read_bytes() == manifests[1].read_bytes()


def test_step_that_fails_ends_the_run_with_its_code_and_keeps_what_is_there(
    arguments: list[str], output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (output / "int8" / "manifest.json").read_bytes()
    code = main(["pipeline", *arguments, "--output", str(output), "--budget", "1e-6"])
    assert code == 2
    captured = capsys.readouterr()
    assert "stopped, since `groot-int8 quantize` failed" in captured.out
    assert "times the limit" in captured.err
    assert (output / "int8" / "manifest.json").read_bytes() == before


def test_audit_that_fails_is_reported_and_asked_again_the_next_time(
    again: Callable[..., tuple[list[str], str]],
    arguments: list[str],
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    again()
    (output / "report" / "report.md").unlink()
    (output / ".pipeline" / "audit.json").unlink()

    def fail(name: str, *words: str) -> None:
        run_subcommand(name, *words)
        raise StepFailedError(name, 1)

    with monkeypatch.context() as patch:
        patch.setattr("offline_tools.pipeline.command.run_subcommand", fail)
        assert main(["pipeline", *arguments, "--output", str(output)]) == 1
    assert (output / "report" / "report.md").is_file()
    capsys.readouterr()
    ran, _ = again()
    assert ran == ["audit"]


def test_folder_of_something_else_is_left_alone(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("ten years")
    assert main(["pipeline", *arguments, "--output", str(tmp_path)]) == 2
    assert "is not a pipeline's results" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("plan", [True, False])
@pytest.mark.parametrize(
    ("limit", "message"),
    [("wide", "KEY=NUMBER, not 'wide'"), ("0", "above 0"), ("wing=1", "names 'wing', and the")],
)
def test_limit_that_quantize_would_refuse_is_refused_before_the_first_step(
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    limit: str,
    message: str,
    plan: bool,
) -> None:
    words = [*arguments, "--output", str(tmp_path / "o"), "--max-joint-error", limit]
    assert main(["pipeline", *words, *(["--plan"] if plan else [])]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("scheme", ["foo", "static-cache"])
def test_scheme_that_quantize_would_refuse_is_a_usage_error(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], scheme: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["pipeline", *arguments, "--output", str(tmp_path / "o"), "--scheme", scheme])
    assert caught.value.code == 2
    assert f"--scheme: invalid choice: '{scheme}'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_pattern_of_no_layer_is_refused_as_soon_as_there_is_a_graph(
    arguments: list[str], output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*arguments, "--output", str(output), "--layers", "no_such_block.*"]
    assert main(["pipeline", *words]) == 2
    printed = capsys.readouterr()
    assert "the pattern 'no_such_block.*' matches no layer" in printed.err
    assert "== export: up to date" in printed.out
    assert "== verify" not in printed.out


def test_missing_folder_is_named(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*arguments, "--checkpoint", str(tmp_path / "none"), "--output", str(tmp_path / "o")]
    assert main(["pipeline", *options]) == 2
    assert f"no such folder: {tmp_path / 'none'}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failing", ["", "audit-engines", "verify-engines"])
def test_where_engines_can_be_built_their_answers_are_part_of_the_verdict(
    arguments: list[str],
    output: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    failing: str,
) -> None:
    """The three commands that need a GPU are stood in for by what they leave."""
    folder = Path(shutil.copytree(output, tmp_path / "out"))
    engines = folder / "int8" / "engines" / "10.3.0-orin-sm87"
    error = 0.11 if failing == "verify-engines" else 0.004
    report = EngineReport({"backbone": "a"}, "a GPU", "frames", 3, error, 0.03, error <= 0.03)
    code, subcommand = int(bool(failing)), {"audit-engines": "audit"}.get(failing, failing)
    ran: list[tuple[str, ...]] = []

    def run(name: str, *words: str) -> None:
        ran.append((name, *words))
        if name == "build":
            engines.mkdir(parents=True)
            (engines / "backbone.json").write_text("{}")
        elif name == "audit":
            shutil.copy(folder / "report" / "audit.json", words[-1])
        elif name == "verify-engines":
            report.write(report_path(folder / "int8", engines))
        else:
            pytest.fail(f"{name} ran again")
        if name == subcommand:
            raise StepFailedError(name, 1)

    monkeypatch.setattr("offline_tools.pipeline.command._engines_here", lambda _: engines)
    monkeypatch.setattr("offline_tools.pipeline.command.run_subcommand", run)
    built = ("--no-library-tactics", "--builder-level", "2")
    words = ["pipeline", *arguments, "--output", str(folder), *built]
    assert main(words) == code
    assert [one[0] for one in ran] == ["build", "audit", "verify-engines"]
    assert ran[0][-3:] == built
    page = (folder / "report" / "report.md").read_text()
    assert ("too far, do not run them" in page) == (failing == "verify-engines")
    assert "engines against the same graphs on ONNX Runtime | | " in page
    ran.clear()
    capsys.readouterr()
    assert main(words) == code
    # A verdict that was bad is asked for again; what is right stays.
    assert [one[0] for one in ran] == ([subcommand] if failing else [])
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if "did not pass, or was interrupted" in line]
    assert [line.split()[0] for line in lines] == ([failing] if failing else [])
