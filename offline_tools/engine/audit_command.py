"""`groot-int8 audit`: is every layer that should be INT8 really INT8?

Owns: the subcommand. Must not import torch. Without an engine it reads the bundle's graphs; with
one, what TensorRT's own inspector said of it when it was built, or says now where a GPU is here.
Exit code 1 means that a layer that should be INT8 is not known to be; a folder of engines answers
for both large graphs, so the layers of one that it lacks are not known.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from groot_int8_ros.errors import ConfigurationError, EngineError
from groot_int8_ros.policy.bundle import GRAPH_FOLDER, Bundle, open_bundle
from groot_int8_ros.policy.engines.tensorrt_engine import TensorRTEngine
from groot_int8_ros.policy.engines.tensorrt_manifest import (
    ENGINE_FOLDER,
    ENGINE_SUFFIX,
    read_engine_manifest,
    rebuild_command,
)
from groot_int8_ros.policy.families import LARGE_GRAPHS
from groot_int8_ros.policy.files import atomic_file, sha256_of_file
from offline_tools.engine.engines import LAYERS_SUFFIX
from offline_tools.engine.inspector import EngineLayer, judge, parse_inspection, read_kernels
from offline_tools.engine.verdicts import LayerVerdict, Precision, count
from offline_tools.quantize.graph_audit import audit_bundle, audit_graph, fewest_launches
from offline_tools.quantize.layers import load_graph

_TIMED_RUNS = 20
_SLOWEST = 15


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's options."""
    parser.add_argument("--bundle", type=Path, required=True, help="the bundle")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--engine", type=Path, help="audit this engine")
    what.add_argument(
        "--engines",
        type=Path,
        nargs="+",
        metavar="DIR",
        help=f"audit every engine of these folders ({ENGINE_FOLDER}/* in the bundle); the layers "
        "of a large graph that has no engine there are not known to be anything",
    )
    parser.add_argument(
        "--time",
        action="store_true",
        help="load each engine here, on the GPU it was built for, and time its layers; with --all "
        "every one of them is listed",
    )
    parser.add_argument(
        "--kernels",
        type=Path,
        help="kernels that one run of --engine launched, as ncu or nsys lists them in CSV: they "
        "decide about regions that TensorRT's inspector does not open (see --run-once)",
    )
    parser.add_argument(
        "--run-once",
        action="store_true",
        help="load --engine, run it once and end: for the profiler that lists --kernels",
    )
    parser.add_argument(
        "--all",
        action="store_true",
        help="list every layer, not the wrong ones, and what an engine fused into each of its own",
    )
    parser.add_argument("--json", type=Path, help="write the verdicts to this file too")


def run(args: argparse.Namespace) -> int:
    """Audit, print, and return 1 if a layer that should be INT8 is not known to be."""
    if args.engine is None and (args.kernels is not None or args.run_once):
        raise ConfigurationError("--kernels and --run-once are for one engine: name it (--engine)")
    if args.engine is None and args.engines is None and args.time:
        raise ConfigurationError(
            "--time is for engines: name one (--engine) or their folder (--engines)"
        )
    bundle = open_bundle(args.bundle, verify_hashes=False)
    if args.run_once:
        # Loading runs an engine once, to warm it up.
        TensorRTEngine(_graph(bundle, args.engine), use_cuda_graph=False).close()
        return 0
    if args.engine is None and args.engines is None:
        found = audit_bundle(bundle)
        print("what the ONNX graphs say (an engine may still differ: --engines)")
        for name, verdicts in found.items():
            _print(name, verdicts, list_all=args.all)
    else:
        found = _audit_engines(args, bundle)
    if args.json is not None:
        _write(args.json, found)
    return int(any(verdict.failed for verdicts in found.values() for verdict in verdicts))


def _audit_engines(args: argparse.Namespace, bundle: Bundle) -> dict[str, list[LayerVerdict]]:
    """Audit the engines that were named, print, and return their verdicts by engine."""
    if args.engine is not None:
        ran = [] if args.kernels is None else read_kernels(_text(args.kernels))
        return {
            args.engine.stem: _report(args, bundle, args.engine, args.engine.stem, ran).verdicts
        }
    found = {}
    by_folder = {folder: _engines(folder, bundle) for folder in args.engines}

    def named(path: Path) -> str:
        return str(path.with_suffix("")) if len(by_folder) > 1 else path.stem

    for folder, paths in by_folder.items():
        calibrated = False
        for path in paths:
            name = named(path)
            audit = _report(args, bundle, path, name, ())
            found[name] = audit.verdicts
            calibrated |= audit.calibrated
        for graph in LARGE_GRAPHS[bundle.manifest.family]:
            path = folder / f"{bundle.graph_path(graph).stem}{ENGINE_SUFFIX}"
            if path not in paths:
                name = named(path)
                found[name] = _without_engine(bundle, graph, calibrated=calibrated)
                print(f"{path} is missing. Build it: {rebuild_command(bundle.folder)}")
                _print(name, found[name], list_all=args.all)
    return found


