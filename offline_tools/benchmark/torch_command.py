"""`groot-int8 benchmark-torch`: what the rewritten graphs buy, in PyTorch on a GPU.

Owns: the subcommand. Both families have the public model's sizes and random weights, run the same
library's kernels and are captured as CUDA graphs. The image chain is part of the deployed graphs
and not of the reference ones, which want it done on the CPU before.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from groot_int8_ros.policy.files import atomic_file
from offline_tools.arguments import camera_size, not_negative_int, positive_int
from offline_tools.benchmark import torch_runs
from offline_tools.cost.stages import made_case
from offline_tools.cost.torch_count import count_stage
from offline_tools.cost.work import GraphWork, observation, total
from offline_tools.demo.random_checkpoint import SIZES
from offline_tools.export.deployed_stages import (
    REFERENCE,
    StageGraph,
    backbone_stages,
    head_stages,
)
from offline_tools.export.graphs import PRECISIONS


@dataclass(frozen=True)
class Setting:
    """One line of the table.

    Attributes:
        cameras: Number of cameras.
        steps: Denoising steps.
        horizon: Action tokens.
    """

    cameras: int
    steps: int
    horizon: int


@dataclass(frozen=True)
class Line:
    """What was measured of one family in one setting; times in milliseconds.

    Attributes:
        setting: Cameras, steps, horizon.
        family: `reference` or `deployed`.
        backbone_ms: Median of the backbone.
        head_ms: Median of everything behind it, all denoising steps.
        total_ms: Median of the sum.
        total_p99_ms: 99th percentile of the sum.
        backbone_floor_ms: Below which this GPU's backbone cannot be (`Ceilings.floor_s`).
        head_floor_ms: The same of the head.
        floor_ms: Of one after the other.
        flops: Of one observation, counted.
        weight_bytes: Of the weights that one observation reads, again at every launch, counted.
    """

    setting: Setting
    family: str
    backbone_ms: float
    head_ms: float
    total_ms: float
    total_p99_ms: float
    backbone_floor_ms: float
    head_floor_ms: float
    floor_ms: float
    flops: int
    weight_bytes: int


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's options."""
    add = parser.add_argument
    add("--size", choices=list(SIZES), default="full", help="of the model (default: %(default)s)")
    add("--cameras", type=positive_int, nargs="+", default=[4], help="default: 4")
    add("--steps", type=int, choices=(1, 2, 4), nargs="+", default=[4], help="default: 4")
    add("--horizon", type=positive_int, default=16, help="action tokens (default: %(default)s)")
    add(
        "--camera-size",
        type=camera_size,
        default=(480, 640),
        metavar="WIDTHxHEIGHT",
        help="of every camera's frames (default: 640x480)",
    )
    add("--prefix-tokens", type=positive_int, default=32, help="default: %(default)s")
    add("--precision", choices=list(PRECISIONS), default="fp16", help="default: %(default)s")
    add("--compile", action="store_true", help="fuse both families with torch.compile first")
    add("--rounds", type=positive_int, default=100, help="counted replays (default: %(default)s)")
    add("--warmup", type=not_negative_int, default=20, help="before them (default: %(default)s)")
    add("--output", type=Path, help="write the figures to this JSON file too")


def run(args: argparse.Namespace) -> int:
    """Measure and print the table."""
    device = torch_runs.require_gpu()
    ceilings = torch_runs.measure_ceilings(device)
    print(
        f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}: "
        f"{ceilings.bytes_per_s / 1e12:.2f} TB/s of a copy, "
        f"{ceilings.flops_per_s / 1e12:.0f} TFLOP/s of a product, measured\n"
    )
    print(
        "| cameras | steps | horizon | graphs | backbone (floor) | head (floor) | total, p99 | "
        "floor | ratio |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    lines: list[Line] = []
    for cameras in args.cameras:
        for steps in args.steps:
            setting = Setting(cameras, steps, args.horizon)
            pair = _measure(args, setting, device, ceilings)
            lines += pair
            for line in pair:
                _print(line, pair[0])
    if args.output is not None:
        with atomic_file(args.output) as temporary:
            content = {
                "device": torch.cuda.get_device_name(device),
                "settings": vars(args),
                "lines": [asdict(line) for line in lines],
            }
            temporary.write_text(json.dumps(content, indent=1, default=str), encoding="utf-8")
    return 0


def _measure(
    args: argparse.Namespace,
    setting: Setting,
    device: torch.device,
    ceilings: torch_runs.Ceilings,
) -> list[Line]:
    graphs = graphs_of(args.size, setting, args.camera_size, args.prefix_tokens, args.precision)
    works = count(graphs)
    parts = {
        name: torch_runs.capture(own, device, compiled=args.compile)
        for name, own in graphs.items()
    }
    times = torch_runs.time_interleaved(parts, rounds=args.rounds, warmup=args.warmup)
    return [_line(setting, family, works, times, ceilings) for family in ("reference", "deployed")]


def graphs_of(
    model: str, setting: Setting, size: tuple[int, int], prefix_tokens: int, precision: str
) -> dict[str, tuple[StageGraph, ...]]:
    """Return backbone and head of both families, by names such as `deployed head`.

    Args:
        model: Key of `SIZES`.
        setting: Cameras, steps, horizon.
        size: Height and width of the cameras' frames in pixels.
        prefix_tokens: Room for the instruction's prefix.
        precision: `fp32` or `fp16`.
    """
    config = replace(SIZES[model], action_horizon=setting.horizon)
    case = made_case(config, setting.cameras, size, prefix_tokens)
    backbones = backbone_stages(case, precision)
    heads = head_stages(config, case.layout, setting.steps, precision)
    return {
        "reference backbone": backbones[REFERENCE],
        "reference head": heads[REFERENCE],
        "deployed backbone": list(backbones.values())[-1],
        "deployed head": list(heads.values())[-1],
    }


def count(graphs: Mapping[str, tuple[StageGraph, ...]]) -> dict[str, tuple[GraphWork, ...]]:
    """Count each part's work for one observation, as `groot-int8 cost` does; needs no GPU."""
    return {name: tuple(count_stage(one) for one in own) for name, own in graphs.items()}


def _line(
    setting: Setting,
    family: str,
    works: Mapping[str, tuple[GraphWork, ...]],
    times: dict[str, list[float]],
    ceilings: torch_runs.Ceilings,
) -> Line:
    own = [f"{family} {name}" for name in ("backbone", "head")]
    backbone, head = (np.array(times[name]) for name in own)
    floors_ms = [1e3 * ceilings.floor_s(works[name]) for name in own]
    work = total(observation(one for name in own for one in works[name]))
    return Line(
        setting=setting,
        family=family,
        backbone_ms=float(np.median(backbone)),
        head_ms=float(np.median(head)),
        total_ms=float(np.median(backbone + head)),
        total_p99_ms=float(np.percentile(backbone + head, 99)),
        backbone_floor_ms=floors_ms[0],
        head_floor_ms=floors_ms[1],
        floor_ms=sum(floors_ms),
        flops=work.flops,
        weight_bytes=work.weight_bytes,
    )


def _print(line: Line, first: Line) -> None:
    one = line.setting
    print(
        f"| {one.cameras} | {one.steps} | {one.horizon} | {line.family} | {line.backbone_ms:.2f} "
        f"({line.backbone_floor_ms:.2f}) | {line.head_ms:.2f} ({line.head_floor_ms:.2f}) | "
        f"{line.total_ms:.2f}, {line.total_p99_ms:.2f} | {line.floor_ms:.2f} | "
        f"{first.total_ms / line.total_ms:.2f} |",
        flush=True,
    )
