"""`groot-int8 make-sim-dataset`: record the scripted expert as a LeRobot dataset.

Owns: the subcommand. Must not import torch. The training draws its demonstrations by itself; a
dataset is for what reads recordings: calibration, open-loop evaluation, conversion to a bag.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path

from groot_int8_ros.policy.files import refuse_occupied
from groot_int8_ros.policy.types import UInt8Array
from offline_tools.arguments import positive_int, seed
from offline_tools.dataset.lerobot_writer import NewEpisode, write_dataset
from offline_tools.simulation.demonstrations import demonstrate
from offline_tools.simulation.environment import Tabletop
from offline_tools.simulation.robot import ACTION_PERIOD_S, FRAME_SIZES, JOINT_KEYS, by_key
from offline_tools.simulation.tasks import parse_task


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's options."""
    parser.add_argument("--output", type=Path, required=True, help="dataset folder to write")
    parser.add_argument("--episodes", type=positive_int, default=6, help="default: %(default)s")
    parser.add_argument(
        "--task",
        metavar="CUBE/PLATE",
        help="record one task alone, for example red/left (default: each episode draws one)",
    )
    parser.add_argument(
        "--undisturbed", action="store_true", help="the expert's clean path, from the start on"
    )
    parser.add_argument(
        "--seed", type=seed, default=3_000_000, help="of the first episode (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Record the episodes; failed ones are left out and replaced."""
    refuse_occupied(args.output)
    task = parse_task(args.task) if args.task else None
    simulation = Tabletop()
    failures = 0

    def episodes() -> Iterator[NewEpisode]:
        nonlocal failures
        written, number = 0, args.seed
        while written < args.episodes:
            frames: list[Mapping[str, UInt8Array]] = []
            episode = demonstrate(
                simulation,
                number,
                task=task,
                disturbed=not args.undisturbed,
                on_frames=frames.append,
            )
            number += 1
            if not episode.success:
                failures += 1
                continue
            written += 1
            yield NewEpisode(
                state=by_key(episode.state_deg),
                action=by_key(episode.action_deg),
                frames={key: [row[key] for row in frames] for key in FRAME_SIZES},
                instructions=episode.task.instruction,
            )

    try:
        write_dataset(
            args.output,
            episodes(),
            fps=1.0 / ACTION_PERIOD_S,
            state_joints=JOINT_KEYS,
            action_joints=JOINT_KEYS,
            cameras=FRAME_SIZES,
            robot_type="simulated_arm",
        )
    finally:
        simulation.close()
    print(f"{args.output}: {args.episodes} episode(s); {failures} more failed and were left out")
    return 0
