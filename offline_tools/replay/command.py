"""`groot-int8 chunk-replay`: what each seam does to a recorded motion, with a policy's latency.

Owns: the subcommand and its table. Must not import torch, ROS or an engine: it runs on a robot.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from groot_int8_ros.errors import DatasetError
from groot_int8_ros.policy.files import atomic_file
from offline_tools.arguments import (
    not_negative_float,
    not_negative_int,
    positive_float,
    positive_int,
)
from offline_tools.arguments import seed as seed_type
from offline_tools.replay.figures import Figures, figures, recording
from offline_tools.replay.simulation import (
    ROADS,
    LatencyModel,
    Motion,
    Options,
    PolicyModel,
    simulate,
)

# A joint that moves less, in its own unit, stands still.
_STILL = 1e-6


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's options."""
    add = parser.add_argument
    latency, policy = LatencyModel(), PolicyModel()
    add("--dataset", type=Path, help="LeRobot dataset (default: generated motions)")
    add(
        "--traj-ids",
        type=not_negative_int,
        nargs="+",
        metavar="ID",
        help="episodes (default: all of the dataset)",
    )
    add("--roads", choices=ROADS, nargs="+", default=list(ROADS), help="(default: all)")
    add(
        "--latency",
        type=positive_float,
        default=latency.median_s,
        metavar="S",
        help="median time of an inference (default: %(default)s)",
    )
    add(
        "--jitter",
        type=not_negative_float,
        default=latency.jitter,
        help="standard deviation of its logarithm (default: %(default)s)",
    )
    add(
        "--outliers",
        type=not_negative_float,
        default=latency.outlier_share,
        metavar="SHARE",
        help="part of the inferences that take four times as long (default: %(default)s)",
    )
    add(
        "--warm-up",
        type=positive_float,
        default=latency.warm_up_s,
        metavar="S",
        help="time of the first inference (default: %(default)s)",
    )
    add(
        "--horizon",
        type=positive_int,
        default=policy.horizon,
        metavar="ROWS",
        help="rows of a chunk (default: %(default)s)",
    )
    add(
        "--disagreement",
        type=not_negative_float,
        default=policy.disagreement,
        metavar="SHARE",
        help="how far two chunks are apart at their ends, as a part of a joint's range of motion "
        "(default: %(default)s)",
    )
    add("--control-rate", type=positive_float, default=50.0, metavar="HZ")
    add("--blend", type=not_negative_float, default=0.2, metavar="S", help="time of a blend")
    add(
        "--limits",
        type=not_negative_float,
        default=2.0,
        metavar="FACTOR",
        help="the executor's limits on velocity and acceleration, as multiples of the recording's "
        "own largest; 0 for none (default: %(default)s)",
    )
    add("--seed", type=seed_type, default=0)
    add("--output", type=Path, help="JSON file for the figures")


def run(args: argparse.Namespace) -> int:
    """Simulate every road on every motion, and print the table."""
    motions = generated() if args.dataset is None else episodes(args.dataset, args.traj_ids)
    options = Options(
        LatencyModel(args.latency, args.jitter, args.outliers, args.warm_up),
        PolicyModel(args.horizon, args.disagreement),
        1.0 / args.control_rate,
        args.blend,
        args.limits or np.inf,
        args.seed,
    )
    seconds = sum(len(motion.values) * motion.period_s for motion in motions)
    print(
        f"{len(motions)} motions, {seconds:.0f} s, {motions[0].values.shape[1]} joints that move; "
        f"chunks of {args.horizon} rows at {1.0 / motions[0].period_s:g} Hz, "
        f"{args.latency:g} s an inference"
    )
    runs = {road: [simulate(motion, road, options) for motion in motions] for road in args.roads}
    found = [recording(runs[args.roads[0]]), *(figures(road, of) for road, of in runs.items())]
    print(table(found))
    if args.output is not None:
        with atomic_file(args.output) as partial:
            partial.write_text(json.dumps([asdict(one) for one in found], indent=2) + "\n")
    return 0


def table(found: Sequence[Figures]) -> str:
    """Return the figures as a table in Markdown."""
    head = (
        "| road | dead time | jump mean | max | resume jump max | jerk ratio | error RMS "
        "| lag | chunks | late | prefix not kept | rows skipped |"
    )
    rows = [
        f"| {one.road} | {one.dead_s:.2f} s ({one.dead_share:.1%}) | {one.seam_jump_mean:.2%} "
        f"| {one.seam_jump_max:.2%} | {one.resume_jump_max:.2%} | {one.jerk_ratio:.1f} "
        f"| {one.error_rms:.2%} | {one.lag_s * 1e3:.0f} ms | {one.chunks} | {one.late_chunks} "
        f"| {one.prefix_mismatches} | {one.rows_skipped:.1f} |"
        for one in found
    ]
    return "\n".join([head, "|" + "---|" * 12, *rows])


def episodes(folder: Path, indices: Sequence[int] | None) -> list[Motion]:
    """Return episodes' recorded actions, joints that stand still left out.

    Args:
        folder: LeRobot dataset.
        indices: Episodes; all if None.

    Raises:
        DatasetError: It cannot be read, or nothing moves in it.
    """
    from offline_tools.dataset.lerobot import LeRobotDataset

    dataset = LeRobotDataset.open(folder)
    wanted = [info.index for info in dataset.episodes] if indices is None else indices
    actions = [dataset.episode(index).action for index in wanted]
    values = [
        np.concatenate([action[key] for key in sorted(action)], axis=1) for action in actions
    ]
    everything = np.concatenate(values).astype(np.float64)
    low, span = everything.min(axis=0), np.ptp(everything, axis=0)
    moving = span > _STILL
    if not moving.any():
        raise DatasetError(f"no joint moves in the episodes {list(wanted)} of {folder}")
    return [
        Motion(
            f"episode {index}",
            1.0 / dataset.fps,
            ((value - low) / np.where(moving, span, 1.0))[:, moving],
        )
        for index, value in zip(wanted, values, strict=True)
    ]


def generated(count: int = 2, seconds: float = 20.0, joints: int = 6) -> list[Motion]:
    """Return motions made of slow sines, for a machine without a dataset."""
    motions = []
    times = np.arange(0.0, seconds, 1.0 / 30.0)[:, None]
    for index in range(count):
        random = np.random.RandomState(index)
        speed, phase = random.uniform(0.5, 2.0, (3, joints)), random.uniform(0, 6.3, (3, joints))
        waves = sum(np.sin(speed[wave] * times + phase[wave]) for wave in range(3))
        span = np.ptp(waves, axis=0)
        motions.append(Motion(f"generated {index}", 1.0 / 30.0, (waves - waves.min(0)) / span))
    return motions
