from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from groot_int8_ros.errors import CheckpointError
from offline_tools.demo.random_checkpoint import SIZES
from offline_tools.model.checkpoint import (
    CheckpointReader,
    expected_keys,
    load_model,
)
from offline_tools.model.configuration import ModelConfig, load_model_config

if TYPE_CHECKING:
    from test.offline_tools.model.conftest import TinyCheckpoint

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
Q_PROJ = "backbone.model.language_model.model.layers.1.self_attn.q_proj.weight"
TO_Q = "action_head.model.transformer_blocks.0.attn1.to_q.weight"


# The public sizes, and what `make-checkpoint` calls full; the counts are those of the reference
# code, in millions of parameters.
@pytest.mark.parametrize(
    ("config", "state_encoder", "action_encoder", "action_decoder"),
    [
        (ModelConfig(max_state_dim=29, max_action_dim=29), 51.4, 228.1, 34.5),
        (SIZES["full"], 54.6, 232.9, 37.8),
    ],
)
def test_the_true_size_model_has_the_references_parameters(
    config: ModelConfig, state_encoder: float, action_encoder: float, action_decoder: float
) -> None:
    keys = expected_keys(config)
    parts = {
        # 427.7 with the pooling head's 15.2, which the model leaves out.
        "backbone.model.vision_model.": 427.7 - 15.2,
        "backbone.model.mlp1.": 13.6,
        "backbone.model.language_model.model.embed_tokens.": 310.6,
        "backbone.model.language_model.model.layers.": 805.4,
        "action_head.model.": 1091.7,
        "action_head.state_encoder.": state_encoder,
        "action_head.action_encoder.": action_encoder,
        "action_head.action_decoder.": action_decoder,
    }
    counts = {
        part: sum(math.prod(shape) for key, shape in keys.items() if key.startswith(part)) / 1e6
        for part in parts
    }
    assert counts == pytest.approx(parts, abs=0.1)


def test_every_weight_arrives_under_its_own_name(tiny: TinyCheckpoint) -> None:
    model, _, _ = load_model(tiny.directory)
    loaded = dict(model.named_parameters())
    assert set(loaded) == set(tiny.weights)
    for key, tensor in tiny.weights.items():
        assert loaded[key].dtype == torch.float32
        assert torch.equal(loaded[key], tensor.float()), key


