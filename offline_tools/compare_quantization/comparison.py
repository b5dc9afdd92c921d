"""Running the schemes on one model and measuring what each does to the actions.

Owns: the order of the measurement and its results as data. Must not print or draw.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from groot_int8_ros.errors import QuantizationError
from groot_int8_ros.policy.bundle import Bundle
from groot_int8_ros.policy.engines import Engine, load_engine
from groot_int8_ros.policy.policy import Policy
from groot_int8_ros.policy.types import Float32Array, Observation
from offline_tools.compare_quantization.layer_errors import layer_errors
from offline_tools.compare_quantization.samples import Answers, answer
from offline_tools.compare_quantization.schemes import SCHEMES, Calibrated
from offline_tools.engine.verdicts import Precision
from offline_tools.evaluate.action_metrics import ActionErrors, action_errors
from offline_tools.quantize.graph_audit import audit_graph
from offline_tools.quantize.layers import Layer
from offline_tools.verify.comparison import Comparison

FLOAT16 = "fp16"
BFLOAT16 = "bf16"


@dataclass(frozen=True)
class Row:
    """One scheme on one model.

    Attributes:
        model: Name of the model.
        scheme: Name of the scheme; `fp16` and `bf16` are no quantisation.
        int8_layers: Layers that are INT8, of `layers`, as an audit of the graphs finds them.
        layers: Layers that could be.
        int8_share: Share of these layers' weights that is INT8.
        errors: Of the actions, against the float policy's.
        by_layer: Layer to the error of its output, inside the quantised graph; empty for `fp16`
            and `bf16`.
        seconds: Wall time of the quantisation.
    """

    model: str
    scheme: str
    int8_layers: int
    layers: int
    int8_share: float
    errors: ActionErrors
    by_layer: Mapping[str, Comparison]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the row as JSON values."""
        return {
            "model": self.model,
            "scheme": self.scheme,
            "int8_layers": self.int8_layers,
            "layers": self.layers,
            "int8_share": round(self.int8_share, 4),
            "seconds": round(self.seconds, 2),
            "errors": self.errors.to_dict(),
            "layer_errors": {
                name: {"cosine": values["cosine"], "relative_l2": values["relative_l2"]}
                for name, one in self.by_layer.items()
                for values in [one.to_dict()]
            },
        }


@dataclass(frozen=True)
class Model:
    """A float policy with its samples.

    Attributes:
        name: As the table prints it.
        bundle: The float bundle.
        calibration: What schemes may look at.
        evaluation: What they are judged by: other observations.
        seed: Of noise and of what schemes draw.
    """

    name: str
    bundle: Bundle
    calibration: Answers
    evaluation: Answers
    seed: int

    def errors(self, found: Sequence[Float32Array]) -> ActionErrors:
        """Judge other answers to the observations of `evaluation`."""
        return action_errors(
            self.bundle.processor,
            self.bundle.manifest.robot,
            self.evaluation.action_pred,
            found,
            [observation.state for observation in self.evaluation.observations],
        )


@dataclass(frozen=True)
class Refusal:
    """A scheme that made no graph of a model, as `auto` does where nothing holds its budget.

    Attributes:
        model: Name of the model.
        scheme: Name of the scheme.
        reason: What it said.
    """

    model: str
    scheme: str
    reason: str


def prepare_model(
    name: str,
    bundle: Bundle,
    calibration: Sequence[Observation],
    evaluation: Sequence[Observation],
    *,
    seed: int,
    threads: int | None,
) -> Model:
    """Run the float policy over both sets of observations."""
    policy = _policy(bundle, {}, threads)
    calibrated, judged = answer(policy, calibration, seed), answer(policy, evaluation, seed)
    policy.close()
    return Model(name, bundle, calibrated, judged, seed)


def compare_schemes(
    model: Model,
    schemes: Sequence[str],
    folder: Path,
    report: Callable[[Row | Refusal], None],
    *,
    budget: float,
    threads: int | None,
) -> list[Row | Refusal]:
    """Quantise a model with each scheme and judge the actions.

    Args:
        model: The model.
        schemes: Keys of `SCHEMES`.
        folder: For the quantised graphs; one scheme's at a time.
        report: Called with each result when it is there.
        budget: Relative L2 of the actions that `auto` may cost.
        threads: CPU threads of ONNX Runtime inside an operator.

    Returns:
        One result a scheme.
    """
    calibrated = Calibrated(model.bundle, model.calibration, budget, model.seed)
    results: list[Row | Refusal] = []
    for name in schemes:
        target = folder / name
        target.mkdir(parents=True)
        start = time.perf_counter()
        try:
            graphs = SCHEMES[name](calibrated, target)
        except QuantizationError as error:
            results.append(Refusal(model.name, name, str(error)))
            report(results[-1])
            shutil.rmtree(target)
            continue
        seconds = time.perf_counter() - start
        policy = _policy(model.bundle, graphs, threads)
        found = answer(policy, model.evaluation.observations, model.seed)
        policy.close()
        by_layer: dict[str, Comparison] = {}
        int8: list[Layer] = []
        for graph, path in graphs.items():
            source = calibrated.graphs[graph]
            by_layer |= layer_errors(
                source.path, path, source.outputs, model.evaluation.feeds[graph]
            )
            found_int8 = {
                verdict.layer
                for verdict in audit_graph(path, None)
                if verdict.verdict is Precision.INT8
            }
            int8 += [layer for layer in source.layers if layer.name in found_int8]
        everything = [layer for graph in calibrated.graphs.values() for layer in graph.layers]
        results.append(
            Row(
                model=model.name,
                scheme=name,
                int8_layers=len(int8),
                layers=len(everything),
                int8_share=sum(one.parameters for one in int8)
                / sum(one.parameters for one in everything),
                errors=model.errors(found.action_pred),
                by_layer=by_layer,
                seconds=seconds,
            )
        )
        report(results[-1])
        shutil.rmtree(target)
    return results


def float_row(model: Model, name: str, found: Sequence[Float32Array]) -> Row:
    """Judge answers of another floating type."""
    return Row(model.name, name, 0, 0, 0.0, model.errors(found), {}, 0.0)


def bundle_actions(
    bundle: Bundle, observations: Sequence[Observation], *, seed: int, threads: int | None
) -> tuple[Float32Array, ...]:
    """Return a bundle's own answers."""
    policy = _policy(bundle, {}, threads)
    found = answer(policy, observations, seed)
    policy.close()
    return found.action_pred


def _policy(bundle: Bundle, graphs: Mapping[str, Path], threads: int | None) -> Policy:
    """Return a bundle's policy with some of its graphs replaced."""
    engines: dict[str, Engine] = {}
    try:
        for name in bundle.manifest.engine_graphs:
            path = graphs.get(name, bundle.graph_path(name))
            engines[name] = load_engine("onnxruntime", path, threads=threads)
            bundle.check_engine(name, engines[name])
        return Policy(bundle, engines)
    except BaseException:
        for engine in engines.values():
            engine.close()
        raise
