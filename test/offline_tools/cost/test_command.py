"""Hazards of the subcommand: torch on a robot, a table with a line missing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
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


def test_deployed_bundle_in_int8_is_counted_with_what_int8_takes_away(
    fp16_deployed: Path,
    write_int8: Callable[[Path, Path, Sequence[str]], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    graphs = ("backbone", "action_head")
    bundles = {
        "float": fp16_deployed,
        "int8": write_int8(tmp_path / "int8", fp16_deployed, graphs),
    }
    found, printed = {}, ""
    for name, bundle in bundles.items():
        report = tmp_path / f"{name}.json"
        words = ["cost", "--bundle", str(bundle), "--device", "thor", "--output", str(report)]
        assert main(words) == 0
        found[name], printed = json.loads(report.read_text()), capsys.readouterr().out
    exact, quantised = (content["graphs"] for content in found.values())
    assert {name: graph["runs"] for name, graph in quantised.items()} == dict.fromkeys(graphs, 1)
    for name in graphs:
        assert exact[name]["int8_flops"] == 0
        assert quantised[name]["flops"] == exact[name]["flops"]
        layers = {
            kind: (sums, exact[name]["kinds"][kind])
            for kind, sums in quantised[name]["kinds"].items()
            if kind.endswith(("MLP", "vision attention", "language attention", "DiT attention"))
        }
        assert len(layers) == {"backbone": 4, "action_head": 2}[name]
        for now, before in layers.values():
            assert now["int8_flops"] == now["flops"]
            assert 2 * now["weight_bytes_read"] == before["weight_bytes_read"]
        assert quantised[name]["kinds"]["attention products"]["int8_flops"] == 0
        assert quantised[name]["kinds"]["row maxima"]["launches"] > 0
    assert "deployed graphs, 4 denoising steps" in printed
    rows = {line.split("  ")[0]: line.split("  ")[1:] for line in printed.splitlines()}
    for name in graphs:
        share = quantised[name]["int8_flops"] / quantised[name]["flops"]
        assert f"{share:.0%}" in " ".join(rows[f"{name}, runs: 1"]).split()
    (line,) = (line for line in printed.splitlines() if line.startswith("  Thor (T5000), MAXN"))
    predicted = found["int8"]["predicted"]["Thor (T5000), MAXN"]
    low, expected, high = (predicted[f"{name}_ms"] for name in ("low", "expected", "high"))
    assert f" {expected:.0f} ({low:.0f} to {high:.0f}) " in line


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
