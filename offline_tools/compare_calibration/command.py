"""`groot-int8 compare-calibration`: what the calibration set does to the INT8 policy.

Owns: the subcommand, its folder and its table. Must not import torch. Sets are derived from one
store of a recorder (`sets`), each is reported on, quantised with each scheme, judged on the same
observations, which are in none of the sets, and let loose on the same scenes of the simulated
robot. What is there already is not made again, so an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from groot_int8_ros.capture.coverage import COVERAGE_FILE, measure_coverage
from groot_int8_ros.capture.store import CaptureStore
from groot_int8_ros.errors import ConfigurationError
from groot_int8_ros.policy.bundle import MANIFEST_FILE, Bundle, open_bundle
from groot_int8_ros.policy.families import LARGE_GRAPHS
from groot_int8_ros.policy.files import atomic_file, refuse_occupied, sha256_of_file
from groot_int8_ros.policy.policy import Policy
from groot_int8_ros.policy.quantization import CACHE
from groot_int8_ros.policy.types import Float32Array
from offline_tools.arguments import not_negative_int, positive_int, seed
from offline_tools.cli import EXIT_CHECK_FAILED
from offline_tools.closed_loop.results import read_results
from offline_tools.closed_loop.statistics import wilson_interval
from offline_tools.compare_calibration.sets import GAPS, SampleSet, plan_sets, write_set
from offline_tools.pipeline.step import StepFailedError, run_subcommand
from offline_tools.quantize.calibration_set import spread
from offline_tools.quantize.evaluation import ActionRunner
from offline_tools.quantize.int8_bundle import AUTO, FIXED_SCHEMES

# Those that look at samples, or need none.
SCHEMES = [AUTO, *(name for name, scheme in FIXED_SCHEMES.items() if scheme.range_method != CACHE)]

_SETUP_FILE = "setup.json"
_REPORT_FILE = "comparison.json"
_MAX, _P99 = "max_error/", "p99_error/"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's options."""
    parser.add_argument("--bundle", type=Path, required=True, help="the float bundle")
    parser.add_argument(
        "--captures", type=Path, required=True, help="completed store that the sets are made from"
    )
    parser.add_argument(
        "--evaluation", type=Path, required=True, help="completed store of other runs, to judge on"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of sets and bundles")
    parser.add_argument(
        "--sizes",
        type=positive_int,
        nargs="+",
        default=[32, 128, 512],
        help="of the good sets (default: 32 128 512)",
    )
    parser.add_argument(
        "--bad-size",
        type=positive_int,
        default=128,
        help="largest size of the sets that lack something (default: %(default)s)",
    )
    parser.add_argument(
        "--gaps",
        nargs="*",
        choices=GAPS,
        default=list(GAPS),
        help="sets that lack something (default: all)",
    )
    parser.add_argument(
        "--schemes",
        nargs="+",
        choices=SCHEMES,
        default=["static-max", "static-percentile", "row-smooth", AUTO],
        help="of quantize (default: %(default)s)",
    )
    parser.add_argument(
        "--judge-samples",
        type=positive_int,
        default=24,
        help="observations of --evaluation that judge, spread over it (default: %(default)s)",
    )
    parser.add_argument(
        "--episodes",
        type=not_negative_int,
        default=0,
        help="of the simulated robot, for each bundle (default: none)",
    )
    parser.add_argument(
        "--first-seed", type=seed, default=0, help="of their scenes (default: %(default)s)"
    )
    parser.add_argument("--threads", type=positive_int, help="CPU threads of the engine")


@dataclass(frozen=True)
class Row:
    """One bundle.

    Attributes:
        name: Of the set that it was calibrated on; empty for the float bundle.
        scheme: That it was quantised with.
        int8_layers: Layers that are INT8; None where the scheme made no bundle.
        errors: Of its actions against the float bundle's, on the evaluation's samples, by the
            names of `ActionErrors.to_dict`; None where there are none.
        episodes: Results of `closed-loop`, by seed.
    """

    name: str
    scheme: str
    int8_layers: int | None = None
    errors: Mapping[str, float] | None = None
    episodes: tuple[Mapping[str, Any], ...] = ()


def run(args: argparse.Namespace) -> int:
    """Make what is missing, print the table, and say what the coverage report did not name."""
    bundle = open_bundle(args.bundle)
    captures, evaluation = _stores(args, bundle)
    _begin(args, captures, evaluation)
    sets = plan_sets(captures, bundle.processor, args.sizes, args.bad_size, args.gaps)
    thin = _write_sets(args, captures, sets)
    judge = _Judge(args, bundle, evaluation)
    rows = [Row("", "float", 0, None, _episodes(args, args.bundle, "float"))]
    for one in sets:
        for scheme in args.schemes:
            quantised = _quantised(args, one, scheme)
            if quantised is None:
                rows.append(Row(one.name, scheme))
                continue
            rows.append(
                Row(
                    one.name,
                    scheme,
                    _int8_layers(quantised),
                    judge.errors(quantised),
                    _episodes(args, quantised.folder, quantised.folder.name),
                )
            )
    missed = [one.name for one in sets if not _is_named(one, thin[one.name])]
    _write_report(args.output / _REPORT_FILE, thin, rows)
    _print(sets, thin, rows)
    if missed:
        print(f"the coverage report does not name what is missing in {', '.join(missed)}")
        return EXIT_CHECK_FAILED
    return 0


def _stores(args: argparse.Namespace, bundle: Bundle) -> tuple[CaptureStore, CaptureStore]:
    captures, evaluation = CaptureStore.open(args.captures), CaptureStore.open(args.evaluation)
    for store in (captures, evaluation):
        store.check_graphs(bundle.manifest)
    known = {record.sha256 for record in captures.records()}
    shared = sum(record.sha256 in known for record in evaluation.records())
    if shared:
        raise ConfigurationError(
            f"{shared} samples of {args.evaluation} are in {args.captures} too, and judging on "
            "what made the scales flatters them: record --evaluation in runs of its own."
        )
    return captures, evaluation


def _begin(args: argparse.Namespace, captures: CaptureStore, evaluation: CaptureStore) -> None:
    """Note in the folder what it is made from, or refuse one that was made from something else."""
    text = json.dumps(
        {
            "bundle": sha256_of_file(args.bundle / MANIFEST_FILE),
            "captures": captures.content_sha256,
            "evaluation": evaluation.content_sha256,
            "sizes": sorted(args.sizes),
            "bad_size": args.bad_size,
            "judge_samples": args.judge_samples,
        }
    )
    path = args.output / _SETUP_FILE
    if not path.is_file():
        refuse_occupied(args.output)
        with atomic_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    elif path.read_text(encoding="utf-8") != text:
        raise ConfigurationError(
            f"{args.output} holds a comparison of other captures or options. Give another "
            "--output, or delete it."
        )


def _write_sets(
    args: argparse.Namespace, captures: CaptureStore, sets: Sequence[SampleSet]
) -> dict[str, list[str]]:
    """Write the sets that are not there with their reports, and return what is thin in each."""
    folders = {one.name: args.output / "sets" / one.name for one in sets}
    # Without its report a set was not finished.
    missing = [one for one in sets if not (folders[one.name] / COVERAGE_FILE).is_file()]
    if missing:
        policy = Policy.load(args.bundle, threads=args.threads)
        try:
            for one in missing:
                folder = folders[one.name]
                shutil.rmtree(folder, ignore_errors=True)
                store = write_set(policy, captures, one, folder)
                measure_coverage(store, policy.processor, policy.manifest).write(folder)
        finally:
            policy.close()
    return {
        name: json.loads((folder / COVERAGE_FILE).read_text(encoding="utf-8"))["thin"]
        for name, folder in folders.items()
    }


class _Judge:
    """Compares bundles' actions with the float bundle's; what was compared is kept in a file."""

    def __init__(self, args: argparse.Namespace, bundle: Bundle, evaluation: CaptureStore) -> None:
        self._folder = args.output / "errors"
        self._folder.mkdir(exist_ok=True)
        self._args = args
        self._bundle = bundle
        self._evaluation = evaluation
        self._runner: ActionRunner | None = None
        self._reference: list[Float32Array] = []

    def errors(self, quantised: Bundle) -> Mapping[str, float]:
        """Return the errors of a bundle's actions on the evaluation's samples."""
        path = self._folder / f"{quantised.folder.name}.json"
        if path.is_file():
            known: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
            return known
        if self._runner is None:
            chosen = spread(tuple(range(len(self._evaluation))), self._args.judge_samples)
            samples = [one for i, one in enumerate(self._evaluation.samples()) if i in chosen]
            self._runner = ActionRunner(self._bundle, samples, threads=self._args.threads)
            self._reference = self._runner.actions(self._runner.features())
        family = quantised.manifest.family
        backbone, head = (quantised.graph_path(name) for name in LARGE_GRAPHS[family])
        actions = self._runner.actions(self._runner.features(backbone), head)
        found = self._runner.compare(self._reference, actions).to_dict()
        with atomic_file(path) as temporary:
            temporary.write_text(json.dumps(found), encoding="utf-8")
        return found


def _quantised(args: argparse.Namespace, one: SampleSet, scheme: str) -> Bundle | None:
    """Return the INT8 bundle of a set; None where the scheme finds none within its budget."""
    folder = args.output / "bundles" / f"{one.name}-{scheme}"
    if not folder.is_dir():
        words = ["--bundle", str(args.bundle), "--scheme", scheme, "--output", str(folder)]
        words += ["--calibration", str(args.output / "sets" / one.name)]
        if scheme != AUTO:
            words.append("--accept")
        if args.threads:
            words += ["--threads", str(args.threads)]
        try:
            run_subcommand("quantize", *words)
        except StepFailedError:
            return None
    return open_bundle(folder)


def _int8_layers(bundle: Bundle) -> int:
    records = [graph.quantization for graph in bundle.manifest.graphs.values()]
    return sum(len(record.layers) for record in records if record is not None)


def _episodes(args: argparse.Namespace, bundle: Path, name: str) -> tuple[Mapping[str, Any], ...]:
    """Let a bundle do its task; `closed-loop` runs the episodes that its file lacks."""
    if not args.episodes:
        return ()
    results = args.output / "loops" / f"{name}.jsonl"
    results.parent.mkdir(exist_ok=True)
    words = ["--bundle", str(bundle), "--output", str(results)]
    words += ["--episodes", str(args.episodes), "--first-seed", str(args.first_seed)]
    run_subcommand("closed-loop", *words)
    seeds = range(args.first_seed, args.first_seed + args.episodes)
    _, found = read_results(results)
    return tuple(found[number] for number in seeds)


def _is_named(one: SampleSet, thin: Sequence[str]) -> bool:
    return not one.warning or any(one.warning in text for text in thin)


def _write_report(path: Path, thin: Mapping[str, Sequence[str]], rows: Sequence[Row]) -> None:
    content = {
        "thin": thin,
        "rows": [asdict(row) for row in rows],
    }
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _print(
    sets: Sequence[SampleSet], thin: Mapping[str, Sequence[str]], rows: Sequence[Row]
) -> None:
    for one in sets:
        print(f"{one.name}: {len(one.positions)} samples")
        for text in thin[one.name] or ("nothing is thin",):
            print(f"  {text}")
    figures = next((list(row.errors) for row in rows if row.errors is not None), [])
    keys = [name.removeprefix(_MAX) for name in figures if name.startswith(_MAX)]
    head = ["set", "scheme", "INT8 layers", "relative L2", "jerk"]
    head += [f"{figure} {key}" for key in keys for figure in ("p99", "max")]
    head += ["success", "95 % interval", "median s"] * any(row.episodes for row in rows)
    print("\n| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in rows:
        cells = [row.name or "-", row.scheme]
        cells.append("no bundle" if row.int8_layers is None else str(row.int8_layers))
        cells += _error_cells(row.errors, keys)
        if row.episodes:
            cells += _episode_cells(row.episodes)
        cells += [""] * (len(head) - len(cells))
        print("| " + " | ".join(cells) + " |")


def _error_cells(errors: Mapping[str, float] | None, keys: Sequence[str]) -> list[str]:
    if errors is None:
        return [""] * (2 + 2 * len(keys))
    cells = [f"{100 * errors['relative_l2']:.2f} %", f"x{errors['jerk_ratio']:.3f}"]
    for key in keys:
        cells += [f"{errors[prefix + key]:.2f}" for prefix in (_P99, _MAX)]
    return cells


def _episode_cells(episodes: Sequence[Mapping[str, Any]]) -> list[str]:
    times = [result["time_s"] for result in episodes if result["success"]]
    low, high = wilson_interval(len(times), len(episodes))
    return [
        f"{len(times)} of {len(episodes)}",
        f"{100 * low:.0f} to {100 * high:.0f} %",
        f"{statistics.median(times):.1f}" if times else "",
    ]
