"""`groot-int8 make-checkpoint`: generate an N1.6-shaped checkpoint with random weights.

Owns: the subcommand.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from groot_int8_ros.policy.bundle import TOKENIZER_FILE
from groot_int8_ros.policy.files import refuse_occupied
from offline_tools.arguments import positive_int, seed
from offline_tools.dataset.lerobot import LeRobotDataset
from offline_tools.demo.random_checkpoint import (
    ACTION_HORIZON,
    SIZES,
    write_random_checkpoint,
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's options."""
    parser.add_argument("--output", type=Path, required=True, help="checkpoint folder to write")
    parser.add_argument(
        "--dataset",
        type=Path,
        required=True,
        help="LeRobot dataset that gives cameras, keys and statistics (see make-dataset)",
    )
    parser.add_argument(
        "--size",
        choices=list(SIZES),
        default="tiny",
        help="tiny; narrow: few blocks, for a try on a GPU; full: the public sizes, 6.6 GB "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--horizon",
        type=positive_int,
        default=ACTION_HORIZON,
        help="actions of a chunk (default: %(default)s)",
    )
    parser.add_argument(
        "--absolute-keys",
        nargs="*",
        default=[],
        metavar="KEY",
        help="action keys with absolute targets; the others are relative to the state",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        help="folder with a tokenizer.json to take, whose words the model then has rows for "
        "(default: a small one is generated)",
    )
    parser.add_argument("--seed", type=seed, default=0, help="default: %(default)s")


def run(args: argparse.Namespace) -> int:
    """Generate the checkpoint."""
    refuse_occupied(args.output)
    write_random_checkpoint(
        args.output,
        LeRobotDataset.open(args.dataset),
        size=args.size,
        horizon=args.horizon,
        seed=args.seed,
        absolute_keys=tuple(args.absolute_keys),
        tokenizer=args.tokenizer / TOKENIZER_FILE if args.tokenizer else None,
    )
    print(f"{args.output}: random weights, size {args.size}, with tokenizer.json")
    return 0
