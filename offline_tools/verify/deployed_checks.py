"""Comparing deployed graphs with PyTorch, with the error of the image chain apart.

Owns: which tensors are compared. The graph has its own image chain, so everything behind it is
judged twice: on the pixels that the processor's chain gives, where only arithmetic differs, and
on the raw frames, as the robot runs it. The reference is the whole model on the whole prompt, with
no prefix computed beforehand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from groot_int8_ros.policy.bundle import Bundle
from groot_int8_ros.policy.deployed_graphs import DeployedGraphs, DeployedInputs
from groot_int8_ros.policy.engines.onnxruntime_engine import OnnxRuntimeEngine
from groot_int8_ros.policy.preprocess import ModelInputs
from groot_int8_ros.policy.token_layout import TokenLayout, layout_of
from groot_int8_ros.policy.types import Float32Array, Observation
from offline_tools.model.checkpoint import CheckpointReader
from offline_tools.model.configuration import ModelConfig
from offline_tools.verify.comparison import Comparison, compare
from offline_tools.verify.cut_graph import CutBackbone
from offline_tools.verify.torch_reference import run_action_head, run_backbone

_HALF_RANGE = 127.5
# The chain works in whole grey levels; where an average lies between two, either may come out.
_GREY_LEVELS = 1.0


@dataclass(frozen=True, eq=False)
class _Observed:
    """One observation in both forms, and what PyTorch made of it."""

    reference: ModelInputs
    deployed: DeployedInputs
    noise: Float32Array
    features: NDArray[Any]
    action_pred: Float32Array


def compare_deployed(
    bundle: Bundle,
    reader: CheckpointReader,
    config: ModelConfig,
    observations: Sequence[Observation],
    noise: Sequence[Float32Array],
    atol: float,
) -> list[Comparison]:
    """Compare PyTorch in float32 with ONNX Runtime on deployed graphs.

    Args:
        bundle: A bundle of deployed graphs.
        reader: The checkpoint that it was exported from.
        config: Sizes of the model.
        observations: What to run; their instructions must be in the bundle.
        noise: Start of the flow of each.
        atol: Largest 99th percentile of the absolute error.

    Returns:
        Comparisons of every observation.

    Raises:
        UnknownInstructionError: An instruction is not in the bundle.
    """
    graphs = DeployedGraphs(bundle, {})
    preprocess = bundle.preprocessor()
    layout = layout_of(
        preprocess.prompt_ids(observations[0].instruction).tolist(), preprocess.image_token_id, 1
    )
    given = [graphs.preprocess(one) for one in observations]
    inputs = [preprocess(one) for one in observations]
    features = run_backbone(reader, config, inputs)
    heads = run_action_head(
        reader,
        config,
        features,
        inputs,
        list(noise),
        embodiment_id=bundle.processor.embodiment_id,
        steps=bundle.manifest.denoising_steps,
    )
    observed = [
        _Observed(one, deployed, start, feature["hidden_states"], head.action_pred)
        for one, deployed, start, feature, head in zip(
            inputs, given, noise, features, heads, strict=True
        )
    ]
    return _compare(bundle, observed, layout, atol)


def _compare(
    bundle: Bundle, observed: Sequence[_Observed], layout: TokenLayout, atol: float
) -> list[Comparison]:
    graphs = DeployedGraphs(bundle, {})
    feeds = [graphs.backbone_feeds(one.deployed) for one in observed]
    recorded = [one.reference.pixel_values for one in observed]
    cut = CutBackbone(bundle.graph_path("backbone"), recorded[0].shape)
    found = [
        _grey_levels(one, pixels) for one, pixels in zip(recorded, cut.pixels(feeds), strict=True)
    ]
    from_pixels = cut.features(feeds, recorded)
    backbone = OnnxRuntimeEngine(bundle.graph_path("backbone"))
    from_frames = [backbone.run(feed)["features"] for feed in feeds]
    backbone.close()
    head = OnnxRuntimeEngine(bundle.graph_path("action_head"))
    graphs = DeployedGraphs(bundle, {"action_head": head})
    live = [one.features[:, -layout.live_length :] for one in observed]
    for source, features in (("recorded pixels", from_pixels), ("frames", from_frames)):
        for wanted, answer in zip(live, features, strict=True):
            for kind, places in (
                ("text", layout.text_positions),
                ("image", layout.image_positions),
            ):
                found.append(
                    compare(
                        f"backbone from {source}: features, {kind} tokens",
                        wanted[:, places],
                        answer[:, places],
                        atol,
                    )
                )
    for name, features in (
        ("action_head: action_pred", live),
        ("action_pred, from recorded pixels", from_pixels),
        ("action_pred, from frames", from_frames),
    ):
        for one, feature in zip(observed, features, strict=True):
            answer = graphs.actions(one.deployed, feature, one.noise)
            found.append(compare(name, one.action_pred, answer, atol))
    head.close()
    return found


def _grey_levels(recorded: Float32Array, pixels: Float32Array) -> Comparison:
    comparison = compare(
        "image chain: grey levels",
        np.asarray(recorded, np.float64) * _HALF_RANGE,
        np.asarray(pixels, np.float64) * _HALF_RANGE,
    )
    return replace(comparison, passed=comparison.max_absolute < _GREY_LEVELS + 1e-3)
