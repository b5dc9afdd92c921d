"""Hazards of timing made-up stages: a family that computes nothing, or not what it is called."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="stages are PyTorch modules")

import torch

from groot_int8_ros.errors import EngineError
from offline_tools.benchmark import torch_runs
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


def test_without_a_gpu_the_command_says_what_to_use_instead() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(EngineError, match="groot-int8 benchmark"):
        torch_runs.require_gpu()
