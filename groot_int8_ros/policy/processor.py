"""What a checkpoint's own processor files say about one embodiment, parsed once and checked.

Owns: `Processor` and the reading of `processor_config.json`, `statistics.json` and
`embodiment_id.json`. Must not import torch, transformers, OpenCV or Pillow: the export, the
robot and the tests read the same description without them.

Files saved by older code are sparse: a keyword that is missing has the default of the public
Isaac-GR00T class `Gr00tN1d6Processor` (commit e29d8fc), which is what that code does with such a
file. A setting that this package does not implement is refused by name; nothing is guessed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

from groot_int8_ros.errors import ProcessorError
from groot_int8_ros.policy.files import read_json
from groot_int8_ros.policy.types import Float64Array

StateEncoding = Literal["min_max", "mean_std", "sin_cos"]
ActionEncoding = Literal["min_max", "mean_std"]
ActionRepresentation = Literal["absolute", "relative"]

PROCESSOR_CONFIG_FILE = "processor_config.json"
STATISTICS_FILE = "statistics.json"
EMBODIMENT_ID_FILE = "embodiment_id.json"

# Rows of the category-specific layers that the public release assigns to its tags; its
# processor fills a tag that is missing from embodiment_id.json from this table.
PUBLIC_EMBODIMENT_IDS: Mapping[str, int] = {
    "oxe_google": 0,
    "oxe_widowx": 1,
    "libero_panda": 2,
    "unitree_g1": 8,
    "new_embodiment": 10,
    "robocasa_panda_omron": 13,
    "oxe_droid": 16,
    "gr1": 20,
    "behavior_r1_pro": 24,
}

_EAGLE_MODEL_NAME = "nvidia/Eagle-Block2A-2B-v2"
_DEFAULT_SHORTEST_IMAGE_EDGE = 512
_DEFAULT_CROP_FRACTION = 0.95
_DEFAULT_MAX_STATE_DIM = 29
_DEFAULT_MAX_ACTION_DIM = 29
_DEFAULT_MAX_ACTION_HORIZON = 40

# Far above any released checkpoint (128); keeps a damaged number from allocating gigabytes.
_LARGEST_DIMENSION = 65536

_LARGEST_FLOAT32 = float(np.finfo(np.float32).max)

# Keywords that shape only training, or that are read elsewhere in this module.
_KNOWN_KEYWORDS = frozenset(
    {
        "modality_configs",
        "image_crop_size",
        "image_target_size",
        "use_albumentations",
        "random_rotation_angle",
        "color_jitter_params",
        "shortest_image_edge",
        "crop_fraction",
        "model_name",
        "model_type",
        "formalize_language",
        "max_state_dim",
        "max_action_dim",
        "max_action_horizon",
        "use_percentiles",
        "clip_outliers",
        "apply_sincos_state_encoding",
        "use_relative_action",
        "transformers_loading_kwargs",
        "statistics",
        "embodiment_id_mapping",
    }
)

_USE_SAVED_FILES = (
    "Use the processor files as the fine-tuning run saved them, or save them again from there."
)


@dataclass(frozen=True)
class ImageChain:
    """How a camera frame is scaled and cropped before the network's own resize.

    Attributes:
        shortest_image_edge: Smaller side in pixels after each scaling.
        crop_fraction: Part of each side that the centre crop keeps, in (0, 1].
    """

    shortest_image_edge: int
    crop_fraction: float


@dataclass(frozen=True, eq=False)
class StateKey:
    """One state key and how its values are encoded.

    Attributes:
        key: Name in the state modality.
        dim: Number of raw values D.
        encoding: `min_max` uses `low` and `high`, `mean_std` uses `mean` and `std`, `sin_cos`
            uses none of them.
        low: Lower bound (minimum or 1st percentile), float64 (D,), else None.
        high: Upper bound (maximum or 99th percentile), float64 (D,), else None.
        mean: Mean, float64 (D,), else None.
        std: Standard deviation, float64 (D,), else None.
        usual_low: 1st percentile of the training data, whatever the encoding, float64 (D,); None
            where the statistics lack it. No inference depends on it.
        usual_high: 99th percentile, likewise.
    """

    key: str
    dim: int
    encoding: StateEncoding
    low: Float64Array | None = None
    high: Float64Array | None = None
    mean: Float64Array | None = None
    std: Float64Array | None = None
    usual_low: Float64Array | None = None
    usual_high: Float64Array | None = None

    @property
    def encoded_dim(self) -> int:
        """Number of values after encoding: 2 D for `sin_cos`, otherwise D."""
        return 2 * self.dim if self.encoding == "sin_cos" else self.dim


@dataclass(frozen=True, eq=False)
class ActionKey:
    """One action key and how the network's values become targets.

    Attributes:
        key: Name in the action modality.
        dim: Number of values D per step.
        encoding: `min_max` uses `low` and `high`, `mean_std` uses `mean` and `std`.
        representation: `relative` targets are offsets from the raw state `reference_state_key`.
        reference_state_key: State key that is added to every step, None for `absolute`.
        low: float64 (D,), or (steps, D) for a relative key's statistics per step, else None.
        high: As `low`.
        mean: As `low`.
        std: As `low`.
    """

    key: str
    dim: int
    encoding: ActionEncoding
    representation: ActionRepresentation
    reference_state_key: str | None = None
    low: Float64Array | None = None
    high: Float64Array | None = None
    mean: Float64Array | None = None
    std: Float64Array | None = None


@dataclass(frozen=True, eq=False)
class Processor:
    """Everything that turns an observation into tensors and tensors into actions.

    Attributes:
        embodiment_tag: Tag whose modality configuration and statistics these are.
        embodiment_id: Row of the network's category-specific weights.
        cameras: Camera keys in the order in which the network sees them.
        state_keys: State keys in the order in which they are concatenated.
        action_keys: Action keys in the order in which the prediction is split.
        delta_indices: Time index of each decoded action step, in action periods after the
            observation; their number is the number of decoded steps.
        max_state_dim: Width of the network's state input.
        max_action_dim: Width of the network's action output.
        max_action_horizon: Number of action steps the processor was trained with at most.
        image_chain: Scaling and cropping of the frames.
        formalize_language: Whether instructions are lower-cased and stripped of punctuation.
        clip_outliers: Whether min/max-encoded state is clipped to [-1, 1].
    """

    embodiment_tag: str
    embodiment_id: int
    cameras: tuple[str, ...]
    state_keys: tuple[StateKey, ...]
    action_keys: tuple[ActionKey, ...]
    delta_indices: tuple[int, ...]
    max_state_dim: int
    max_action_dim: int
    max_action_horizon: int
    image_chain: ImageChain
    formalize_language: bool
    clip_outliers: bool

    @property
    def action_steps(self) -> int:
        """Number of decoded action steps."""
        return len(self.delta_indices)


def load_processor(directory: Path, embodiment: str | None = None) -> Processor:
    """Read a checkpoint's processor files.

    Args:
        directory: Folder with `processor_config.json` and `statistics.json`; the optional
            `embodiment_id.json` beside them overrides the public tag-to-row table.
        embodiment: Tag to read, or None where the files leave only one choice.

    Returns:
        The processor of that embodiment.

    Raises:
        ProcessorError: A file is missing or damaged, or says what is not implemented.
    """
    config = _read_json(directory / PROCESSOR_CONFIG_FILE)
    statistics = _read_json(directory / STATISTICS_FILE)
    ids_path = directory / EMBODIMENT_ID_FILE
    ids = _read_json(ids_path) if ids_path.exists() else None
    return parse_processor(config, statistics, ids, embodiment)


def parse_processor(
    config: Mapping[str, Any],
    statistics: Mapping[str, Any],
    embodiment_ids: Mapping[str, Any] | None,
    embodiment: str | None,
) -> Processor:
    """Check the content of the processor files and keep one embodiment's part.

    Args:
        config: Content of `processor_config.json`.
        statistics: Content of `statistics.json`.
        embodiment_ids: Content of `embodiment_id.json`, or None without that file.
        embodiment: Tag to read, or None where the files leave only one choice.

    Returns:
        The processor of that embodiment.

    Raises:
        ProcessorError: Something is missing, malformed, contradictory or not implemented.
    """
    kwargs = _mapping(
        _required(
            _mapping(config, PROCESSOR_CONFIG_FILE), "processor_kwargs", PROCESSOR_CONFIG_FILE
        ),
        "processor_kwargs",
    )
    _refuse_unknown_keywords(kwargs)
    _refuse_other_backbones(kwargs)
    modality_configs = _mapping(
        _required(kwargs, "modality_configs", "processor_kwargs"), "modality_configs"
    )
    all_statistics = _mapping(statistics, STATISTICS_FILE)
    tag = _choose_embodiment(modality_configs, all_statistics, embodiment)
    modalities = _mapping(modality_configs[tag], f"modality_configs.{tag}")
    tag_statistics = _mapping(all_statistics[tag], f"statistics.{tag}")

    use_percentiles = _flag(kwargs, "use_percentiles", False)
    state_keys = _state_keys(
        _modality(modalities, "state", tag),
        _group(tag_statistics, "state", tag),
        use_percentiles=use_percentiles,
        use_sin_cos=_flag(kwargs, "apply_sincos_state_encoding", False),
    )
    action_modality = _modality(modalities, "action", tag)
    delta_indices = _action_delta_indices(action_modality)
    action_keys = _action_keys(
        action_modality,
        tag_statistics,
        tag,
        state_dims={key.key: key.dim for key in state_keys},
        steps=len(delta_indices),
        use_percentiles=use_percentiles,
        use_relative_action=_flag(kwargs, "use_relative_action", False),
    )
    video = _modality(modalities, "video", tag)
    for modality in ("video", "state"):
        _require_current_frame_only(modalities, modality, tag)

    processor = Processor(
        embodiment_tag=tag,
        embodiment_id=_embodiment_id(embodiment_ids, tag),
        cameras=_modality_keys(video, f"{tag}.video"),
        state_keys=state_keys,
        action_keys=action_keys,
        delta_indices=delta_indices,
        max_state_dim=_size(kwargs, "max_state_dim", _DEFAULT_MAX_STATE_DIM),
        max_action_dim=_size(kwargs, "max_action_dim", _DEFAULT_MAX_ACTION_DIM),
        max_action_horizon=_size(kwargs, "max_action_horizon", _DEFAULT_MAX_ACTION_HORIZON),
        image_chain=_image_chain(kwargs),
        formalize_language=_flag(kwargs, "formalize_language", True),
        clip_outliers=_flag(kwargs, "clip_outliers", True),
    )
    _require_fit(processor)
    return processor


def _read_json(path: Path) -> Any:
    try:
        return read_json(path)
    except FileNotFoundError as error:
        raise ProcessorError(
            f"{path} is missing. Without it neither images, state nor actions can be converted. "
            "Copy it from the fine-tuning output; it lies beside the weights or in the folder "
            "'processor'."
        ) from error
    except OSError as error:
        raise ProcessorError(
            f"cannot read {path}: {error.strerror or error}. Check its permissions and the disk."
        ) from error
    except ValueError as error:
        raise ProcessorError(
            f"{path} is not valid JSON ({error}). It is damaged or cut short: copy it again from "
            "the fine-tuning output."
        ) from error


def _describe(value: Any) -> str:
    """Return a value as JSON would write it, short enough for a message."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**18:
        return "an integer of more than 18 digits"
    if isinstance(value, (str, int, float, bool)) or value is None:
        text = json.dumps(value)
        return text if len(text) <= 60 else text[:57] + "..."
    if isinstance(value, Mapping):
        return f"an object with {len(value)} entries"
    if isinstance(value, Sequence):
        return f"a list of {len(value)}"
    return type(value).__name__


