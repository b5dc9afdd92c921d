"""`groot-int8 verify-engines`: do a bundle's TensorRT engines answer what its graphs answer?

Owns: the subcommand. Must not import torch. A builder can be wrong without a word: TensorRT 8.6
was, for whole precisions of whole graphs (docs/verification.md). So the policy answers the same
observations from the same noise, on ONNX Runtime on the CPU and then on the engines, each in a
process of its own: on a board that shares its memory the one is gone before the other is loaded.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from groot_int8_ros.errors import EngineError
from groot_int8_ros.policy.bundle import Bundle, open_bundle
from groot_int8_ros.policy.engines.cuda import Cuda
from groot_int8_ros.policy.engines.engine_report import ENGINE_REPORT, EngineReport
from groot_int8_ros.policy.engines.tensorrt_engine import import_tensorrt
from groot_int8_ros.policy.engines.tensorrt_manifest import (
    ENGINE_SUFFIX,
    engine_folder,
    read_engine_manifest,
    rebuild_command,
)
from groot_int8_ros.policy.policy import Policy, draw_noise
from groot_int8_ros.policy.types import Float32Array, Observation
from offline_tools.arguments import not_negative_int, positive_float, positive_int
from offline_tools.cli import EXIT_CHECK_FAILED
from offline_tools.engine.child import run_in_child
from offline_tools.verify.comparison import compare, worst
from offline_tools.verify.observations import generated_observations, recorded_observations

# Engines that were right were at most 0.012 off, INT8 with static scales, and that of float32;
# those that were wrong at least 0.1 (docs/verification.md).
DEFAULT_MAX_ERROR = 0.03


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's options."""
    add = parser.add_argument
    add("--bundle", type=Path, required=True, help="the bundle with engines for this device")
    add("--dataset", type=Path, help="LeRobot dataset to take observations from (default: noise)")
    add("--episode", type=not_negative_int, default=0, help="default: %(default)s")
    add(
        "--samples",
        type=positive_int,
        default=3,
        help="observations to compare (default: %(default)s)",
    )
    add(
        "--max-error",
        type=positive_float,
        default=DEFAULT_MAX_ERROR,
        help="largest relative L2 of the normalised actions (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Print the worst error, write the report into the bundle, and fail if it is too large."""
    bundle = open_bundle(args.bundle)
    # First, for ONNX Runtime takes minutes on a board.
    device, engines = engines_here(bundle)
    if args.dataset:
        observations = recorded_observations(bundle, args.dataset, args.episode, args.samples)
    else:
        observations = generated_observations(bundle, args.samples)
    print(f"{len(observations)} observations on ONNX Runtime, then on {device}", flush=True)
    wanted, found = (
        run_in_child(answers, args.bundle, kind, observations, what=f"the policy on {kind}")
        for kind in ("onnxruntime", "tensorrt")
    )
    error = worst(
        [compare("action_pred", a, b) for a, b in zip(wanted, found, strict=True)]
    ).to_dict()["relative_l2"]
    passed = error is not None and error <= args.max_error
    report = EngineReport(
        engines=engines,
        device=device,
        source=args.dataset.name if args.dataset else "generated noise",
        samples=len(observations),
        relative_l2=error,
        max_error=args.max_error,
        passed=passed,
    )
    shown = "not finite" if error is None else f"{error:.2e}"
    print(f"action_pred: relative L2 {shown} in the worst; asked: at most {args.max_error:g}")
    # Before the report, which a bundle on a read-only disk cannot take.
    print(
        "PASS"
        if passed
        else "FAIL: the engines do not answer what their graphs do. Do not run them. Build them "
        f"with another --builder-level, or from a bundle of another precision: "
        f"{rebuild_command(args.bundle)}"
    )
    report.write(args.bundle)
    print(args.bundle / ENGINE_REPORT)
    return 0 if passed else EXIT_CHECK_FAILED


def engines_here(bundle: Bundle) -> tuple[str, dict[str, str]]:
    """Return what the engines run on, and the hash of each by its graph.

    Raises:
        EngineError: There is no TensorRT or GPU here, or an engine is missing.
    """
    version, device = str(import_tensorrt().__version__), Cuda().device()
    folder = engine_folder(bundle.folder, version, device)
    hashes = {}
    for name in bundle.manifest.engine_graphs:
        path = folder / (bundle.graph_path(name).stem + ENGINE_SUFFIX)
        if not path.is_file():
            raise EngineError(
                f"{path} does not exist. Build it here: {rebuild_command(bundle.folder)}"
            )
        manifest = read_engine_manifest(path.with_suffix(".json"), bundle.folder)
        hashes[name] = manifest.engine_sha256
    return f"TensorRT {version}, {device.describe()}", hashes


def answers(bundle: Path, engine: str, observations: list[Observation]) -> list[Float32Array]:
    """Answer observations with one engine.

    Args:
        bundle: The bundle.
        engine: Which engine runs its graphs.
        observations: Asked one after the other, the noise drawn from their place.

    Returns:
        `action_pred` of each, float32 (horizon, max_action_dim), finite or not.
    """
    policy = Policy.load(bundle, engine=engine, failed_engines=True)
    try:
        graphs: Any = policy.graphs  # either family's, whose stages take what the last gave
        found = []
        for index, observation in enumerate(observations):
            inputs = graphs.preprocess(observation)
            noise = draw_noise(0, index, policy.noise_shape)
            # Not `infer`, which refuses values that are not finite: here they are looked for.
            found.append(graphs.actions(inputs, graphs.features(inputs), noise).copy())
        return found
    finally:
        policy.close()
