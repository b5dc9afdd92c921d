"""`groot-int8 quantize`: from a float bundle and captured inputs to an INT8 bundle.

Owns: the subcommand and its tables. Must not import torch.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from groot_int8_ros.errors import ConfigurationError
from offline_tools.arguments import positive_float, positive_int, seed
from offline_tools.quantize.int8_bundle import (
    AUTO,
    DEFAULT_ALPHA,
    DEFAULT_BUDGET,
    FIXED_SCHEMES,
    QuantizeOptions,
    QuantizeResult,
    quantize_bundle,
)
from offline_tools.quantize.ranges import DEFAULT_PERCENTILE


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's options."""
    parser.add_argument("--bundle", type=Path, required=True, help="the float bundle")
    parser.add_argument(
        "--calibration",
        type=Path,
        help="its capture store, as groot-int8 calibrate writes it (default: BUNDLE/calibration)",
    )
    parser.add_argument("--output", type=Path, required=True, help="the INT8 bundle to write")
    parser.add_argument(
        "--scheme",
        choices=[AUTO, *FIXED_SCHEMES],
        default=AUTO,
        help="auto picks for each layer under the budget; docs/quantization.md explains the "
        "others (default: %(default)s)",
    )
    parser.add_argument(
        "--layers",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="layers that may become INT8, such as 'transformer_blocks.*'; a leading ! takes "
        "layers out (default: all)",
    )
    parser.add_argument(
        "--budget",
        type=float,
        help="largest relative L2 error of the normalised actions against the float bundle's, "
        "held with 95 %% confidence over observations "
        f"(default: {DEFAULT_BUDGET} for auto, what bfloat16 costs; none for a fixed scheme)",
    )
    parser.add_argument(
        "--max-joint-error",
        nargs="+",
        default=[],
        metavar="[KEY=]UNITS",
        help="largest error of an action's target in its physical units, of every action key or "
        "of one",
    )
    parser.add_argument(
        "--accept",
        action="store_true",
        help="write the bundle of a fixed scheme even if it misses the limits",
    )
    parser.add_argument(
        "--migration-alpha",
        type=float,
        default=DEFAULT_ALPHA,
        help="of smooth and row-smooth (default: %(default)s)",
    )
    parser.add_argument(
        "--percentile",
        type=float,
        default=DEFAULT_PERCENTILE,
        help="of static-percentile (default: %(default)s)",
    )
    parser.add_argument(
        "--calibration-cache",
        nargs="+",
        default=[],
        metavar="GRAPH=FILE",
        help="of static-cache: the scales that TensorRT's calibrator found, as `groot-int8 build "
        "--quantization calibrator` leaves them in BUNDLE/calibration; a graph without one stays "
        "float",
    )
    parser.add_argument("--seed", type=seed, default=0, help="default: %(default)s")
    parser.add_argument(
        "--search-samples",
        type=positive_int,
        default=8,
        help="observations that guide auto's search (default: %(default)s)",
    )
    parser.add_argument(
        "--judge-samples",
        type=positive_int,
        default=16,
        help="held-out observations that judge the result (default: %(default)s)",
    )
    parser.add_argument(
        "--max-evaluations",
        type=positive_int,
        default=16,
        help="plans that auto measures at most (default: %(default)s)",
    )
    parser.add_argument("--threads", type=positive_int, help="CPU threads inside an operator")


def run(args: argparse.Namespace) -> int:
    """Write the bundle and print what it is."""
    budget = args.budget
    limits = parse_joint_limits(args.max_joint_error)
    if budget is None and args.scheme == AUTO and not limits:
        budget = DEFAULT_BUDGET
    result = quantize_bundle(
        QuantizeOptions(
            bundle=args.bundle,
            calibration=args.calibration or args.bundle / "calibration",
            output=args.output,
            scheme=args.scheme,
            layers=tuple(args.layers),
            budget=budget,
            max_joint_error=limits,
            accept=args.accept,
            migration_alpha=args.migration_alpha,
            percentile=args.percentile,
            calibration_caches=_caches(args.calibration_cache),
            seed=args.seed,
            search_samples=args.search_samples,
            judge_samples=args.judge_samples,
            max_evaluations=args.max_evaluations,
            threads=args.threads,
        ),
        report=lambda line: print(line, flush=True),
    )
    _print(result)
    print(f"{args.output}: quantised with {args.scheme}")
    return 0


def parse_joint_limits(texts: Iterable[str]) -> dict[str, float]:
    """Read `--max-joint-error`.

    Args:
        texts: `UNITS` or `KEY=UNITS`.

    Returns:
        Action key to limit in the key's units; the key `""` stands for every key.

    Raises:
        ConfigurationError: A text is none of the two, or its number is not above 0.
    """
    limits = {}
    for text in texts:
        key, _, number = text.rpartition("=")
        try:
            limits[key] = positive_float(number)
        except argparse.ArgumentTypeError as error:
            raise ConfigurationError(
                f"--max-joint-error takes a number above 0 or KEY=NUMBER, not {text!r}"
            ) from error
    return limits


def _caches(texts: list[str]) -> dict[str, Path]:
    caches = {}
    for text in texts:
        graph, separator, file = text.partition("=")
        if not separator or not file:
            raise ConfigurationError(f"--calibration-cache takes GRAPH=FILE, not {text!r}")
        caches[graph] = Path(file)
    return caches


def _print(result: QuantizeResult) -> None:
    print(f"\n{'graph':13}{'scheme':24}{'layers':>8}{'weights':>12}")
    for name, layers in result.layers.items():
        record = result.manifest.graphs[name].quantization
        schemes = {} if record is None else record.layers
        found: Counter[str] = Counter()
        weights: Counter[str] = Counter()
        for layer in layers:
            scheme = schemes[layer.name].name if layer.name in schemes else "float"
            found[scheme] += 1
            weights[scheme] += layer.parameters
        total = sum(weights.values())
        for scheme in sorted(found):
            share = 100 * weights[scheme] / total
            print(f"{name:13}{scheme:24}{found[scheme]:>8}{share:>11.1f}%")
    print(
        f"\nsize of both graphs: {result.float_bytes / 1e6:.1f} MB -> "
        f"{result.int8_bytes / 1e6:.1f} MB"
    )
    errors = result.errors
    print("actions against the float bundle's, on held-out samples:")
    print(
        f"  relative L2 {100 * errors.relative_l2:.3f} %, cosine {errors.cosine:.6f}, "
        f"jerk x {errors.jerk_ratio:.4f}"
    )
    for key, largest in errors.max_error.items():
        print(f"  {key}: max {largest:.4g}, p99 {errors.p99_error[key]:.4g} (joint units)")
    if result.share is not None:
        print(f"  {100 * result.share:.0f} % of the limit, other observations allowed for")
