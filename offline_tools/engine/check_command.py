"""`groot-int8 build-check`: does TensorRT take this bundle's graphs?

Owns: the subcommand. Must not import torch.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from groot_int8_ros.errors import ConfigurationError
from groot_int8_ros.policy.bundle import open_bundle
from offline_tools.engine.profiles import lengths_of
from offline_tools.engine.rtx import check_build


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's options."""
    parser.add_argument("--bundle", type=Path, required=True, help="the bundle to check")
    parser.add_argument(
        "--graph",
        action="append",
        help="check this graph alone; may be given several times",
    )


def run(args: argparse.Namespace) -> int:
    """Parse and build every graph, printing a line each."""
    bundle = open_bundle(args.bundle)
    largest = {axis: length for axis, (_, _, length) in lengths_of(bundle).axes.items()}
    print(f"{'graph':16}{'precision':>10}{'layers':>8}{'engine MB':>11}{'seconds':>9}")
    # Not the prefix model, which no engine runs.
    known = bundle.manifest.engine_graphs
    unknown = set(args.graph or ()) - set(known)
    if unknown:
        raise ConfigurationError(
            f"--graph {min(unknown)}: the bundle's engines are of {', '.join(known)}"
        )
    for name in args.graph or known:
        record = bundle.manifest.graphs[name]
        result = check_build(bundle.graph_path(name), record, largest)
        print(
            f"{name:16}{record.precision:>10}{result.layers:>8}"
            f"{result.engine_bytes / 1e6:>11.2f}{result.seconds:>9.1f}",
            flush=True,
        )
    return 0
