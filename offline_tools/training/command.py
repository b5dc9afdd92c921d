"""`groot-int8 train-small`: train the small policy of the simulated robot.

Owns: the subcommand.
"""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from pathlib import Path

from groot_int8_ros.policy.files import refuse_occupied
from offline_tools.arguments import positive_int, seed
from offline_tools.training.configuration import TrainingOptions

_HELP = {
    "episodes": "demonstrations of the scripted expert",
    "steps": "optimiser steps",
    "batch": "observations of a step",
    "corrections": "rollouts of each round in which the expert corrects the policy",
    "validation_episodes": "episodes of each evaluation during the training",
    "workers": "simulator processes",
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's options."""
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="folder for checkpoint/, training.json and training.png",
    )
    parser.add_argument("--device", default="cuda", help="torch's device (default: %(default)s)")
    parser.add_argument("--seed", type=seed, default=0, help="default: %(default)s")
    defaults = TrainingOptions()
    for field in fields(TrainingOptions):
        if field.name in _HELP:
            parser.add_argument(
                f"--{field.name.replace('_', '-')}",
                type=positive_int,
                default=getattr(defaults, field.name),
                help=f"{_HELP[field.name]} (default: %(default)s)",
            )
    parser.add_argument(
        "--correction-rounds",
        type=int,
        default=defaults.correction_rounds,
        help="rounds of corrections (default: %(default)s)",
    )
    parser.add_argument("--no-compile", action="store_true", help="do not use torch.compile")


def run(args: argparse.Namespace) -> int:
    """Train."""
    from offline_tools.training.picture import draw_curves
    from offline_tools.training.trainer import train

    refuse_occupied(args.output)
    args.output.mkdir(parents=True, exist_ok=True)
    options = replace(
        TrainingOptions(),
        seed=args.seed,
        compiled=not args.no_compile,
        correction_rounds=args.correction_rounds,
        **{name: getattr(args, name) for name in _HELP},
    )
    record = train(
        args.output, options, device=args.device, say=lambda text: print(text, flush=True)
    )
    draw_curves(record, args.output / "training.png")
    print(f"{args.output / 'checkpoint'}: trained in {record['total_s']:.0f} s")
    return 0
