from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from groot_int8_ros.errors import CheckpointError
from offline_tools.model.configuration import ModelConfig, load_model_config

if TYPE_CHECKING:
    from test.offline_tools.model.conftest import TinyCheckpoint


def write(directory: Path, **fields: Any) -> None:
    (directory / "config.json").write_text(json.dumps(fields))


def test_an_empty_config_json_means_the_public_sizes(tmp_path: Path) -> None:
    write(tmp_path)
    config, notes = load_model_config(tmp_path)
    assert config == ModelConfig()
    assert any("eagle_config.json" in note for note in notes)


def test_a_diffusion_config_without_sizes_means_those_of_the_references_dit_class(
    tmp_path: Path,
) -> None:
    # Only an object that is absent as a whole means the public model's sizes.
    sparse = {
        "model_type": "Gr00tN1d6",
        "diffusion_model_cfg": {"interleave_self_attention": True, "positional_embeddings": None},
        "input_embedding_dim": 512,
        "hidden_size": 26,
    }
    (tmp_path / "config.json").write_text(json.dumps(sparse))
    dit = load_model_config(tmp_path)[0].dit
    assert (dit.layers, dit.heads, dit.head_dim, dit.output_dim) == (12, 8, 64, 26)


def test_the_eagle_config_beside_the_checkpoint_gives_way_to_an_explicit_one(
    tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    explicit = tmp_path / "other.json"
    eagle = json.loads((tiny.directory / "eagle_config.json").read_text())
    eagle["text_config"]["num_attention_heads"] = 8
    explicit.write_text(json.dumps(eagle))
    assert load_model_config(tiny.directory)[0].language.heads == 4
    assert load_model_config(tiny.directory, explicit)[0].language.heads == 8


def test_no_more_layers_are_kept_than_the_language_model_has(tiny: TinyCheckpoint) -> None:
    tiny.write_config(select_layer=16)
    assert load_model_config(tiny.directory)[0].language.layers == 3


@pytest.mark.parametrize(("trained", "expected"), [(3, 3), (5, 5), (40, 5)])
def test_the_trained_horizon_wins_where_it_is_shorter(
    tiny: TinyCheckpoint, trained: int, expected: int
) -> None:
    limits = {"max_state_dim": 7, "max_action_dim": 6, "max_action_horizon": trained}
    path = tiny.directory / "processor_config.json"
    path.write_text(json.dumps({"processor_kwargs": limits}))
    config, notes = load_model_config(tiny.directory)
    assert config.action_horizon == expected
    assert bool(notes) == (expected != 5)
    assert not notes or notes[0].startswith("3 action tokens are run, as in training")
    assert not notes or "the reference code runs all 5" in notes[0]


def test_a_processor_of_other_padded_widths_is_named(tiny: TinyCheckpoint) -> None:
    limits = {"max_state_dim": 7, "max_action_dim": 128}
    path = tiny.directory / "processor_config.json"
    path.write_text(json.dumps({"processor_kwargs": limits}))
    with pytest.raises(CheckpointError, match=r"max_action_dim of the model is 6 .* is 128"):
        load_model_config(tiny.directory)


DIT = {
    "num_layers": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "output_dim": 8,
}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "Gr00tN1d5"}, "model_type"),
        ({"use_alternate_vl_dit": False}, "use_alternate_vl_dit"),
        ({"reproject_vision": True}, "reproject_vision"),
        ({"diffusion_model_cfg": {**DIT, "norm_type": "layer_norm"}}, "norm_type"),
        (
            {"diffusion_model_cfg": {**DIT, "positional_embeddings": "sinusoidal"}},
            "positional_embeddings",
        ),
        (
            {"diffusion_model_cfg": {**DIT, "interleave_self_attention": False}},
            "interleave_self_attention",
        ),
        ({"diffusion_model_cfg": {**DIT, "attention_bias": False}}, "attention_bias"),
        ({"diffusion_model_cfg": {**DIT, "activation_fn": "geglu"}}, "activation_fn"),
        ({"action_horizon": 0}, "action_horizon is 0"),
        ({"action_horizon": "16"}, "action_horizon is '16'"),
        ({"action_horizon": 33}, "longer than the 32 learned positions"),
        ({"add_pos_embed": "yes"}, "add_pos_embed"),
        ({"hidden_size": 12}, "output_dim of the DiT is 8"),
        ({"input_embedding_dim": 36}, "attention_head_dim of the DiT is 24"),
        ({"backbone_embedding_dim": 2048}, "--eagle-config"),
    ],
)
def test_a_config_that_the_model_cannot_follow_is_refused_by_name(
    tiny: TinyCheckpoint, changes: dict[str, Any], named: str
) -> None:
    tiny.write_config(**changes)
    with pytest.raises(CheckpointError, match=named):
        load_model_config(tiny.directory)


@pytest.mark.parametrize(
    ("part", "changes", "named"),
    [
        ("vision_config", {"use_rope": True}, "use_rope"),
        ("vision_config", {"use_windows_attn": True}, "use_windows_attn"),
        ("vision_config", {"model_type": "radio"}, "model_type"),
        ("vision_config", {"num_patches": 15}, "no square grid"),
        ("vision_config", {"num_attention_heads": 3}, "does not divide"),
        ("text_config", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling"),
        ("text_config", {"use_sliding_window": True}, "use_sliding_window"),
        ("text_config", {"attention_bias": True}, "attention_bias"),
        ("text_config", {"architectures": ["LlamaForCausalLM"]}, "architectures"),
        ("text_config", {"num_key_value_heads": 3}, "3 key heads"),
        ("", {"mlp_connector_layers": 1}, "mlp_connector_layers"),
        ("", {"downsample_ratio": 0.25}, "downsample_ratio"),
        ("", {"use_pixel_shuffle": False}, "use_pixel_shuffle"),
        ("", {"select_layer": -2}, "select_layer"),
        ("", {"use_llm_lora": 64}, "use_llm_lora"),
        ("", {"text_config": []}, "text_config is not an object"),
    ],
)
def test_an_eagle_config_that_the_model_cannot_follow_is_refused_by_name(
    tiny: TinyCheckpoint, part: str, changes: dict[str, Any], named: str
) -> None:
    path = tiny.directory / "eagle_config.json"
    eagle = json.loads(path.read_text())
    (eagle[part] if part else eagle).update(changes)
    path.write_text(json.dumps(eagle))
    with pytest.raises(CheckpointError, match=named) as raised:
        load_model_config(tiny.directory)
    assert "eagle_config.json" in str(raised.value)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"action_horizon": \xff}'])
def test_a_damaged_config_json_is_named(tiny: TinyCheckpoint, content: str) -> None:
    (tiny.directory / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_model_config(tiny.directory)


def test_a_folder_without_config_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        load_model_config(tmp_path)
