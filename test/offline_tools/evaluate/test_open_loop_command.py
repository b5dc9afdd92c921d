"""Hazards of the open-loop report: wrong figures, unlike inputs, a need for torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="needs ONNX Runtime")
pytest.importorskip("pyarrow", reason="reading a dataset needs pyarrow")

from pyarrow import parquet

from groot_int8_ros.policy.policy import Policy
from offline_tools.calibration.dataset_source import DatasetSource
from offline_tools.cli import EXIT_USER_ERROR, main

STEPS = 20
HORIZON = 8
STARTS = [0, 8, 16]
# Neither the bundle's number nor the checkpoint's: the option has to reach every policy.
DENOISING_STEPS = 3
WARMUP = 2


def _open_loop(*arguments: object) -> int:
    return main(["open-loop", *map(str, arguments), "--threads", "1"])


@pytest.fixture(scope="module")
def g1_int8(
    g1_policy: Path, g1_dataset_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Its bundle in INT8, named `int8`. Tests only read it."""
    from offline_tools.calibration.run import capture
    from offline_tools.quantize.int8_bundle import QuantizeOptions, quantize_bundle

    folder = tmp_path_factory.mktemp("g1_int8")
    policy = Policy.load(g1_policy / "float", threads=1)
    source = DatasetSource(g1_dataset_dir, policy, [1])
    capture(policy, source, folder / "store", samples=4, seed=0, report=lambda _: None)
    policy.close()
    options = QuantizeOptions(
        g1_policy / "float",
        folder / "store",
        folder / "int8",
        scheme="static-max",
        budget=None,
        search_samples=1,
        threads=1,
    )
    quantize_bundle(options, lambda _: None)
    return folder / "int8"


