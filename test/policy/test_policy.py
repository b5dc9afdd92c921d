"""Hazards of inference: noise that cannot be drawn again, steps run wrong, values not finite.

The recorded reference is the public implementation's own answer to raw images, state and
instruction; the other tests run a generated policy.
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from groot_int8_ros.errors import EngineError, ObservationError
from groot_int8_ros.policy.bundle import open_bundle
from groot_int8_ros.policy.deployed_graphs import DeployedGraphs
from groot_int8_ros.policy.policy import DEFAULT_SEED, Policy, draw_noise
from groot_int8_ros.policy.prefix_model import compute_prefix
from groot_int8_ros.policy.prompt_bank import read_prefix
from groot_int8_ros.policy.reference_graphs import ReferenceGraphs
from groot_int8_ros.policy.types import CommittedActions, Observation

RELATIVE_TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def policy(tiny_bundle: Path) -> Iterator[Policy]:
    loaded = Policy.load(tiny_bundle, threads=2)
    yield loaded
    loaded.close()


def _observation(policy: Policy, stamp_ns: int = 1_700_000_000_123_456_789) -> Observation:
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
        instruction="Put the red cube into the green bowl.",
        stamp_ns=stamp_ns,
    )


def test_chunk_is_dated_scheduled_and_typed_as_documented(policy: Policy) -> None:
    observation = _observation(policy)
    chunk = policy.infer(observation, seed=3)
    assert chunk.stamp_ns == observation.stamp_ns
    assert chunk.seed == 3
    # The arm's dataset has 30 frames a second; the checkpoint decodes 16 steps.
    np.testing.assert_allclose(chunk.time_from_start_s, np.arange(16) / 30.0, atol=1e-12)
    shapes = {key: (value.shape, value.dtype) for key, value in chunk.actions.items()}
    assert shapes == {
        "single_arm": ((16, 5), np.dtype(np.float32)),
        "gripper": ((16, 1), np.dtype(np.float32)),
    }
    assert chunk.action_pred.shape == policy.noise_shape
    stages = {name: seconds for name, seconds in chunk.timings_s.items() if name != "total"}
    assert set(stages) == {"preprocess", "backbone", "action_head", "postprocess"}
    assert 0 < sum(stages.values()) <= chunk.timings_s["total"]


def test_same_seed_and_stamp_give_the_same_chunk_to_the_bit(policy: Policy) -> None:
    first, second = (policy.infer(_observation(policy), seed=3) for _ in range(2))
    np.testing.assert_array_equal(first.action_pred, second.action_pred)
    for key, actions in first.actions.items():
        np.testing.assert_array_equal(actions, second.actions[key])


def test_another_stamp_or_seed_gives_another_chunk(policy: Policy) -> None:
    chunks = [
        policy.infer(_observation(policy), seed=3),
        policy.infer(_observation(policy), seed=4),
        policy.infer(_observation(policy, stamp_ns=1_700_000_000_123_456_790), seed=3),
        policy.infer(_observation(policy, stamp_ns=123_456_789), seed=3),
    ]
    for index, one in enumerate(chunks):
        for other in chunks[:index]:
            assert np.abs(one.action_pred - other.action_pred).max() > 0.1


def test_seed_that_is_not_given_is_the_default_and_is_reported(policy: Policy) -> None:
    chunk = policy.infer(_observation(policy))
    assert chunk.seed == DEFAULT_SEED
    again = policy.infer(_observation(policy), seed=chunk.seed)
    np.testing.assert_array_equal(chunk.action_pred, again.action_pred)


def test_reference_graphs_read_the_tokenizer_for_a_new_instruction_alone(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    policy = Policy.load(bundle, threads=2)
    try:
        assert isinstance(policy.graphs, ReferenceGraphs)
        known = _observation(policy)
        first = policy.infer(known, seed=3)
        tokenizer = bundle / "tokenizer.json"
        content = tokenizer.read_bytes()
        tokenizer.unlink()
        np.testing.assert_array_equal(policy.infer(known, seed=3).action_pred, first.action_pred)
        assert "reference graphs" in policy.graphs.describe_cost()
        with pytest.raises(ObservationError, match=r"is new, .*tokenizer\.json is missing"):
            policy.infer(replace(known, instruction="open the door"), seed=3)
        tokenizer.write_bytes(content)
        policy.infer(replace(known, instruction="open the door"), seed=3)
    finally:
        policy.close()


def test_explicit_noise_is_used_as_it_is(policy: Policy) -> None:
    observation = _observation(policy)
    noise = draw_noise(3, observation.stamp_ns, policy.noise_shape)
    chunk = policy.infer(observation, noise=noise)
    assert chunk.seed is None
    np.testing.assert_array_equal(chunk.action_pred, policy.infer(observation, seed=3).action_pred)
    other = policy.infer(observation, noise=np.zeros_like(noise))
    assert np.abs(chunk.action_pred - other.action_pred).max() > 0.1


def test_noise_and_seed_together_are_refused(policy: Policy) -> None:
    with pytest.raises(ObservationError, match="either noise or a seed, not both"):
        policy.infer(_observation(policy), noise=np.zeros(policy.noise_shape, np.float32), seed=1)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda noise: noise[:-1],
        lambda noise: noise[None],
        lambda noise: noise[:, :1],
        lambda noise: np.where(np.eye(*noise.shape) > 0, np.nan, noise),
        lambda noise: np.where(np.eye(*noise.shape) > 0, np.inf, noise),
    ],
)
def test_noise_of_another_shape_or_not_finite_is_refused(
    policy: Policy, spoil: Callable[[NDArray[Any]], NDArray[Any]]
) -> None:
    noise = spoil(np.zeros(policy.noise_shape, np.float32))
    with pytest.raises(ObservationError, match="the noise must be finite and of shape"):
        policy.infer(_observation(policy), noise=noise)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seed_out_of_range_is_an_observation_error(policy: Policy, seed: int) -> None:
    with pytest.raises(ObservationError, match="seed must be from 0 to"):
        policy.infer(_observation(policy), seed=seed)


def test_frame_of_another_size_is_refused_before_any_graph_runs(policy: Policy) -> None:
    observation = _observation(policy)
    images = {**observation.images, "wrist": np.zeros((240, 320, 3), np.uint8)}
    with pytest.raises(ObservationError, match="wrist"):
        policy.infer(replace(observation, images=images))


@given(
    st.lists(
        st.tuples(st.integers(0, 2**32 - 1), st.integers(-(2**63), 2**63 - 1)),
        min_size=2,
        max_size=2,
        unique=True,
    )
)
def test_each_seed_and_stamp_has_a_stream_of_its_own(pairs: list[tuple[int, int]]) -> None:
    first, second = (draw_noise(seed, stamp, (16, 29)) for seed, stamp in pairs)
    # Two independent draws of 464 values correlate with a standard deviation of 0.046.
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.35


def test_noise_is_standard_normal() -> None:
    # As it is used: many small draws, one a stamp.
    noise = np.concatenate(
        [draw_noise(7, 33_333_333 * step, (16, 29)).ravel() for step in range(500)]
    ).astype(np.float64)
    assert noise.size == 232_000
    # Six standard deviations of each estimate.
    assert abs(noise.mean()) < 6 / np.sqrt(noise.size)
    assert abs(noise.var() - 1) < 6 * np.sqrt(2 / noise.size)
    assert abs((noise**3).mean()) < 6 * np.sqrt(15 / noise.size)
    assert abs((noise**4).mean() - 3) < 6 * np.sqrt(96 / noise.size)
    # And 3.2 of a million normal values lie outside of 4.66 sigma: the tails are not cut off.
    assert 4.0 < np.abs(noise).max() < 6.0
    steps = noise.reshape(500, -1)
    assert abs((steps[1:] * steps[:-1]).mean()) < 6 / np.sqrt(noise.size)


def test_noise_is_the_same_in_another_process() -> None:
    code = (
        "from groot_int8_ros.policy.policy import draw_noise; "
        "print(draw_noise(7, 1_700_000_000_123_456_789, (16, 29)).tobytes().hex())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env={"PYTHONPATH": ":".join(filter(None, sys.path)), "PYTHONHASHSEED": "123"},
    )
    expected = draw_noise(7, 1_700_000_000_123_456_789, (16, 29))
    assert bytes.fromhex(done.stdout.strip()) == expected.tobytes()


_WITHOUT_TORCH = """
import sys
for name in ("torch", "transformers", "onnx", "onnxscript", "rclpy", "offline_tools"):
    sys.modules[name] = None  # makes an import fail as where the package is not installed
