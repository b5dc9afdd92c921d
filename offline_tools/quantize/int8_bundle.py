"""Writing an INT8 bundle: statistics, plan, graphs, measured error, then one rename.

Owns: the order of the steps and what is refused before they start. Must not import torch. Whatever
is large is written inside the new bundle's temporary folder, candidates of the search included, so
that a kill or a full disk leaves nothing behind.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from groot_int8_ros.capture.sample import CaptureSample
from groot_int8_ros.capture.store import CaptureStore
from groot_int8_ros.errors import BundleError, OutputError, QuantizationError
from groot_int8_ros.policy.bundle import (
    MANIFEST_FILE,
    Bundle,
    GraphRecord,
    Manifest,
    open_bundle,
)
from groot_int8_ros.policy.families import LARGE_GRAPHS
from groot_int8_ros.policy.files import atomic_directory, refuse_occupied, sha256_of_file
from groot_int8_ros.policy.processor import Processor
from groot_int8_ros.policy.quantization import CACHE, LayerScheme, QuantizationRecord
from offline_tools.engine.calibration_cache import hash_of_graph, scales_for_graph
from offline_tools.quantize.calibration_set import CalibrationSet
from offline_tools.quantize.evaluation import (
    ActionErrors,
    ActionRunner,
    Features,
    relative_l2_bound,
)
from offline_tools.quantize.graph_audit import audit_graph
from offline_tools.quantize.layers import Layer, find_layers, load_graph, select
from offline_tools.quantize.qdq import quantize_graph
from offline_tools.quantize.ranges import DEFAULT_PERCENTILE
from offline_tools.quantize.search import Found, GraphPlans, search, section_weights
from offline_tools.quantize.sensitivity import Group, measure
from offline_tools.quantize.statistics import DEFAULT_ROWS, GraphStatistics, collect

AUTO = "auto"
DEFAULT_ALPHA = 0.5
# What the user may ask for, beside `auto`, and what every layer then gets.
FIXED_SCHEMES: Mapping[str, LayerScheme] = {
    "static-max": LayerScheme("static", "max"),
    "static-entropy": LayerScheme("static", "entropy"),
    "static-percentile": LayerScheme("static", "percentile"),
    "smooth": LayerScheme("static", "max", DEFAULT_ALPHA),
    "static-cache": LayerScheme("static", CACHE),
    "row": LayerScheme("row"),
    "row-smooth": LayerScheme("row", None, DEFAULT_ALPHA),
}

STATIC_CACHE = "static-cache"

# What bfloat16 alone costs the public reference: relative L2 of its actions against float32, on
# its recorded test vectors.
DEFAULT_BUDGET = 0.009

REPORT_FILE = "reports/quantization.json"

_SPARE_BYTES = 64 << 20


@dataclass(frozen=True)
class QuantizeOptions:
    """What the user asks for.

    Attributes:
        bundle: The float bundle.
        calibration: Its capture store.
        output: Folder of the INT8 bundle.
        scheme: `auto`, or a key of `FIXED_SCHEMES`.
        layers: Patterns of the layers that may become INT8; see `layers.select`.
        budget: Largest relative L2 of the actions over all observations, of which the samples are
            a few; None sets no such limit.
        max_joint_error: Action key to the largest error of its targets, in joint units; the key
            `""` stands for every key.
        accept: Write a bundle of a fixed scheme that misses the limits too.
        migration_alpha: Of the schemes `smooth` and `row-smooth`.
        percentile: Of the range method of that name.
        calibration_caches: Graph to the cache that TensorRT's calibrator wrote for it; the scheme
            `static-cache` takes its scales, and a graph without one stays float.
        seed: Seed of the rows on which layers are compared.
        search_samples: Observations that guide the search.
        judge_samples: Held-out observations that judge the result.
        max_evaluations: See `search.search`.
        threads: CPU threads inside an operator; ONNX Runtime's choice if None.
    """

    bundle: Path
    calibration: Path
    output: Path
    scheme: str = AUTO
    layers: tuple[str, ...] = ()
    budget: float | None = DEFAULT_BUDGET
    max_joint_error: Mapping[str, float] = field(default_factory=dict)
    accept: bool = False
    migration_alpha: float = DEFAULT_ALPHA
    percentile: float = DEFAULT_PERCENTILE
    calibration_caches: Mapping[str, Path] = field(default_factory=dict)
    seed: int = 0
    search_samples: int = 8
    judge_samples: int = 16
    max_evaluations: int = 16
    threads: int | None = None


@dataclass(frozen=True)
class QuantizeResult:
    """What was written.

    Attributes:
        manifest: Of the new bundle.
        errors: Of its actions against the float bundle's, on held-out samples.
        share: The error as a share of the limits, that of `budget` with `relative_l2_bound`; above
            1 they are missed. None without limits.
        float_bytes: Size of the float bundle's two large graphs.
        int8_bytes: Size of the same graphs now.
        layers: Graph to all layers that could be INT8.
    """

    manifest: Manifest
    errors: ActionErrors
    share: float | None
    float_bytes: int
    int8_bytes: int
    layers: Mapping[str, Sequence[Layer]]


def quantize_bundle(options: QuantizeOptions, report: Callable[[str], None]) -> QuantizeResult:
    """Write the INT8 form of a float bundle.

    Args:
        options: What to do.
        report: Called with a line of progress at a time.

    Raises:
        GrootError: The bundle, the calibration set, the options or the disk do not allow it, or
            the limits cannot be met. Nothing is left behind then.
    """
    _check_options(options)
    refuse_occupied(options.output)
    bundle = open_bundle(options.bundle)
    _refuse_quantized(bundle)
    check_limit_keys(options.max_joint_error, bundle.processor)
    _check_caches(options, bundle)
    store = CaptureStore.open(options.calibration)
    calibration = CalibrationSet(store, bundle)
    if "int8" in (store.meta.precision or {}).values():
        raise QuantizationError(
            f"{options.calibration} was captured with an INT8 policy, whose inner tensors are off "
            "already: capture with the float bundle, groot-int8 calibrate --bundle "
            f"{options.bundle}"
        )
    layers = eligible_layers(bundle, options.layers)
    _refuse_full_disk(bundle, options)
    if store.unfinished:
        report(f"note: {store.unfinished}")
    if calibration.is_small:
        report(f"note: only {len(store)} calibration samples; static ranges are guesses")
    with atomic_directory(options.output) as folder:
        return _Job(bundle, calibration, layers, options, folder, report).run()


class _Job:
    """One run of `quantize_bundle`, inside the new bundle's temporary folder."""

    def __init__(
        self,
        bundle: Bundle,
        calibration: CalibrationSet,
        layers: Mapping[str, Sequence[Layer]],
        options: QuantizeOptions,
        folder: Path,
        report: Callable[[str], None],
    ) -> None:
        self._bundle = bundle
        self._calibration = calibration
        self._layers = layers
        self._options = options
        self._folder = folder
        self._report = report
        self._statistics: dict[str, GraphStatistics] = {}
        self._cache_scales: dict[str, Mapping[str, float]] = {}

    @property
    def graphs(self) -> tuple[str, ...]:
        """The two graphs that may become INT8; the others carry the actions or run seldom."""
        return LARGE_GRAPHS[self._bundle.manifest.family]

    def file_name(self, graph: str) -> str:
        """Return the name of a graph's file without its folder."""
        return self._bundle.graph_path(graph).name

    def run(self) -> QuantizeResult:
        self._collect()
        judges = self._candidates("final", self._held_out())
        share: float | None
        if self._options.scheme == AUTO:
            groups = self._measure_layers()
            found = self._search(groups, judges)
            plans, share = found.plans, found.share
            errors = judges.errors(plans)
        else:
            groups, plans = [], self._fixed_plans()
            errors = judges.errors(plans)
            share = _share(errors, self._options)
        if share is not None and share > 1.0 and not self._options.accept:
            raise QuantizationError(
                f"the scheme {self._options.scheme} gives {_describe(errors)} on held-out "
                f"samples; what other observations may cost is {share:.2f} times the limit, "
                "and nothing was written. Use the scheme auto, raise the limit, keep sensitive "
                "layers float with --layers '!PATTERN', calibrate on more, or add --accept."
            )
        manifest = self._write(plans, judges.paths, errors)
        self._write_report(groups, errors, share)
        return QuantizeResult(
            manifest=manifest,
            errors=errors,
            share=share,
            float_bytes=_graph_bytes(self._bundle.manifest),
            int8_bytes=_graph_bytes(manifest),
            layers=self._layers,
        )

    def _collect(self) -> None:
        if self._options.scheme == "row":
            return  # the one scheme that needs to know nothing
        if self._options.scheme == STATIC_CACHE:
            self._read_caches()
            return
        for graph, layers in self._layers.items():
            self._report(f"{graph}: statistics of {len(layers)} layers' inputs")
            self._statistics[graph] = collect(
                self._bundle.graph_path(graph),
                self._calibration.fit_feeds(graph),
                layers,
                rows=DEFAULT_ROWS,
                seed=self._options.seed,
                threads=self._options.threads,
            )

    def _read_caches(self) -> None:
        manifest = self._bundle.manifest
        for graph, path in self._options.calibration_caches.items():
            files = {name: manifest.files[name][0] for name in _files_of(manifest, graph)}
            scales, known = scales_for_graph(
                path,
                hash_of_graph(files),
                {name for layer in self._layers[graph] for name in layer.inputs},
            )
            self._cache_scales[graph] = scales
            if not known:
                self._report(
                    f"note: nothing beside {path} says which graph it was made on; it has a scale "
                    f"for every input of {graph}'s layers and is taken for this one's"
                )

    def _measure_layers(self) -> list[Group]:
        found = []
        for graph, layers in self._layers.items():
            self._report(f"{graph}: error of each scheme on each layer")
            found += measure(
                graph,
                self._bundle.graph_path(graph),
                layers,
                self._statistics[graph],
                percentile=self._options.percentile,
            )
        return found

    def _fixed_plans(self) -> GraphPlans:
        scheme = FIXED_SCHEMES[self._options.scheme]
        if scheme.migration_alpha is not None:
            scheme = replace(scheme, migration_alpha=self._options.migration_alpha)
        return {
            graph: {layer.name: scheme for layer in layers}
            for graph, layers in self._layers.items()
            if scheme.range_method != CACHE or graph in self._cache_scales
        }

    def _search(self, groups: Sequence[Group], judges: _Candidates) -> Found:
        """Search on samples that made the scales, checked on held-out samples."""
        samples = self._calibration.samples(
            self._calibration.split.fit, self._options.search_samples
        )
        candidates = self._candidates("search", samples)
        tried: list[tuple[GraphPlans, ActionErrors]] = []

        def judge(plans: GraphPlans) -> float:
            tried.append((plans, candidates.errors(plans)))
            return _limited_share(tried[-1][1], self._options)

        def check(plans: GraphPlans) -> float:
            known = [errors for other, errors in tried if other == plans]
            return _limited_share(judges.errors(plans), self._options, known[-1:])

        weights = section_weights(groups, judge, self._report)
        found = search(groups, weights, judge, check, self._report, self._options.max_evaluations)
        candidates.clear()
        return found

    def _held_out(self) -> list[CaptureSample]:
        return self._calibration.samples(
            self._calibration.split.held_out, self._options.judge_samples
        )

    def _candidates(self, name: str, samples: Sequence[CaptureSample]) -> _Candidates:
        self._report(f"{name}: the float policy on {len(samples)} samples")
        runner = ActionRunner(self._bundle, samples, threads=self._options.threads)
        return _Candidates(self, runner, self._folder / f".{name}")

    def write_graph(self, graph: str, plan: Mapping[str, LayerScheme], target: Path) -> None:
        """Write one graph's INT8 form."""
        quantize_graph(
            self._bundle.graph_path(graph),
            target,
            plan,
            self._statistics.get(graph),
            percentile=self._options.percentile,
            cache_scales=self._cache_scales.get(graph),
        )

    def _write(
        self, plans: GraphPlans, written: Mapping[str, Path], errors: ActionErrors
    ) -> Manifest:
        source = self._bundle.manifest
        replaced: dict[str, Path] = {}
        graphs: dict[str, GraphRecord] = {}
        for name, graph in source.graphs.items():
            if not plans.get(name):
                graphs[name] = graph
                continue
            path = self._folder / graph.file
            path.parent.mkdir(parents=True, exist_ok=True)
            for made in (written[name], written[name].with_name(f"{written[name].name}.data")):
                if made.exists():
                    os.replace(made, path.parent / made.name)
                    key = (path.parent / made.name).relative_to(self._folder).as_posix()
                    replaced[key] = path.parent / made.name
            graphs[name] = replace(
                graph, precision="int8", quantization=self._record(name, plans[name], errors)
            )
        shutil.rmtree(self._folder / ".final", ignore_errors=True)
        stale = {file for name in graphs if plans.get(name) for file in _files_of(source, name)}
        files: dict[str, tuple[str, int]] = {}
        for name, entry in source.files.items():
            if name not in stale:
                # Not a link: ONNX refuses external data with a second name as a possible attack.
                target = self._folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self._bundle.folder / name, target)
                files[name] = entry
        self._report("hashing")
        for name, path in replaced.items():
            files[name] = (sha256_of_file(path), path.stat().st_size)
        notes = [*source.notes, f"quantised with the scheme {self._options.scheme}"]
        if self._calibration.is_small:
            notes.append(f"calibrated on {len(self._calibration.store)} samples only")
        manifest = replace(
            source, graphs=graphs, files=dict(sorted(files.items())), notes=tuple(notes)
        )
        for name in written:
            verdicts = audit_graph(self._folder / graphs[name].file, graphs[name].quantization)
            failed = [verdict for verdict in verdicts if verdict.failed]
            if failed:
                raise RuntimeError(f"{failed[0].layer} is not INT8: {failed[0].evidence}")
        (self._folder / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
        return manifest

    def _record(
        self, graph: str, plan: Mapping[str, LayerScheme], errors: ActionErrors
    ) -> QuantizationRecord:
        options: dict[str, Any] = {
            "layers": list(self._options.layers),
            "budget": self._options.budget,
            "max_joint_error": dict(self._options.max_joint_error),
            "percentile": self._options.percentile,
        }
        statistics = self._statistics.get(graph)
        calibration_sha256 = None if statistics is None else self._calibration.store.content_sha256
        if graph in self._cache_scales:
            calibration_sha256 = sha256_of_file(self._options.calibration_caches[graph])
        return QuantizationRecord(
            layers=plan,
            scheme=self._options.scheme,
            source_sha256=_source_hash(self._bundle.manifest, graph),
            calibration_sha256=calibration_sha256,
            calibration_samples=0 if statistics is None else statistics.samples,
            seed=self._options.seed,
            options=options,
            errors=errors.to_dict(),
        )

    def _write_report(
        self, groups: Sequence[Group], errors: ActionErrors, share: float | None
    ) -> None:
        content = {
            "scheme": self._options.scheme,
            "errors": errors.to_dict(),
            "share_of_limits": share,
            "groups": [
                {
                    "graph": group.graph,
                    "layers": [layer.name for layer in group.layers],
                    "parameters": group.parameters,
                    "local_errors": [
                        {**scheme.to_dict(), "error": error}
                        for scheme, error in group.errors.items()
                    ],
                }
                for group in groups
            ],
        }
        path = self._folder / REPORT_FILE
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


class _Candidates:
    """Plans written and run, each graph only when its own plan has changed.

    Once a search has ended, its plan is usually the last one that was checked.
    """

    def __init__(self, job: _Job, runner: ActionRunner, folder: Path) -> None:
        self._job = job
        self._runner = runner
        self._folder = folder
        self._float_features = runner.features()
        self._reference = runner.actions(self._float_features)
        self._plans: GraphPlans = {graph: {} for graph in job.graphs}
        self._features: Features = self._float_features
        self._errors: ActionErrors | None = None
        self.paths: dict[str, Path] = {}

    def errors(self, plans: GraphPlans) -> ActionErrors:
        """Return how far the actions under a plan lie from the float ones."""
        backbone, head = self._job.graphs
        for graph in self._job.graphs:
            plan = dict(plans.get(graph, {}))
            if plan == self._plans[graph]:
                continue
            self._errors = None
            self._plans[graph] = plan
            path = self._folder / self._job.file_name(graph)
            if plan:
                self._job.write_graph(graph, plan, path)
                self.paths[graph] = path
            else:
                self.paths.pop(graph, None)
            if graph == backbone:
                self._features = self._runner.features(path) if plan else self._float_features
        if self._errors is None:
            found = self._runner.actions(self._features, self.paths.get(head))
            self._errors = self._runner.compare(self._reference, found)
        return self._errors

    def clear(self) -> None:
        """Remove what was written."""
        shutil.rmtree(self._folder, ignore_errors=True)


def _check_options(options: QuantizeOptions) -> None:
    if options.scheme != AUTO and options.scheme not in FIXED_SCHEMES:
        raise QuantizationError(
            f"unknown scheme {options.scheme!r}; choose one of {', '.join((AUTO, *FIXED_SCHEMES))}"
        )
    if (options.scheme == STATIC_CACHE) != bool(options.calibration_caches):
        raise QuantizationError(
            f"the scheme {STATIC_CACHE} and --calibration-cache go together: one says to take "
            "scales from a cache of TensorRT's calibrator, the other names it"
        )
    limits = [*options.max_joint_error.values()]
    if options.budget is not None:
        limits.append(options.budget)
    if not all(limit > 0.0 for limit in limits):
        raise QuantizationError("--budget and --max-joint-error must be positive")
    if options.scheme == AUTO and not limits:
        raise QuantizationError("the scheme auto needs a --budget or a --max-joint-error")
    if not 0.0 <= options.migration_alpha <= 1.0:
        raise QuantizationError("--migration-alpha must be from 0 to 1")
    if not 50.0 < options.percentile <= 100.0:
        raise QuantizationError("--percentile must be above 50 and at most 100")
    if min(options.search_samples, options.judge_samples, options.max_evaluations) < 1:
        raise QuantizationError("numbers of samples and evaluations must be at least 1")


def _check_caches(options: QuantizeOptions, bundle: Bundle) -> None:
    graphs = LARGE_GRAPHS[bundle.manifest.family]
    unknown = sorted(set(options.calibration_caches) - set(graphs))
    if unknown:
        raise QuantizationError(
            f"--calibration-cache for the graph {unknown[0]!r}: the graphs that can be INT8 are "
            f"{', '.join(graphs)}"
        )


def _refuse_quantized(bundle: Bundle) -> None:
    for name, graph in bundle.manifest.graphs.items():
        if graph.quantization is not None:
            raise BundleError(
                f"{bundle.folder} is quantised already (the graph {name} with the scheme "
                f"{graph.quantization.scheme}): name the float bundle that it was made from"
            )


def check_limit_keys(limits: Iterable[str], processor: Processor) -> None:
    """Refuse limits in joint units of what the policy does not move.

    Args:
        limits: Keys of `QuantizeOptions.max_joint_error`.
        processor: Of the embodiment.

    Raises:
        QuantizationError: A key is none of the action keys.
    """
    known = [key.key for key in processor.action_keys]
    for wanted in limits:
        if wanted not in ("", *known):
            raise QuantizationError(
                f"--max-joint-error names {wanted!r}, and the action keys are {', '.join(known)}"
            )


def eligible_layers(bundle: Bundle, patterns: Sequence[str]) -> dict[str, list[Layer]]:
    """Return the layers that may become INT8, by graph; a graph without any is left out.

    Args:
        bundle: The float bundle.
        patterns: See `layers.select`.

    Raises:
        QuantizationError: A pattern matches nothing, or no layer is left.
    """
    by_graph = {
        name: find_layers(load_graph(bundle.graph_path(name)))
        for name in LARGE_GRAPHS[bundle.manifest.family]
    }
    everything = [layer for layers in by_graph.values() for layer in layers]
    chosen = {layer.name for layer in select(everything, patterns, str(bundle.folder))}
    if not chosen:
        raise QuantizationError("the patterns of --layers leave no layer to quantise")
    eligible = {
        name: [layer for layer in layers if layer.name in chosen]
        for name, layers in by_graph.items()
    }
    return {name: layers for name, layers in eligible.items() if layers}


def _refuse_full_disk(bundle: Bundle, options: QuantizeOptions) -> None:
    # The search keeps one candidate of each graph beside the one that is judged; where most layers
    # are float a candidate is as large as the float graph.
    copies = 2 if options.scheme == AUTO else 1
    needed = copies * _graph_bytes(bundle.manifest) + _SPARE_BYTES
    existing = options.output.absolute().parent
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OutputError(
            f"the INT8 bundle takes up to {needed / 1e9:.1f} GB while it is made and {existing} "
            f"has {free / 1e9:.1f} GB free; nothing was written. Free space or name a folder on "
            "another disk."
        )


def _graph_bytes(manifest: Manifest) -> int:
    return sum(
        manifest.files[file][1]
        for name in LARGE_GRAPHS[manifest.family]
        for file in _files_of(manifest, name)
    )


def _files_of(manifest: Manifest, graph: str) -> list[str]:
    file = manifest.graphs[graph].file
    return [name for name in (file, f"{file}.data") if name in manifest.files]


def _source_hash(manifest: Manifest, graph: str) -> str:
    digest = hashlib.sha256()
    for name in _files_of(manifest, graph):
        digest.update(f"{name} {manifest.files[name][0]}\n".encode())
    return digest.hexdigest()


def _share(
    errors: ActionErrors, options: QuantizeOptions, spread: Sequence[ActionErrors] = ()
) -> float | None:
    """Return the error as a share of the limits, the largest of them; None without limits.

    Args:
        errors: Of the samples that judge.
        options: With the limits.
        spread: Of other samples; see `relative_l2_bound`.
    """
    budget = options.budget
    shares = [] if budget is None else [relative_l2_bound(errors, spread) / budget]
    for wanted, limit in options.max_joint_error.items():
        keys = [key for key in errors.max_error if wanted in ("", key)]
        shares += [one.max_error[key] / limit for one in (errors, *spread) for key in keys]
    return max(shares, default=None)


def _limited_share(
    errors: ActionErrors, options: QuantizeOptions, spread: Sequence[ActionErrors] = ()
) -> float:
    share = _share(errors, options, spread)
    assert share is not None  # `_check_options`: a search has a limit
    return share


def _describe(errors: ActionErrors) -> str:
    joints = ", ".join(f"{key} {value:.3g}" for key, value in errors.max_error.items())
    return f"a relative L2 of {100 * errors.relative_l2:.2f} % and at most {joints} in joint units"
