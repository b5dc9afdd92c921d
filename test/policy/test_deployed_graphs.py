"""Hazards of the deployed road: copies of frames, swapped inputs, committed rows that move."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from groot_int8_ros.errors import (
    BundleError,
    ConfigurationError,
    ObservationError,
    UnknownInstructionError,
)
from groot_int8_ros.policy.bundle import open_bundle
from groot_int8_ros.policy.policy import Policy
from groot_int8_ros.policy.preprocess import normalize_state
from groot_int8_ros.policy.types import CommittedActions, Observation

Json = Any


@pytest.fixture(scope="module")
def policy(small_deployed: Path) -> Iterator[Policy]:
    loaded = Policy.load(small_deployed, threads=1)
    yield loaded
    loaded.close()


def _observation(policy: Policy) -> Observation:
    random = np.random.RandomState(5)
    return Observation(
        images={
            camera.key: random.randint(0, 256, (camera.height, camera.width, 3), dtype=np.uint8)
            for camera in policy.robot.cameras
        },
        state={
            key.key: np.asarray(random.uniform(-1, 1, key.dim), np.float32)
            for key in policy.processor.state_keys
        },
        instruction="Pick up the cube!",
        stamp_ns=7,
    )


def _edit(bundle: Path, change: Callable[[Json], object]) -> None:
    content = json.loads((bundle / "manifest.json").read_text())
    change(content)
    (bundle / "manifest.json").write_text(json.dumps(content))


def test_frames_reach_the_engine_without_a_copy(policy: Policy) -> None:
    observation = _observation(policy)
    seen: list[tuple[str, dict[str, NDArray[Any]]]] = []
    with policy.observed(lambda name, feeds: seen.append((name, dict(feeds)))):
        policy.infer(observation, seed=3)
    assert [name for name, _ in seen] == ["backbone", "action_head"]
    for key, frame in observation.images.items():
        assert seen[0][1][f"image_{key}"] is frame


def test_each_graph_is_given_its_own_inputs(policy: Policy) -> None:
    observation = _observation(policy)
    seen: dict[str, dict[str, NDArray[Any]]] = {}
    with policy.observed(lambda name, feeds: seen.update({name: dict(feeds)})):
        chunk = policy.infer(observation, seed=3)
    assert {name: set(feeds) for name, feeds in seen.items()} == {
        name: set(policy.manifest.graphs[name].inputs) for name in ("backbone", "action_head")
    }
    head = seen["action_head"]
    np.testing.assert_array_equal(
        head["state"], normalize_state(policy.processor, observation.state)
    )
    assert not head["committed_mask"].any()
    # The graph adds one number to the noise: with another camera or prefix it is another number.
    shift = chunk.action_pred - head["noise"][0]
    others = [
        replace(observation, instruction="put it down"),
        *(
            replace(observation, images={**observation.images, key: np.zeros_like(frame)})
            for key, frame in observation.images.items()
        ),
        replace(observation, state={k: v + 0.5 for k, v in observation.state.items()}),
    ]
    for other in others:
        moved = policy.infer(other, seed=3).action_pred - head["noise"][0]
        assert np.abs(moved - shift).min() > 1e-5


def test_committed_rows_come_out_as_they_went_in(policy: Policy) -> None:
    observation = _observation(policy)
    free = policy.infer(observation, seed=3)
    earlier = policy.infer(observation, seed=4)
    rows = [0, 1, 5]
    committed = CommittedActions(rows, {k: v[rows] for k, v in earlier.actions.items()})
    chunk = policy.infer(observation, seed=3, committed=committed)
    others = [row for row in range(len(free.time_from_start_s)) if row not in rows]
    for key, actions in chunk.actions.items():
        np.testing.assert_allclose(actions[rows], earlier.actions[key][rows], rtol=2e-6, atol=1e-6)
        np.testing.assert_array_equal(actions[others], free.actions[key][others])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: replace(c, rows=[0, 99]), r"the committed rows \[0, 99\] must be different"),
        (lambda c: replace(c, rows=[-1, 0]), "must be different rows of the coming chunk, from 0"),
        (lambda c: replace(c, rows=[3, 3]), "must be different rows"),
        (lambda c: replace(c, actions={}), "no committed actions of"),
        (
            lambda c: replace(c, actions={k: v[:1] for k, v in c.actions.items()}),
            r"have shape \(1, \d\)",
        ),
        (
            lambda c: replace(c, actions={k: v * np.nan for k, v in c.actions.items()}),
            "must be finite",
        ),
    ],
)
def test_committed_rows_that_cannot_be_are_refused(
    policy: Policy, change: Callable[[CommittedActions], CommittedActions], message: str
) -> None:
    observation = _observation(policy)
    actions = {k: v[:2] for k, v in policy.infer(observation, seed=3).actions.items()}
    with pytest.raises(ObservationError, match=message):
        policy.infer(observation, committed=change(CommittedActions([0, 1], actions)))


def test_unknown_instruction_is_never_answered_with_another_ones_prefix(policy: Policy) -> None:
    with pytest.raises(UnknownInstructionError):
        policy.infer(replace(_observation(policy), instruction="open the door"))


def test_instructions_of_the_bank_need_no_tokenizer_once_loaded(
    small_deployed: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(small_deployed, bundle)
    policy = Policy.load(bundle, threads=1)
    try:
        tokenizer = bundle / "tokenizer.json"
        content = tokenizer.read_bytes()
        tokenizer.unlink()
        for spelled in ("Pick up the cube!", "put it down", "pick UP the cube"):
            policy.infer(replace(_observation(policy), instruction=spelled), seed=3)
        with pytest.raises(ObservationError, match=r"is new, .*tokenizer\.json is missing"):
            policy.check_instruction("open the door")
        tokenizer.write_bytes(content)
        with pytest.raises(UnknownInstructionError):
            policy.check_instruction("open the door")
    finally:
        policy.close()


def test_frame_of_another_size_is_refused_with_the_command(policy: Policy) -> None:
    observation = _observation(policy)
    key = policy.robot.cameras[0].key
    images = {**observation.images, key: np.zeros((8, 8, 3), np.uint8)}
    with pytest.raises(ObservationError, match=rf"'{key}' gives frames of 8x8.*groot-int8 export"):
        policy.infer(replace(observation, images=images))


def test_other_number_of_steps_than_unrolled_is_refused_with_the_option(
    small_deployed: Path,
) -> None:
    Policy.load(small_deployed, denoising_steps=2).close()
    with pytest.raises(ConfigurationError, match=r"2 steps unrolled.*--denoising-steps 4"):
        Policy.load(small_deployed, denoising_steps=4)


def _spec(content: Json, graph: str, tensor: str) -> Json:
    return content["graphs"][graph]["inputs"][tensor]


_DAMAGES: dict[str, tuple[Callable[[Json], object], str]] = {
    "camera of another size than the graph's": (
        lambda m: m["robot"]["cameras"]["front"].update(width=1280),
        r"backbone takes image_front as uint8\[\d+, \d+, 3\], and camera sizes.*1280, 3\]",
    ),
    "frames as floats": (
        lambda m: _spec(m, "backbone", "image_front").update(dtype="float32"),
        "backbone takes image_front as float32",
    ),
    "room of another length": (
        lambda m: m["prompts"].update(length=40),
        r"takes prefix_mask as bool\[32\].*bool\[40\]",
    ),
    "keys and values unlike": (
        lambda m: _spec(m, "action_head", "prefix_text_keys").update(shape=[1, 3, 32, 2]),
        "prefix_text_keys and prefix_text_values as",
    ),
    "features unlike": (
        lambda m: _spec(m, "action_head", "features").update(shape=[1, 9, 4]),
        "backbone gives features as",
    ),
    "horizon": (
        lambda m: m.update(action_horizon=17),
        r"action_head takes noise as float32\[1, 16, 29\].*\[1, 17, 29\]",
    ),
    "input missing": (
        lambda m: m["graphs"]["action_head"]["inputs"].pop("committed_mask"),
        "action_head takes .* and must take .*committed_mask",
    ),
    "prefix model of another shape": (
        lambda m: m["graphs"]["prefix"]["outputs"]["prefix_keys"].update(shape=[5, 1, "t", 3]),
        "prefix gives prefix_keys as",
    ),
    "bank missing": (lambda m: m.pop("prompts"), "deployed graphs, and no others, have a bank"),
    "instruction longer than the room": (
        lambda m: m["prompts"]["instructions"][0].update(tokens=99),
        "99 tokens of 'pick up the cube' do not fit into 32",
    ),
    "prefix that no hash guards": (
        lambda m: m["files"].pop(m["prompts"]["instructions"][0]["file"]),
        "the prefix of 'pick up the cube' lies in prompts/.*, which is not listed",
    ),
    "unknown family": (
        lambda m: m.update(family="quick"),
        'family must be one of reference, deployed, not "quick"',
    ),
    "reference graphs expected": (
        lambda m: m.update(family="reference"),
        "it lists no graph 'conditioner'",
    ),
}


@pytest.mark.parametrize("damage", _DAMAGES)
def test_deployed_bundle_that_contradicts_itself_is_refused_with_the_way_out(
    small_copy: Path, damage: str
) -> None:
    change, message = _DAMAGES[damage]
    _edit(small_copy, change)
    with pytest.raises(BundleError, match=message) as caught:
        open_bundle(small_copy)
    assert str(caught.value).endswith(f"--bundle {small_copy} --force")


def test_manifest_of_a_deployed_bundle_survives_a_round_trip(small_copy: Path) -> None:
    manifest = open_bundle(small_copy).manifest
    (small_copy / "manifest.json").write_text(manifest.to_json())
    assert open_bundle(small_copy).manifest == manifest