@pytest.fixture(scope="module")
def g1_report(
    g1_policy: Path,
    g1_int8: Path,
    g1_dataset_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    output = tmp_path_factory.mktemp("g1_report") / "report"
    code = _open_loop(
        *("--bundle", g1_policy / "float", g1_int8),
        *("--checkpoint", g1_policy / "checkpoint"),
        *("--dataset", g1_dataset_dir, "--traj-ids", 0, 2, "--steps", STEPS),
        *("--action-horizon", HORIZON, "--denoising-steps", DENOISING_STEPS),
        *("--warmup", WARMUP, "--output", output),
    )
    assert code == 0
    return output


def _read(output: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((output / "open_loop.json").read_text())
    return content


def test_deployed_graphs_answer_as_the_reference_graphs_do(
    tiny_bundle: Path, deployed_bundle: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    bundles = ("--bundle", tiny_bundle, deployed_bundle)
    assert _open_loop(*bundles, "--dataset", tiny_dataset, "--output", tmp_path / "out") == 0
    _, deployed = _read(tmp_path / "out")["policies"]
    assert deployed["runs_on"].endswith("deployed graphs, backbone fp32, action_head fp32")
    # From raw frames, the image chain included, of which a grey level may round otherwise.
    assert deployed["against"]["relative_l2"] < 1e-3
    assert deployed["against"]["times_bfloat16"] is None


def test_all_forms_of_a_policy_answer_the_same_frames_from_the_same_noise(g1_report: Path) -> None:
    report = _read(g1_report)
    assert [(one["id"], one["asked_at"]) for one in report["trajectories"]] == [
        (0, STARTS),
        (2, STARTS),
    ]
    policies = {one["name"]: one for one in report["policies"]}
    assert list(policies) == ["PyTorch float32", "PyTorch bfloat16", "float", "int8"]
    assert {one["denoising_steps"] for one in policies.values()} == {DENOISING_STEPS}
    assert policies["PyTorch float32"]["against"] is None
    errors = {n: one["against"] for n, one in policies.items() if one["against"] is not None}
    assert {one["reference"] for one in errors.values()} == {"PyTorch float32"}
    # Another noise, frame or number of steps would be off by far more than an arithmetic is.
    assert errors["float"]["relative_l2"] < 1e-4
    assert 1e-4 < errors["PyTorch bfloat16"]["relative_l2"] < 0.02
    assert 1e-4 < errors["int8"]["relative_l2"] < 0.1
    assert "dit int8" in policies["int8"]["runs_on"]
    yardstick = errors["PyTorch bfloat16"]["relative_l2"]
    for one in errors.values():
        assert one["times_bfloat16"] == pytest.approx(one["relative_l2"] / yardstick)


def test_figures_are_those_of_the_public_procedure(
    g1_policy: Path, g1_dataset_dir: Path, g1_report: Path
) -> None:
    # The dataset is read here without our reader: raw column, spans of modality.json.
    table = parquet.read_table(g1_dataset_dir / "data/chunk-000/episode_000002.parquet")
    recorded = np.stack(table.column("action").to_pylist()[:STEPS])
    spans = json.loads((g1_dataset_dir / "meta/modality.json").read_text())["action"]
    policy = Policy.load(g1_policy / "float", threads=1, denoising_steps=DENOISING_STEPS)
    source = DatasetSource(g1_dataset_dir, policy, [2])
    predicted = np.zeros_like(recorded)
    for start, one in zip(STARTS, source.observations(frozenset(STARTS)), strict=True):
        chunk = policy.infer(one.read())
        for key, span in spans.items():
            rows = min(HORIZON, STEPS - start)
            predicted[start : start + rows, span["start"] : span["end"]] = chunk.actions[key][
                :rows
            ]
    policy.close()
    report = next(one for one in _read(g1_report)["policies"] if one["name"] == "float")
    found = report["recorded"]["trajectories"][1]
    assert found["trajectory"] == 2
    # The episode's joints stand in spans that touch: no column is left out.
    assert found["mse"] == pytest.approx(np.mean((predicted - recorded) ** 2), rel=1e-5)
    assert found["mae"] == pytest.approx(np.mean(np.abs(predicted - recorded)), rel=1e-5)
    assert len(found["joints"]) == recorded.shape[1] == 26
    total = [one["mse"] for one in report["recorded"]["trajectories"]]
    assert report["recorded"]["mse"] == pytest.approx(np.mean(total))


def test_latencies_leave_the_warm_up_out_and_torch_has_none(g1_report: Path) -> None:
    for one in _read(g1_report)["policies"]:
        if one["name"].startswith("PyTorch"):
            assert one["latency_ms"] == {}
            continue
        stages = one["latency_ms"]
        assert list(stages) == ["preprocess", "backbone", "action_head", "postprocess", "total"]
        assert {stage["answers"] for stage in stages.values()} == {2 * len(STARTS) - WARMUP}
        assert all(0 < stage["median"] <= stage["p99"] for stage in stages.values())


def test_every_trajectory_has_its_picture(g1_report: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    for number in (0, 2):
        picture = cv2.imread(str(g1_report / f"trajectory_{number}.png"))
        assert picture is not None
        assert picture.std() > 10  # lines on white; an empty sheet has none


_WITHOUT = """
import sys
for name in sys.argv.pop(1).split(","):
    sys.modules[name] = None
from offline_tools.cli import main
sys.exit(main(sys.argv[1:]))
"""


def _without(packages: str, root: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _WITHOUT, packages, "open-loop", *map(str, arguments)],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_a_robot_without_torch_gets_the_same_figures(
    repository_root: Path, fp16_bundle: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    given = ("--bundle", fp16_bundle, "--dataset", tiny_dataset, "--steps", 20)
    assert _open_loop(*given, "--output", tmp_path / "here") == 0
    robot = tmp_path / "robot"
    done = _without(
        "torch,transformers,onnx",
        repository_root,
        *(*given, "--threads", 1, "--output", robot),
    )
    assert done.returncode == 0, done.stderr
    here, there = _read(tmp_path / "here"), _read(robot)
    assert [one.pop("latency_ms") is not None for one in here["policies"] + there["policies"]]
    assert here == there


def test_a_checkpoint_without_torch_is_refused_before_anything_runs(
    repository_root: Path, fp16_bundle: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    given = ("--bundle", fp16_bundle, "--dataset", tiny_dataset, "--checkpoint", tmp_path)
    output = tmp_path / "report"
    done = _without("torch,transformers", repository_root, *given, "--output", output)
    assert done.returncode == EXIT_USER_ERROR
    assert "'torch', which is not installed" in done.stderr
    assert not output.exists()


def test_what_cannot_be_compared_is_refused_and_writes_nothing(
    fp16_bundle: Path,
    minimal_checkpoint: Path,
    tiny_checkpoint: Path,
    g1_int8: Path,
    tiny_dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "report"
    engines = ("onnxruntime", "onnxruntime")
    for arguments, message in (
        (("--bundle", fp16_bundle, "--engine", *engines), "2 engines for 1 bundles"),
        (("--bundle", fp16_bundle, fp16_bundle), "same bundle twice for the same engine"),
        (("--bundle", fp16_bundle, g1_int8), "has another checkpoint than"),
        (("--bundle", minimal_checkpoint), "manifest.json"),
        (
            ("--bundle", fp16_bundle, "--checkpoint", tiny_checkpoint),
            "was exported from another checkpoint",
        ),
    ):
        code = _open_loop(*arguments, "--dataset", tiny_dataset, "--output", output)
        assert code == EXIT_USER_ERROR, arguments
        assert message in capsys.readouterr().err
        assert not output.exists()


def test_a_folder_that_is_no_report_is_kept_and_an_earlier_report_replaced(
    fp16_bundle: Path, tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("mine")
    given = ("--bundle", fp16_bundle, "--dataset", tiny_dataset, "--steps", 1)
    assert _open_loop(*given, "--output", tmp_path / "notes") == EXIT_USER_ERROR
    assert "is not an open-loop report" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "notes").iterdir()] == ["thesis.txt"]
    for seed in (1, 2):
        assert _open_loop(*given, "--output", tmp_path / "report", "--seed", seed) == 0
        assert _read(tmp_path / "report")["seed"] == seed
    # One answer is all warm-up: no figure is better than that of a cold engine.
    assert _read(tmp_path / "report")["policies"][0]["latency_ms"] == {}
    assert "all 1 answers were warm-up" in capsys.readouterr().out
