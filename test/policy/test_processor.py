"""Hazards of a checkpoint's processor files: sparse, damaged, of another setting than ours."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from groot_int8_ros.errors import ProcessorError
from groot_int8_ros.policy.processor import (
    ActionKey,
    Processor,
    StateKey,
    load_processor,
    parse_processor,
)

Json = Any
Change = Callable[[Json, Json, Json], None]

STEPS = 3


def _statistics_of(width: int, rows: int | None = None) -> Json:
    def field(value: float) -> Json:
        row = [value + index for index in range(width)]
        return row if rows is None else [[v + step for v in row] for step in range(rows)]

    return {
        "min": field(-2.0),
        "max": field(6.0),
        "mean": field(1.0),
        "std": field(0.5),
        "q01": field(-1.5),
        "q99": field(5.5),
    }


def _files() -> tuple[Json, Json, Json]:
    """Processor files with a relative and an absolute action key, complete and valid."""
    config = {
        "processor_class": "Gr00tN1d6Processor",
        "processor_kwargs": {
            "modality_configs": {
                "new_embodiment": {
                    "video": {"delta_indices": [0], "modality_keys": ["front", "wrist"]},
                    "state": {
                        "delta_indices": [0],
                        "modality_keys": ["arm", "hand"],
                        "sin_cos_embedding_keys": ["arm"],
                        "mean_std_embedding_keys": ["hand"],
                    },
                    "action": {
                        "delta_indices": list(range(STEPS)),
                        "modality_keys": ["arm", "hand"],
                        "mean_std_embedding_keys": ["hand"],
                        "action_configs": [
                            {"rep": "RELATIVE", "type": "NON_EEF", "format": "DEFAULT"},
                            {"rep": "ABSOLUTE", "type": "NON_EEF", "format": "DEFAULT"},
                        ],
                    },
                    "language": {"delta_indices": [0], "modality_keys": ["task"]},
                }
            },
            "use_albumentations": True,
            "image_crop_size": [230, 230],
            "image_target_size": [256, 256],
            "shortest_image_edge": 256,
            "crop_fraction": 0.9,
            "formalize_language": False,
            "max_state_dim": 12,
            "max_action_dim": 10,
            "max_action_horizon": 8,
            "use_percentiles": False,
            "clip_outliers": False,
            "apply_sincos_state_encoding": True,
            "use_relative_action": True,
        },
    }
    statistics = {
        "new_embodiment": {
            "state": {"arm": _statistics_of(2), "hand": _statistics_of(1)},
            "action": {"arm": _statistics_of(2), "hand": _statistics_of(1)},
            "relative_action": {"arm": _statistics_of(2, rows=STEPS)},
        }
    }
    return config, statistics, {"new_embodiment": 10}


def _parse(change: Change, embodiment: str | None = None) -> Processor:
    config, statistics, ids = _files()
    change(config, statistics, ids)
    return parse_processor(config, statistics, ids, embodiment)


def _kwargs(config: Json) -> Json:
    return config["processor_kwargs"]


def _modality(config: Json, name: str) -> Json:
    return _kwargs(config)["modality_configs"]["new_embodiment"][name]


def _set_kwarg(key: str, value: Json) -> Change:
    return lambda config, statistics, ids: _kwargs(config).__setitem__(key, value)


def _drop_kwarg(key: str) -> Change:
    return lambda config, statistics, ids: _kwargs(config).__delitem__(key)


def _set_modality(name: str, key: str, value: Json) -> Change:
    return lambda config, statistics, ids: _modality(config, name).__setitem__(key, value)


def _set_statistic(group: str, key: str, field: str, value: Json) -> Change:
    def change(config: Json, statistics: Json, ids: Json) -> None:
        statistics["new_embodiment"][group][key][field] = value

    return change


def _drop_statistics(*path: str) -> Change:
    def change(config: Json, statistics: Json, ids: Json) -> None:
        node = statistics
        for step in path[:-1]:
            node = node[step]
        del node[path[-1]]

    return change


def _set_action_config(key: str, value: Json) -> Change:
    def change(config: Json, statistics: Json, ids: Json) -> None:
        _modality(config, "action")["action_configs"][0][key] = value

    return change


def _unchanged(config: Json, statistics: Json, ids: Json) -> None:
    return None


def test_every_setting_of_a_complete_file_reaches_the_processor() -> None:
    processor = _parse(_unchanged)
    arm, hand = processor.state_keys
    assert (arm.encoding, arm.encoded_dim, hand.encoding, hand.encoded_dim) == (
        "sin_cos",
        4,
        "mean_std",
        1,
    )
    relative, absolute = processor.action_keys
    assert (relative.representation, relative.reference_state_key) == ("relative", "arm")
    assert relative.low is not None
    assert relative.low.tolist() == _statistics_of(2, rows=STEPS)["min"]
    assert (absolute.encoding, absolute.representation) == ("mean_std", "absolute")
    assert absolute.std is not None
    assert absolute.std.tolist() == [0.5]
    assert processor.cameras == ("front", "wrist")
    assert processor.embodiment_id == 10
    assert (processor.max_state_dim, processor.max_action_dim) == (12, 10)
    assert processor.max_action_horizon == 8
    assert not processor.clip_outliers
    assert not processor.formalize_language
    assert processor.image_chain.crop_fraction == 0.9


def test_a_sparse_file_means_the_public_class_defaults_not_ours() -> None:
    def sparse(config: Json, statistics: Json, ids: Json) -> None:
        kept = {"modality_configs", "use_albumentations"}
        config["processor_kwargs"] = {k: v for k, v in _kwargs(config).items() if k in kept}

    processor = _parse(sparse)
    assert processor.image_chain.shortest_image_edge == 512
    assert processor.image_chain.crop_fraction == 0.95
    assert (processor.max_state_dim, processor.max_action_dim) == (29, 29)
    assert processor.max_action_horizon == 40
    assert processor.formalize_language
    assert processor.clip_outliers
    # Without the flags neither sines nor relative targets, whatever the modality says.
    assert processor.state_keys[0].encoding == "min_max"
    assert processor.action_keys[0].representation == "absolute"
    assert processor.action_keys[0].low is not None
    assert processor.action_keys[0].low.shape == (2,)


def test_null_image_settings_are_derived_from_the_training_crop() -> None:
    def derived(config: Json, statistics: Json, ids: Json) -> None:
        _kwargs(config)["crop_fraction"] = None
        _kwargs(config)["shortest_image_edge"] = None

    chain = _parse(derived).image_chain
    assert (chain.shortest_image_edge, chain.crop_fraction) == (256, 230 / 256)


def test_percentiles_replace_bounds_but_never_those_of_relative_actions() -> None:
    def percentiles(config: Json, statistics: Json, ids: Json) -> None:
        _kwargs(config)["use_percentiles"] = True
        _kwargs(config)["apply_sincos_state_encoding"] = False
        del _modality(config, "action")["mean_std_embedding_keys"]

    processor = _parse(percentiles)
    state, relative, absolute = processor.state_keys[0], *processor.action_keys
    assert state.low is not None
    assert relative.high is not None
    assert absolute.high is not None
    assert state.low.tolist() == _statistics_of(2)["q01"]
    assert relative.high.tolist() == _statistics_of(2, rows=STEPS)["max"]
    assert absolute.high.tolist() == _statistics_of(1)["q99"]


def test_percentiles_of_the_state_are_known_whatever_its_encoding() -> None:
    arm, hand = _parse(lambda *_: None).state_keys
    assert (arm.encoding, hand.encoding) == ("sin_cos", "mean_std")
    for key in (arm, hand):
        assert key.usual_low is not None
        assert key.usual_high is not None
        assert key.usual_low.tolist() == _statistics_of(key.dim)["q01"]
        assert key.usual_high.tolist() == _statistics_of(key.dim)["q99"]

    def without(config: Json, statistics: Json, ids: Json) -> None:
        del statistics["new_embodiment"]["state"]["hand"]["q99"]

    assert [key.usual_low is None for key in _parse(without).state_keys] == [False, True]

    def narrow(config: Json, statistics: Json, ids: Json) -> None:
        for name in ("q01", "q99"):
            statistics["new_embodiment"]["state"]["arm"][name].pop()

    with pytest.raises(ProcessorError, match=r"'arm': q01 has shape \(1,\), the others have \(2,"):
        _parse(narrow)


def test_missing_action_configs_mean_absolute_targets() -> None:
    processor = _parse(_set_modality("action", "action_configs", None))
    assert {key.representation for key in processor.action_keys} == {"absolute"}


def test_relative_key_may_refer_to_a_state_key_of_another_name() -> None:
    def renamed(config: Json, statistics: Json, ids: Json) -> None:
        _modality(config, "state")["modality_keys"] = ["measured", "hand"]
        group = statistics["new_embodiment"]["state"]
        group["measured"] = group.pop("arm")
        _modality(config, "action")["action_configs"][0]["state_key"] = "measured"

    assert _parse(renamed).action_keys[0].reference_state_key == "measured"


def test_row_number_comes_from_the_file_and_else_from_the_public_table() -> None:
    config, statistics, _ = _files()
    saved = parse_processor(config, statistics, {"new_embodiment": 3}, None)
    other_tag = parse_processor(config, statistics, {"my_robot": 4}, None)
    without = parse_processor(config, statistics, None, None)
    assert (saved.embodiment_id, other_tag.embodiment_id, without.embodiment_id) == (3, 10, 10)


def test_several_embodiments_need_a_choice_and_are_listed() -> None:
    def two(config: Json, statistics: Json, ids: Json) -> None:
        configs = _kwargs(config)["modality_configs"]
        configs["gr1"] = copy.deepcopy(configs["new_embodiment"])
        configs["unitree_g1"] = copy.deepcopy(configs["new_embodiment"])
        statistics["gr1"] = copy.deepcopy(statistics["new_embodiment"])

    with pytest.raises(ProcessorError, match=r"gr1, new_embodiment\. Name one"):
        _parse(two)
    assert _parse(two, "gr1").embodiment_id == 20
    with pytest.raises(ProcessorError, match=r"'unitree_g1' has no statistics.*gr1"):
        _parse(two, "unitree_g1")
    with pytest.raises(ProcessorError, match=r"'typo' has no modality.*gr1, new_embodiment"):
        _parse(two, "typo")


def test_statistics_cannot_be_changed_after_the_check() -> None:
    low = _parse(_unchanged).action_keys[0].low
    assert low is not None
    with pytest.raises(ValueError, match="read-only"):
        low[0] = 0.0


REFUSED: dict[str, tuple[Change, str]] = {
    "end effector": (_set_action_config("type", "EEF"), r"type.*EEF.*not implemented"),
    "delta": (_set_action_config("rep", "DELTA"), r"rep.*DELTA.*not implemented"),
    "unknown representation": (_set_action_config("rep", "WARP"), r"rep.*WARP"),
    "rotation format": (_set_action_config("format", "XYZ_ROT6D"), r"format.*XYZ_ROT6D"),
    "reference state missing": (_set_action_config("state_key", "leg"), r"state key 'leg'"),
    "reference state width": (_set_action_config("state_key", "hand"), r"'arm' has 2.*'hand'"),
    "action_configs length": (_set_modality("action", "action_configs", [{}]), r"list of 2"),
    "video history": (_set_modality("video", "delta_indices", [-1, 0]), r"video.*2 time steps"),
    "delayed video": (_set_modality("video", "delta_indices", [-2]), r"video.*\[-2\]"),
    "state history": (_set_modality("state", "delta_indices", [-1, 0]), r"state.*2 time steps"),
    "no video key": (_set_modality("video", "modality_keys", []), r"video.modality_keys is empty"),
    "key twice": (_set_modality("video", "modality_keys", ["a", "a"]), r"twice"),
    "actions before now": (_set_modality("action", "delta_indices", [-1, 0, 1]), r"-1 first"),
    "actions out of order": (_set_modality("action", "delta_indices", [0, 2, 1]), r"order"),
    "actions repeated": (_set_modality("action", "delta_indices", [0, 1, 1]), r"order"),
    "step beyond any time": (_set_modality("action", "delta_indices", [10**30]), r"integers"),
    "no action step": (_set_modality("action", "delta_indices", []), r"delta_indices is empty"),
    "other horizon": (_set_modality("action", "delta_indices", [0, 1]), r"3 rows.*2"),
    "letter-box chain": (_set_kwarg("use_albumentations", False), r"use_albumentations"),
    "letter-box by default": (_drop_kwarg("use_albumentations"), r"use_albumentations"),
    "other backbone": (_set_kwarg("model_name", "nvidia/Other"), r"model_name.*Other"),
    "newer keyword": (_set_kwarg("letter_box_transform", True), r"letter_box_transform"),
    "crop above one": (_set_kwarg("crop_fraction", 1.5), r"crop_fraction.*1\.5"),
    "crop of nothing": (_set_kwarg("crop_fraction", 0), r"crop_fraction"),
    "edge of nothing": (_set_kwarg("shortest_image_edge", 0), r"shortest_image_edge"),
    "flag as text": (_set_kwarg("clip_outliers", "false"), r"clip_outliers.*true or false"),
    "huge width": (_set_kwarg("max_state_dim", 10**30), r"max_state_dim"),
    "state too wide": (_set_kwarg("max_state_dim", 4), r"5 encoded state.*max_state_dim 4"),
    "action too wide": (_set_kwarg("max_action_dim", 2), r"3 action values.*max_action_dim 2"),
    "too many steps": (_set_kwarg("max_action_horizon", 2), r"3 action delta.*horizon 2"),
    "no statistics": (_drop_statistics("new_embodiment"), r"statistics \(found: none\)"),
    "no state statistics": (_drop_statistics("new_embodiment", "state"), r"no 'state'"),
    "no statistics of a key": (_drop_statistics("new_embodiment", "state", "hand"), r"'hand'"),
    "no field": (_drop_statistics("new_embodiment", "state", "hand", "std"), r"'hand'.*'std'"),
    "no relative statistics": (_drop_statistics("new_embodiment", "relative_action"), r"relative"),
    "NaN": (_set_statistic("action", "hand", "mean", [math.nan]), r"'hand'\.mean\[0\] is nan"),
    "infinity": (_set_statistic("action", "hand", "mean", [math.inf]), r"is inf"),
    "beyond float32": (_set_statistic("action", "hand", "mean", [1e39]), r"1e\+39"),
    "beyond float": (_set_statistic("action", "hand", "mean", [10**400]), r"finite"),
    "swapped bounds": (
        _set_statistic("relative_action", "arm", "min", [[0, 0], [0, 99], [0, 0]]),
        r"min is above max at index 1",
    ),
    "negative deviation": (_set_statistic("state", "hand", "std", [-1.0]), r"std is negative"),
    "unequal widths": (_set_statistic("state", "hand", "std", [1.0, 1.0]), r"\(1,\).*\(2,\)"),
    "ragged rows": (
        _set_statistic("relative_action", "arm", "min", [[0], [0, 1], [0, 1]]),
        r"different widths",
    ),
    "relative width": (_set_statistic("action", "arm", "min", [0.0]), r"2 wide.*absolute.*1"),
    "text for a number": (_set_statistic("state", "hand", "mean", ["1"]), r"a number"),
    "row as a flag": (lambda config, statistics, ids: ids.update(new_embodiment=True), r"row"),
    "row below zero": (lambda config, statistics, ids: ids.update(new_embodiment=-1), r"-1"),
}


@pytest.mark.parametrize("hazard", REFUSED)
def test_what_is_wrong_or_not_implemented_is_refused_by_name(hazard: str) -> None:
    change, message = REFUSED[hazard]
    with pytest.raises(ProcessorError, match=message):
        _parse(change)


def test_unknown_keywords_that_are_switched_off_do_no_harm() -> None:
    assert _parse(_set_kwarg("letter_box_transform", False)).cameras == ("front", "wrist")


def test_an_embodiment_without_any_row_number_is_refused() -> None:
    config, statistics, _ = _files()
    configs = _kwargs(config)["modality_configs"]
    configs["my_robot"] = configs.pop("new_embodiment")
    statistics["my_robot"] = statistics.pop("new_embodiment")
    with pytest.raises(ProcessorError, match=r"'my_robot' has no row number.*unitree_g1"):
        parse_processor(config, statistics, None, None)


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**20, -(10**400), 0.5, math.nan, math.inf, -math.inf, 1e300])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["arm", "RELATIVE", "EEF", "new_embodiment"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)


def _paths(node: Json, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    if path:
        yield path
    if isinstance(node, dict):
        for key, child in node.items():
            yield from _paths(child, (*path, key))
    elif isinstance(node, list):
        for index, child in enumerate(node):
            yield from _paths(child, (*path, index))


# "__delete__" removes the entry; every path of the three files can be hit.
ALL_PATHS = list(_paths(dict(enumerate(_files()))))


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    changes=st.lists(
        st.tuples(st.sampled_from(ALL_PATHS), st.just("__delete__") | JSON_VALUES),
        min_size=1,
        max_size=3,
    )
)
def test_no_malformed_content_escapes_as_anything_but_a_processor_error(
    changes: list[tuple[tuple[str | int, ...], Json]],
) -> None:
    files: Json = dict(enumerate(_files()))
    for path, value in changes:
        node = files
        try:
            for step in path[:-1]:
                node = node[step]
            if value == "__delete__" and len(path) > 1:
                del node[path[-1]]
            else:
                node[path[-1]] = value
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change took this place away
    try:
        processor = parse_processor(files[0], files[1], files[2], None)
    except ProcessorError:
        return
    assert sum(key.encoded_dim for key in processor.state_keys) <= processor.max_state_dim
    keys: list[StateKey | ActionKey] = [*processor.state_keys, *processor.action_keys]
    for key in keys:
        for array in (key.low, key.high, key.mean, key.std):
            assert array is None or (np.isfinite(array).all() and array.shape[-1] == key.dim)


def _write(folder: Path, config: str, statistics: str, ids: str | None = None) -> Path:
    (folder / "processor_config.json").write_text(config)
    (folder / "statistics.json").write_text(statistics)
    if ids is not None:
        (folder / "embodiment_id.json").write_text(ids)
    return folder


def test_files_cut_short_anywhere_are_refused(tmp_path: Path) -> None:
    config, statistics, _ = (json.dumps(content) for content in _files())
    assert load_processor(_write(tmp_path, config, statistics)).embodiment_id == 10
    for length in range(0, len(statistics), 37):
        _write(tmp_path, config, statistics[:length])
        with pytest.raises(ProcessorError, match=r"statistics\.json is not valid JSON"):
            load_processor(tmp_path)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"[" * 100_000, b"[1" + b"0" * 5000 + b"]"])
def test_files_that_are_no_json_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "processor_config.json").write_bytes(content)
    (tmp_path / "statistics.json").write_text("{}")
    with pytest.raises(ProcessorError, match=r"processor_config\.json"):
        load_processor(tmp_path)


def test_a_missing_file_is_named_and_the_optional_one_is_not_needed(tmp_path: Path) -> None:
    with pytest.raises(ProcessorError, match=r"processor_config\.json is missing"):
        load_processor(tmp_path)


def test_the_public_code_s_own_files_are_read_as_they_are(golden_dir: Path) -> None:
    folder = golden_dir / "checkpoint"
    processor = load_processor(folder)
    statistics = json.loads((folder / "statistics.json").read_text())["new_embodiment"]
    arm, gripper = processor.action_keys
    assert (arm.key, arm.dim, arm.reference_state_key) == ("single_arm", 5, "single_arm")
    assert arm.low is not None
    assert gripper.high is not None
    assert np.array_equal(arm.low, statistics["relative_action"]["single_arm"]["min"])
    assert np.array_equal(gripper.high, statistics["action"]["gripper"]["max"])
    assert processor.action_steps == 16
    assert processor.cameras == ("front", "wrist")
    assert (processor.image_chain.shortest_image_edge, processor.embodiment_id) == (256, 10)
