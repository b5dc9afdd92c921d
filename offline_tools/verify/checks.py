"""Comparing a bundle's graphs with PyTorch, graph by graph and end to end.

Owns: which tensors are compared. Every graph is fed with PyTorch's tensors, so that an error is
found where it arises; `action_pred` then runs the whole chain on its own.
"""

from __future__ import annotations

from pathlib import Path

from groot_int8_ros.errors import CheckpointError
from groot_int8_ros.policy.bundle import Bundle
from groot_int8_ros.policy.engines import Engine
from groot_int8_ros.policy.engines.onnxruntime_engine import OnnxRuntimeEngine
from groot_int8_ros.policy.families import DEPLOYED
from groot_int8_ros.policy.policy import Policy, draw_noise
from groot_int8_ros.policy.preprocess import ModelInputs
from groot_int8_ros.policy.reference_graphs import ReferenceGraphs
from groot_int8_ros.policy.types import Observation
from offline_tools.export.bundle_writer import checkpoint_hash
from offline_tools.model.checkpoint import CheckpointReader
from offline_tools.model.configuration import load_model_config
from offline_tools.verify.comparison import Comparison, compare, compare_masks, worst
from offline_tools.verify.deployed_checks import compare_deployed
from offline_tools.verify.torch_reference import (
    Arrays,
    HeadReference,
    run_action_head,
    run_backbone,
)


def verify_bundle(
    bundle: Bundle,
    checkpoint: Path,
    eagle_config: Path | None,
    observations: list[Observation],
    atol: float,
) -> list[Comparison]:
    """Compare PyTorch in float32 with ONNX Runtime on a bundle's graphs.

    Args:
        bundle: The bundle.
        checkpoint: The checkpoint it was exported from.
        eagle_config: As it was given to the export.
        observations: What to run.
        atol: Largest 99th percentile of the absolute error.

    Returns:
        One comparison a tensor, the worst over the observations.

    Raises:
        CheckpointError: The bundle was made from another checkpoint.
    """
    config, _ = load_model_config(checkpoint, eagle_config)
    reader = CheckpointReader(checkpoint)
    refuse_other_checkpoint(bundle, checkpoint, reader)
    if bundle.manifest.family == DEPLOYED:
        shape = bundle.manifest.action_horizon, bundle.processor.max_action_dim
        noise = [draw_noise(0, index, shape) for index in range(len(observations))]
        return _fold(compare_deployed(bundle, reader, config, observations, noise, atol))
    policy = Policy.load(bundle.folder, verify_hashes=False)
    graphs = policy.graphs
    assert isinstance(graphs, ReferenceGraphs)
    inputs = [graphs.preprocess(observation) for observation in observations]
    noise = [draw_noise(0, index, policy.noise_shape) for index in range(len(inputs))]
    # Not `infer`, which refuses values that are not finite: here they are what is looked for.
    ended = [
        graphs.actions(one, graphs.features(one), start)
        for one, start in zip(inputs, noise, strict=True)
    ]
    policy.close()
    features = run_backbone(reader, config, inputs)
    heads = run_action_head(
        reader,
        config,
        features,
        inputs,
        noise,
        embodiment_id=bundle.processor.embodiment_id,
        steps=bundle.manifest.denoising_steps,
    )
    found = _backbone(bundle, inputs, features, atol)
    found += _action_head(bundle, inputs, features, heads, atol)
    found += [
        compare("action_pred, end to end", head.action_pred, action_pred, atol)
        for head, action_pred in zip(heads, ended, strict=True)
    ]
    return _fold(found)


def refuse_other_checkpoint(bundle: Bundle, checkpoint: Path, reader: CheckpointReader) -> None:
    """Raise `CheckpointError` if a bundle was made from another checkpoint than this one."""
    if checkpoint_hash(checkpoint, reader) != bundle.manifest.checkpoint_sha256:
        raise CheckpointError(
            f"{bundle.folder} was exported from another checkpoint than {checkpoint}: name "
            "that one, or export again"
        )


def _backbone(
    bundle: Bundle, inputs: list[ModelInputs], features: list[Arrays], atol: float
) -> list[Comparison]:
    engine = _engine(bundle, "backbone")
    found = []
    for one, expected in zip(inputs, features, strict=True):
        outputs = engine.run(
            {
                "input_ids": one.input_ids,
                "attention_mask": one.attention_mask,
                "pixel_values": one.pixel_values,
            }
        )
        image = expected["image_mask"]
        text = expected["attn_mask"] & ~image
        for name, tokens in (("text", text), ("image", image)):
            found.append(
                compare(
                    f"backbone: hidden_states, {name} tokens",
                    expected["hidden_states"][tokens],
                    outputs["hidden_states"][tokens],
                    atol,
                )
            )
        found += [
            compare_masks(f"backbone: {name}", expected[name], outputs[name])
            for name in ("attn_mask", "image_mask")
        ]
    engine.close()
    return found


def _action_head(
    bundle: Bundle,
    inputs: list[ModelInputs],
    features: list[Arrays],
    heads: list[HeadReference],
    atol: float,
) -> list[Comparison]:
    engines = {
        name: _engine(bundle, name)
        for name in ("conditioner", "action_encoder", "dit", "action_decoder")
    }
    found = []
    for one, feature, head in zip(inputs, features, heads, strict=True):
        outputs = engines["conditioner"].run(
            {"hidden_states": feature["hidden_states"], "state": one.state}
        )
        found += [
            compare(f"conditioner: {name}", expected, outputs[name], atol)
            for name, expected in head.condition.items()
        ]
        for step in head.steps:
            found += _denoising_step(engines, feature, head.condition, step, atol)
    for engine in engines.values():
        engine.close()
    return found


def _denoising_step(
    engines: dict[str, Engine], feature: Arrays, condition: Arrays, step: Arrays, atol: float
) -> list[Comparison]:
    encoded = engines["action_encoder"].run(
        {
            "state_features": condition["state_features"],
            "actions": step["actions"],
            "timestep": step["timestep"],
        }
    )
    output = engines["dit"].run(
        {
            "sa_embs": step["sa_embs"],
            "vl_embs": condition["vl_embs"],
            "timestep": step["timestep"],
            "image_mask": feature["image_mask"],
            "backbone_attention_mask": feature["attn_mask"],
        }
    )
    decoded = engines["action_decoder"].run({"dit_output": step["dit_output"]})
    return [
        compare("action_encoder: sa_embs", step["sa_embs"], encoded["sa_embs"], atol),
        compare("dit: output", step["dit_output"], output["output"], atol),
        compare("action_decoder: velocity", step["velocity"], decoded["velocity"], atol),
    ]


def _engine(bundle: Bundle, name: str) -> Engine:
    return OnnxRuntimeEngine(bundle.graph_path(name))


def _fold(found: list[Comparison]) -> list[Comparison]:
    by_name: dict[str, list[Comparison]] = {}
    for comparison in found:
        by_name.setdefault(comparison.name, []).append(comparison)
    return [worst(group) for group in by_name.values()]
