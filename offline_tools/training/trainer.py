"""The training: demonstrations, optimiser steps, corrections, evaluations, curves.

Owns: `train`. Everything that is random has a seed; a GPU's sums are not ordered, so two trainings
give policies of the same quality and not of the same bits.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from groot_int8_ros.errors import ConfigurationError
from groot_int8_ros.policy.image_sizes import image_sizes
from groot_int8_ros.policy.preprocess import PromptTokenizer
from groot_int8_ros.policy.types import Float32Array, UInt8Array
from offline_tools.simulation.robot import FRAME_SIZES
from offline_tools.simulation.tasks import TASKS, Task, other_task, task_of
from offline_tools.training.checkpoint import (
    processor,
    processor_files,
    tokenized_model,
    write_checkpoint,
)
from offline_tools.training.configuration import CAMERAS, IMAGE_CHAIN, TrainingOptions
from offline_tools.training.network import Batch, TrainedPolicy
from offline_tools.training.normalization import Normalization
from offline_tools.training.samples import Samples, joined
from offline_tools.training.simulators import BatchPolicy, Outcome, Rollout, SimulatorPool

# Seeds of episodes: those of the final evaluation, from 0 on, occur nowhere in the training.
VALIDATION_SEED = 500_000
_DEMONSTRATION_SEED = 1_000_000
_CORRECTION_SEED = 2_000_000

LIMIT_S = 12.0
_CORRECTION_LIMIT_S = 9.0
ROWS = 4
_DENOISING_STEPS = 4
_LOG_EVERY = 100
_CLIP = 1.0


class _Store:
    """The samples on the device, with room for corrections."""

    def __init__(self, samples: Samples, device: torch.device) -> None:
        self._device = device
        self.images = torch.from_numpy(samples.images).to(device)
        self.state = torch.from_numpy(samples.state_deg).to(device)
        self.chunk = torch.from_numpy(samples.chunk_deg).to(device)
        self.task = torch.from_numpy(samples.task).to(device)
        self.truth = torch.from_numpy(samples.truth_m).to(device)
        self._mean = self.truth.mean(dim=0)
        self._deviation = self.truth.std(dim=0) + 1e-3

    def __len__(self) -> int:
        return len(self.task)

    def add(self, samples: Samples) -> None:
        def longer(old: Tensor, new: np.ndarray[Any, Any]) -> Tensor:
            return torch.cat([old, torch.from_numpy(new).to(self._device)])

        self.images = longer(self.images, samples.images)
        self.state = longer(self.state, samples.state_deg)
        self.chunk = longer(self.chunk, samples.chunk_deg)
        self.task = longer(self.task, samples.task)
        self.truth = longer(self.truth, samples.truth_m)

    def batch(self, index: Tensor, normalization: Normalization) -> Batch:
        state = self.state[index]
        return Batch(
            images=self.images[index],
            state=normalization.state(state),
            actions=normalization.chunk(self.chunk[index], state),
            task=self.task[index],
            truth=(self.truth[index] - self._mean) / self._deviation,
        )


def train(
    output: Path,
    options: TrainingOptions,
    *,
    device: str,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train the small policy from nothing and write it as a checkpoint.

    Args:
        output: Folder for `checkpoint/` and `training.json`; must exist.
        options: How.
        device: Torch's name of the device.
        say: Receives the progress.

    Returns:
        What `training.json` holds: options, curves, evaluations and times.

    Raises:
        ConfigurationError: No demonstration succeeded.
    """
    began = time.perf_counter()
    place = torch.device(device)
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    record: dict[str, Any] = {
        "options": dict(vars(options)),
        "loss": [],
        "evaluations": [],
        "corrections": [],
    }
    with SimulatorPool(options.workers) as simulators:
        first = _DEMONSTRATION_SEED + 100_000 * options.seed
        parts = [
            part
            for part in simulators.demonstrations(range(first, first + options.episodes))
            if part is not None
        ]
        if not parts:
            raise ConfigurationError("no demonstration succeeded: there is nothing to train on")
        samples = joined(parts)
        record["demonstrations"] = {"episodes": len(parts), "samples": len(samples)}
        record["data_s"] = time.perf_counter() - began
        say(
            f"{len(parts)} of {options.episodes} demonstrations succeeded, {len(samples)} samples,"
            f" {record['data_s']:.0f} s"
        )
        files = processor_files(samples)
        known = processor(files)
        normalization = Normalization(known, place)
        config = tokenized_model(output / "tokenizer.json")
        prompts = task_prompts(output / "tokenizer.json")
        network = TrainedPolicy(config, prompts).to(place)
        store = _Store(samples, place)
        del samples, parts
        average = copy.deepcopy(network)
        parameters = sum(p.numel() for p in network.model.parameters())
        record["parameters"] = parameters
        say(f"{parameters} parameters, prompts of {len(prompts[0])} tokens")
        _Loop(options, network, average, store, normalization, simulators, record, say).run(began)
        record["total_s"] = time.perf_counter() - began
    write_checkpoint(
        output / "checkpoint",
        {name: p.detach() for name, p in average.model.named_parameters()},
        files,
    )
    (output / "tokenizer.json").unlink()
    (output / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


class _Loop:
    """The optimiser's loop with what happens in between."""

    def __init__(
        self,
        options: TrainingOptions,
        network: TrainedPolicy,
        average: TrainedPolicy,
        store: _Store,
        normalization: Normalization,
        simulators: SimulatorPool,
        record: dict[str, Any],
        say: Callable[[str], None],
    ) -> None:
        self._options = options
        self._network = network
        self._average = average
        self._store = store
        self._normalization = normalization
        self._simulators = simulators
        self._record = record
        self._say = say
        self._device = store.task.device
        self._optimizer = torch.optim.AdamW(
            _weight_groups(network, options.weight_decay),
            lr=options.learning_rate,
            betas=(0.9, 0.95),
            fused=self._device.type == "cuda",
        )
        self._forward: Callable[..., Any] = torch.compile(network) if options.compiled else network

    def run(self, began: float) -> None:
        options = self._options
        corrections = {
            round(
                options.steps
                * (
                    options.first_correction
                    + (0.9 - options.first_correction) * number / options.correction_rounds
                )
            )
            for number in range(options.correction_rounds)
        }
        self._network.train()
        losses: list[Tensor] = []
        for step in range(options.steps):
            if step in corrections:
                self._correct(step)
            losses.append(self._step(step))
            if (step + 1) % _LOG_EVERY == 0:
                velocity, auxiliary = torch.stack(losses).mean(dim=0).tolist()
                losses.clear()
                elapsed = time.perf_counter() - began
                self._record["loss"].append([step + 1, velocity, auxiliary, elapsed])
                if (step + 1) % (10 * _LOG_EVERY) == 0:
                    self._say(
                        f"step {step + 1}: loss {velocity:.4f}, places {auxiliary:.4f}, "
                        f"{elapsed:.0f} s"
                    )
        self._evaluate(options.steps)

    def _step(self, step: int) -> Tensor:
        options = self._options
        for group in self._optimizer.param_groups:
            group["lr"] = options.learning_rate * _schedule(step, options)
        index = torch.randint(len(self._store), (options.batch,), device=self._device)
        batch = self._store.batch(index, self._normalization)
        with torch.autocast(self._device.type, torch.bfloat16, self._device.type == "cuda"):
            velocity, auxiliary = self._forward(batch, options.noises)
        loss = velocity + options.auxiliary_weight * auxiliary
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._network.parameters(), _CLIP)
        self._optimizer.step()
        with torch.no_grad():
            decay = min(options.average, (step + 1) / (step + 10))
            torch._foreach_lerp_(
                list(self._average.parameters()), list(self._network.parameters()), 1.0 - decay
            )
        return torch.stack([velocity.detach(), auxiliary.detach()])

    def _evaluate(self, step: int) -> None:
        count = self._options.validation_episodes
        started = time.perf_counter()
        seeds = range(VALIDATION_SEED, VALIDATION_SEED + count)
        results = {}
        for name, wrong in (("asked", False), ("wrong", True)):
            chosen = seeds[: max(1, count // 2)] if wrong else seeds
            outcomes, _ = self._simulators.run(
                batch_policy(self._average, self._normalization),
                [rollout(seed, wrong=wrong) for seed in chosen],
                limit_s=LIMIT_S,
                rows=lambda: ROWS,
                stop_at_success=not wrong,
            )
            results[name] = success_rate(outcomes)
        self._record["evaluations"].append({"step": step, **results})
        self._say(
            f"step {step}: success {results['asked']:.2f} of {count}, of the asked task under a "
            f"wrong instruction {results['wrong']:.2f} ({time.perf_counter() - started:.0f} s)"
        )

    def _correct(self, step: int) -> None:
        self._evaluate(step)
        options = self._options
        started = time.perf_counter()
        random = np.random.RandomState([options.seed, step])
        first = _CORRECTION_SEED + 100_000 * options.seed + step * 1000 % 90_000
        outcomes, samples = self._simulators.run(
            batch_policy(self._average, self._normalization),
            [rollout(seed) for seed in range(first, first + options.corrections)],
            limit_s=_CORRECTION_LIMIT_S,
            rows=lambda: int(random.randint(2, 9)),
            labelled=True,
        )
        self._store.add(joined(samples))
        entry = {
            "step": step,
            "rollouts": len(outcomes),
            "success": success_rate(outcomes),
            "samples": len(samples),
            "seconds": time.perf_counter() - started,
        }
        self._record["corrections"].append(entry)
        self._say(
            f"step {step}: {entry['samples']} corrections from {entry['rollouts']} rollouts, "
            f"success {entry['success']:.2f} ({entry['seconds']:.0f} s)"
        )


def rollout(seed: int, *, wrong: bool = False) -> Rollout:
    """Return the episode of a seed: its task follows from the seed, as does the wrong one."""
    asked = task_of(seed)
    return Rollout(seed, asked, other_task(asked, seed // len(TASKS)) if wrong else asked)


def success_rate(outcomes: Sequence[Outcome]) -> float:
    """Return the part of the episodes in which the asked task was fulfilled."""
    return float(np.mean([outcome.success for outcome in outcomes]))


def batch_policy(network: TrainedPolicy, normalization: Normalization) -> BatchPolicy:
    """Return a policy over many observations at once, in float32."""
    device = network.prompts.device

    def answer(images: UInt8Array, state_deg: Float32Array, tasks: Sequence[Task]) -> Float32Array:
        state = torch.from_numpy(state_deg).to(device)
        actions = network.act(
            torch.from_numpy(images).to(device),
            normalization.state(state),
            torch.tensor([task.index for task in tasks], device=device),
            _DENOISING_STEPS,
        )
        decoded: Float32Array = normalization.decode(actions, state).cpu().numpy()
        return decoded

    return answer


def task_prompts(tokenizer: Path) -> list[list[int]]:
    """Return the token ids of each task's prompt, all of one length.

    Args:
        tokenizer: The checkpoint's `tokenizer.json`.
    """
    encode = PromptTokenizer.from_file(tokenizer).encode
    tokens = [image_sizes(*FRAME_SIZES[camera], IMAGE_CHAIN).tokens for camera in CAMERAS]
    prompts = [encode(task.instruction, tokens, formalize=True)[0][0].tolist() for task in TASKS]
    if len({len(prompt) for prompt in prompts}) > 1:
        raise RuntimeError("the tokenizer gives the tasks' prompts different lengths")
    return prompts


def _schedule(step: int, options: TrainingOptions) -> float:
    if step < options.warmup_steps:
        return (step + 1) / options.warmup_steps
    done = (step - options.warmup_steps) / max(1, options.steps - options.warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * done)) * 0.99 + 0.01


def _weight_groups(network: torch.nn.Module, decay: float) -> list[dict[str, Any]]:
    """Decay matrices alone: norms, biases and embeddings keep their scale."""
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in network.named_parameters():
        plain = parameter.ndim >= 2 and "embed" not in name and not name.endswith(".b")
        (matrices if plain else others).append(parameter)
    return [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
