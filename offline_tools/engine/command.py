"""`groot-int8 build-check`: does TensorRT take this bundle's graphs?

Owns: the subcommand. Must not import torch.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from groot_int8_ros.policy.bundle import GRAPH_FILES, open_bundle
from groot_int8_ros.policy.preprocess import image_sizes
from offline_tools.engine.rtx import LIBRARIES, check_build

# Room for a long instruction beside the images: prefix, delimiters and suffix need about 40.
_TEXT_TOKENS = 128


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's options."""
    parser.add_argument("--bundle", type=Path, required=True, help="the bundle to check")
    parser.add_argument(
        "--graph",
        action="append",
        choices=list(GRAPH_FILES),
        help="check this graph alone; may be given several times",
    )
    parser.add_argument(
        "--library",
        choices=list(LIBRARIES),
        default="tensorrt_rtx",
        help="tensorrt_rtx needs no GPU; tensorrt builds for the GPU here (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Parse and build every graph, printing a line each."""
    bundle = open_bundle(args.bundle)
    robot = bundle.manifest.robot
    tokens = [
        image_sizes(camera.height, camera.width, bundle.processor.image_chain).tokens
        for camera in robot.cameras
    ]
    sequence = sum(tokens) + _TEXT_TOKENS
    lengths = {"batch": 1, "images": len(tokens), "sequence": sequence}
    print(f"{'graph':16}{'precision':>10}{'layers':>8}{'engine MB':>11}{'seconds':>9}")
    for name, record in bundle.manifest.graphs.items():
        if args.graph and name not in args.graph:
            continue
        result = check_build(bundle.graph_path(name), record, lengths, args.library)
        print(
            f"{name:16}{record.precision:>10}{result.layers:>8}"
            f"{result.engine_bytes / 1e6:>11.2f}{result.seconds:>9.1f}",
            flush=True,
        )
    return 0
