"""`groot-int8 verify-engines`: do a bundle's TensorRT engines answer what its graphs answer?

Owns: the subcommand. Must not import torch. A builder can be wrong without a word: TensorRT 8.6
was, for whole precisions of whole graphs (docs/verification.md). So the policy answers the same
observations from the same noise, on the engines and then on ONNX Runtime on the CPU, each in a
process of its own: on a board that shares its memory the one is gone before the other is loaded.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from groot_int8_ros.errors import EngineError, OutputError
from groot_int8_ros.policy.bundle import open_bundle
from groot_int8_ros.policy.engines import Engine, load_engine
from groot_int8_ros.policy.engines.engine_report import (
    EngineReport,
    advice,
    engines_here,
    report_path,
)
from groot_int8_ros.policy.engines.onnxruntime_engine import OnnxRuntimeEngine
from groot_int8_ros.policy.graph_runs import CommittedRows
from groot_int8_ros.policy.policy import Policy, draw_noise
from groot_int8_ros.policy.types import Float32Array, Observation
from offline_tools.arguments import positive_float
from offline_tools.cli import EXIT_CHECK_FAILED
from offline_tools.engine.child import run_in_child
from offline_tools.verify.comparison import compare, worst
from offline_tools.verify.observations import add_observation_options, chosen_observations

# Whole policies that were right were at most 0.015 off, with static scales and measured from
# float32; wrong ones at least 0.1 (docs/verification.md). Of true size were FP16 engines alone.
DEFAULT_MAX_ERROR = 0.03

_KINDS = ("tensorrt", "onnxruntime")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's options."""
    add = parser.add_argument
    add("--bundle", type=Path, required=True, help="the bundle with engines for this device")
    add_observation_options(parser, samples=3)
    add(
        "--max-error",
        type=positive_float,
        default=DEFAULT_MAX_ERROR,
        help="largest relative L2 of the normalised actions (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Print the worst error, write the report into the bundle, and fail if it is too large."""
    bundle = open_bundle(args.bundle)
    here = engines_here(bundle)
    observations, source = chosen_observations(bundle, args)
    # The engines first: what is wrong with them shows before ONNX Runtime has taken minutes.
    print(f"{len(observations)} observations on {here.device}, then on ONNX Runtime", flush=True)
    found, wanted = (
        run_in_child(
            answers,
            args.bundle,
            kind,
            observations,
            what=f"the policy on {kind}",
            if_killed="use a machine with more of it",
            if_crashed="Build the engines again, and report the graph",
        )
        for kind in _KINDS
    )
    if not all(np.isfinite(one).all() for one in wanted):
        raise EngineError(
            f"the graphs' own actions on ONNX Runtime are not finite, so nothing is said of the "
            f"engines. A layer overflows in its precision: quantise or export {args.bundle} again "
            "with that layer in float (groot-int8 verify names it)"
        )
    error = worst(
        [compare("action_pred", a, b) for a, b in zip(wanted, found, strict=True)]
    ).to_dict()["relative_l2"]
    report = EngineReport(
        engines=here.hashes,
        device=here.device,
        source=source,
        samples=len(observations),
        relative_l2=error,
        max_error=args.max_error,
        passed=error is not None and error <= args.max_error,
    )
    print(f"the engines' actions are {report.error}: relative L2, the worst observation")
    path = report_path(args.bundle, here.folder)
    if report.passed:
        print("PASS")
    else:
        print(f"FAIL. {advice(args.bundle, here)}")
    try:
        report.write(path)
        print(path)
    except OutputError as failure:
        # The verdict stands; whoever loads the engines will not know of it.
        print(f"the verdict was not kept: {failure}")
        if report.passed:
            raise
    return 0 if report.passed else EXIT_CHECK_FAILED


def answers(bundle: Path, kind: str, observations: list[Observation]) -> list[Float32Array]:
    """Answer observations with one engine.

    Args:
        bundle: The bundle, whose hashes are known to be right.
        kind: `onnxruntime` or `tensorrt`. Not through `Policy.load`, which refuses engines that
            were found wrong, and whose ONNX Runtime copies weights to be faster.
        observations: Asked one after the other, the noise drawn from their place; every second
            one with rows that are committed already, as the seam between two chunks has them.

    Returns:
        `action_pred` of each, float32 (horizon, max_action_dim), finite or not.
    """
    opened = open_bundle(bundle, verify_hashes=False)
    engines = {}
    for name in opened.manifest.engine_graphs:
        engines[name] = _load(kind, opened.graph_path(name))
        opened.check_engine(name, engines[name])
    policy = Policy(opened, engines)
    try:
        graphs: Any = policy.graphs  # either family's, whose stages take what the last gave
        found = []
        for index, observation in enumerate(observations):
            inputs = graphs.preprocess(observation)
            noise = draw_noise(0, index, policy.noise_shape)
            # Not `infer`, which refuses values that are not finite: here they are looked for.
            rows = _first_rows_committed(policy.noise_shape) if index % 2 else None
            found.append(graphs.actions(inputs, graphs.features(inputs), noise, rows).copy())
        return found
    finally:
        policy.close()


def _first_rows_committed(shape: tuple[int, int]) -> CommittedRows:
    horizon, width = shape
    actions, mask = np.zeros((1, horizon, width), np.float32), np.zeros((1, horizon), np.bool_)
    first = slice(max(1, horizon // 4))
    actions[0, first], mask[0, first] = 0.5, True
    return CommittedRows(actions, mask)


def _load(kind: str, graph: Path) -> Engine:
    if kind == "tensorrt":
        return load_engine(kind, graph)
    return OnnxRuntimeEngine(graph, keep_graph_as_written=True)