def _wrong(where: str, value: Any, expected: str) -> ProcessorError:
    return ProcessorError(
        f"{where}: expected {expected}, found {_describe(value)}. {_USE_SAVED_FILES}"
    )


def _not_implemented(where: str, found: str, advice: str) -> ProcessorError:
    return ProcessorError(f"{where}: found {found}, which is not implemented here. {advice}")


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise _wrong(where, value, "an object")
    return value


def _required(mapping: Mapping[str, Any], key: str, where: str) -> Any:
    if key not in mapping:
        raise ProcessorError(f"{where} has no '{key}'. {_USE_SAVED_FILES}")
    return mapping[key]


def _flag(kwargs: Mapping[str, Any], key: str, default: bool) -> bool:
    value = kwargs.get(key, default)
    if not isinstance(value, bool):
        raise _wrong(f"processor_kwargs.{key}", value, "true or false")
    return value


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _positive_integer(value: Any, where: str) -> int:
    if not _is_integer(value) or not 1 <= value <= _LARGEST_DIMENSION:
        raise _wrong(where, value, f"an integer from 1 to {_LARGEST_DIMENSION}")
    return int(value)


def _size(kwargs: Mapping[str, Any], key: str, default: int) -> int:
    return _positive_integer(kwargs.get(key, default), f"processor_kwargs.{key}")