"""

_INFER = """
from pathlib import Path
import numpy as np
from groot_int8_ros.policy.policy import Policy
from groot_int8_ros.policy.types import Observation
policy = Policy.load(Path(sys.argv[1]), threads=1)
chunk = policy.infer(
    Observation(
        images={c.key: np.zeros((c.height, c.width, 3), np.uint8) for c in policy.robot.cameras},
        state={k.key: np.zeros(k.dim, np.float32) for k in policy.processor.state_keys},
        instruction="pick up the cube",
    )
)
print(chunk.action_pred.shape)
"""

_COMPUTE_PREFIX = """
import runpy
runpy.run_module("groot_int8_ros.policy.prefix_model", run_name="__main__", alter_sys=True)
"""


def _without_torch(code: str, *arguments: object, stdin: bytes = b"") -> bytes:
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_TORCH + code, *map(str, arguments)],
        input=stdin,
        capture_output=True,
        check=False,
        timeout=120,
        env={"PYTHONPATH": ":".join(filter(None, sys.path))},
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


@pytest.mark.parametrize("fixture", ["tiny_bundle", "small_deployed"])
def test_robot_needs_neither_torch_nor_ros_nor_the_workstation_side(
    request: pytest.FixtureRequest, fixture: str
) -> None:
    assert _without_torch(_INFER, request.getfixturevalue(fixture)).strip() == b"(16, 29)"


def test_new_instruction_s_prefix_needs_none_of_them_either(small_deployed: Path) -> None:
    answer = _without_torch(_COMPUTE_PREFIX, small_deployed, 1, stdin=b"open the door")
    found = read_prefix(io.BytesIO(answer))
    expected = compute_prefix(open_bundle(small_deployed), "open the door", threads=1)
    np.testing.assert_array_equal(found.input_ids, expected.input_ids)
    for name, tensor in expected.tensors.items():
        np.testing.assert_array_equal(found.tensors[name], tensor)


def test_answer_that_is_not_finite_never_becomes_a_chunk(
    bundle_copy: Path, reseal: Callable[[Path], None]
) -> None:
    weights = bundle_copy / "onnx" / "action_decoder.onnx.data"
    weights.write_bytes(b"\xff" * weights.stat().st_size)  # NaN in float32
    reseal(bundle_copy)
    policy = Policy.load(bundle_copy, threads=1)
    with pytest.raises(EngineError, match="NaN or infinity"):
        policy.infer(_observation(policy))
    policy.close()


@pytest.mark.parametrize("fixture", ["tiny_bundle", "small_deployed"])
def test_backbone_the_largest_engine_is_loaded_while_memory_is_empty(
    request: pytest.FixtureRequest, fixture: str
) -> None:
    told: list[str] = []
    folder = request.getfixturevalue(fixture)
    Policy.load(folder, threads=1, verify_hashes=False, progress=told.append).close()
    assert next(text for text in told if "loading" in text).startswith("loading backbone ")


def test_policy_that_was_closed_says_so(tiny_bundle: Path) -> None:
    policy = Policy.load(tiny_bundle, threads=1)
    observation = _observation(policy)
    policy.close()
    with pytest.raises(RuntimeError, match="was closed"):
        policy.infer(observation)


def _golden(golden_dir: Path, folder: Path, **options: Any) -> Path:
    """Export the recorded checkpoint in float32, with four denoising steps unless told."""
    pytest.importorskip("torch", reason="exporting the recorded checkpoint needs torch")
    pytest.importorskip("transformers", reason="exporting needs transformers")
    from offline_tools.export.bundle_writer import ExportOptions, write_bundle

    robot = folder / "robot.yaml"
    robot.write_text(
        "action_period_s: 0.05\n"
        "cameras:\n"
        "  front: {width: 640, height: 480}\n"
        "  wrist: {width: 640, height: 480}\n"
    )
    write_bundle(
        ExportOptions(
            checkpoint=golden_dir / "checkpoint",
            bundle=folder / "bundle",
            tokenizer=golden_dir / "tokenizer",
            eagle_config=golden_dir / "eagle_config.json",
            robot=robot,
            precision="fp32",
            **options,
        ),
        report=lambda _: None,
    )
    return folder / "bundle"


@pytest.fixture(scope="session")
def golden_bundle(golden_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _golden(golden_dir, tmp_path_factory.mktemp("golden"), graphs="reference")


@pytest.fixture(scope="session", params=[1, 2, 4])
def golden_deployed(
    golden_dir: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Path:
    """With as many denoising steps as the parameter says: they are unrolled into the graph."""
    return _golden(
        golden_dir,
        tmp_path_factory.mktemp("golden_deployed"),
        graphs="deployed",
        instructions=tuple(entry["instruction"] for entry in _recorded(golden_dir)),
        denoising_steps=request.param,
    )


def _recorded(golden_dir: Path) -> list[dict[str, Any]]:
    recorded: list[dict[str, Any]] = json.loads((golden_dir / "observations.json").read_text())
    assert recorded
    return recorded


def _golden_observation(entry: dict[str, Any], arrays: Mapping[str, Any]) -> Observation:
    return Observation(
        images={camera: arrays[f"image.{camera}"] for camera in entry["cameras"]},
        state={key: np.array(values[0], np.float32) for key, values in entry["state"].items()},
        instruction=entry["instruction"],
    )


def _relative_error(expected: NDArray[Any], found: NDArray[Any]) -> float:
    expected, found = expected.astype(np.float64), found.astype(np.float64)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_recorded_observations_give_the_recorded_actions(
    golden_dir: Path, golden_bundle: Path, tmp_path: Path, steps: int
) -> None:
    bundle = Path(shutil.copytree(golden_bundle, tmp_path / "bundle"))
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["denoising_steps"] == 4
    manifest["denoising_steps"] = steps
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    policy = Policy.load(bundle, threads=2)
    for entry in _recorded(golden_dir):
        with np.load(golden_dir / f"golden_obs{entry['index']}.npz") as arrays:
            observation = _golden_observation(entry, arrays)
            chunk = policy.infer(observation, noise=arrays["noise"][0])
            expected = arrays[f"n{steps}.action_pred"][0]
            decoded = {key: arrays[f"n{steps}.decoded.{key}"][0] for key in chunk.actions}
        assert _relative_error(expected, chunk.action_pred) < RELATIVE_TOLERANCE
        for key, actions in chunk.actions.items():
            assert _relative_error(decoded[key], actions) < RELATIVE_TOLERANCE, key
    policy.close()


def test_deployed_graphs_give_the_recorded_actions_too(
    golden_dir: Path, golden_deployed: Path
) -> None:
    from offline_tools.verify.cut_graph import CutBackbone

    policy = Policy.load(golden_deployed, threads=2)
    graphs = policy.graphs
    assert isinstance(graphs, DeployedGraphs)
    recorded = f"n{policy.manifest.denoising_steps}"
    for entry in _recorded(golden_dir):
        with np.load(golden_dir / f"golden_obs{entry['index']}.npz") as arrays:
            observation = _golden_observation(entry, arrays)
            noise, pixels = arrays["noise"][0], arrays["pixel_values"]
            expected = arrays[f"{recorded}.action_pred"][0]
            chunk = policy.infer(observation, noise=noise)
            decoded = {key: arrays[f"{recorded}.decoded.{key}"][0] for key in chunk.actions}
        inputs = graphs.preprocess(observation)
        feeds = [graphs.backbone_feeds(inputs)]
        cut = CutBackbone(golden_deployed / "onnx" / "backbone.onnx", pixels.shape)
        # From the recorded pixels, so that the image chain has no part in it.
        (features,) = cut.features(feeds, [pixels])
        assert _relative_error(expected, graphs.actions(inputs, features, noise)) < (
            RELATIVE_TOLERANCE
        )
        # The image chain by itself: within one grey level of 255.
        (own,) = cut.pixels(feeds)
        assert np.abs(own - pixels).max() * 127.5 < 1.001
        # And from the raw frames, as the robot runs it.
        assert _relative_error(expected, chunk.action_pred) < RELATIVE_TOLERANCE
        for key, actions in chunk.actions.items():
            assert _relative_error(decoded[key], actions) < RELATIVE_TOLERANCE, key
    policy.close()


@pytest.fixture(scope="module")
def families(tiny_bundle: Path, deployed_bundle: Path) -> Iterator[tuple[Policy, Policy]]:
    policies = [Policy.load(folder, threads=2) for folder in (tiny_bundle, deployed_bundle)]
    yield policies[0], policies[1]
    for one in policies:
        one.close()


def test_both_families_give_the_same_chunk(families: tuple[Policy, Policy]) -> None:
    reference, deployed = families
    for stamp in (1, 2):
        observation = _observation(reference, stamp)
        chunks = [one.infer(observation, seed=3) for one in (reference, deployed)]
        error = _relative_error(chunks[0].action_pred, chunks[1].action_pred)
        assert error < RELATIVE_TOLERANCE
        for key, actions in chunks[0].actions.items():
            np.testing.assert_allclose(chunks[1].actions[key], actions, rtol=1e-4, atol=1e-4)


def test_committed_rows_bend_the_others_alike_in_both_families(
    families: tuple[Policy, Policy],
) -> None:
    reference = families[0]
    observation = _observation(reference)
    free = reference.infer(observation, seed=3)
    earlier = reference.infer(observation, seed=8)
    rows = [0, 1, 2, 7]
    committed = CommittedActions(rows, {k: v[rows] for k, v in earlier.actions.items()})
    chunks = [one.infer(observation, seed=3, committed=committed) for one in families]
    assert _relative_error(chunks[0].action_pred, chunks[1].action_pred) < RELATIVE_TOLERANCE
    others = [row for row in range(16) if row not in rows]
    for key, actions in chunks[1].actions.items():
        np.testing.assert_allclose(actions[rows], earlier.actions[key][rows], rtol=1e-5, atol=1e-5)
    # They are not only copied: the rows between them move as well.
    moved = np.abs(chunks[1].action_pred - free.action_pred)[others]
    assert moved.max() > 1e-3


def test_observer_sees_every_graphs_inputs_in_order_and_changes_nothing(policy: Policy) -> None:
    seen: list[tuple[str, dict[str, NDArray[Any]]]] = []
    plain = policy.infer(_observation(policy), seed=3)
    with policy.observed(lambda name, feeds: seen.append((name, dict(feeds)))):
        chunk = policy.infer(_observation(policy), seed=3)
    np.testing.assert_array_equal(chunk.action_pred, plain.action_pred)
    step = ["action_encoder", "dit", "action_decoder"]
    assert [name for name, _ in seen] == ["backbone", "conditioner", *step, *step]
    # What was seen is what the graphs were run on: the same inputs give the same answer.
    inputs = [feeds for name, feeds in seen if name == "dit"]
    assert [feeds["timestep"].tolist() for feeds in inputs] == [[0], [500]]
    np.testing.assert_array_equal(inputs[0]["vl_embs"], inputs[1]["vl_embs"])
    again = policy._engines["dit"].run(inputs[1])
    np.testing.assert_array_equal(again["output"], seen[-1][1]["dit_output"])


def test_observer_is_gone_after_its_block_also_when_it_fails(policy: Policy) -> None:
    def fail(name: str, feeds: object) -> None:
        raise ZeroDivisionError(name)

    with pytest.raises(ZeroDivisionError, match="backbone"), policy.observed(fail):
        policy.infer(_observation(policy))
    policy.infer(_observation(policy))
    with (
        policy.observed(fail),
        pytest.raises(RuntimeError, match="observed already"),
        policy.observed(fail),
    ):
        pass
