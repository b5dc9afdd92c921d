"""The recordings that are no single observation: image sizes, prompts, statistics, a batch.

Owns: how each of these golden files is compared. Counts and names come from the files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from groot_int8_ros.errors import ConfigurationError
from groot_int8_ros.policy.image_sizes import image_sizes
from groot_int8_ros.policy.postprocess import decode_actions_float64
from groot_int8_ros.policy.preprocess import (
    evaluation_image,
    formalize,
    normalize_state,
    pixel_values,
    prompt_text,
)
from groot_int8_ros.policy.processor import ImageChain, Processor, parse_processor
from offline_tools.model.policy_model import ModelInputs
from offline_tools.parity.boundaries import ObservationCheck, levels
from offline_tools.parity.chain import Array, Chain, tensor
from offline_tools.parity.recording import Recording, read_json
from offline_tools.parity.report import Report, Rule

_RAW = re.compile(r"raw_(.+)")
_NORMALISED = re.compile(r"percentiles([01])\.(noclip_nosincos\.)?(state|decoded)\.(.+)")


def check_image_sizes(path: Path, chain: ImageChain, report: Report) -> None:
    """Compare the size of frames after each stage with `image_sizes.json`."""
    entries = read_json(path)
    recorded, computed = [], []
    for entry in entries:
        height, width = entry["input"]
        sizes = image_sizes(height, width, chain)
        stages = (sizes.resized, sizes.cropped, sizes.evaluation, sizes.network)
        computed.append([*(side for size in stages for side in size), sizes.tokens])
        names = ("after_first_resize", "after_crop", "eval_size", "final")
        recorded.append([*(side for name in names for side in entry[name]), entry["tokens"]])
    label = f"sizes of {len(entries)} frames"
    report.add(path.stem, label, "input", Rule.EXACT, np.array(computed), np.array(recorded))


def check_preprocess(recording: Recording, chain: ImageChain, report: Report) -> None:
    """Compare the image chain on one frame for each input size."""
    for name in [name for name in recording if _RAW.fullmatch(name)]:
        size = name.removeprefix("raw_")
        frame = recording[name]
        evaluation = evaluation_image(frame, chain)
        if f"eval_{size}" in recording:
            expected = recording[f"eval_{size}"]
            report.add(recording.name, f"eval_{size}", name, Rule.IMAGE, evaluation, expected)
        values = f"pixel_values_{size}"
        if values in recording:
            computed = levels(pixel_values([frame], chain)[0])
            expected = levels(recording[values])
            report.add(recording.name, values, name, Rule.IMAGE, computed, expected)


def check_tokenizer(
    recording: Recording, description: Path, chain: Chain, formalized: bool, report: Report
) -> None:
    """Compare the token ids of many instructions with several numbers of images."""
    described = read_json(description)
    tokens, items = int(described["tokens_per_image"]), described["items"]
    offsets, ids = recording["offsets"], recording["ids"]
    counts = sorted({int(count) for item in items for count in item["n_tokens"]})
    if len(offsets) != len(items) * len(counts) + 1:
        raise ConfigurationError(
            f"{description} describes {len(items)} instructions with {len(counts)} numbers of "
            f"images, {recording.name} holds {len(offsets) - 1} prompts. Use files that were "
            "recorded together."
        )
    texts = [str(item["instruction"]) for item in items]
    report.add(
        recording.name,
        "formalized",
        f"{len(texts)} instructions",
        Rule.EXACT,
        np.array([formalize(text) if formalized else text for text in texts]),
        np.array([str(item["formalized"]) for item in items]),
    )
    for position, count in enumerate(counts):
        prompts = [
            chain.tokenizer.encode_prompt(prompt_text(text, [tokens] * count, formalized))[0]
            for text in texts
        ]
        starts = [len(counts) * index + position for index in range(len(texts))]
        recorded = [ids[offsets[start] : offsets[start + 1]] for start in starts]
        report.add(
            recording.name,
            f"lengths with {count} images",
            f"{len(texts)} instructions",
            Rule.EXACT,
            np.array([len(prompt) for prompt in prompts]),
            np.array([len(prompt) for prompt in recorded]),
        )
        report.add(
            recording.name,
            f"ids with {count} images",
            f"{len(texts)} instructions",
            Rule.EXACT,
            np.concatenate(prompts),
            np.concatenate(recorded).astype(np.int64),
        )


def check_normalisation(recording: Recording, description: Path, report: Report) -> None:
    """Compare state normalisation and action decoding in the corner cases of statistics."""
    described = read_json(description)
    cases: dict[tuple[bool, bool], set[str]] = {}
    for name in recording:
        found = _NORMALISED.fullmatch(name)
        if found:
            case = (found[1] == "1", found[2] is not None)
            cases.setdefault(case, set()).add(found[3])
    for (percentiles, plain), groups in cases.items():
        processor = _described_processor(described, percentiles, plain)
        prefix = f"percentiles{int(percentiles)}." + ("noclip_nosincos." if plain else "")
        if "state" in groups:
            _check_state(recording, processor, f"{prefix}state.", report)
        if "decoded" in groups:
            _check_decoding(recording, processor, f"{prefix}decoded.", report)


def _described_processor(
    described: Mapping[str, Any], percentiles: bool, plain: bool
) -> Processor:
    modalities = dict(described["modality_config"])
    statistics = described["statistics"]
    tag = next(iter(statistics))
    # No camera is part of this recording, but a processor has at least one.
    modalities.setdefault("video", {"delta_indices": [0], "modality_keys": ["camera"]})
    widths = [2 * len(key["mean"]) for key in (*statistics[tag]["state"].values(),)]
    actions = [len(key["mean"]) for key in statistics[tag]["action"].values()]
    config = {
        "processor_kwargs": {
            "modality_configs": {tag: modalities},
            "use_albumentations": True,
            "max_state_dim": sum(widths),
            "max_action_dim": sum(actions),
            "max_action_horizon": len(modalities["action"]["delta_indices"]),
            "use_percentiles": percentiles,
            "clip_outliers": not plain,
            "apply_sincos_state_encoding": not plain,
            "use_relative_action": True,
        }
    }
    return parse_processor(config, statistics, {tag: 0}, tag)


def _check_state(recording: Recording, processor: Processor, prefix: str, report: Report) -> None:
    state = {key: value[-1] for key, value in recording.with_prefix("in.state.").items()}
    encoded = normalize_state(processor, state)
    start = 0
    for key in processor.state_keys:
        values = encoded[:, start : start + key.encoded_dim]
        start += key.encoded_dim
        name = f"{prefix}{key.key}"
        if name in recording:
            expected = recording[name]
            source = f"in.state.{key.key}"
            report.add(recording.name, name, source, Rule.RELATIVE, values, expected)


def _check_decoding(
    recording: Recording, processor: Processor, prefix: str, report: Report
) -> None:
    normalised = recording.with_prefix("in.normalized_action.")
    parts = [normalised[key.key] for key in processor.action_keys]
    prediction = np.concatenate(parts, axis=-1)
    batch = len(prediction)
    single = recording.with_prefix("in.state.")
    states = {key: np.stack([value] * batch) for key, value in single.items()}
    for key in processor.state_keys:
        name = f"in.{key.key}_state_batch"
        if name in recording:
            states[key.key] = recording[name]
    decoded = [
        decode_actions_float64(
            processor, prediction[row], {key: value[row][-1] for key, value in states.items()}
        )
        for row in range(batch)
    ]
    for action in processor.action_keys:
        name = f"{prefix}{action.key}"
        if name in recording:
            computed = np.stack([actions[action.key] for actions in decoded])
            expected = recording[name]
            source = f"in.normalized_action.{action.key}"
            report.add(recording.name, name, source, Rule.RELATIVE, computed, expected)


def check_batch(
    recording: Recording,
    chain: Chain,
    observations: Mapping[int, ObservationCheck],
    pixels: Mapping[int, Array],
    steps: int,
    report: Report,
) -> None:
    """Compare several observations of different length in one left-padded batch.

    Args:
        recording: The batch.
        chain: The policy.
        observations: The recorded observations by index.
        pixels: Their recorded pixel values, shape (cameras, 3, H, W), by index.
        steps: Denoising steps that the batch was recorded with.
        report: Gets the results.
    """
    indices = [int(index) for index in recording["obs_index"]]
    absent = sorted({index for index in indices if index not in pixels})
    if absent:
        report.note(
            f"{recording.name}: nothing is compared, the pixel values of its observations "
            f"{absent} are not recorded"
        )
        return
    checks = [observations[index] for index in indices]
    inputs = [chain.inputs(check.processor, check.observation) for check in checks]
    ids, mask = _left_padded(
        [given.input_ids.numpy()[0] for given in inputs], chain.tokenizer.pad_token_id
    )
    name, source = recording.name, "raw observations"
    report.add(name, "input_ids", source, Rule.EXACT, ids, recording["input_ids"])
    report.add(name, "attention_mask", source, Rule.EXACT, mask, recording["attention_mask"])

    images = tensor(np.concatenate([pixels[index] for index in indices]))
    ids, mask = recording["input_ids"], recording["attention_mask"]
    with torch.no_grad():
        features, valid, image = chain.model.backbone(tensor(ids), tensor(mask), images)
    fed = "input_ids, attention_mask, pixel_values"
    for label, computed, rule in (
        ("backbone_features", features, Rule.RELATIVE),
        ("backbone_attention_mask", valid, Rule.EXACT),
        ("image_mask", image, Rule.EXACT),
    ):
        if label in recording:
            report.add(name, label, fed, rule, computed.numpy(), recording[label])
    rows = {check.processor.embodiment_id for check in checks}
    if len(rows) > 1 or "action_pred" not in recording or "noise" not in recording:
        report.note(f"{name}: action_pred is not compared, it or its one embodiment is not given")
        return
    batch = ModelInputs(
        input_ids=tensor(ids),
        attention_mask=tensor(mask),
        pixel_values=images,
        state=torch.cat([given.state for given in inputs]),
        embodiment_id=rows.pop(),
    )
    prediction = chain.model.get_action(batch, tensor(recording["noise"]), steps).numpy()
    report.add(
        name, "action_pred", f"{fed}, noise", Rule.RELATIVE, prediction, recording["action_pred"]
    )


def _left_padded(rows: Sequence[Array], pad: int) -> tuple[Array, Array]:
    length = max(map(len, rows))
    ids = np.full((len(rows), length), pad, dtype=np.int64)
    mask = np.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, length - len(row) :] = row
        mask[index, length - len(row) :] = 1
    return ids, mask