def _engines(folder: Path, bundle: Bundle) -> list[Path]:
    paths = sorted(folder.glob(f"*{ENGINE_SUFFIX}"))
    if not paths:
        raise EngineError(
            f"{folder} holds no engine. Build some: {rebuild_command(bundle.folder)}"
        )
    return paths


def _without_engine(bundle: Bundle, graph: str, *, calibrated: bool) -> list[LayerVerdict]:
    """Return the verdicts of a graph that has no engine beside the others.

    Args:
        bundle: The bundle.
        graph: The graph's name.
        calibrated: Whether INT8 was asked of TensorRT's calibrator for the engines beside it.
    """
    return [
        replace(
            layer,
            wanted=Precision.INT8 if calibrated else layer.wanted,
            verdict=Precision.UNKNOWN,
            evidence="the graph has no engine here",
        )
        for layer in audit_graph(
            bundle.graph_path(graph), bundle.manifest.graphs[graph].quantization
        )
    ]


def _report(
    args: argparse.Namespace, bundle: Bundle, path: Path, name: str, ran: Sequence[str]
) -> _EngineAudit:
    """Audit an engine and print what was found under its name."""
    audit = _audit_engine(bundle, path, ran, time=args.time)
    if args.all or args.time:
        _print_layers(name, audit, list_all=args.all)
    _print(name, audit.verdicts, list_all=args.all)
    if audit.calibrated:
        print(_what_a_calibrator_gave(name, audit.verdicts))
    hidden = any(one.failed and one.verdict is Precision.UNKNOWN for one in audit.verdicts)
    if hidden and not ran and any(layer.is_opaque for layer in audit.layers):
        print(_how_to_look_inside(name, bundle.folder, path))
    return audit


def count_products(graph: Path) -> int:
    """Return how many matrix products a graph has, those of two activations included."""
    return sum(node.op_type in ("MatMul", "Gemm") for node in load_graph(graph).graph)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}") from error


@dataclass(frozen=True)
class _EngineAudit:
    """What one engine's audit found.

    Attributes:
        verdicts: Of each layer of the graph.
        layers: The engine's own layers.
        times_ms: Engine layer to its time, where it was measured.
        calibrated: Whether INT8 was asked of TensorRT's calibrator.
    """

    verdicts: list[LayerVerdict]
    layers: list[EngineLayer]
    times_ms: dict[str, float]
    calibrated: bool


def _audit_engine(bundle: Bundle, path: Path, ran: Sequence[str], *, time: bool) -> _EngineAudit:
    manifest = read_engine_manifest(path.with_suffix(".json"), bundle.folder)
    if not path.is_file() or sha256_of_file(path) != manifest.engine_sha256:
        raise EngineError(
            f"{path} is not the engine that its manifest speaks of. Build it again: "
            + rebuild_command(bundle.folder, manifest.build_options)
        )
    by_file = {record.file: record for record in bundle.manifest.graphs.values()}
    record = by_file.get(manifest.graph)
    if record is None or any(
        bundle.manifest.files.get(file, ("", 0))[0] != sha256
        for file, sha256 in manifest.graph_sha256.items()
    ):
        raise EngineError(
            f"{path} was built from another {manifest.graph} than the bundle has now. Build it "
            f"again: {rebuild_command(bundle.folder, manifest.build_options)}"
        )
    layers, times_ms = _layers(bundle, path, time=time)
    calibrated = manifest.quantization == "calibrator"
    in_graph = audit_graph(bundle.folder / record.file, record.quantization)
    wanted = {one.layer: Precision.INT8 if calibrated else one.wanted for one in in_graph}
    products = {one.layer: one.products for one in in_graph}
    asked = {name for name, wish in wanted.items() if wish is Precision.INT8}
    verdicts = judge(
        layers,
        wanted,
        ran,
        float_products=count_products(bundle.folder / record.file)
        - sum(products[name] for name in asked),
        int8_launches=fewest_launches(bundle.folder / record.file, asked),
        products=products,
    )
    return _EngineAudit(verdicts, layers, times_ms, calibrated)


