"""Hazards of options: a number out of range that surfaces as a traceback or as an empty result."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest

from offline_tools import arguments
from offline_tools.cli import main


@pytest.mark.parametrize(
    ("kind", "taken", "refused"),
    [
        (arguments.positive_int, ["1", "7"], ["0", "-1", "1.5", "", "many"]),
        (arguments.not_negative_int, ["0", "7"], ["-1", "0.5", "nan"]),
        (arguments.seed, ["0", "4294967295"], ["-1", "4294967296"]),
        (arguments.positive_float, ["0.1", "1e-12"], ["0", "-1", "nan", "inf", "fast"]),
        (arguments.not_negative_float, ["0", "2.5"], ["-0.1", "nan", "-inf", ""]),
    ],
)
def test_number_is_taken_within_its_range_and_refused_outside(
    kind: Callable[[str], float], taken: list[str], refused: list[str]
) -> None:
    assert [kind(text) for text in taken] == [float(text) for text in taken]
    for text in refused:
        with pytest.raises(argparse.ArgumentTypeError, match=r"expected a .*not ") as caught:
            kind(text)
        assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["make-dataset", "--seed", "-1"], "--seed: expected a whole number from 0 to 4294967295"),
        (["make-dataset", "--frames", "0"], "--frames: expected a whole number of at least 1"),
        (["make-dataset", "--episodes", "0"], "--episodes: expected a whole number of at least 1"),
        (["make-checkpoint", "--seed", "x"], "--seed: expected a whole number from 0 to"),
        (["demo", "--episodes", "-5"], "--episodes: expected a whole number of at least 1, not"),
        (["demo", "--seed", "4294967296"], "--seed: expected a whole number from 0 to"),
        (["verify", "--atol", "nan"], "--atol: expected a number above 0, not 'nan'"),
        (["verify", "--atol", "-1"], "--atol: expected a number above 0, not '-1'"),
        (["verify", "--samples", "0"], "--samples: expected a whole number of at least 1"),
        (["verify", "--episode", "-1"], "--episode: expected a whole number of at least 0"),
        (["quantize", "--seed", "-1"], "--seed: expected a whole number from 0 to 4294967295"),
        (["quantize", "--threads", "0"], "--threads: expected a whole number of at least 1"),
        (["quantize", "--judge-samples", "0"], "--judge-samples: expected a whole number of"),
        (["add-outliers", "--seed", "-1"], "--seed: expected a whole number from 0 to"),
        (["compare-quantization", "--seed", "-1"], "--seed: expected a whole number from 0 to"),
        (["compare-quantization", "--threads", "0"], "--threads: expected a whole number of"),
        (["compare-quantization", "--evaluation-samples", "0"], "--evaluation-samples: expected"),
        (["gpu-proof", "--samples", "0"], "--samples: expected a whole number of at least 1"),
        (["gpu-proof", "--parallel", "0"], "--parallel: expected a whole number of at least 1"),
        (["cost", "--denoising-steps", "3"], "--denoising-steps: invalid choice: 3"),
    ],
)
def test_option_out_of_range_is_a_usage_error_before_anything_is_done(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("torch", "rclpy"):
        if words[0] in {"demo", "verify", "make-checkpoint", "add-outliers"}:
            pytest.importorskip(package, reason=f"{words[0]} needs {package}")
    with pytest.raises(SystemExit) as caught:
        main([words[0], "--output", str(tmp_path / "out"), *words[1:]])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