def test_rotary_frequencies_stay_float32_in_a_half_precision_model(tiny: TinyCheckpoint) -> None:
    model, _, _ = load_model(tiny.directory, dtype=torch.float16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    frequencies = model.backbone.language.model.rotary_emb.inv_freq
    assert frequencies.dtype == torch.float32
    # theta 1e6, head_dim 6
    assert frequencies.tolist() == pytest.approx([1.0, 1e6 ** (-1 / 3), 1e6 ** (-2 / 3)])


@pytest.mark.parametrize("count", [1, 3])
def test_shards_hold_the_same_model_as_one_file(tiny: TinyCheckpoint, count: int) -> None:
    whole, _, _ = load_model(tiny.directory)
    tiny.write_shards(count)
    sharded, _, _ = load_model(tiny.directory)
    for (name, first), (_, second) in zip(
        whole.named_parameters(), sharded.named_parameters(), strict=True
    ):
        assert torch.equal(first, second), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_checkpoints_of_every_float_type_load(tiny: TinyCheckpoint, dtype: torch.dtype) -> None:
    tiny.weights = {key: tensor.to(dtype) for key, tensor in tiny.weights.items()}
    tiny.write_weights()
    model, _, _ = load_model(tiny.directory)
    assert torch.equal(model.get_parameter(TO_Q), tiny.weights[TO_Q].float())


def test_keys_that_inference_leaves_unused_are_no_error(tiny: TinyCheckpoint) -> None:
    language = "backbone.model.language_model"
    unused = (
        "action_head.mask_token",
        "backbone.model.vision_model.vision_model.head.probe",
        "backbone.model.vision_model.vision_model.head.mlp.fc1.weight",
        f"{language}.lm_head.weight",
        f"{language}.model.layers.2.mlp.up_proj.weight",
    )
    tiny.weights.update({key: torch.zeros(3) for key in unused})
    tiny.write_weights()
    load_model(tiny.directory)


def test_a_single_file_beside_an_index_is_read_and_said(tiny: TinyCheckpoint) -> None:
    tiny.write_shards(2)
    tiny.write_weights()
    _, _, notes = load_model(tiny.directory)
    assert any(INDEX in note for note in notes)


def _truncate(tiny: TinyCheckpoint) -> None:
    path = tiny.directory / SINGLE
    path.write_bytes(path.read_bytes()[:-100])


def _append(tiny: TinyCheckpoint) -> None:
    path = tiny.directory / SINGLE
    path.write_bytes(path.read_bytes() + b"x")


def _cut_header(tiny: TinyCheckpoint) -> None:
    path = tiny.directory / SINGLE
    path.write_bytes(path.read_bytes()[:50])


def _empty(tiny: TinyCheckpoint) -> None:
    (tiny.directory / SINGLE).write_bytes(b"")


def _garble_header(tiny: TinyCheckpoint) -> None:
    path = tiny.directory / SINGLE
    content = bytearray(path.read_bytes())
    content[8:12] = b"\xff\xff\xff\xff"
    path.write_bytes(bytes(content))


def _pointer(tiny: TinyCheckpoint) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
    (tiny.directory / SINGLE).write_text(text)


def _no_weights(tiny: TinyCheckpoint) -> None:
    (tiny.directory / SINGLE).unlink()


def _missing_key(tiny: TinyCheckpoint) -> None:
    del tiny.weights[TO_Q]
    tiny.write_weights()


def _unexpected_key(tiny: TinyCheckpoint) -> None:
    tiny.weights["action_head.surprise.weight"] = torch.zeros(2, 3)
    tiny.write_weights()


def _misshapen_key(tiny: TinyCheckpoint) -> None:
    tiny.weights[TO_Q] = torch.zeros(24, 25)
    tiny.write_weights()


def _misshapen_backbone_key(tiny: TinyCheckpoint) -> None:
    tiny.weights[Q_PROJ] = torch.zeros(16, 16)
    tiny.write_weights()


def _integer_weights(tiny: TinyCheckpoint) -> None:
    tiny.weights[TO_Q] = tiny.weights[TO_Q].to(torch.int8)
    tiny.write_weights()


def _double_weights(tiny: TinyCheckpoint) -> None:
    tiny.weights[TO_Q] = tiny.weights[TO_Q].to(torch.float64)
    tiny.write_weights()


def _missing_shard(tiny: TinyCheckpoint) -> None:
    tiny.write_shards(3)
    (tiny.directory / "model-00002-of-00003.safetensors").unlink()


def _truncated_shard(tiny: TinyCheckpoint) -> None:
    tiny.write_shards(3)
    path = tiny.directory / "model-00003-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def _change_index(tiny: TinyCheckpoint, change: Callable[[dict[str, str]], object]) -> None:
    tiny.write_shards(2)
    path = tiny.directory / INDEX
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def _index_of_absent_key(tiny: TinyCheckpoint) -> None:
    shard = "model-00001-of-00002.safetensors"
    _change_index(tiny, lambda weight_map: weight_map.update({"action_head.ghost": shard}))


def _index_without_a_key(tiny: TinyCheckpoint) -> None:
    _change_index(tiny, lambda weight_map: weight_map.pop(TO_Q))


def _damaged_index(tiny: TinyCheckpoint) -> None:
    tiny.write_shards(2)
    (tiny.directory / INDEX).write_text('{"metadata": {}}')


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_truncate, (SINGLE, "truncated", "its header promises", "Copy the file again")),
        (_append, (SINGLE, "its header promises")),
        (_cut_header, (SINGLE, "truncated", "header is cut off")),
        (_empty, (SINGLE, "header is cut off")),
        (_garble_header, (SINGLE, "corrupt safetensors header")),
        (_pointer, (SINGLE, "no safetensors file")),
        (_no_weights, (f"neither {SINGLE} nor {INDEX}",)),
        (_missing_key, ("1 missing", f"{TO_Q} [24, 24]", "config.json")),
        (_unexpected_key, ("1 unexpected", "action_head.surprise.weight [2, 3]")),
        (_misshapen_key, ("1 misshapen", f"{TO_Q}: expected [24, 24], found [24, 25]")),
        (_misshapen_backbone_key, ("1 misshapen", Q_PROJ, "--eagle-config")),
        (_integer_weights, (f"{TO_Q}: I8", "bfloat16, float16 or float32")),
        (_double_weights, (f"{TO_Q}: F64",)),
        (_missing_shard, ("model-00002-of-00003.safetensors", "1 are missing")),
        (_truncated_shard, ("model-00003-of-00003.safetensors", "truncated")),
        (_index_of_absent_key, ("action_head.ghost is not in", "disagree")),
        (_index_without_a_key, (TO_Q, "the index says no shard")),
        (_damaged_index, (INDEX, "no index of safetensors shards")),
    ],
)
def test_a_damaged_checkpoint_is_named_before_anything_is_loaded(
    tiny: TinyCheckpoint,
    damage: Callable[[TinyCheckpoint], None],
    said: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    damage(tiny)
    read: list[str] = []
    monkeypatch.setattr(CheckpointReader, "tensor", lambda _, key: read.append(key))
    with pytest.raises(CheckpointError) as raised:
        load_model(tiny.directory)
    for part in said:
        assert part in str(raised.value)
    assert not read


def test_many_problems_stay_a_readable_message(tiny: TinyCheckpoint) -> None:
    for key in list(tiny.weights)[::2]:
        del tiny.weights[key]
    tiny.write_weights()
    with pytest.raises(CheckpointError, match=r"and \d+ more") as raised:
        load_model(tiny.directory)
    assert len(str(raised.value).splitlines()) < 15


def test_public_sizes_that_do_not_fit_point_to_the_eagle_config(tiny: TinyCheckpoint) -> None:
    config, _ = load_model_config(tiny.directory)
    assumed = replace(config, language=replace(config.language, mlp_size=24))
    reader = CheckpointReader(tiny.directory)
    with pytest.raises(CheckpointError, match="pass --eagle-config"):
        reader.validate(assumed, None)
    reader.validate(config, None)


def test_a_backbone_of_other_sizes_points_to_the_eagle_config(tiny: TinyCheckpoint) -> None:
    # hidden_size agrees with config.json, so only the shapes of the weights can tell.
    path = tiny.directory / "eagle_config.json"
    eagle = json.loads(path.read_text())
    eagle["text_config"]["head_dim"] = 8
    path.write_text(json.dumps(eagle))
    with pytest.raises(CheckpointError, match="pass another --eagle-config"):
        load_model(tiny.directory)
