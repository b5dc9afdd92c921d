"""`groot-int8 gpu-proof`: what TensorRT really does with a bundle, on the GPU that is here.

Owns: the subcommand. Must not import torch. It builds engines of every kind from bundles of one
checkpoint (the float ones as they are; the float32 one through the entropy calibrator, where this
TensorRT has it; the INT8 ones by their Q/DQ nodes), side by side in processes of their own, and
then loads them all and prints, for each: outputs against ONNX Runtime on the float32 graph and on
its own graph, verdicts of the layer audit, whether a CUDA graph is in use, times that were
measured in turns, so that a clock that moves moves all of them, and how much TensorRT keeps of the
engine in the host's memory (`host_copy`), with what of that came back into memory in all these
runs.

Use bundles of a small checkpoint (`make-checkpoint --size narrow`): it is the mechanism that is
shown here. Accuracy and speed of a real policy are another matter.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from groot_int8_ros.capture.store import CaptureStore
from groot_int8_ros.errors import ConfigurationError, GrootError
from groot_int8_ros.policy.bundle import MANIFEST_FILE, open_bundle
from groot_int8_ros.policy.engines.cuda import Cuda
from groot_int8_ros.policy.engines.onnxruntime_engine import OnnxRuntimeEngine
from groot_int8_ros.policy.engines.tensorrt_engine import TensorRTEngine
from groot_int8_ros.policy.families import LARGE_GRAPHS
from groot_int8_ros.policy.files import atomic_file
from offline_tools.arguments import positive_int
from offline_tools.engine import build_command
from offline_tools.engine.engines import BuildOptions, build_engines
from offline_tools.engine.library import open_library
from offline_tools.verify.comparison import compare, worst

_ROUNDS = 15
_POLICY_OBSERVATIONS = 3
_RUNS_A_ROUND = 20


@dataclass(frozen=True)
class Variant:
    """One kind of engine.

    Attributes:
        name: What the table calls it.
        bundle: A bundle of its own, for engines of two kinds do not share a folder.
        options: How it is built.
    """

    name: str
    bundle: Path
    options: BuildOptions


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's options: those of `build`, and where the other bundles are."""
    build_command.configure(parser)
    add = parser.add_argument
    add(
        "--also",
        type=Path,
        action="append",
        default=[],
        help="another bundle of the same checkpoint: FP16, or INT8 with Q/DQ; --bundle is float32",
    )
    add("--work", type=Path, required=True, help="folder for copies, engines and the report")
    add(
        "--policy",
        action="append",
        default=[],
        metavar="ENGINES",
        help="build all graphs of this kind (as the table calls it) and run the policy",
    )
    add(
        "--samples",
        type=positive_int,
        default=6,
        help="feeds to compare on (default: %(default)s)",
    )
    add(
        "--parallel",
        type=positive_int,
        default=6,
        help="builds side by side (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Build, compare, audit, time; 1 if an engine could not be built or does not fit its graph."""
    if args.captures is None:
        raise ConfigurationError("gpu-proof needs --captures: what the engines are fed")
    cuda = Cuda()
    library = open_library("tensorrt")
    print(f"TensorRT {library.version} on {cuda.device().describe()}")
    variants = list(variants_of(args, with_calibrator=library.has_calibrators))
    family = open_bundle(args.bundle, verify_hashes=False).manifest.family
    graphs = tuple(args.graph or LARGE_GRAPHS[family])
    start = time.perf_counter()
    unknown = set(args.policy) - {variant.name for variant in variants}
    if unknown:
        raise ConfigurationError(
            f"--policy {min(unknown)}: there are {', '.join(v.name for v in variants)}"
        )
    built = _build(variants, graphs, args.policy, args.parallel)
    print(f"builds: {time.perf_counter() - start:.0f} s, {args.parallel} side by side")
    rows = []
    for graph in graphs:
        there = [variant for variant in variants if (variant.name, graph) in built]
        rows += _measure(graph, args.bundle, there, args.captures, args.samples)
    policies = []
    for variant in variants:
        if variant.name in args.policy:
            try:
                policies.append(_policy(variant, args.bundle, args.captures))
            except GrootError as error:
                print(f"policy {variant.name} FAILED: {error}")
    with atomic_file(args.work / "proof.json") as temporary:
        temporary.write_text(
            json.dumps({"engines": rows, "policies": policies}, indent=2) + "\n", encoding="utf-8"
        )
    others = len(_all_graphs(variants[0])) - len(graphs)
    wanted = len(variants) * len(graphs) + len(args.policy) * others
    complete = len(built) == wanted
    complete = complete and len(policies) == len(args.policy)
    return int(not complete or any(row["against_own_graph"] is None for row in rows))


def variants_of(args: argparse.Namespace, *, with_calibrator: bool) -> Iterator[Variant]:
    """Copy the bundles into the work folder, or take the copies that are there.

    Args:
        args: The subcommand's.
        with_calibrator: Whether this TensorRT has the entropy calibrator.

    Yields:
        One variant for each kind of engine.

    Raises:
        ConfigurationError: A copy is of another bundle, or of what the bundle was before.
    """
    base = replace(build_command.options_of(args), captures=None)
    kinds = [(args.bundle, "", base)]
    if with_calibrator:
        calibrated = replace(base, quantization="calibrator", captures=args.captures)
        kinds.append((args.bundle, "-calibrator", calibrated))
    kinds += [(bundle, "", base) for bundle in args.also]
    for bundle, suffix, options in kinds:
        name = bundle.name + suffix
        copy = args.work / name
        if copy.exists():
            _check_copy(copy, bundle)
        else:
            shutil.copytree(bundle, copy, ignore=shutil.ignore_patterns("engines", "*.cache*"))
        yield Variant(name, copy, replace(options, bundle=copy))


def _check_copy(copy: Path, bundle: Path) -> None:
    """Refuse a copy whose engines would be of other graphs than those they are compared with."""
    manifest = copy / MANIFEST_FILE
    if not manifest.is_file() or manifest.read_bytes() != (bundle / MANIFEST_FILE).read_bytes():
        raise ConfigurationError(
            f"{copy} is no copy of {bundle} as it is now, which was made anew or has the name of "
            "another: remove the copy with its engines, or give another --work"
        )


def _build(
    variants: list[Variant], graphs: tuple[str, ...], whole: list[str], parallel: int
) -> set[tuple[str, str]]:
    def one(job: tuple[Variant, str]) -> tuple[str, str] | None:
        variant, graph = job
        try:
            build_engines(
                replace(variant.options, graphs=(graph,)),
                lambda line: print(f"[{variant.name}/{graph}] {line.strip()}", flush=True),
            )
        except GrootError as error:
            print(f"[{variant.name}/{graph}] FAILED: {error}", flush=True)
            return None
        return variant.name, graph

    jobs = [
        (variant, graph)
        for variant in variants
        for graph in (_all_graphs(variant) if variant.name in whole else graphs)
    ]
    with ThreadPoolExecutor(parallel) as pool:
        return {done for done in pool.map(one, jobs) if done is not None}


def _all_graphs(variant: Variant) -> tuple[str, ...]:
    return open_bundle(variant.bundle, verify_hashes=False).manifest.engine_graphs


def _measure(
    graph: str, reference: Path, variants: list[Variant], captures: Path, samples: int
) -> list[dict[str, Any]]:
    opened = open_bundle(reference, verify_hashes=False)
    captured = CaptureStore.open(captures).feeds(graph, opened)
    feeds = [dict(feed) for feed in islice(captured, samples)]
    expected = _onnxruntime(reference, graph, feeds)
    engines: dict[str, TensorRTEngine] = {}
    rows: list[dict[str, Any]] = []
    print(f"\n{graph}: worst of {len(feeds)} feeds")
    print(
        f"{'engine':28}{'MB':>8}{'vs float32':>12}{'vs own ONNX':>12}{'INT8':>6}{'FLOAT':>6}"
        f"{'UNKN':>6}{'ms':>9}{'plain':>9}{'copy MB':>9}{'resident':>9}  CUDA graph"
    )
    try:
        for variant in variants:
            path = open_bundle(variant.bundle, verify_hashes=False).graph_path(graph)
            try:
                engines[variant.name] = TensorRTEngine(path)
            except GrootError as error:
                print(f"{variant.name:28} FAILED: {error}")
        outputs = {name: [engine.run(feed) for feed in feeds] for name, engine in engines.items()}
        times = _times(engines)
        for variant in variants:
            if variant.name not in engines:
                continue
            engine, found = engines[variant.name], outputs[variant.name]
            own = _onnxruntime(variant.bundle, graph, feeds)
            verdicts = list(engine.manifest.layer_precision.values())
            row = {
                "graph": graph,
                "engine": variant.name,
                "megabytes": engine.manifest.engine_bytes / 1e6,
                "against_float32": _error(expected, found),
                "against_own_graph": _error(own, found),
                "verdicts": {v: verdicts.count(v) for v in ("INT8", "FLOAT", "UNKNOWN")},
                "milliseconds": times[variant.name],
                "host_copy_megabytes": engine.host_copy.found_bytes / 1e6,
                "host_copy_kept_megabytes": engine.host_copy.kept_bytes / 1e6,
                "host_copy_returned_megabytes": engine.host_copy.returned_bytes() / 1e6,
                "cuda_graph": engine.cuda_graph_state,
                "zero_copy": engine.zero_copy,
                "build_seconds": engine.manifest.seconds,
                "peak_gib": engine.manifest.peak_memory_bytes / 2**30,
            }
            plain = TensorRTEngine(
                open_bundle(variant.bundle, verify_hashes=False).graph_path(graph),
                use_cuda_graph=False,
            )
            plain.run(feeds[0])
            row["milliseconds_plain"] = _times({variant.name: plain})[variant.name]
            plain.close()
            rows.append(row)
            _print(row)
    finally:
        for engine in engines.values():
            engine.close()
    return rows


def _policy(variant: Variant, reference: Path, captures: Path) -> dict[str, Any]:
    """Run the whole policy on engines and on ONNX Runtime, from the same frames and noise."""
    instruction = CaptureStore.open(captures).records()[0].instruction
    # Here, for it brings OpenCV and the tokenizer, which the rest of the proof does not need.
    from groot_int8_ros.policy.policy import Policy
    from groot_int8_ros.policy.types import Observation

    actions: dict[str, list[NDArray[Any]]] = {}
    timings: dict[str, float] = {}
    for kind, bundle in (("onnxruntime", reference), ("tensorrt", variant.bundle)):
        policy = Policy.load(bundle, engine=kind)
        random = np.random.RandomState(0)
        actions[kind] = []
        for stamp_ns in range(_POLICY_OBSERVATIONS):
            chunk = policy.infer(
                Observation(
                    images={
                        camera.key: random.randint(
                            0, 256, (camera.height, camera.width, 3), dtype=np.uint8
                        )
                        for camera in policy.robot.cameras
                    },
                    state={
                        key.key: random.uniform(-1, 1, key.dim).astype(np.float32)
                        for key in policy.processor.state_keys
                    },
                    instruction=instruction,
                    stamp_ns=stamp_ns,
                )
            )
            actions[kind].append(chunk.action_pred)
            timings[kind] = chunk.timings_s["total"] * 1e3
        policy.close()
    errors = [
        compare("action_pred", a, b)
        for a, b in zip(actions["onnxruntime"], actions["tensorrt"], strict=True)
    ]
    row = {
        "policy": variant.name,
        "relative_l2": worst(errors).relative_l2,
        "max_absolute": worst(errors).max_absolute,
        "milliseconds": timings,
    }
    print(
        f"\npolicy {variant.name}: action_pred against ONNX Runtime on {reference.name}, worst of "
        f"{len(errors)} observations: relative L2 {row['relative_l2']:.2e}, max abs "
        f"{row['max_absolute']:.2e}; whole inference {timings['tensorrt']:.1f} ms"
    )
    return row


def _print(row: Mapping[str, Any]) -> None:
    verdicts = row["verdicts"]
    print(
        f"{row['engine']:28}{row['megabytes']:8.2f}{_shown(row['against_float32'])}"
        f"{_shown(row['against_own_graph'])}{verdicts['INT8']:6}{verdicts['FLOAT']:6}"
        f"{verdicts['UNKNOWN']:6}{row['milliseconds']:9.4f}{row['milliseconds_plain']:9.4f}"
        f"{row['host_copy_megabytes']:9.2f}"
        f"{row['host_copy_kept_megabytes'] + row['host_copy_returned_megabytes']:9.2f}  "
        f"{row['cuda_graph']}",
        flush=True,
    )


def _shown(error: float | None) -> str:
    return f"{'mask!':>12}" if error is None else f"{error:12.2e}"


def _times(engines: Mapping[str, TensorRTEngine]) -> dict[str, float]:
    """Time engines in turns and return the median of each."""
    found: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(_ROUNDS):
        for name, engine in engines.items():
            found[name].append(engine.time_ms(_RUNS_A_ROUND))
    return {name: statistics.median(values) for name, values in found.items()}


def _onnxruntime(
    bundle: Path, graph: str, feeds: list[dict[str, NDArray[Any]]]
) -> list[dict[str, NDArray[Any]]]:
    engine = OnnxRuntimeEngine(open_bundle(bundle, verify_hashes=False).graph_path(graph))
    try:
        return [engine.run(feed) for feed in feeds]
    finally:
        engine.close()


def _error(
    reference: list[dict[str, NDArray[Any]]], found: list[dict[str, NDArray[Any]]]
) -> float | None:
    """Return the worst relative L2 error over floating outputs; None if a mask differs."""
    comparisons = []
    for a, b in zip(reference, found, strict=True):
        for name, values in a.items():
            if not np.issubdtype(values.dtype, np.floating):
                if not np.array_equal(values, b[name]):
                    return None
                continue
            comparisons.append(compare(name, values.astype(np.float32), b[name]))
    return worst(comparisons).relative_l2
