"""Hazards of planted outliers: a changed function, magnitudes missed, the wrong token hit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from groot_int8_ros.errors import CheckpointError, ConfigurationError
from offline_tools.cli import main
from offline_tools.compare_quantization.outliers import (
    CALIBRATED_GAINS,
    MASSIVE_ACTIVATION,
    MASSIVE_RESIDUAL,
    VISION_GELU,
    VISION_LAST_GELU,
    VISION_LATE_NORM,
    VISION_RESIDUAL,
    channel_outliers,
    massive_token,
    vision_outliers,
    write_edited,
)
from offline_tools.demo.random_checkpoint import SIZES
from offline_tools.model.checkpoint import CheckpointReader, expected_keys, load_model
from offline_tools.model.configuration import ModelConfig, load_model_config
from offline_tools.model.policy_model import GrootN16, ModelInputs

TOKEN, OTHER, DELIMITER = 11, 12, 3
STEPS = 2


def _inputs(config: ModelConfig, seed: int = 0) -> ModelInputs:
    random = torch.Generator().manual_seed(seed)
    image = [DELIMITER, *[config.language.image_token_id] * 6, 4]
    ids = [1, TOKEN, OTHER, int(torch.randint(20, 400, (1,), generator=random)), *image, *image, 2]
    return ModelInputs(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        pixel_values=torch.rand((2, 3, 56, 84), generator=random) * 2 - 1,
        state=torch.randn((1, config.max_state_dim), generator=random),
        embodiment_id=10,
    )


def _actions(model: GrootN16, inputs: ModelInputs) -> Tensor:
    noise = torch.randn(
        (1, model.config.action_horizon, model.config.max_action_dim),
        generator=torch.Generator().manual_seed(1),
    )
    return model.get_action(inputs, noise, STEPS)


def _inputs_of(
    model: GrootN16, inputs: ModelInputs, *kinds: type[torch.nn.Module]
) -> dict[str, Tensor]:
    """Return the absolute input of every linear layer, or of every module of other kinds."""
    seen: dict[str, Tensor] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(_module: object, given: tuple[Tensor, ...], _result: object) -> None:
            seen[name] = given[0].detach().abs()

        return hook

    handles = [
        module.register_forward_hook(record(name))
        for name, module in model.named_modules()
        if isinstance(module, kinds or torch.nn.Linear)
    ]
    _actions(model, inputs)
    for handle in handles:
        handle.remove()
    return seen


@pytest.fixture(scope="module")
def config(tiny_checkpoint: Path) -> ModelConfig:
    return load_model_config(tiny_checkpoint)[0]


@pytest.fixture(scope="module")
def plain(tiny_checkpoint: Path) -> GrootN16:
    return load_model(tiny_checkpoint)[0]


@pytest.fixture(scope="module")
def with_channels(
    tiny_checkpoint: Path, config: ModelConfig, tmp_path_factory: pytest.TempPathFactory
) -> GrootN16:
    folder = tmp_path_factory.mktemp("channels") / "checkpoint"
    write_edited(tiny_checkpoint, folder, channel_outliers(config))
    return load_model(folder)[0]


def test_channel_outliers_leave_the_function_as_it_was(
    plain: GrootN16, with_channels: GrootN16, config: ModelConfig
) -> None:
    for seed in range(2):
        inputs = _inputs(config, seed)
        wanted, found = _actions(plain, inputs), _actions(with_channels, inputs)
        error = (found - wanted).norm() / wanted.norm()
        assert error < 1e-5, f"relative error {error:.1e}"


def test_channel_outliers_reach_the_calibrations_magnitudes(
    plain: GrootN16, with_channels: GrootN16, config: ModelConfig
) -> None:
    before = _inputs_of(plain, _inputs(config))
    after = _inputs_of(with_channels, _inputs(config))
    grown = {name for name in after if after[name].max() > 1.5 * before[name].max()}
    # Behind a GELU nothing can be scaled, nor in the time embedding's linear layers.
    spared = ("fc2", "ff.net", "mlp1.3", "timestep_embedder", "norm1.linear", "proj_out_1")
    expected = {name for name in after if not any(part in name for part in spared)}
    expected = {name for name in expected if "patch_embedding" not in name}
    assert grown == expected
    # As a calibration of a real backbone saw them, within a factor of three: the gains are those
    # of that calibration, what they are applied to is random.
    for part, layer, seen in (
        ("language", "q_proj", 27.0),
        ("language", "o_proj", 35.0),
        ("language", "down_proj", 180.0),
        ("vision", "q_proj", 20.0),
    ):
        found = [after[n].max().item() for n in after if part in n and n.endswith(layer)]
        assert found
        assert all(seen / 3 < value < seen * 3 for value in found), (layer, found)
    # Channels, not tokens: the same channel is large in nearly every row.
    rows = after[next(n for n in after if "language" in n and "q_proj" in n)][0]
    channel = int(rows.max(dim=0).values.argmax())
    share = (rows.argmax(dim=1) == channel).float().mean()
    assert share > 0.5


def test_gains_of_one_change_no_weight(tiny_checkpoint: Path, tmp_path: Path) -> None:
    config, _ = load_model_config(tiny_checkpoint)
    ones = replace(CALIBRATED_GAINS, **dict.fromkeys(vars(CALIBRATED_GAINS), 1.0))
    write_edited(tiny_checkpoint, tmp_path / "same", channel_outliers(config, gains=ones))
    before, after = CheckpointReader(tiny_checkpoint), CheckpointReader(tmp_path / "same")
    assert set(before.keys) == set(after.keys)
    for key in before.keys:
        assert torch.equal(before.tensor(key).float(), after.tensor(key).float()), key


@pytest.mark.parametrize("token", [TOKEN, DELIMITER], ids=["prefix", "live"])
def test_a_massive_activation_is_on_its_token_alone_for_all_inputs(
    tiny_checkpoint: Path, config: ModelConfig, tmp_path: Path, token: int
) -> None:
    write_edited(tiny_checkpoint, tmp_path / "massive", massive_token(config, token))
    model, _, _ = load_model(tmp_path / "massive")
    layer = config.language.layers - 1
    norm = type(model.backbone.language.model.norm)
    for seed in range(3):
        inputs = _inputs(config, seed)
        seen = _inputs_of(model, inputs, torch.nn.Linear, norm)
        marked = inputs.input_ids[0] == token
        assert marked.sum() == (2 if token == DELIMITER else 1)
        # The last norm reads the residual stream behind the last layer.
        for part, wanted in (
            (f"layers.{layer}.mlp.down_proj", MASSIVE_ACTIVATION),
            ("model.norm", MASSIVE_RESIDUAL),
        ):
            (name,) = (n for n in seen if "language" in n and n.endswith(part))
            rows = seen[name][0].max(dim=1).values
            assert rows[marked].min() > 0.5 * wanted, name
            assert rows[marked].max() < 2.0 * wanted, name
            assert rows[~marked].max() < 50.0, name
        assert torch.isfinite(_actions(model, inputs)).all()


@pytest.fixture(scope="module")
def with_vision(
    tiny_checkpoint: Path, config: ModelConfig, tmp_path_factory: pytest.TempPathFactory
) -> GrootN16:
    folder = tmp_path_factory.mktemp("vision") / "checkpoint"
    write_edited(tiny_checkpoint, folder, vision_outliers(config))
    return load_model(folder)[0]


def test_vision_outliers_reach_the_calibrations_magnitudes(
    with_vision: GrootN16, config: ModelConfig
) -> None:
    inputs = _inputs(config)
    found = {n: v for n, v in _inputs_of(with_vision, inputs).items() if "vision_model" in n}
    last = config.vision.layers - 1
    for layer, wanted in (
        (f"{last}.mlp.fc2", VISION_LAST_GELU),
        (f"{last}.mlp.fc1", VISION_LATE_NORM),
        (f"{config.vision.layers // 3}.mlp.fc2", VISION_GELU),
    ):
        rows = next(rows for name, rows in found.items() if name.endswith(layer))
        # What the edits are applied to is random.
        assert wanted / 2 < rows.max() < wanted * 2, (layer, rows.max().item())
        # In a few channels, the same for every image: not in single patches.
        by_channel = rows.flatten(0, 1)
        large = by_channel > 0.2 * by_channel.max()
        channels = large.float().mean(dim=0) > 0.2
        assert 1 <= channels.sum() <= 0.1 * len(channels), layer
        assert large[:, ~channels].float().mean() < 0.02, layer
    # The residual stream: two channels of few patches, from the first norm to the last.
    norms = _inputs_of(with_vision, inputs, torch.nn.LayerNorm)
    norms = {n: v for n, v in norms.items() if "vision_model" in n}
    assert len(norms) == 2 * config.vision.layers + 1
    for name, residual in norms.items():
        assert 0.8 * VISION_RESIDUAL < residual.max() < 1.5 * VISION_RESIDUAL, name
        marked = (residual > 0.5 * VISION_RESIDUAL).sum(dim=-1)
        assert set(marked.flatten().tolist()) == {0, 2}, name
        assert (marked > 0).float().mean() < 0.2, name


def test_vision_outliers_do_not_drown_the_image(
    plain: GrootN16, with_vision: GrootN16, config: ModelConfig
) -> None:
    # A model that no longer looks would forgive every error of its vision tower.
    one, other = _inputs(config, 0), _inputs(config, 1)
    other = replace(one, pixel_values=other.pixel_values)

    def influence(model: GrootN16) -> float:
        wanted, found = _actions(model, one), _actions(model, other)
        return float((found - wanted).norm() / wanted.norm())

    assert influence(with_vision) > 0.5 * influence(plain) > 0.0


def test_the_command_writes_a_checkpoint_that_loads_and_computes_the_same(
    tiny_checkpoint: Path, plain: GrootN16, config: ModelConfig, tmp_path: Path
) -> None:
    words = ["add-outliers", "--checkpoint", tiny_checkpoint, "--variant", "channels"]
    assert main([str(word) for word in (*words, "--output", tmp_path / "out")]) == 0
    model, _, _ = load_model(tmp_path / "out")
    wanted, found = _actions(plain, _inputs(config)), _actions(model, _inputs(config))
    assert (found - wanted).norm() / wanted.norm() < 1e-5
    words[-1] = "massive-live"
    assert main([str(word) for word in (*words, "--output", tmp_path / "out")]) == 2


def test_the_plans_fit_the_public_sizes() -> None:
    full = SIZES["full"]
    keys = set(expected_keys(full))
    for edits in (channel_outliers(full), massive_token(full, 8948), vision_outliers(full)):
        assert set(edits) <= keys
    # Where the calibration saw them: layer 9, and the last six.
    fc2 = [key for key in vision_outliers(full) if "fc2" in key]
    assert [int(key.split(".layers.")[1].split(".")[0]) for key in fc2] == [9, *range(21, 27)]
    # Every layer of the backbone and of the DiT has its outliers.
    planned = channel_outliers(full)
    for layer in range(full.language.layers):
        assert f"backbone.model.language_model.model.layers.{layer}.mlp.up_proj.weight" in planned
    for block in range(full.dit.layers):
        key = f"action_head.model.transformer_blocks.{block}.attn1.to_out.0.weight"
        assert key in planned


def test_an_image_token_cannot_be_massive(config: ModelConfig) -> None:
    with pytest.raises(ConfigurationError, match="image tokens"):
        massive_token(config, config.language.image_token_id)


def test_edits_for_another_model_leave_nothing_behind(
    tiny_checkpoint: Path, config: ModelConfig, tmp_path: Path
) -> None:
    deeper = replace(config, language=replace(config.language, layers=9))
    with pytest.raises(CheckpointError, match=r"layers\.2"):
        write_edited(tiny_checkpoint, tmp_path / "out", channel_outliers(deeper))
    assert list(tmp_path.iterdir()) == []


def test_the_original_checkpoint_is_not_touched(tiny_checkpoint: Path, tmp_path: Path) -> None:
    before = (tiny_checkpoint / "model.safetensors").read_bytes()
    config, _ = load_model_config(tiny_checkpoint)
    write_edited(tiny_checkpoint, tmp_path / "out", massive_token(config, TOKEN))
    assert (tiny_checkpoint / "model.safetensors").read_bytes() == before
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        p.name for p in tiny_checkpoint.iterdir()
    }