def _layers(
    bundle: Bundle, path: Path, *, time: bool
) -> tuple[list[EngineLayer], dict[str, float]]:
    recorded = path.with_name(path.stem + LAYERS_SUFFIX)
    if not time:
        if not recorded.is_file():
            raise EngineError(
                f"{recorded} is missing: nobody asked TensorRT about this engine when it was "
                "built. Use --time on the device it was built for."
            )
        return parse_inspection(recorded.read_text(encoding="utf-8"), str(recorded)), {}
    engine = TensorRTEngine(_graph(bundle, path), use_cuda_graph=False)
    try:
        layers = parse_inspection(engine.inspect(), str(path))
        return layers, engine.layer_times_ms(_TIMED_RUNS)
    finally:
        engine.close()


def _print_layers(name: str, audit: _EngineAudit, *, list_all: bool) -> None:
    """Print the engine's own layers, the slowest first where they were timed."""
    layers = sorted(audit.layers, key=lambda layer: -audit.times_ms.get(layer.name, 0.0))
    shown = layers if list_all else layers[:_SLOWEST]
    print(
        f"{name}: {len(shown)} of {len(layers)} layers of the engine"
        + (", ms (TensorRT waits after each: their sum is more)" if audit.times_ms else "")
    )
    for layer in shown:
        time_ms = audit.times_ms.get(layer.name)
        print(
            f"  {'' if time_ms is None else f'{time_ms:.4f}':>9}  {layer.precision.value:7} "
            f"{layer.kind:16} {layer.name[:60]:60} {layer.kernel}"
        )
        if list_all and len(layer.nodes) > 1:
            print(f"{'':11} fused: {', '.join(layer.nodes)}")


def _what_a_calibrator_gave(name: str, verdicts: Sequence[LayerVerdict]) -> str:
    """Say plainly what became of INT8 that was asked of TensorRT's calibrator."""
    counts = count(verdicts)
    return (
        f"{name}: TensorRT's calibrator was asked for INT8. Known to be INT8: "
        f"{counts[Precision.INT8]} of {len(verdicts)} layers; floating: "
        f"{counts[Precision.FLOAT]}; not known: {counts[Precision.UNKNOWN]}. Calibration allows "
        "INT8 and does not demand it, and little is what it gives a transformer: for INT8 that is "
        "there use groot-int8 quantize and build --quantization qdq"
    )


def _how_to_look_inside(name: str, bundle: Path, engine: Path) -> str:
    """Say how to learn what is in regions that the inspector does not open."""
    words = ["groot-int8", "audit", "--bundle", str(bundle), "--engine", str(engine)]
    command = shlex.join(words)
    return (
        f"{name}: the kernels that a run launches tell what is inside. On the device: "
        f"ncu --metrics gpu__time_duration.sum --csv {command} --run-once > kernels.csv; "
        f"then: {command} --kernels kernels.csv"
    )


def _graph(bundle: Bundle, engine: Path) -> Path:
    return bundle.folder / GRAPH_FOLDER / f"{engine.stem}.onnx"


def _print(name: str, verdicts: Sequence[LayerVerdict], *, list_all: bool) -> None:
    wanted = sum(verdict.wanted is Precision.INT8 for verdict in verdicts)
    proven = sum(
        verdict.verdict is Precision.INT8
        for verdict in verdicts
        if verdict.wanted is Precision.INT8
    )
    counts = ", ".join(f"{number} {p.value}" for p, number in count(verdicts).items())
    print(
        f"{name}: {len(verdicts)} layers: {counts}; {proven} of {wanted} that should be are INT8"
    )
    for verdict in verdicts:
        if list_all or verdict.failed:
            mark = "!" if verdict.failed else " "
            print(
                f"  {mark} {verdict.layer:60} wanted {verdict.wanted.value:7} "
                f"{verdict.verdict.value:7} {verdict.evidence}"
            )


def _write(path: Path, found: dict[str, list[LayerVerdict]]) -> None:
    content = {
        name: [
            {
                "layer": verdict.layer,
                "wanted": verdict.wanted.value,
                "verdict": verdict.verdict.value,
                "evidence": verdict.evidence,
                "fused": verdict.fused,
            }
            for verdict in verdicts
        ]
        for name, verdicts in found.items()
    }
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
