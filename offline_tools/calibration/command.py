"""`groot-int8 calibrate`: calibration data from a dataset, a bag or a robot's recorder.

Owns: the subcommand's options and what it prints.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from groot_int8_ros.capture.coverage import measure_coverage
from groot_int8_ros.capture.store import CaptureStore
from groot_int8_ros.errors import ConfigurationError
from groot_int8_ros.policy.bundle import open_bundle
from groot_int8_ros.policy.policy import DEFAULT_SEED, Policy
from offline_tools import arguments
from offline_tools.calibration.run import Skipped, Source, capture, complete

DEFAULT_SAMPLES = 128
CALIBRATION_FOLDER = "calibration"

_SOURCES = ("dataset", "bag", "complete")
_ONLY_WITH: dict[str, tuple[str, ...]] = {
    "episodes": ("dataset",),
    "instruction_key": ("dataset",),
    "params_file": ("bag",),
    "instruction": ("bag",),
    # `--complete` keeps every sample of its store with the noise that it has, and starts anew.
    "samples": ("dataset", "bag"),
    "seed": ("dataset", "bag"),
    "resume": ("dataset", "bag"),
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's options."""
    parser.add_argument("--bundle", type=Path, required=True, help="float bundle to run")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--dataset", type=Path, help="LeRobot dataset to take observations from")
    source.add_argument("--bag", type=Path, help="rosbag2 to take observations from")
    source.add_argument(
        "--complete",
        type=Path,
        metavar="STORE",
        help="store of calibration_recorder_node: compute what the recorder could not see",
    )
    parser.add_argument(
        "--output", type=Path, help="folder of the store (default: BUNDLE/calibration)"
    )
    parser.add_argument(
        "--samples",
        type=arguments.positive_int,
        help="observations to keep, spread over the recording "
        f"(default: {DEFAULT_SAMPLES}; not with --complete, which keeps all)",
    )
    parser.add_argument(
        "--seed",
        type=arguments.seed,
        help=f"of the noise (default: {DEFAULT_SEED}; with --complete it is the recorder's)",
    )
    parser.add_argument(
        "--episodes", help="episodes of --dataset, such as 0,3-5 (default: all of them)"
    )
    parser.add_argument("--instruction-key", help="annotation of --dataset with the instructions")
    parser.add_argument(
        "--params-file", type=Path, help="the node's YAML: topics and joints of --bag"
    )
    parser.add_argument(
        "--instruction", help="instruction of --bag until its instruction topic says another"
    )
    parser.add_argument(
        "--keep-images", action="store_true", help="store camera frames beside the tensors"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with a store that was interrupted"
    )
    parser.add_argument(
        "--threads",
        type=arguments.positive_int,
        help="CPU threads of the engine (default: its choice)",
    )


def run(args: argparse.Namespace) -> int:
    """Capture or complete, print the coverage report and write it beside the samples."""
    _refuse_unused(args)
    _refuse_int8(args.bundle)
    output: Path = args.output or args.bundle / CALIBRATION_FOLDER
    captured = CaptureStore.open(args.complete) if args.complete else None
    policy = Policy.load(args.bundle, threads=args.threads)
    try:
        if captured is not None:
            store = _complete(policy, captured, output, args)
        else:
            done = capture(
                policy,
                _source(policy, args),
                output,
                samples=args.samples or DEFAULT_SAMPLES,
                seed=DEFAULT_SEED if args.seed is None else args.seed,
                keep_images=args.keep_images,
                resume=args.resume,
            )
            store = done.store
            _tell_skipped(done.skipped)
        coverage = measure_coverage(store, policy.processor, policy.manifest)
    finally:
        policy.close()
    coverage.write(output)
    print(coverage.to_text(), end="")
    print(f"{output}: {len(store)} samples, content SHA-256 {store.content_sha256}")
    return 0


def _refuse_unused(args: argparse.Namespace) -> None:
    """Refuse options that the source of the observations has no use for."""
    source = next(name for name in _SOURCES if getattr(args, name) is not None)
    for option, sources in _ONLY_WITH.items():
        value = getattr(args, option)
        if source not in sources and value is not None and value is not False:  # 0 is a seed
            raise ConfigurationError(
                f"--{option.replace('_', '-')} has no meaning with --{source}, but with "
                f"{' or '.join(f'--{name}' for name in sources)}: leave it out"
            )


def _refuse_int8(folder: Path) -> None:
    # The policy reads the files once more and compares their hashes.
    if open_bundle(folder, verify_hashes=False).manifest.is_quantized:
        raise ConfigurationError(
            f"{folder} is an INT8 bundle: ranges are measured on what the float graphs are given. "
            "Give the float bundle that it was made of"
        )


def _source(policy: Policy, args: argparse.Namespace) -> Source:
    # Each needs libraries that a machine without the other's recordings may lack.
    if args.dataset:
        from offline_tools.calibration.dataset_source import DatasetSource

        return DatasetSource(args.dataset, policy, _episodes(args.episodes), args.instruction_key)
    from offline_tools.calibration.bag_source import BagInputs, BagSource

    return BagSource(args.bag, policy, BagInputs.read(args.params_file, args.instruction))


def _complete(
    policy: Policy, captured: CaptureStore, output: Path, args: argparse.Namespace
) -> CaptureStore:
    done = complete(policy, captured, output, keep_images=args.keep_images)
    print(f"{done.completed} samples completed")
    for key, difference in done.largest_difference.items():
        print(
            f"largest difference between recorded and computed targets of {key}: {difference:.3g}"
        )
    return done.store


def _tell_skipped(skipped: Skipped) -> None:
    if skipped.count:
        print(
            f"{skipped.count} observation(s) could not be used; the first: {skipped.first}",
            file=sys.stderr,
        )


def _episodes(text: str | None) -> list[int] | None:
    if text is None:
        return None
    numbers: list[int] = []
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            numbers += range(int(first), int(last or first) + 1)
    except ValueError:
        numbers = []
    if not numbers:
        raise ConfigurationError(f"--episodes {text!r} is no list such as 0,3-5")
    return numbers
