"""Hazards of training data: pictures that the robot will not make, statistics it does not use."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from groot_int8_ros.policy.postprocess import decode_actions
from groot_int8_ros.policy.preprocess import Preprocessor, PromptTokenizer, normalize_state
from groot_int8_ros.policy.types import Observation, UInt8Array
from offline_tools.simulation.demonstrations import demonstrate
from offline_tools.simulation.environment import Tabletop
from offline_tools.simulation.robot import by_key, robot_description
from offline_tools.simulation.tasks import TASKS
from offline_tools.training.checkpoint import processor, processor_files, tokenized_model
from offline_tools.training.configuration import MODEL
from offline_tools.training.normalization import Normalization
from offline_tools.training.samples import Samples, joined, network_images


def test_stored_images_are_what_the_robot_gives_the_network(
    samples: Samples, tmp_path: Path
) -> None:
    tokenized_model(tmp_path / "tokenizer.json")
    preprocess = Preprocessor(
        processor(processor_files(samples)),
        PromptTokenizer.from_file(tmp_path / "tokenizer.json"),
        robot_description().cameras,
    )
    simulation = Tabletop()
    simulation.reset(9)
    frames = simulation.frames()
    inputs = preprocess(Observation(frames, by_key(samples.state_deg[0]), TASKS[0].instruction))
    stored = network_images(frames).transpose(0, 3, 1, 2).astype(np.float32)
    np.testing.assert_array_equal((stored - 127.5) / np.float32(127.5), inputs.pixel_values)
    simulation.close()


def test_normalisation_is_the_robots_own(samples: Samples) -> None:
    known = processor(processor_files(samples))
    normalization = Normalization(known, torch.device("cpu"))
    state = torch.from_numpy(samples.state_deg)
    encoded = normalization.state(state).numpy()
    chunk = normalization.chunk(torch.from_numpy(samples.chunk_deg), state)
    decoded = normalization.decode(chunk, state).numpy()
    for row in range(0, len(samples), 7):
        values = by_key(samples.state_deg[row])
        np.testing.assert_allclose(
            encoded[row], normalize_state(known, values)[0], atol=1e-5, rtol=0.0
        )
        actions = decode_actions(known, chunk[row].numpy(), values)
        robots = np.concatenate([actions["single_arm"], actions["gripper"]], axis=1)
        np.testing.assert_allclose(decoded[row], robots, atol=1e-3, rtol=0.0)
        # Nothing of its own statistics is clipped, so a chunk comes back as it was.
        np.testing.assert_allclose(decoded[row], samples.chunk_deg[row], atol=1e-3, rtol=0.0)
    assert encoded.shape[1] == MODEL.max_state_dim
    assert chunk.shape[1:] == (MODEL.action_horizon, MODEL.max_action_dim)


def test_targets_beyond_the_statistics_are_clipped(samples: Samples) -> None:
    normalization = Normalization(processor(processor_files(samples)), torch.device("cpu"))
    state = torch.from_numpy(samples.state_deg[:1])
    far = torch.from_numpy(samples.chunk_deg[:1]) + 500.0
    assert normalization.chunk(far, state)[..., :6].max() == 1.0


def test_samples_carry_the_chunk_that_follows_their_row(samples: Samples) -> None:
    # Row 0 of a chunk is the target of its own instant, row 1 that of the next sample.
    np.testing.assert_array_equal(samples.chunk_deg[:-1, 1], samples.chunk_deg[1:, 0])
    assert len(joined([samples, samples])) == 2 * len(samples)


def test_drawing_does_not_disturb_a_demonstration(samples: Samples) -> None:
    simulation = Tabletop()
    blind = demonstrate(simulation, 5)
    images: list[UInt8Array] = []
    seeing = demonstrate(simulation, 5, on_frames=lambda f: images.append(f["front"]))
    np.testing.assert_array_equal(blind.state_deg, seeing.state_deg)
    np.testing.assert_array_equal(seeing.state_deg, samples.state_deg)
    assert len(images) == len(samples)
    simulation.close()
