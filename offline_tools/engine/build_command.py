"""`groot-int8 build`: TensorRT engines of a bundle, on the device that will run them.

Owns: the subcommand. Must not import torch.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path

from offline_tools.engine.builder import WEIGHT_FORMS, BuilderSettings
from offline_tools.engine.engines import (
    LOW_MEMORY,
    PRECISIONS,
    QUANTIZATIONS,
    BuildOptions,
    build_engines,
)

# Options that say where and not what: they are no part of the command that rebuilds an engine.
_NOT_REBUILT = frozenset({"bundle", "graph", "ignore_forecast"})


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's options."""
    add = parser.add_argument
    add("--bundle", type=Path, required=True, help="the bundle; its engines go inside")
    add("--graph", action="append", help="build this graph alone; may be given several times")
    add(
        "--precision",
        choices=PRECISIONS,
        help="of the two large graphs (default: the bundle's own, which every version can build)",
    )
    add(
        "--quantization",
        choices=QUANTIZATIONS,
        help="qdq: the bundle's own Q/DQ nodes; calibrator: TensorRT's entropy calibration of a "
        "float bundle, up to TensorRT 10 (default: what the bundle has)",
    )
    add(
        "--captures",
        type=Path,
        help="capture store that the calibrator is fed from (default: the one in the bundle)",
    )
    add(
        "--calibration-cache",
        type=Path,
        help="cache to use, or to write (default: calibration/GRAPH.cache in the bundle)",
    )
    add(
        "--max-seq-len",
        type=_positive,
        help="longest prompt in tokens, images included; this and the next three are for "
        "reference graphs, for deployed ones have fixed shapes",
    )
    add("--opt-seq-len", type=_positive, help="prompt length that kernels are chosen for")
    add(
        "--opt-sa-seq",
        type=_positive,
        help="tokens of state and actions (default: 1 + the trained horizon)",
    )
    add("--exact", action="store_true", help="build for prompts of --max-seq-len tokens alone")
    add("--workspace-mb", type=_positive, help="scratch memory of a kernel, in MiB")
    add("--tactic-mb", type=_positive, help="memory for trying out kernels, in MiB")
    add("--builder-level", type=int, choices=range(6), help="how long TensorRT searches")
    add(
        "--low-memory",
        action="store_true",
        help="for a board of 16 GB: "
        f"--workspace-mb {LOW_MEMORY.workspace_mb} --tactic-mb {LOW_MEMORY.tactic_mb} "
        f"--builder-level {LOW_MEMORY.level}, unless they are given",
    )
    add(
        "--no-library-tactics",
        action="store_true",
        help="leave out kernels of cuBLAS and cuDNN, for a TensorRT without them",
    )
    add(
        "--weight-form",
        choices=WEIGHT_FORMS,
        default="auto",
        help="how INT8 weights are handed over; auto goes by the version (default: %(default)s)",
    )
    add("--timing-cache", type=Path, help="measured kernels (default: beside the engines)")
    add(
        "--ignore-forecast",
        action="store_true",
        help="start although the memory forecast says that it will not fit",
    )


def run(args: argparse.Namespace) -> int:
    """Build the engines, printing a line each."""
    # Read by CUDA when it starts: kernels that are not used are then never loaded.
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")
    build_engines(options_of(args), lambda line: print(line, flush=True))
    return 0


def options_of(args: argparse.Namespace) -> BuildOptions:
    """Turn parsed arguments into options."""
    base = LOW_MEMORY if args.low_memory else BuilderSettings()
    given = {
        "workspace_mb": args.workspace_mb,
        "tactic_mb": args.tactic_mb,
        "level": args.builder_level,
    }
    settings = replace(
        base,
        **{name: value for name, value in given.items() if value is not None},
        library_tactics=not args.no_library_tactics,
        weight_form=args.weight_form,
    )
    return BuildOptions(
        bundle=args.bundle,
        graphs=tuple(args.graph or ()),
        precision=args.precision,
        quantization=args.quantization,
        captures=args.captures,
        calibration_cache=args.calibration_cache,
        max_seq_len=args.max_seq_len,
        opt_seq_len=args.opt_seq_len,
        opt_sa_seq=args.opt_sa_seq,
        exact=args.exact,
        settings=settings,
        timing_cache=args.timing_cache,
        ignore_forecast=args.ignore_forecast,
        words=_words(args),
    )


def _words(args: argparse.Namespace) -> tuple[str, ...]:
    parser = argparse.ArgumentParser()
    configure(parser)
    words: list[str] = []
    for name in vars(parser.parse_args(["--bundle", "."])):
        value = getattr(args, name)
        if name in _NOT_REBUILT or value is None or value is False or value == "auto":
            continue
        option = "--" + name.replace("_", "-")
        words += [option] if value is True else [option, str(value)]
    return tuple(words)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value
