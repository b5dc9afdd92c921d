"""What quantisation did to the actions: the whole policy on captured samples, float against INT8.

Owns: running graphs on samples from end to end, and the metrics. Must not import torch.

Both policies start from the same captured inputs of the backbone, state and noise, so every
difference is the graphs'. One large graph is loaded at a time, with its weights mapped from their
file; that is what lets a true-size model be judged on a small machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from groot_int8_ros.capture.feeds import observation_of
from groot_int8_ros.capture.sample import CaptureSample
from groot_int8_ros.errors import QuantizationError
from groot_int8_ros.policy.bundle import Bundle
from groot_int8_ros.policy.deployed_graphs import DeployedGraphs
from groot_int8_ros.policy.engines import Engine
from groot_int8_ros.policy.engines.onnxruntime_engine import OnnxRuntimeEngine
from groot_int8_ros.policy.families import LARGE_GRAPHS, REFERENCE
from groot_int8_ros.policy.policy import Policy
from groot_int8_ros.policy.postprocess import decode_actions
from groot_int8_ros.policy.preprocess import ModelInputs
from groot_int8_ros.policy.processor import Processor
from groot_int8_ros.policy.reference_graphs import ReferenceGraphs
from groot_int8_ros.policy.types import Float32Array, Float64Array

# What a family's backbone gave for each sample.
Features = list[Any]

# A jerk is a third difference over the steps of a chunk.
_JERK_ORDER = 3


@dataclass(frozen=True)
class ActionErrors:
    """How far one policy's actions lie from another's, over all samples.

    Attributes:
        relative_l2: Norm of the difference of the normalised actions over the reference's norm;
            of the dimensions that the embodiment uses.
        cosine: Cosine similarity of the same.
        max_error: Action key to the largest absolute difference of its targets, in joint units.
        p99_error: Action key to the 99th percentile of the same.
        jerk_ratio: Root mean square of the chunks' third differences over the reference's: above
            1 the chunks have become rougher.
        squares: float64 (samples, 2): of each sample the squared norm of the difference and of
            the reference, whose sums make `relative_l2`.
    """

    relative_l2: float
    cosine: float
    max_error: Mapping[str, float]
    p99_error: Mapping[str, float]
    jerk_ratio: float
    squares: Float64Array

    def to_dict(self) -> dict[str, float]:
        """Return the metrics by name, those of an action key as `max_error/KEY`."""
        errors = {
            "relative_l2": self.relative_l2,
            "cosine": self.cosine,
            "jerk_ratio": self.jerk_ratio,
        }
        for name, by_key in (("max_error", self.max_error), ("p99_error", self.p99_error)):
            errors |= {f"{name}/{key}": value for key, value in by_key.items()}
        return errors


def relative_l2_bound(errors: ActionErrors, spread: Sequence[ActionErrors] = ()) -> float:
    """Return what the relative L2 over all observations stays below, at nominally 95 % confidence.

    A few samples are a few draws of the observations to come. The squared relative L2 is a ratio
    of two means; its standard error is that of the residuals e² - R·y² (Cochran, "Sampling
    Techniques", 1977, section 2.11), and Student's t covers that the spread is itself estimated.

    Args:
        errors: Of the samples that judge.
        spread: Of other samples, which a search may have looked at: they say nothing of the error,
            but how much it varies.

    Returns:
        Not below `errors.relative_l2`; equal to it for a single sample, whose spread is unknown.
    """
    pooled = np.concatenate([one.squares for one in (errors, *spread)])
    freedom = len(pooled) - 1
    if not freedom or not np.isfinite(pooled).all():
        return errors.relative_l2
    own = errors.squares.mean(axis=0)
    residuals = pooled[:, 0] - pooled[:, 0].sum() / pooled[:, 1].sum() * pooled[:, 1]
    deviation = float(np.sqrt(np.sum(residuals**2) / freedom / len(errors.squares)))
    return float(np.sqrt((own[0] + _student_t(freedom) * deviation) / own[1]))


def _student_t(freedom: int) -> float:
    """Return the 95th percentile of Student's t (Abramowitz and Stegun, 26.7.5)."""
    z = NormalDist().inv_cdf(0.95)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


class ActionRunner:
    """Answers captured samples with the graphs of a bundle, or with others in their place."""

    def __init__(
        self, bundle: Bundle, samples: Sequence[CaptureSample], *, threads: int | None = None
    ) -> None:
        """Take samples.

        Args:
            bundle: The float bundle; what is not replaced runs from it.
            samples: With the inputs of the family's backbone, state and noise.
            threads: CPU threads inside an operator; ONNX Runtime's choice if None.

        Raises:
            QuantizationError: There is no sample, or one lacks what is needed.
        """
        if not samples:
            raise QuantizationError("there is no sample to judge the actions on")
        family = bundle.manifest.family
        self._backbone, self._head = LARGE_GRAPHS[family]
        for sample in samples:
            known = sample.has(family, self._backbone) and sample.noise is not None
            if not known or (family == REFERENCE and sample.normalised_state is None):
                raise QuantizationError(
                    f"the sample {sample.source} lacks backbone inputs, normalised state or "
                    "noise, which the policy needs to answer it. "
                    + (
                        "An import holds one graph's inputs and no more, and no frames to compute "
                        "the others from: capture again, groot-int8 calibrate --bundle BUNDLE "
                        "--dataset DATASET"
                        if sample.images is None
                        else "Compute them: groot-int8 calibrate --bundle BUNDLE --complete STORE "
                        "--output NEW_FOLDER"
                    )
                )
        self._bundle = bundle
        self._samples = samples
        self._threads = threads

    @property
    def samples(self) -> Sequence[CaptureSample]:
        """The samples that are answered."""
        return self._samples

    def features(self, backbone: Path | None = None) -> Features:
        """Run a backbone, the bundle's own if None, and return its outputs for each sample."""
        engines = {self._backbone: self._engine(self._backbone, backbone)}
        graphs = Policy(self._bundle, engines).graphs
        found = [graphs.features(_inputs(graphs, sample)) for sample in self._samples]
        engines[self._backbone].close()
        return found

    def actions(self, features: Features, head: Path | None = None) -> list[Float32Array]:
        """Integrate the flow with a DiT or an action head, the bundle's own if None.

        Args:
            features: What `features` gave.
            head: The second of the family's large graphs.

        Returns:
            Normalised actions for each sample, float32 (horizon, max_action_dim).
        """
        engines = {
            name: self._engine(name, head if name == self._head else None)
            for name in self._bundle.manifest.engine_graphs
            if name != self._backbone
        }
        graphs = Policy(self._bundle, engines).graphs
        found = []
        for sample, one in zip(self._samples, features, strict=True):
            assert sample.noise is not None
            found.append(graphs.actions(_inputs(graphs, sample), one, sample.noise))
        for loaded in engines.values():
            loaded.close()
        return found

    def compare(
        self, reference: Sequence[Float32Array], found: Sequence[Float32Array]
    ) -> ActionErrors:
        """Compare two lists of what `actions` gave."""
        return compare_actions(self._bundle.processor, self._samples, reference, found)

    def _engine(self, name: str, replacement: Path | None) -> Engine:
        return OnnxRuntimeEngine(
            replacement or self._bundle.graph_path(name),
            threads=self._threads,
            keep_graph_as_written=True,
        )


def compare_actions(
    processor: Processor,
    samples: Sequence[CaptureSample],
    reference: Sequence[Float32Array],
    found: Sequence[Float32Array],
) -> ActionErrors:
    """Compare two policies' answers to the same samples.

    Args:
        processor: The embodiment's conventions.
        samples: What was answered; relative actions are decoded against their states.
        reference: Normalised actions taken as right, float32 (horizon, max_action_dim) each.
        found: Normalised actions under test.

    Returns:
        The metrics; values that are not finite count as an infinite error.
    """
    used = slice(0, sum(key.dim for key in processor.action_keys))
    steps = slice(0, processor.action_steps)
    wanted = np.stack([one[steps, used] for one in reference]).astype(np.float64)
    got = np.stack([one[steps, used] for one in found]).astype(np.float64)
    if not np.isfinite(got).all():
        broken = dict.fromkeys((key.key for key in processor.action_keys), float("inf"))
        squares = np.full((len(samples), 2), np.inf)
        return ActionErrors(float("inf"), 0.0, broken, broken, float("inf"), squares)
    norms = float(np.linalg.norm(wanted)), float(np.linalg.norm(got))
    squares = np.stack([np.sum((got - wanted) ** 2, (1, 2)), np.sum(wanted**2, (1, 2))], axis=1)
    gaps: dict[str, list[Float64Array]] = {}
    jerks = np.zeros(2)
    for sample, one, other in zip(samples, reference, found, strict=True):
        decoded = [decode_actions(processor, value, sample.state) for value in (one, other)]
        for key in decoded[0]:
            pair = [value[key].astype(np.float64) for value in decoded]
            gaps.setdefault(key, []).append(np.abs(pair[0] - pair[1]).ravel())
    if wanted.shape[1] > _JERK_ORDER:
        jerks = np.array(
            [np.linalg.norm(np.diff(value, _JERK_ORDER, axis=1)) for value in (wanted, got)]
        )
    return ActionErrors(
        relative_l2=float(np.linalg.norm(got - wanted)) / norms[0] if norms[0] else float("inf"),
        cosine=float(np.sum(wanted * got)) / (norms[0] * norms[1]) if all(norms) else 0.0,
        max_error={key: float(np.concatenate(gap).max()) for key, gap in gaps.items()},
        p99_error={
            key: float(np.percentile(np.concatenate(gap), 99.0)) for key, gap in gaps.items()
        },
        jerk_ratio=float(jerks[1] / jerks[0]) if jerks[0] else 1.0,
        squares=squares,
    )


def _inputs(graphs: ReferenceGraphs | DeployedGraphs, sample: CaptureSample) -> Any:
    """Return what the graphs need of a sample, without the image chain of reference graphs."""
    if isinstance(graphs, DeployedGraphs):
        return graphs.preprocess(observation_of(sample))
    assert sample.backbone is not None
    assert sample.normalised_state is not None
    return ModelInputs(
        pixel_values=sample.backbone.pixel_values,
        input_ids=sample.backbone.input_ids[None],
        attention_mask=sample.backbone.attention_mask[None],
        state=sample.normalised_state[None],
    )
