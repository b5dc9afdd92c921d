"""Hazards of a generated checkpoint: not what its seed says, not the layout that is released."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="checkpoints are written with torch")
pytest.importorskip("transformers", reason="the model's sizes need transformers")

import torch
from safetensors.torch import load_file

from groot_int8_ros.errors import ConfigurationError
from groot_int8_ros.policy.preprocess import PromptTokenizer
from groot_int8_ros.policy.processor import load_processor
from offline_tools.cli import main
from offline_tools.dataset.lerobot import LeRobotDataset
from offline_tools.demo import random_checkpoint
from offline_tools.demo.random_checkpoint import SIZES, write_random_checkpoint
from offline_tools.model.checkpoint import (
    CheckpointReader,
    expected_keys,
)
from offline_tools.model.configuration import find_eagle_config, load_model_config


def _hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_seed_decides_every_byte(
    tiny_checkpoint: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    dataset = LeRobotDataset.open(tiny_dataset)
    for seed in (0, 1):
        write_random_checkpoint(
            tmp_path / str(seed), dataset, seed=seed, absolute_keys=("gripper",)
        )
    assert _hashes(tmp_path / "0") == _hashes(tiny_checkpoint)
    different = {
        name
        for name, value in _hashes(tmp_path / "1").items()
        if value != _hashes(tiny_checkpoint)[name]
    }
    assert different == {"model.safetensors"}


def test_tokenizer_that_is_given_has_a_row_for_each_of_its_words(
    tiny_dataset: Path, golden_dir: Path, tmp_path: Path
) -> None:
    words, folder = golden_dir / "tokenizer", tmp_path / "checkpoint"
    options = ["--dataset", str(tiny_dataset), "--tokenizer", str(words)]
    assert main(["make-checkpoint", "--output", str(folder), *options]) == 0
    config, _ = load_model_config(folder)
    tokenizer = PromptTokenizer.from_file(folder / "tokenizer.json")
    assert config.language.image_token_id == tokenizer.image_token_id == 151669
    assert config.language.vocab_size > tokenizer.image_token_id
    reader = CheckpointReader(folder)
    reader.validate(config, find_eagle_config(folder))


def test_tokenizer_that_is_not_there_is_named(
    tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--dataset", str(tiny_dataset), "--tokenizer", str(tmp_path / "gone")]
    assert main(["make-checkpoint", "--output", str(tmp_path / "out"), *options]) == 2
    assert "gone/tokenizer.json is missing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_large_checkpoint_is_sharded_with_the_same_weights(
    tiny_checkpoint: Path,
    tiny_dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limit = 1 << 20
    monkeypatch.setattr(random_checkpoint, "_SHARD_BYTES", limit)
    folder = tmp_path / "sharded"
    write_random_checkpoint(folder, LeRobotDataset.open(tiny_dataset), absolute_keys=("gripper",))
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    assert [path.name for path in shards] == [
        f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    header_bytes = 1 << 16
    # A tensor is never split; one that is larger than a shard has one of its own.
    assert all(
        path.stat().st_size < limit + header_bytes or len(load_file(path)) == 1 for path in shards
    )
    config, _ = load_model_config(folder)
    reader = CheckpointReader(folder)
    reader.validate(config, find_eagle_config(folder))
    single = load_file(tiny_checkpoint / "model.safetensors")
    assert set(reader.keys) == set(single)
    for key, weight in single.items():
        assert torch.equal(reader.tensor(key), weight), key
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(single)


def test_written_files_describe_the_model_that_was_asked_for(tiny_checkpoint: Path) -> None:
    config, notes = load_model_config(tiny_checkpoint)
    tokenizer = PromptTokenizer.from_file(tiny_checkpoint / "tokenizer.json")
    assert notes == ()
    assert tokenizer.image_token_id == config.language.image_token_id
    assert config.dit == SIZES["tiny"].dit
    assert config.vision == SIZES["tiny"].vision
    assert expected_keys(config) == {
        key: tuple(value.shape)
        for key, value in load_file(tiny_checkpoint / "model.safetensors").items()
    }


def test_signals_neither_vanish_nor_explode_in_the_generated_layers(
    tiny_checkpoint: Path,
) -> None:
    for key, weight in load_file(tiny_checkpoint / "model.safetensors").items():
        values = weight.float()
        assert torch.isfinite(values).all()
        if key.endswith("layers.0.mlp.down_proj.weight"):
            assert values.std() * np.sqrt(values.shape[1]) == pytest.approx(1.0, rel=0.05)


def test_statistics_are_those_of_the_dataset(tiny_checkpoint: Path, tiny_dataset: Path) -> None:
    processor = load_processor(tiny_checkpoint)
    episode = LeRobotDataset.open(tiny_dataset).episode(0)
    keys = {key.key: key for key in processor.action_keys}
    gripper, arm = keys["gripper"], keys["single_arm"]
    assert gripper.representation == "absolute"
    assert gripper.low is not None
    assert gripper.high is not None
    np.testing.assert_allclose(gripper.low, episode.action["gripper"].min(axis=0), rtol=1e-6)
    np.testing.assert_allclose(gripper.high, episode.action["gripper"].max(axis=0), rtol=1e-6)
    assert arm.representation == "relative"
    assert arm.reference_state_key == "single_arm"
    assert arm.low is not None
    assert arm.low.shape == (16, 5)
    last = len(episode) - 1
    offsets = [
        episode.action["single_arm"][min(t + 3, last)] - episode.state["single_arm"][t]
        for t in range(len(episode))
    ]
    np.testing.assert_allclose(arm.low[3], np.min(offsets, axis=0), rtol=1e-5, atol=1e-5)


def test_unknown_key_is_refused_and_nothing_is_written(tiny_dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="has no action key 'griper'; it has single_arm"):
        write_random_checkpoint(
            tmp_path / "checkpoint", LeRobotDataset.open(tiny_dataset), absolute_keys=("griper",)
        )
    assert list(tmp_path.iterdir()) == []


def test_horizon_is_that_of_the_model_the_chunks_and_their_statistics(
    tiny_dataset: Path, tmp_path: Path
) -> None:
    words = ["make-checkpoint", "--dataset", tiny_dataset, "--output", tmp_path / "c"]
    assert main([*map(str, words), "--horizon", "24"]) == 0
    config, _ = load_model_config(tmp_path / "c")
    assert config.action_horizon == 24
    arm = next(
        key for key in load_processor(tmp_path / "c").action_keys if key.key == "single_arm"
    )
    assert arm.low is not None
    assert arm.low.shape == (24, 5)


def test_horizon_longer_than_the_position_table_is_refused(
    tiny_dataset: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match="size tiny has 64"):
        write_random_checkpoint(
            tmp_path / "checkpoint", LeRobotDataset.open(tiny_dataset), horizon=65
        )
    assert list(tmp_path.iterdir()) == []


def test_command_writes_what_the_function_writes(
    tiny_checkpoint: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    words = ["make-checkpoint", "--dataset", tiny_dataset, "--output", tmp_path / "c"]
    assert main([*map(str, words), "--absolute-keys", "gripper"]) == 0
    assert _hashes(tmp_path / "c") == _hashes(tiny_checkpoint)
