"""`groot-int8 make-dataset`: generate episodes of an arm, for trying the other steps.

Owns: the subcommand. Must not import torch.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from groot_int8_ros.policy.files import refuse_occupied
from offline_tools.arguments import camera_size, positive_int, seed
from offline_tools.demo.arm_dataset import CAMERA_ORDER, write_arm_dataset


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's options."""
    parser.add_argument("--output", type=Path, required=True, help="dataset folder to write")
    parser.add_argument("--episodes", type=positive_int, default=1, help="default: %(default)s")
    parser.add_argument(
        "--frames",
        type=positive_int,
        default=150,
        help="frames of an episode at 30 Hz (default: 150)",
    )
    parser.add_argument(
        "--cameras",
        type=int,
        choices=range(1, len(CAMERA_ORDER) + 1),
        default=2,
        help="views of the arm (default: %(default)s)",
    )
    parser.add_argument(
        "--camera-size",
        type=camera_size,
        default=(480, 640),
        metavar="WIDTHxHEIGHT",
        help="of every camera's frames in pixels, both even (default: 640x480)",
    )
    parser.add_argument("--seed", type=seed, default=0, help="default: %(default)s")


def run(args: argparse.Namespace) -> int:
    """Generate the dataset."""
    refuse_occupied(args.output)
    write_arm_dataset(
        args.output,
        episodes=args.episodes,
        frames=args.frames,
        seed=args.seed,
        cameras=dict.fromkeys(CAMERA_ORDER[: args.cameras], args.camera_size),
    )
    print(f"{args.output}: {args.episodes} episode(s) of {args.frames} frames")
    return 0
