"""`groot-int8 export`: from a checkpoint to a bundle.

Owns: the subcommand's options and what it prints.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from groot_int8_ros.policy.families import DEPLOYED, FAMILIES
from offline_tools.arguments import positive_int
from offline_tools.export.bundle_writer import ExportOptions, write_bundle
from offline_tools.export.graphs import PRECISIONS


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's options."""
    parser.add_argument("--checkpoint", type=Path, required=True, help="fine-tuned N1.6 folder")
    parser.add_argument("--bundle", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--tokenizer", type=Path, help="folder with tokenizer.json (default: the checkpoint)"
    )
    parser.add_argument(
        "--eagle-config",
        type=Path,
        help="sizes of vision tower and language model (default: eagle_config.json beside the "
        "checkpoint, else the public sizes)",
    )
    parser.add_argument("--embodiment", help="tag (default: the checkpoint's only one)")
    parser.add_argument("--robot", type=Path, help="cameras, joints and rate, as YAML")
    parser.add_argument(
        "--dataset", type=Path, help="LeRobot dataset to take cameras, joint names and rate from"
    )
    parser.add_argument(
        "--graphs",
        choices=FAMILIES,
        default=DEPLOYED,
        help="deployed: what the robot runs; reference: the community's tensor contracts "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--instruction",
        dest="instructions",
        action="extend",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="instructions whose prefix is computed now (default: the dataset's tasks)",
    )
    parser.add_argument(
        "--max-prefix-tokens",
        type=positive_int,
        help="room for an instruction and the words before it (default: that of the longest)",
    )
    parser.add_argument(
        "--prefix-model",
        action="store_true",
        help="let the robot compute the prefix of an instruction that is not in the bundle, on "
        "its CPU; takes the disk space of the language model and its embeddings",
    )
    parser.add_argument(
        "--precision", choices=list(PRECISIONS), default="fp16", help="default: %(default)s"
    )
    parser.add_argument(
        "--denoising-steps",
        type=int,
        choices=(1, 2, 4),
        help="Euler steps at inference (default: the checkpoint's own number)",
    )
    parser.add_argument("--force", action="store_true", help="replace an existing bundle")


def run(args: argparse.Namespace) -> int:
    """Export and say what was written."""
    start = time.perf_counter()

    def report(line: str) -> None:
        print(f"[{time.perf_counter() - start:6.1f} s] {line}", flush=True)

    options = ExportOptions(**{**vars(args), "instructions": tuple(args.instructions)})
    manifest = write_bundle(options, report)
    size = sum(size for _, size in manifest.files.values())
    report(f"{args.bundle}: {len(manifest.graphs)} graphs, {size / 1e6:.1f} MB")
    return 0
