"""Hazards of the subcommand: torch on a robot, a table with a line missing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from offline_tools.cli import main
from offline_tools.model.deployed.transformations import BACKBONE, HEAD


def test_bundle_is_counted_without_torch(
    fp16_bundle: Path, repository_root: Path, tmp_path: Path
) -> None:
    report = tmp_path / "cost.json"
    words = ["cost", "--bundle", str(fp16_bundle), "--device", "orin-nx-16gb:25W"]
    code = (
        "import sys; sys.modules.update(torch=None, transformers=None); "
        "from offline_tools.cli import main; "
        f"sys.exit(main({[*words, '--output', str(report)]!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=repository_root,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "reference graphs, 4 denoising steps" in done.stdout
    assert "Orin NX 16 GB, 25W" in done.stdout
    assert "Thor (T5000)" not in done.stdout
    content = json.loads(report.read_text())
    runs = {name: graph["runs"] for name, graph in content["graphs"].items()}
    assert runs == {
        "backbone": 1,
        "conditioner": 1,
        "action_encoder": 4,
        "dit": 4,
        "action_decoder": 4,
    }
    summed = ("flops", "int8_flops", "weight_bytes_read", "activation_bytes", "launches")
    for graph in content["graphs"].values():
        for number in summed:
            assert sum(kind[number] for kind in graph["kinds"].values()) == graph[number]
    assert content["graphs"]["dit"]["kinds"]["DiT MLP"]["weight_bytes_read"] > 0
    name = "Orin NX 16 GB, 25W"
    of_graphs = [graph["expected_ms"][name] for graph in content["graphs"].values()]
    of_kinds = [
        kind["expected_ms"][name]
        for graph in content["graphs"].values()
        for kind in graph["kinds"].values()
    ]
    assert min(of_kinds) > 0
    expected = content["predicted"][name]["expected_ms"]
    assert sum(of_kinds) == pytest.approx(expected)
    assert sum(of_graphs) == pytest.approx(expected)
    assert f"ms 1: expected in TensorRT engines on {name}" in done.stdout
    printed = next(line for line in done.stdout.splitlines() if line.startswith("total"))
    assert float(printed.split()[-1]) == pytest.approx(expected, abs=0.006)
    predicted = content["predicted"]["Orin NX 16 GB, 25W"]
    assert 0 < predicted["low_ms"] < predicted["expected_ms"] < predicted["high_ms"]


def test_time_of_a_float32_bundle_is_not_predicted(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cost", "--bundle", str(tiny_bundle)]) == 0
    output = capsys.readouterr().out
    assert "no prediction: the graphs are FP32" in output
    assert "Thor (T5000)" not in output


def test_every_transformation_has_its_line(
    minimal_checkpoint: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    report = tmp_path / "cost.json"
    words = ["cost", "--checkpoint", str(minimal_checkpoint), "--output", str(report)]
    assert main([*words, "--cameras", "2", "--frame-size", "480x640"]) == 0
    names = list(json.loads(report.read_text())["transformations"])
    assert names == ["reference", *BACKBONE, *HEAD]
    output = capsys.readouterr().out
    starts = [line.split()[0] for line in output.splitlines() if line]
    assert [word for word in starts if word in names] == names
    # Every published N1.6 point is shown with its error.
    assert output.count("N1.6 H100") == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--size", "full", "--text-tokens", "20"], "give --text-tokens 25 or more"),
        (["--size", "full", "--frame-size", "20x3000"], "a frame of 20x3000"),
        (["--size", "full", "--device", "xavier"], "no device 'xavier'"),
    ],
)
def test_what_cannot_be_counted_is_refused_with_the_option_to_change(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cost", *words]) == 2
    assert message in capsys.readouterr().err
