"""Samples of deployed graphs: frames, noise and features, from which the very feeds come back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from groot_int8_ros.capture.community import export_community, import_community
from groot_int8_ros.capture.coverage import measure_coverage
from groot_int8_ros.capture.inference import run_on
from groot_int8_ros.capture.store import CaptureMeta, CaptureStore, CaptureWriter
from groot_int8_ros.errors import CaptureError
from groot_int8_ros.policy.bundle import open_bundle
from groot_int8_ros.policy.families import LARGE_GRAPHS
from groot_int8_ros.policy.policy import Policy
from groot_int8_ros.policy.postprocess import decode_actions
from groot_int8_ros.policy.types import CommittedActions, Observation
from offline_tools.calibration.run import complete
from offline_tools.compare_quantization.samples import generated_observations

INSTRUCTIONS = ("pick up the cube", "put it down")


@pytest.fixture(scope="module")
def policy(small_deployed: Path) -> Iterator[Policy]:
    loaded = Policy.load(small_deployed, threads=1)
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def observations(small_deployed: Path) -> list[Observation]:
    drawn = generated_observations(open_bundle(small_deployed), 4, seed=0)
    return [replace(one, instruction=INSTRUCTIONS[i % 2]) for i, one in enumerate(drawn)]


@pytest.fixture(scope="module")
def store(
    policy: Policy, observations: list[Observation], tmp_path_factory: pytest.TempPathFactory
) -> CaptureStore:
    """Four samples of deployed graphs. Tests only read it."""
    folder = tmp_path_factory.mktemp("deployed") / "store"
    with CaptureWriter(folder, CaptureMeta.of_bundle(policy.manifest, "test", seed=3)) as writer:
        for number, one in enumerate(observations):
            writer.add(run_on(policy, one, f"frame {number}", seed=3, keep_images=False))
    return CaptureStore.open(folder)


def test_feeds_are_to_the_byte_what_the_graphs_were_given(
    policy: Policy, observations: list[Observation], store: CaptureStore
) -> None:
    given: dict[str, list[dict[str, Any]]] = {"backbone": [], "action_head": []}
    with policy.observed(lambda name, feeds: given[name].append(dict(feeds))):
        for one, sample in zip(observations, store.samples(), strict=True):
            policy.infer(one, noise=sample.noise)
    bundle = open_bundle(policy.folder)
    for graph, wanted in given.items():
        feeds = store.feeds(graph, bundle)
        assert len(feeds) == 4
        for found, run in zip(feeds, wanted, strict=True):
            assert set(found) == set(run) == set(bundle.manifest.graphs[graph].inputs)
            for name, array in run.items():
                assert found[name].dtype == array.dtype
                np.testing.assert_array_equal(found[name], array, err_msg=name)
            if graph == "action_head":
                assert not found["committed_mask"].any()


@pytest.mark.parametrize("family", ["reference", "deployed"])
def test_what_a_recorder_stored_is_completed_for_either_family(
    request: pytest.FixtureRequest,
    policy: Policy,
    store: CaptureStore,
    tmp_path: Path,
    family: str,
) -> None:
    with CaptureWriter(tmp_path / "live", replace(store.meta, origin="live")) as writer:
        for sample in store.samples():
            writer.add(replace(sample, features=None, normalised_state=None))
    live = CaptureStore.open(tmp_path / "live")
    with pytest.raises(CaptureError, match=r"lack the inputs of action_head.*--complete"):
        live.feeds("action_head", open_bundle(policy.folder))
    other = policy
    if family == "reference":
        other = Policy.load(request.getfixturevalue("tiny_bundle"), threads=1)
    done = complete(other, live, tmp_path / "full", report=lambda _: None)
    assert done.completed == 4
    assert done.store.meta.family == family
    bundle = open_bundle(other.folder)
    if family == "reference":
        assert len(done.store.feeds("dit", bundle)) == 4 * other.manifest.denoising_steps
        assert done.largest_difference.keys() == {"single_arm", "gripper"}
        other.close()
    else:
        assert done.store.content_sha256 == store.content_sha256
        assert set(done.largest_difference.values()) == {0.0}


@pytest.mark.parametrize("family", ["reference", "deployed"])
def test_committed_rows_are_given_again_where_a_chunk_is_completed(
    request: pytest.FixtureRequest,
    small_deployed: Path,
    observations: list[Observation],
    tmp_path: Path,
    family: str,
) -> None:
    folder = small_deployed
    if family == "reference":
        folder = request.getfixturevalue("tiny_bundle")
    policy = Policy.load(folder, threads=1)
    observation, rows = observations[0], [0, 1, 3]
    # Inside of what the keys can express, where these policies' own answers are not.
    inside = np.full(policy.noise_shape, 0.25, np.float32)
    actions = decode_actions(policy.processor, inside, observation.state)
    committed = CommittedActions(rows, {key: value[rows] for key, value in actions.items()})
    large = LARGE_GRAPHS[family]
    given: dict[str, list[dict[str, Any]]] = {name: [] for name in large}

    def keep(name: str, feeds: Any) -> None:
        if name in large:
            given[name].append({tensor: array.copy() for tensor, array in feeds.items()})

    with policy.observed(keep):
        policy.infer(observation, seed=3, committed=committed)
    direct = run_on(policy, observation, "frame 0", seed=3, keep_images=True, committed=committed)
    for name, known in (("with", committed), ("without", None)):
        live = replace(
            direct, committed=known, backbone=None, dit=None, normalised_state=None, features=None
        )
        with CaptureWriter(
            tmp_path / name, CaptureMeta.of_bundle(policy.manifest, "live")
        ) as writer:
            writer.add(live)
        done = complete(
            policy,
            CaptureStore.open(tmp_path / name),
            tmp_path / f"{name}-full",
            keep_images=True,
            report=lambda _: None,
        )
        same = [
            all(np.array_equal(one[tensor], other[tensor]) for tensor in other)
            for graph, runs in given.items()
            for one, other in zip(done.store.feeds(graph, open_bundle(folder)), runs, strict=True)
        ]
        if known:
            assert next(done.store.samples()).sha256() == direct.sha256()
            assert all(same)
            assert set(done.largest_difference.values()) == {0.0}
        else:
            # The control: what was not stored is missed.
            # The backbone knows nothing of committed rows, and a step at t = 0 sees noise alone.
            assert same[0]
            assert not same[-1]
            assert min(done.largest_difference.values()) > 1e-3
    policy.close()


def test_samples_of_the_other_family_are_refused_with_the_way_out(
    store: CaptureStore, tiny_bundle: Path, small_deployed: Path, tmp_path: Path
) -> None:
    reference = open_bundle(tiny_bundle)
    with pytest.raises(CaptureError, match=r"deployed graphs, .*has reference.*--complete"):
        store.feeds("backbone", reference)
    with pytest.raises(CaptureError, match="holds no inputs of dit"):
        store.feeds("dit", reference)
    with pytest.raises(CaptureError, match="holds inputs of the reference graphs alone"):
        export_community(store, "backbone", tmp_path / "out")
    with pytest.raises(CaptureError, match="holds inputs of the reference graphs alone"):
        import_community(tmp_path / "a.npz", open_bundle(small_deployed).manifest, tmp_path)


def test_instruction_that_the_bank_lacks_is_named_with_the_command_that_adds_it(
    policy: Policy, store: CaptureStore, tmp_path: Path
) -> None:
    with CaptureWriter(tmp_path / "other", store.meta) as writer:
        sample = next(store.samples())
        writer.add(replace(sample, instruction="fold the towel", source="frame 9"))
    feeds = CaptureStore.open(tmp_path / "other").feeds("backbone", open_bundle(policy.folder))
    with pytest.raises(CaptureError, match=r"frame 9: .*add-instruction"):
        next(iter(feeds))


def test_coverage_counts_every_unrolled_step(policy: Policy, store: CaptureStore) -> None:
    coverage = measure_coverage(store, policy.processor, policy.manifest)
    assert coverage.timesteps == {0: 4, 500: 4}
    assert {camera.camera for camera in coverage.cameras} == set(policy.processor.cameras)
