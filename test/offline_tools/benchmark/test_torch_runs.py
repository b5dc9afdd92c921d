"""Hazards of timing made-up stages: a family that computes nothing, or not what it is called."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

pytest.importorskip("torch", reason="stages are PyTorch modules")

import torch

from groot_int8_ros.errors import EngineError
from offline_tools.benchmark import torch_command, torch_runs
from offline_tools.benchmark.torch_command import Setting, graphs_of

SETTING = Setting(cameras=2, steps=2, horizon=16)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_both_families_run_with_random_weights_and_give_what_their_graphs_are_for(
    precision: str,
) -> None:
    device = torch.device("cpu")
    shapes = {}
    for name, graphs in graphs_of("tiny", SETTING, (240, 320), 32, precision).items():
        for graph in graphs:
            module = torch_runs.make_module(graph.spec, device)
            with torch.no_grad():
                found = module(*torch_runs.make_inputs(graph.spec, device))
            first = found[0] if isinstance(found, tuple) else found
            assert torch.isfinite(first.float()).all()
            assert first.float().std() > 0
            shapes[f"{name}: {graph.name}"] = tuple(first.shape), graph.runs
    # 240x320 frames are 108 tokens; the reference family sees the prefix's 32 tokens too.
    assert shapes["reference backbone: backbone"] == ((1, 258, 64), 1)
    assert shapes["deployed backbone: backbone"] == ((1, 226, 64), 1)
    assert shapes["reference head: dit"] == ((1, 17, 64), 2)
    assert shapes["deployed head: action_head"] == ((1, 16, 29), 1)


def test_each_part_stands_beside_the_floor_of_its_own_work(
    capsys: pytest.CaptureFixture[str],
) -> None:
    # 4 GB at 2 TB/s are 2 ms, 1e9 operations at 1 TFLOP/s are 1 ms: a backbone bound by its
    # memory; and a head bound by its arithmetic of 3 ms.
    ceilings = torch_runs.Ceilings(bytes_per_s=2e12, flops_per_s=1e12)
    made = {"backbone": (4 * 10**9, 10**9), "head": (10**9, 3 * 10**9)}
    never_replayed: Any = None
    parts = {
        f"deployed {name}": torch_runs.Captured(never_replayed, (), *work)
        for name, work in made.items()
    }
    times = {"deployed backbone": [2.5, 2.5, 2.5], "deployed head": [4.0, 4.0, 4.0]}
    line = torch_command._line(SETTING, "deployed", parts, times, ceilings)
    floors = (line.backbone_floor_ms, line.head_floor_ms, line.floor_ms)
    assert floors == pytest.approx((2.0, 3.0, 5.0))
    assert set(asdict(line)) > {"backbone_floor_ms", "head_floor_ms", "floor_ms"}
    torch_command._print(line, line)
    cells = "| 2.50 (2.00) | 4.00 (3.00) | 6.50, 6.50 | 5.00 | 1.00 |"
    assert cells in capsys.readouterr().out


def test_without_a_gpu_the_command_says_what_to_use_instead() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(EngineError, match="groot-int8 benchmark"):
        torch_runs.require_gpu()
