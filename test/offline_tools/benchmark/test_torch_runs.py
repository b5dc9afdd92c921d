"""Hazards of timing made-up stages: a family that computes nothing, or not what it is called."""

from __future__ import annotations

from dataclasses import asdict

import pytest

pytest.importorskip("torch", reason="stages are PyTorch modules")

import torch

from groot_int8_ros.errors import EngineError
from offline_tools.benchmark import torch_command, torch_runs
from offline_tools.benchmark.torch_command import Setting, count, graphs_of
from offline_tools.cost.reference_work import reference_head
from offline_tools.cost.work import GraphWork, Launch, observation, total
from offline_tools.demo.random_checkpoint import SIZES
from offline_tools.export.graph import weight_bytes

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


def test_no_graph_of_the_head_takes_memory_for_weights_that_it_never_reads() -> None:
    graphs = graphs_of("tiny", SETTING, (240, 320), 32, "fp16")
    for name in ("reference head", "deployed head"):
        for graph, work in zip(graphs[name], count(graphs)[name], strict=True):
            # Of a table of positions the first rows are read; it counts as a whole.
            assert weight_bytes(graph.spec) <= work.stored_bytes, f"{name}: {graph.name}"


def test_each_part_stands_beside_the_floor_of_its_own_work(
    capsys: pytest.CaptureFixture[str],
) -> None:
    # 4 GB at 2 TB/s are 2 ms, 1e9 operations at 1 TFLOP/s are 1 ms: a backbone bound by its
    # memory; and a head bound by its arithmetic, 1 ms in each of three runs.
    ceilings = torch_runs.Ceilings(bytes_per_s=2e12, flops_per_s=1e12)
    backbone = Launch("language MLP", 10**9, 4 * 10**9, 10**6, "a")
    step = Launch("DiT MLP", 10**9, 10**8, 10**6, "b")
    works = {
        "deployed backbone": (GraphWork("backbone", 1, (backbone,), 10**9),),
        "deployed head": (GraphWork("head", 3, (step,), 10**9),),
    }
    times = {"deployed backbone": [2.5, 2.5, 2.5], "deployed head": [4.0, 4.0, 4.0]}
    line = torch_command._line(SETTING, "deployed", works, times, ceilings)
    floors = (line.backbone_floor_ms, line.head_floor_ms, line.floor_ms)
    assert floors == pytest.approx((2.0, 3.0, 5.0))
    assert set(asdict(line)) > {"backbone_floor_ms", "head_floor_ms", "floor_ms"}
    torch_command._print(line, line)
    cells = "| 2.50 (2.00) | 4.00 (3.00) | 6.50, 6.50 | 5.00 | 1.00 |"
    assert cells in capsys.readouterr().out


@pytest.fixture(scope="module")
def full_works() -> dict[int, dict[str, tuple[GraphWork, ...]]]:
    """Both families at true size with 1 and 4 steps."""
    return {
        steps: count(graphs_of("full", Setting(1, steps, 50), (256, 256), 32, "fp16"))
        for steps in (1, 4)
    }


def test_floor_reads_what_the_graphs_multiply_by_in_every_step_and_nothing_else(
    full_works: dict[int, dict[str, tuple[GraphWork, ...]]],
) -> None:
    # Peaks that leave the memory alone to bound every part.
    ceilings = torch_runs.Ceilings(bytes_per_s=1e12, flops_per_s=1e30)
    for steps, works in full_works.items():
        found = round(ceilings.floor_s(works["reference head"]) * 1e12)
        # From the configuration alone: the DiT's matrices once a step. The layers around it
        # gather the embodiment's rows, which do not count.
        around = ("state_encoder", "action_encoder", "action_decoder")
        computed = observation(reference_head(SIZES["full"], 114, 50, steps))
        dit = [launch for launch in computed if not launch.weight.startswith(around)]
        assert found == total(dit).weight_bytes, steps
    one, four = ({k: ceilings.floor_s(v) for k, v in full_works[n].items()} for n in (1, 4))
    assert four["reference head"] == pytest.approx(4 * one["reference head"])
    # Keys and values of the tokens are computed once an observation.
    assert 3.5 < four["deployed head"] / one["deployed head"] < 4
    for name in ("reference backbone", "deployed backbone"):
        assert four[name] == one[name]


def test_no_weight_of_true_size_is_still_in_the_cache_when_it_is_read_again(
    full_works: dict[int, dict[str, tuple[GraphWork, ...]]],
) -> None:
    cache_bytes = 50 * 2**20  # an H100's L2
    for name, graphs in full_works[4].items():
        position, last = 0, dict[str, int]()
        for launch in observation(graphs):
            if launch.weight:
                since = position - last.get(launch.weight, -cache_bytes - 1)
                assert since > cache_bytes, f"{name}: {launch.weight}"
                position += launch.weight_bytes
                last[launch.weight] = position


def test_without_a_gpu_the_command_says_what_to_use_instead() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(EngineError, match="groot-int8 benchmark"):
        torch_runs.require_gpu()
