"""`groot-int8 verify`: does ONNX Runtime compute what PyTorch computes?

Owns: the subcommand, its table and its report.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from groot_int8_ros.policy.bundle import open_bundle
from groot_int8_ros.policy.files import atomic_file
from offline_tools.arguments import positive_float
from offline_tools.cli import EXIT_CHECK_FAILED
from offline_tools.verify.checks import verify_bundle
from offline_tools.verify.comparison import DEFAULT_ATOL, MIN_COSINE, Comparison
from offline_tools.verify.observations import add_observation_options, chosen_observations


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's options."""
    parser.add_argument("--bundle", type=Path, required=True, help="the bundle to verify")
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="the checkpoint it was exported from"
    )
    parser.add_argument("--eagle-config", type=Path, help="as it was given to export")
    add_observation_options(parser, samples=2)
    parser.add_argument(
        "--atol",
        type=positive_float,
        default=DEFAULT_ATOL,
        help="largest 99th percentile of the absolute error (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Print a line for each tensor, write `reports/verify.json`, and fail if one fails."""
    bundle = open_bundle(args.bundle)
    observations, source = chosen_observations(bundle, args)
    found = verify_bundle(bundle, args.checkpoint, args.eagle_config, observations, args.atol)
    _print(found, args.atol)
    passed = all(comparison.passed for comparison in found)
    report = {
        "reference": "PyTorch float32",
        "engine": "ONNX Runtime CPU",
        "source": source,
        "samples": len(observations),
        "min_cosine": MIN_COSINE,
        "atol": args.atol,
        "passed": passed,
        "tensors": [comparison.to_dict() for comparison in found],
    }
    # Before the report, which a bundle on a read-only disk cannot take.
    print("PASS" if passed else "FAIL: the graphs do not compute what the checkpoint computes")
    with atomic_file(args.bundle / "reports" / "verify.json") as path:
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0 if passed else EXIT_CHECK_FAILED


def _print(found: list[Comparison], atol: float) -> None:
    width = max(len(comparison.name) for comparison in found)
    print(f"{'tensor':{width}}  {'cosine':>10} {'rel. L2':>10} {'p99 abs':>10} {'max abs':>10}")
    for c in found:
        verdict = "ok" if c.passed else "FAIL"
        print(
            f"{c.name:{width}}  {c.cosine:10.7f} {c.relative_l2:10.2e} {c.p99_absolute:10.2e} "
            f"{c.max_absolute:10.2e}  {verdict}"
        )
    print(f"asked: cosine >= {MIN_COSINE}, p99 < {atol}, no NaN, equal masks")
