"""Hazards of the training network: another forward than the deployed one, a loss that stays."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from groot_int8_ros.errors import CheckpointError
from offline_tools.model.checkpoint import load_model
from offline_tools.model.configuration import DiTConfig, LanguageConfig, VisionConfig
from offline_tools.simulation.tasks import TASKS
from offline_tools.training.checkpoint import (
    processor,
    processor_files,
    tokenized_model,
    write_checkpoint,
)
from offline_tools.training.configuration import MODEL
from offline_tools.training.network import Batch, TrainedPolicy
from offline_tools.training.normalization import Normalization
from offline_tools.training.samples import Samples
from offline_tools.training.trainer import task_prompts


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    path = tmp_path_factory.mktemp("prompts") / "tokenizer.json"
    tokenized_model(path)
    return task_prompts(path)


def _network(prompts: list[list[int]], tmp_path: Path) -> TrainedPolicy:
    """The architecture with few and narrow layers: quick on a CPU."""
    config = tokenized_model(tmp_path / "tokenizer.json")
    small = replace(
        config,
        vision=VisionConfig(hidden_size=32, layers=1, heads=2, mlp_size=64, positions=64),
        language=replace(
            config.language,
            hidden_size=32,
            layers=1,
            heads=2,
            kv_heads=1,
            mlp_size=64,
            head_dim=16,
        ),
        dit=DiTConfig(layers=4, heads=2, head_dim=16, output_dim=32, cross_dim=32),
        mlp_size=32,
    )
    torch.manual_seed(0)
    return TrainedPolicy(small, prompts)


def _batch(samples: Samples, rows: int) -> Batch:
    normalization = Normalization(processor(processor_files(samples)), torch.device("cpu"))
    index = np.linspace(0, len(samples) - 1, rows).astype(int)
    state = torch.from_numpy(samples.state_deg[index])
    truth = torch.from_numpy(samples.truth_m[index])
    return Batch(
        images=torch.from_numpy(samples.images[index]),
        state=normalization.state(state),
        actions=normalization.chunk(torch.from_numpy(samples.chunk_deg[index]), state),
        task=torch.from_numpy(samples.task[index]),
        truth=truth * 10.0,
    )


def test_prompts_differ_in_the_words_of_the_task_alone(prompts: list[list[int]]) -> None:
    rows = np.array(prompts)
    assert len({tuple(row) for row in prompts}) == len(TASKS)
    # Colour and side: every word of a task is one token.
    assert ((rows != rows[0]).any(axis=0)).sum() == 2


def test_a_few_steps_on_one_batch_lower_both_losses(
    samples: Samples, prompts: list[list[int]], tmp_path: Path
) -> None:
    network = _network(prompts, tmp_path)
    batch = _batch(samples, 8)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        velocity, auxiliary = network(batch, 4)
        optimizer.zero_grad()
        (velocity + auxiliary).backward()
        optimizer.step()
        losses.append([velocity.item(), auxiliary.item()])
    first, last = np.mean(losses[:5], axis=0), np.mean(losses[-5:], axis=0)
    assert (last < 0.7 * first).all(), (first, last)


def test_every_weight_of_the_policy_is_trained(
    samples: Samples, prompts: list[list[int]], tmp_path: Path
) -> None:
    network = _network(prompts, tmp_path)
    # A zero modulation lets no gradient through to the time embedding yet.
    for block in network.model.action_head.model.transformer_blocks:
        torch.nn.init.normal_(block.norm1.linear.weight, std=0.1)  # type: ignore[union-attr,arg-type]
    velocity, _ = network(_batch(samples, 4), 2)
    velocity.backward()
    still = [
        name
        for name, parameter in network.model.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    ]
    assert still == []


def test_what_is_trained_acts_as_the_model_that_is_exported(
    samples: Samples, prompts: list[list[int]], tmp_path: Path
) -> None:
    from offline_tools.model.policy_model import ModelInputs
    from offline_tools.training.configuration import EMBODIMENT_ROW

    network = _network(prompts, tmp_path).eval()
    batch = _batch(samples, 2)
    torch.manual_seed(3)
    acted = network.act(batch.images, batch.state, batch.task, 2)
    torch.manual_seed(3)
    noise = torch.randn(2, MODEL.action_horizon, MODEL.max_action_dim)
    ids = network.prompts[batch.task]
    pixels = (batch.images.flatten(0, 1).permute(0, 3, 1, 2).float() - 127.5) / 127.5
    inputs = ModelInputs(ids, torch.ones_like(ids), pixels, batch.state, EMBODIMENT_ROW)
    torch.testing.assert_close(acted, network.model.get_action(inputs, noise, 2))


def test_a_written_checkpoint_loads_strictly_and_answers_as_before(
    samples: Samples, prompts: list[list[int]], tmp_path: Path
) -> None:
    torch.manual_seed(1)
    network = TrainedPolicy(tokenized_model(tmp_path / "tokenizer.json"), prompts).eval()
    weights = dict(network.model.named_parameters())
    write_checkpoint(tmp_path / "checkpoint", weights, processor_files(samples))
    model, config, notes = load_model(tmp_path / "checkpoint")
    assert notes == ()
    assert config == network.model.config
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, weights[name].half().float().detach())


def test_a_diverged_training_is_not_written(
    samples: Samples, prompts: list[list[int]], tmp_path: Path
) -> None:
    network = _network(prompts, tmp_path)
    weights = {name: p.detach().clone() for name, p in network.model.named_parameters()}
    next(iter(weights.values())).view(-1)[0] = float("nan")
    with pytest.raises(CheckpointError, match="diverged"):
        write_checkpoint(tmp_path / "checkpoint", weights, processor_files(samples))
    assert not (tmp_path / "checkpoint").exists()


def test_the_model_is_n16_in_small() -> None:
    public = LanguageConfig()
    assert MODEL.language.heads % MODEL.language.kv_heads == 0
    assert MODEL.language.rope_theta == public.rope_theta
    assert MODEL.dit.text_period == DiTConfig().text_period
    assert MODEL.max_embodiments > 1