def _names(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise _wrong(where, value, "a list of names")
    return tuple(value)


def _optional_names(modality: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    value = modality.get(key)
    return () if value is None else _names(value, f"{where}.{key}")


def _refuse_unknown_keywords(kwargs: Mapping[str, Any]) -> None:
    # A keyword of newer code that is null, false, zero or empty is switched off: no reason to
    # refuse. One that is on may change images or numbers, which would go unnoticed on the robot.
    for key, value in kwargs.items():
        if key not in _KNOWN_KEYWORDS and value:
            raise _not_implemented(
                f"processor_kwargs.{key}",
                _describe(value),
                "It comes from another version of the training code. If it has no effect at "
                "inference, remove it from the file; otherwise fine-tune without it.",
            )


def _refuse_other_backbones(kwargs: Mapping[str, Any]) -> None:
    for key, supported in (("model_name", _EAGLE_MODEL_NAME), ("model_type", "eagle")):
        value = kwargs.get(key, supported)
        if value != supported:
            raise _not_implemented(
                f"processor_kwargs.{key}",
                _describe(value),
                f"Only GR00T N1.6 checkpoints, with '{supported}', can be used.",
            )


def _choose_embodiment(
    modality_configs: Mapping[str, Any], statistics: Mapping[str, Any], embodiment: str | None
) -> str:
    usable = sorted(set(modality_configs) & set(statistics))
    listed = ", ".join(usable) if usable else "none"
    if embodiment is None:
        if len(usable) == 1:
            return usable[0]
        raise ProcessorError(
            "the embodiment is not given and the processor files do not leave exactly one choice. "
            f"Tags with both a modality configuration and statistics: {listed}. Name one of them."
            if usable
            else "no embodiment has both a modality configuration (found: "
            f"{', '.join(sorted(modality_configs)) or 'none'}) and statistics (found: "
            f"{', '.join(sorted(statistics)) or 'none'}). {_USE_SAVED_FILES}"
        )
    if embodiment not in modality_configs:
        raise ProcessorError(
            f"embodiment '{embodiment}' has no modality configuration in {PROCESSOR_CONFIG_FILE}. "
            f"Usable here: {listed}. Name one of them."
        )
    if embodiment not in statistics:
        raise ProcessorError(
            f"embodiment '{embodiment}' has no statistics in {STATISTICS_FILE}, so its state and "
            f"actions cannot be scaled. Usable here: {listed}. Name one of them, or use the "
            "statistics saved by the fine-tuning run."
        )
    return embodiment


def _embodiment_id(embodiment_ids: Mapping[str, Any] | None, tag: str) -> int:
    # The public code takes its own table for an absent or empty file and for absent tags.
    saved = {} if embodiment_ids is None else _mapping(embodiment_ids, EMBODIMENT_ID_FILE)
    known = {**PUBLIC_EMBODIMENT_IDS, **saved}
    if tag not in known:
        raise ProcessorError(
            f"embodiment '{tag}' has no row number in {EMBODIMENT_ID_FILE}. Known: "
            f"{', '.join(sorted(known))}. Add the row that the fine-tuning run used."
        )
    value = known[tag]
    if not _is_integer(value) or not 0 <= value < _LARGEST_DIMENSION:
        raise _wrong(f"{EMBODIMENT_ID_FILE}: {tag}", value, "a row number (0 or more)")
    return int(value)


def _modality(modalities: Mapping[str, Any], name: str, tag: str) -> Mapping[str, Any]:
    where = f"modality_configs.{tag}"
    return _mapping(_required(modalities, name, where), f"{where}.{name}")


def _group(statistics: Mapping[str, Any], name: str, tag: str) -> Mapping[str, Any]:
    where = f"statistics.{tag}"
    return _mapping(_required(statistics, name, where), f"{where}.{name}")


def _modality_keys(modality: Mapping[str, Any], where: str) -> tuple[str, ...]:
    keys = _names(_required(modality, "modality_keys", where), f"{where}.modality_keys")
    if not keys:
        raise ProcessorError(
            f"{where}.modality_keys is empty: the policy needs at least one. {_USE_SAVED_FILES}"
        )
    if len(set(keys)) != len(keys):
        raise ProcessorError(f"{where}.modality_keys names a key twice. {_USE_SAVED_FILES}")
    return keys


def _delta_indices(modality: Mapping[str, Any], where: str) -> tuple[int, ...]:
    values = _required(modality, "delta_indices", where)
    if not isinstance(values, list) or not all(
        _is_integer(value) and abs(value) <= _LARGEST_DIMENSION for value in values
    ):
        raise _wrong(f"{where}.delta_indices", values, "a list of integers")
    return tuple(values)


def _require_current_frame_only(modalities: Mapping[str, Any], name: str, tag: str) -> None:
    where = f"{tag}.{name}"
    indices = _delta_indices(_modality(modalities, name, tag), where)
    if indices != (0,):
        raise _not_implemented(
            f"{where}.delta_indices",
            f"{len(indices)} time steps" if len(indices) != 1 else f"[{indices[0]}]",
            "Only the current one, [0], can be used: fine-tune with delta_indices [0].",
        )


def _action_delta_indices(modality: Mapping[str, Any]) -> tuple[int, ...]:
    indices = _delta_indices(modality, "action")
    if not indices:
        raise ProcessorError(f"action.delta_indices is empty: no action step. {_USE_SAVED_FILES}")
    if indices[0] < 0 or any(later <= earlier for earlier, later in pairwise(indices)):
        raise _not_implemented(
            "action.delta_indices",
            f"{indices[0]} first" if indices[0] < 0 else "steps out of order",
            "Steps must start at 0 or later and ascend: they are the times at which the actions "
            "are due. Fine-tune with such indices.",
        )
    return indices


def _number(value: Any, where: str) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise _wrong(where, value, "a number")
    try:
        number = float(value)
    except OverflowError as error:
        raise _wrong(where, value, "a finite number") from error
    # Everything scaled with it ends as float32: what float32 cannot hold is infinite too.
    if not abs(number) <= _LARGEST_FLOAT32:
        raise ProcessorError(
            f"{where} is {number}: a joint scaled by it would move anywhere. The training data "
            "holds NaN or infinity: clean it, compute the statistics again, fine-tune with them."
        )
    return number


def _numbers(value: Any, where: str) -> list[float]:
    if not isinstance(value, list) or not value:
        raise _wrong(where, value, "a list of numbers")
    return [_number(item, f"{where}[{index}]") for index, item in enumerate(value)]


def _statistic(
    stats: Mapping[str, Any], field: str, where: str, steps: int | None
) -> Float64Array:
    """Read one field of a key's statistics.

    Args:
        stats: The key's statistics.
        field: For instance `min`.
        where: For messages.
        steps: Number of rows of statistics per step, or None where only one row makes sense.

    Returns:
        Read-only float64 (D,), or (steps, D) for statistics per step.
    """
    value = _required(stats, field, where)
    where = f"{where}.{field}"
    if steps is not None and isinstance(value, list) and value and isinstance(value[0], list):
        rows = [_numbers(row, f"{where}[{index}]") for index, row in enumerate(value)]
        if len(rows) != steps:
            raise ProcessorError(
                f"{where} has {len(rows)} rows, but the action modality has {steps} "
                "delta_indices: the statistics belong to another horizon. Compute the relative "
                "statistics again for this horizon, or use the files of one and the same run."
            )
        if any(len(row) != len(rows[0]) for row in rows):
            raise ProcessorError(f"{where} has rows of different widths. {_USE_SAVED_FILES}")
        array = np.array(rows, dtype=np.float64)
    else:
        array = np.array(_numbers(value, where), dtype=np.float64)
    array.setflags(write=False)
    return array


def _statistic_pair(
    stats: Mapping[str, Any], fields: tuple[str, str], where: str, steps: int | None
) -> tuple[Float64Array, Float64Array]:
    first = _statistic(stats, fields[0], where, steps)
    second = _statistic(stats, fields[1], where, steps)
    if first.shape != second.shape:
        raise ProcessorError(
            f"{where}: {fields[0]} has shape {first.shape}, {fields[1]} has shape {second.shape}. "
            f"{_USE_SAVED_FILES}"
        )
    return first, second


def _bounds(
    stats: Mapping[str, Any], fields: tuple[str, str], where: str, steps: int | None = None
) -> tuple[Float64Array, Float64Array]:
    low, high = _statistic_pair(stats, fields, where, steps)
    if np.any(low > high):
        joint = int(np.argwhere(low > high)[0][-1])
        raise ProcessorError(
            f"{where}: {fields[0]} is above {fields[1]} at index {joint}, which would reverse the "
            f"joint. {_USE_SAVED_FILES}"
        )
    return low, high


def _moments(
    stats: Mapping[str, Any], where: str, steps: int | None = None
) -> tuple[Float64Array, Float64Array]:
    mean, std = _statistic_pair(stats, ("mean", "std"), where, steps)
    if np.any(std < 0):
        joint = int(np.argwhere(std < 0)[0][-1])
        raise ProcessorError(
            f"{where}: std is negative at index {joint}, which would reverse the joint. "
            f"{_USE_SAVED_FILES}"
        )
    return mean, std


def _bound_fields(use_percentiles: bool) -> tuple[str, str]:
    return ("q01", "q99") if use_percentiles else ("min", "max")


def _state_keys(
    modality: Mapping[str, Any],
    statistics: Mapping[str, Any],
    *,
    use_percentiles: bool,
    use_sin_cos: bool,
) -> tuple[StateKey, ...]:
    mean_std = _optional_names(modality, "mean_std_embedding_keys", "state")
    sin_cos = _optional_names(modality, "sin_cos_embedding_keys", "state")
    fields = _bound_fields(use_percentiles)
    keys = []
    for key in _modality_keys(modality, "state"):
        where = f"statistics of state key '{key}'"
        stats = _mapping(_required(statistics, key, "state statistics"), where)
        if use_sin_cos and key in sin_cos:
            # The values are not scaled; the statistics only tell how many there are.
            width = _statistic(stats, fields[0], where, None).shape[0]
            found = StateKey(key, width, "sin_cos")
        elif key in mean_std:
            mean, std = _moments(stats, where)
            found = StateKey(key, mean.shape[0], "mean_std", mean=mean, std=std)
        else:
            low, high = _bounds(stats, fields, where)
            found = StateKey(key, low.shape[0], "min_max", low=low, high=high)
        percentiles = _bound_fields(use_percentiles=True)
        if all(field in stats for field in percentiles):
            usual_low, usual_high = _bounds(stats, percentiles, where)
            if usual_low.shape != (found.dim,):
                raise ProcessorError(
                    f"{where}: {percentiles[0]} has shape {usual_low.shape}, the others have "
                    f"({found.dim},). {_USE_SAVED_FILES}"
                )
            found = replace(found, usual_low=usual_low, usual_high=usual_high)
        keys.append(found)
    return tuple(keys)


def _is_relative(config: Mapping[str, Any], where: str, use_relative_action: bool) -> bool:
    """Check one action configuration and tell whether its targets are relative."""
    choices = {
        "rep": ("ABSOLUTE", "RELATIVE", "DELTA"),
        "type": ("NON_EEF", "EEF"),
        "format": ("DEFAULT", "XYZ_ROT6D", "XYZ_ROTVEC"),
    }
    values: dict[str, str] = {}
    for name, allowed in choices.items():
        value = _required(config, name, where)
        if not isinstance(value, str) or value not in allowed:
            raise _wrong(f"{where}.{name}", value, " or ".join(allowed))
        values[name] = value
    if values["rep"] == "DELTA":
        raise _not_implemented(
            f"{where}.rep",
            "DELTA",
            "Fine-tune this key with RELATIVE (offsets from the current state) or ABSOLUTE.",
        )
    if values["type"] == "EEF":
        raise _not_implemented(
            f"{where}.type",
            "EEF",
            "End-effector poses have no joints to send them to. Fine-tune with joint actions, "
            "type NON_EEF.",
        )
    relative = values["rep"] == "RELATIVE" and use_relative_action
    if relative and values["format"] != "DEFAULT":
        raise _not_implemented(
            f"{where}.format",
            values["format"],
            "Relative joint actions have the format DEFAULT: fine-tune with it.",
        )
    return relative


def _action_configs(
    modality: Mapping[str, Any], keys: tuple[str, ...]
) -> tuple[Mapping[str, Any] | None, ...]:
    value = modality.get("action_configs")
    if value is None:
        return (None,) * len(keys)
    if not isinstance(value, list) or len(value) != len(keys):
        raise _wrong("action.action_configs", value, f"null or a list of {len(keys)}, one a key")
    return tuple(
        _mapping(item, f"action.action_configs[{index}]") for index, item in enumerate(value)
    )


def _reference_state(
    config: Mapping[str, Any], key: str, dim: int, state_dims: Mapping[str, int]
) -> str:
    named = config.get("state_key")
    if named is not None and not isinstance(named, str):
        raise _wrong(f"action key '{key}': state_key", named, "a state key or null")
    reference = named or key
    if reference not in state_dims:
        raise ProcessorError(
            f"action key '{key}' is relative to the state key '{reference}', which the state "
            f"modality lacks (it has {', '.join(state_dims)}). {_USE_SAVED_FILES}"
        )
    if state_dims[reference] != dim:
        raise ProcessorError(
            f"action key '{key}' has {dim} values, but the state key '{reference}' it is relative "
            f"to has {state_dims[reference]}. {_USE_SAVED_FILES}"
        )
    return reference


def _action_keys(
    modality: Mapping[str, Any],
    tag_statistics: Mapping[str, Any],
    tag: str,
    *,
    state_dims: Mapping[str, int],
    steps: int,
    use_percentiles: bool,
    use_relative_action: bool,
) -> tuple[ActionKey, ...]:
    mean_std = _optional_names(modality, "mean_std_embedding_keys", "action")
    names = _modality_keys(modality, "action")
    absolute_statistics = _group(tag_statistics, "action", tag)
    keys = []
    for index, (key, config) in enumerate(
        zip(names, _action_configs(modality, names), strict=True)
    ):
        where = f"statistics of action key '{key}'"
        absolute = _mapping(_required(absolute_statistics, key, "action statistics"), where)
        fields = _bound_fields(use_percentiles)
        if config is None or not _is_relative(
            config, f"action.action_configs[{index}]", use_relative_action
        ):
            keys.append(_action_key(key, absolute, fields, where, key in mean_std))
            continue
        where = f"relative statistics of action key '{key}'"
        group = _group(tag_statistics, "relative_action", tag)
        stats = _mapping(_required(group, key, "relative_action statistics"), where)
        # The public code takes min/max here even where use_percentiles is on.
        relative = _action_key(key, stats, ("min", "max"), where, key in mean_std, steps)
        width = _statistic(absolute, fields[0], f"statistics of action key '{key}'", None).shape[0]
        if relative.dim != width:
            raise ProcessorError(
                f"{where} are {relative.dim} wide, its absolute statistics {width}. "
                f"{_USE_SAVED_FILES}"
            )
        keys.append(
            ActionKey(
                key,
                relative.dim,
                relative.encoding,
                "relative",
                _reference_state(config, key, relative.dim, state_dims),
                relative.low,
                relative.high,
                relative.mean,
                relative.std,
            )
        )
    return tuple(keys)


def _action_key(
    key: str,
    stats: Mapping[str, Any],
    fields: tuple[str, str],
    where: str,
    mean_std: bool,
    steps: int | None = None,
) -> ActionKey:
    if mean_std:
        mean, std = _moments(stats, where, steps)
        return ActionKey(key, mean.shape[-1], "mean_std", "absolute", mean=mean, std=std)
    low, high = _bounds(stats, fields, where, steps)
    return ActionKey(key, low.shape[-1], "min_max", "absolute", low=low, high=high)


def _image_chain(kwargs: Mapping[str, Any]) -> ImageChain:
    if not _flag(kwargs, "use_albumentations", False):
        raise _not_implemented(
            "processor_kwargs.use_albumentations",
            "false (also the meaning of a missing entry)",
            "That selects the letter-box image chain. Fine-tune with use_albumentations, as the "
            "released N1.6 checkpoints are.",
        )
    edge = kwargs.get("shortest_image_edge", _DEFAULT_SHORTEST_IMAGE_EDGE)
    fraction = kwargs.get("crop_fraction", _DEFAULT_CROP_FRACTION)
    if edge is None:
        edge = _first_side(kwargs, "image_target_size")
    if fraction is None:
        fraction = _first_side(kwargs, "image_crop_size") / _first_side(
            kwargs, "image_target_size"
        )
    where = "processor_kwargs.crop_fraction"
    fraction = _number(fraction, where)
    if not 0.0 < fraction <= 1.0:
        raise _wrong(where, fraction, "a fraction above 0 and at most 1")
    return ImageChain(
        shortest_image_edge=_positive_integer(edge, "processor_kwargs.shortest_image_edge"),
        crop_fraction=fraction,
    )


def _first_side(kwargs: Mapping[str, Any], key: str) -> int:
    where = f"processor_kwargs.{key}"
    value = kwargs.get(key)
    if not isinstance(value, list) or not value:
        raise _wrong(
            where,
            value,
            "[height, width], because shortest_image_edge or crop_fraction is null and "
            "is derived from it",
        )
    return _positive_integer(value[0], f"{where}[0]")


def _require_fit(processor: Processor) -> None:
    state_width = sum(key.encoded_dim for key in processor.state_keys)
    action_width = sum(key.dim for key in processor.action_keys)
    for what, found, limit_name, limit in (
        ("encoded state values", state_width, "max_state_dim", processor.max_state_dim),
        ("action values", action_width, "max_action_dim", processor.max_action_dim),
        (
            "action delta_indices",
            processor.action_steps,
            "max_action_horizon",
            processor.max_action_horizon,
        ),
    ):
        if found > limit:
            raise ProcessorError(
                f"embodiment '{processor.embodiment_tag}' has {found} {what}, more than "
                f"{limit_name} {limit}: the network has no room for them. {_USE_SAVED_FILES}"
            )
