"""Hazards of capturing: tensors that are not the robot's, a new set each run, mixed passes."""

from __future__ import annotations

import contextlib
import json
import re
import tracemalloc
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="needs ONNX Runtime")
pytest.importorskip("pyarrow", reason="reading a dataset needs pyarrow")
pytest.importorskip("builtin_interfaces", reason="reading joint states needs the ROS messages")

from rosbags.interfaces import Connection
from rosbags.rosbag2 import StoragePlugin, Writer

from groot_int8_ros.capture.inference import run_on
from groot_int8_ros.capture.sample import CaptureSample
from groot_int8_ros.capture.selection import Candidate
from groot_int8_ros.capture.store import CaptureMeta, CaptureStore, CaptureWriter
from groot_int8_ros.errors import (
    BagError,
    CaptureError,
    ConfigurationError,
    DatasetError,
    OutputError,
)
from groot_int8_ros.policy.engines import Engine, Tensors
from groot_int8_ros.policy.policy import Policy, draw_noise
from groot_int8_ros.policy.types import Observation
from offline_tools import cli
from offline_tools.bags import messages
from offline_tools.bags.episode_to_bag import BagOptions, convert_episode
from offline_tools.calibration.bag_source import BagInputs, BagSource
from offline_tools.calibration.dataset_source import EPISODE_SPACING_NS, DatasetSource
from offline_tools.calibration.run import Recorded, Skipped, capture, choose, complete

from ...full_disk import file_size_limit
from ...int8_record import quantization_record

SEED = 5
SECOND = 1_000_000_000


@pytest.fixture(scope="module")
def policy(tiny_bundle: Path) -> Iterator[Policy]:
    loaded = Policy.load(tiny_bundle, threads=1)
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def from_dataset(
    policy: Policy, tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> CaptureStore:
    """Ten samples of the generated episode. Tests only read it."""
    folder = tmp_path_factory.mktemp("calibration") / "store"
    return capture(
        policy,
        DatasetSource(tiny_dataset, policy),
        folder,
        samples=10,
        seed=SEED,
        keep_images=True,
        report=lambda _: None,
    ).store


def assert_equal_samples(
    found: Sequence[CaptureSample], wanted: Sequence[CaptureSample], *, but: tuple[str, ...] = ()
) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one.stamp_ns == other.stamp_ns
        left, right = one.arrays(), other.arrays()
        names = {name for name in left.keys() | right.keys() if not name.startswith(but or ("-",))}
        for name in sorted(names):
            assert left[name].dtype == right[name].dtype
            np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def test_feeds_are_what_the_engines_were_given(policy: Policy, from_dataset: CaptureStore) -> None:
    steps = policy.manifest.denoising_steps
    assert len(from_dataset.feeds("backbone")) == len(from_dataset) == 10
    assert len(from_dataset.feeds("dit")) == 10 * steps
    dit = iter(from_dataset.feeds("dit"))
    for sample, backbone in zip(
        from_dataset.samples(), from_dataset.feeds("backbone"), strict=True
    ):
        # From the stored inputs alone the policy's own graphs give its own chunk again.
        assert sample.normalised_state is not None
        assert sample.noise is not None
        assert sample.chunk is not None
        np.testing.assert_array_equal(
            sample.noise, draw_noise(SEED, sample.stamp_ns, policy.noise_shape)
        )
        engines = policy._engines
        features = engines["backbone"].run(backbone)
        condition = engines["conditioner"].run(
            {"hidden_states": features["hidden_states"], "state": sample.normalised_state[None]}
        )
        actions = sample.noise[None]
        assert actions.dtype == np.float32
        for _ in range(steps):
            feed = next(dit)
            encoded = engines["action_encoder"].run(
                {
                    "state_features": condition["state_features"],
                    "actions": actions,
                    "timestep": feed["timestep"],
                }
            )
            np.testing.assert_array_equal(feed["sa_embs"], encoded["sa_embs"])
            output = engines["dit"].run(feed)
            velocity = engines["action_decoder"].run({"dit_output": output["output"]})
            actions = np.asarray(actions + velocity["velocity"] / np.float32(steps), np.float32)
        np.testing.assert_array_equal(actions[0], sample.chunk.action_pred)


class ReusingEngine:
    """A real engine that answers in the same buffers every time, as one on a GPU does."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._buffers: dict[str, np.ndarray] = {}
        self.inputs, self.outputs, self.remarks = engine.inputs, engine.outputs, engine.remarks

    def run(self, feeds: Tensors) -> dict[str, np.ndarray]:
        for name, array in self._engine.run(feeds).items():
            np.copyto(self._buffers.setdefault(name, np.empty_like(array)), array)
        return self._buffers

    def close(self) -> None:
        pass


def test_capture_is_right_with_an_engine_that_reuses_its_buffers(
    policy: Policy, from_dataset: CaptureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = next(from_dataset.samples())
    assert wanted.images is not None
    reusing: dict[str, Engine] = {n: ReusingEngine(e) for n, e in policy._engines.items()}
    monkeypatch.setattr(policy, "_engines", reusing)
    observation = Observation(wanted.images, wanted.state, wanted.instruction, wanted.stamp_ns)
    found = run_on(policy, observation, wanted.source, seed=SEED, keep_images=True)
    # A later observation must not reach into the earlier one's sample.
    other = replace(observation, stamp_ns=observation.stamp_ns + 1)
    run_on(policy, other, "other", seed=SEED, keep_images=True)
    assert_equal_samples([found], [wanted])


def test_same_recording_gives_the_same_set_and_it_is_spread_over_the_episode(
    policy: Policy, tiny_dataset: Path, from_dataset: CaptureStore, tmp_path: Path
) -> None:
    again = capture(
        policy,
        DatasetSource(tiny_dataset, policy),
        tmp_path / "again",
        samples=10,
        seed=SEED,
        keep_images=True,
        report=lambda _: None,
    )
    assert again.offered == 45
    assert again.store.content_sha256 == from_dataset.content_sha256
    frames = [int(record.source.split()[-1]) for record in from_dataset.records()]
    assert frames == sorted(frames)
    assert np.diff([0, *frames, 44]).max() <= 14
    other = capture(
        policy,
        DatasetSource(tiny_dataset, policy),
        tmp_path / "other",
        samples=10,
        seed=SEED + 1,
        keep_images=True,
        report=lambda _: None,
    )
    assert other.store.content_sha256 != from_dataset.content_sha256


class Endless:
    """Observations of a run as long as one likes, without images."""

    name = "endless"

    def __init__(self, length: int) -> None:
        self._length = length

    def candidates(self, skipped: Skipped) -> Iterator[tuple[int, Candidate]]:
        for number in range(self._length):
            state = np.array([np.sin(number / 7), np.cos(number / 5)], np.float32)
            yield 2 * number, Candidate((number + 1) * SECOND // 30, state, "pick")

    def observations(self, chosen: frozenset[int]) -> Iterator[Recorded]:
        raise NotImplementedError


def test_memory_of_the_choice_does_not_grow_with_the_recording() -> None:
    peaks = []
    for length in (1000, 16_000):
        tracemalloc.start()
        try:
            chosen, offered, _ = choose(Endless(length), 10)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
        assert offered == length
        assert len(chosen) == 10
        assert max(chosen) > length, "the second half of the run is not there"
        assert all(number % 2 == 0 for number in chosen), "the source's numbers were lost"
    assert peaks[1] < 2 * peaks[0]


@pytest.mark.parametrize("compression", [None, "png"])
def test_bag_of_an_episode_gives_the_samples_of_the_episode(
    policy: Policy,
    tiny_dataset: Path,
    from_dataset: CaptureStore,
    tmp_path: Path,
    compression: str | None,
) -> None:
    options = BagOptions(start_time_ns=EPISODE_SPACING_NS)
    if compression == "png":
        options = replace(options, compression="png")
    convert_episode(tiny_dataset, 0, tmp_path / "bag", options)
    done = capture(
        policy,
        BagSource(tmp_path / "bag", policy, BagInputs.read(None, None)),
        tmp_path / "store",
        samples=10,
        seed=SEED,
        keep_images=True,
        report=lambda _: None,
    )
    assert done.offered == 45
    assert_equal_samples(list(done.store.samples()), list(from_dataset.samples()))


def test_what_a_recorder_stored_is_completed_to_the_same_arrays_bit_for_bit(
    policy: Policy, from_dataset: CaptureStore, tmp_path: Path
) -> None:
    meta = CaptureMeta.of_bundle(policy.manifest, "live")
    with CaptureWriter(tmp_path / "live", meta) as writer:
        for sample in from_dataset.samples():
            assert sample.chunk is not None
            published = replace(sample.chunk, action_pred=None)
            writer.add(
                replace(sample, chunk=published, backbone=None, dit=None, normalised_state=None)
            )
    live = CaptureStore.open(tmp_path / "live")
    with pytest.raises(CaptureError, match="--complete"):
        live.feeds("dit")
    done = complete(policy, live, tmp_path / "full", keep_images=True, report=lambda _: None)
    assert done.completed == 10
    assert done.largest_difference == {"single_arm": 0.0, "gripper": 0.0}
    assert_equal_samples(list(done.store.samples()), list(from_dataset.samples()))
    assert done.store.content_sha256 == from_dataset.content_sha256
    # What is complete stays as it is, and needs no images for it.
    bare = complete(policy, done.store, tmp_path / "again", report=lambda _: None)
    assert bare.completed == 0


def test_completing_says_how_far_a_recorded_chunk_lies_from_the_float_policy(
    policy: Policy, from_dataset: CaptureStore, tmp_path: Path
) -> None:
    sample = next(from_dataset.samples())
    assert sample.chunk is not None
    shifted = {key: value + 0.25 for key, value in sample.chunk.actions.items()}
    meta = CaptureMeta.of_bundle(policy.manifest, "live")
    with CaptureWriter(tmp_path / "live", meta) as writer:
        writer.add(replace(sample, dit=None, chunk=replace(sample.chunk, actions=shifted)))
    done = complete(
        policy, CaptureStore.open(tmp_path / "live"), tmp_path / "full", report=lambda _: None
    )
    assert done.largest_difference["single_arm"] == pytest.approx(0.25, abs=1e-4)


def test_samples_of_another_checkpoint_or_without_observation_are_not_completed(
    policy: Policy, from_dataset: CaptureStore, tmp_path: Path
) -> None:
    meta = CaptureMeta.of_bundle(policy.manifest, "live")
    sample = replace(next(from_dataset.samples()), dit=None, source="frame 1")
    for name, wrong, one, message in (
        ("a", replace(meta, checkpoint_sha256="0" * 64), sample, "checkpoint_sha256"),
        ("b", meta, replace(sample, images=None), "frame 1: the sample has no images"),
        ("c", meta, replace(sample, noise=None), "frame 1: the sample has no noise"),
    ):
        with CaptureWriter(tmp_path / name, wrong) as writer:
            writer.add(one)
        with pytest.raises(CaptureError, match=message):
            complete(
                policy,
                CaptureStore.open(tmp_path / name),
                tmp_path / f"{name}-full",
                report=lambda _: None,
            )


class Interrupted:
    """A source that ends early, as a run does that is killed."""

    def __init__(self, source: DatasetSource, after: int) -> None:
        self._source = source
        self._after = after
        self.name = source.name
        self.candidates = source.candidates

    def observations(self, chosen: frozenset[int]) -> Iterator[Recorded]:
        for count, one in enumerate(self._source.observations(chosen)):
            if count == self._after:
                raise KeyboardInterrupt
            yield one


def test_interrupted_capture_is_gone_on_with(
    policy: Policy, tiny_dataset: Path, tmp_path: Path
) -> None:
    source = DatasetSource(tiny_dataset, policy)
    folder = tmp_path / "store"
    read: list[str] = []

    class Watched(Interrupted):
        def observations(self, chosen: frozenset[int]) -> Iterator[Recorded]:
            for one in super().observations(chosen):
                yield replace(one, read=partial(self.note, one))

        def note(self, one: Recorded) -> Observation:
            read.append(one.source)
            return one.read()

    def run(after: int, *, resume: bool) -> CaptureStore:
        return capture(
            policy,
            Watched(source, after),
            folder,
            samples=6,
            seed=SEED,
            resume=resume,
            report=lambda _: None,
        ).store

    with pytest.raises(KeyboardInterrupt):
        run(4, resume=False)
    assert not CaptureStore.open(folder).index.finished
    store = run(99, resume=True)
    assert store.index.finished
    assert len(store) == 6
    assert len(read) == len(set(read)) == 6, "an observation was run twice"


class OnAFullDisk:
    """A source during whose reading the disk fills up, until `disk` is closed."""

    def __init__(self, source: DatasetSource, after: int, disk: contextlib.ExitStack) -> None:
        self._source = source
        self._after = after
        self._disk = disk
        self.name = source.name
        self.candidates = source.candidates

    def observations(self, chosen: frozenset[int]) -> Iterator[Recorded]:
        for count, one in enumerate(self._source.observations(chosen)):
            if count == self._after:
                self._disk.enter_context(file_size_limit(20_000))
            yield one


def test_full_disk_names_what_is_whole_and_the_option_that_goes_on(
    policy: Policy, tiny_dataset: Path, tmp_path: Path
) -> None:
    source = DatasetSource(tiny_dataset, policy)
    keep = partial(capture, policy, output=tmp_path / "store", seed=SEED, report=lambda _: None)
    message = r"shard-00001\.npz.*The 16 samples in .*store"
    with contextlib.ExitStack() as disk, pytest.raises(OutputError, match=message) as told:
        keep(source=OnAFullDisk(source, 17, disk), samples=32)
    assert str(told.value).endswith("Free space, then run the command again with --resume.")
    assert "Nothing was left behind" not in str(told.value)
    assert len(CaptureStore.open(tmp_path / "store")) == 16
    assert len(keep(source=source, samples=32, resume=True).store) == 32


def test_full_disk_before_the_first_samples_leaves_nothing_and_the_command_can_be_run_again(
    tiny_bundle: Path, tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "store"
    options = ("--bundle", tiny_bundle, "--dataset", tiny_dataset, "--output", output)
    arguments = (*options, "--samples", 1, "--threads", 1)
    with file_size_limit(20_000):
        assert run_command(*arguments) == 2
    assert "Nothing was left behind" in capsys.readouterr().err
    assert not output.exists()
    assert run_command(*arguments) == 0


def write_bag(
    path: Path, policy: Policy, stamps: list[tuple[int, int]], *, instruction: str = "pick"
) -> None:
    """Write observations: (recording time, header stamp); joints hold the stamp's seconds."""
    robot = policy.robot
    names = [joint.name for joints in robot.state_joints.values() for joint in joints]
    with Writer(path, version=9, storage_plugin=StoragePlugin.MCAP) as writer:

        def connect(topic: str, kind: str) -> Connection:
            return writer.add_connection(topic, kind, typestore=messages.TYPESTORE)

        text = connect("/instruction", messages.STRING_TYPE)
        joints = connect("/joint_states", messages.JOINT_STATE_TYPE)
        cameras = {
            camera: connect(f"/cameras/{camera.key}/image_raw", messages.IMAGE_TYPE)
            for camera in robot.cameras
        }
        for recorded, stamp in stamps:
            phase = stamp / SECOND % 1000
            if instruction:
                writer.write(text, recorded, messages.string(instruction))
            values = np.full(len(names), phase)
            writer.write(joints, recorded, messages.joint_state(names, values, stamp))
            for camera, connection in cameras.items():
                grey = np.full((camera.height, camera.width, 3), int(phase * 7) % 256, np.uint8)
                writer.write(connection, recorded, messages.image(grey, "rgb8", camera.key, stamp))


def times(start_s: float, count: int, period_s: float = 0.1) -> list[int]:
    return [round((start_s + period_s * i) * SECOND) for i in range(count)]


def test_bag_that_loops_gives_each_moment_once_and_never_mixes_passes(
    policy: Policy, tmp_path: Path
) -> None:
    stamps = times(1000, 12) * 3
    write_bag(tmp_path / "bag", policy, list(zip(times(50_000, 36), stamps, strict=True)))
    done = capture(
        policy,
        BagSource(tmp_path / "bag", policy, BagInputs.read(None, None)),
        tmp_path / "store",
        samples=100,
        seed=SEED,
        report=lambda _: None,
    )
    assert [sample.stamp_ns for sample in done.store.samples()] == times(1000, 12)


@pytest.mark.parametrize("jump_s", [-700.0, 900.0])
def test_bag_whose_clock_jumps_never_joins_what_lies_on_both_sides(
    policy: Policy, tmp_path: Path, jump_s: float
) -> None:
    stamps = [*times(1000, 10), *times(1001 + jump_s, 10)]
    write_bag(tmp_path / "bag", policy, list(zip(times(50_000, 20), stamps, strict=True)))
    done = capture(
        policy,
        BagSource(tmp_path / "bag", policy, BagInputs.read(None, None)),
        tmp_path / "store",
        samples=100,
        seed=SEED,
        keep_images=True,
        report=lambda _: None,
    )
    found = list(done.store.samples())
    assert [sample.stamp_ns for sample in found] == stamps
    for sample in found:
        phase = sample.stamp_ns / SECOND % 1000
        for values in sample.state.values():
            np.testing.assert_allclose(values, phase, rtol=1e-6)
        for image in (sample.images or {}).values():
            assert set(np.unique(image)) == {int(phase * 7) % 256}


def test_bag_without_usable_observation_says_why(policy: Policy, tmp_path: Path) -> None:
    def try_bag(name: str) -> None:
        capture(
            policy,
            BagSource(tmp_path / name, policy, BagInputs.read(None, None)),
            tmp_path / f"{name}-store",
            samples=10,
            seed=SEED,
            report=lambda _: None,
        )

    write_bag(tmp_path / "unstamped", policy, [(SECOND, 0), (2 * SECOND, 0)])
    with pytest.raises(CaptureError, match=r"no usable observation.*unstamped"):
        try_bag("unstamped")
    write_bag(tmp_path / "silent", policy, [(SECOND, SECOND)], instruction="")
    with pytest.raises(CaptureError, match="instruction '' is empty"):
        try_bag("silent")
    assert not (tmp_path / "silent-store").exists()
    given = capture(
        policy,
        BagSource(tmp_path / "silent", policy, BagInputs.read(None, "pick")),
        tmp_path / "given",
        samples=10,
        seed=SEED,
        report=lambda _: None,
    )
    assert [record.instruction for record in given.store.records()] == ["pick"]


def test_bag_topics_and_joints_come_from_the_nodes_own_parameter_file(
    policy: Policy, tmp_path: Path
) -> None:
    write_bag(tmp_path / "bag", policy, [(SECOND, SECOND)])
    first = policy.robot.cameras[0].key
    file = tmp_path / "node.yaml"
    file.write_text(f"/**: {{ros__parameters: {{cameras: {{{first}: {{topic: /elsewhere}}}}}}}}")
    with pytest.raises(BagError, match=r"no messages on /elsewhere\. It has"):
        BagSource(tmp_path / "bag", policy, BagInputs.read(file, None))
    file.write_text("/**: {ros__parameters: {joint_state_topic: instruction}}")
    with pytest.raises(BagError, match="/instruction holds std_msgs/msg/String"):
        BagSource(tmp_path / "bag", policy, BagInputs.read(file, None))
    key, joints = next(iter(policy.robot.state_joints.items()))
    offsets = [float(index) for index in range(len(joints))]
    file.write_text(
        json.dumps({"/**": {"ros__parameters": {f"state_joints.{key}.offsets": offsets}}})
    )
    source = BagSource(tmp_path / "bag", policy, BagInputs.read(file, None))
    (one,) = source.observations(frozenset([0]))
    np.testing.assert_allclose(one.read().state[key], 1.0 + np.array(offsets), rtol=1e-6)
    file.write_text(f"/**: {{ros__parameters: {{state_joints: {{{key}: {{names: [a]}}}}}}}}")
    with pytest.raises(ConfigurationError, match=f"state_joints.{key}.names"):
        BagSource(tmp_path / "bag", policy, BagInputs.read(file, None))
    file.write_text("not parameters")
    with pytest.raises(ConfigurationError, match="no ROS parameter file"):
        BagInputs.read(file, None)


def test_observations_that_cannot_be_used_are_counted_and_the_first_is_named(
    policy: Policy, tiny_dataset: Path, tmp_path: Path
) -> None:
    source = DatasetSource(tiny_dataset, policy)
    spoil = source._observation

    def observation(episode: object, row: int, images: object) -> Observation:
        made = spoil(episode, row, images)  # type: ignore[arg-type]
        if row not in (3, 7):
            return made
        return replace(made, state={k: v * np.float32(np.nan) for k, v in made.state.items()})

    source._observation = observation  # type: ignore[method-assign,assignment]
    skipped = Skipped()
    assert len(list(source.candidates(skipped))) == 43
    assert skipped.count == 2
    assert skipped.first.startswith("episode 0 frame 3: state ")


def test_dataset_of_another_robot_is_refused(
    policy: Policy, tiny_dataset: Path, g1_dataset_dir: Path
) -> None:
    with pytest.raises(DatasetError, match="no episode 4"):
        DatasetSource(tiny_dataset, policy, [4])
    camera = policy.robot.cameras[0].key
    with pytest.raises(DatasetError, match=f"no camera '{camera}', which the bundle needs"):
        DatasetSource(g1_dataset_dir, policy)


def run_command(*arguments: object) -> int:
    return cli.main(["calibrate", *map(str, arguments)])


def test_command_writes_store_and_coverage_and_names_what_is_thin(
    tiny_bundle: Path,
    tiny_dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    from_dataset: CaptureStore,
) -> None:
    output = tmp_path / "store"
    options = ("--bundle", tiny_bundle, "--dataset", tiny_dataset, "--output", output)
    arguments = (*options, "--samples", 10, "--seed", SEED, "--threads", 1, "--episodes", "0")
    assert run_command(*arguments, "--keep-images") == 0
    out = capsys.readouterr().out
    assert "10 samples of 45 offered" in out
    assert "THIN: 10 samples, fewer than 32" in out
    assert from_dataset.content_sha256 in out
    report = json.loads((output / "coverage.json").read_text())
    assert report["timesteps"] == {"0": 10, "500": 10}
    assert CaptureStore.open(output).content_sha256 == from_dataset.content_sha256
    assert run_command(*arguments) == 2
    assert "holds a capture store already: go on with" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--episodes", "x"], "no list such as"),
        (["--episodes", "7"], "no episode 7"),
        (
            ["--params-file", "robot.yaml"],
            "--params-file has no meaning with --dataset, but with --bag",
        ),
        (["--instruction", "lift"], "--instruction has no meaning with --dataset, but with --bag"),
    ],
)
def test_wrong_options_are_one_message_and_leave_nothing(
    tiny_bundle: Path,
    tiny_dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    output = tmp_path / "store"
    base = ("--bundle", tiny_bundle, "--dataset", tiny_dataset, "--output", output)
    assert run_command(*base, *options) == 2
    assert message in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize(
    "option", [("--samples", 4), ("--seed", 0), ("--resume",), ("--episodes", "0")]
)
def test_completing_takes_no_choice_that_it_would_not_follow(
    tiny_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    option: tuple[object, ...],
) -> None:
    options = ("--bundle", tiny_bundle, "--complete", tmp_path / "store", *option)
    assert run_command(*options) == 2
    assert f"{option[0]} has no meaning with --complete" in capsys.readouterr().err


def test_int8_bundle_is_refused_before_it_is_run(
    tiny_dataset: Path, bundle_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = bundle_copy / "manifest.json"
    content = json.loads(path.read_text())
    content["graphs"]["dit"] |= {
        "precision": "int8",
        "quantization": quantization_record(["blocks.0"]),
    }
    path.write_text(json.dumps(content))
    assert run_command("--bundle", bundle_copy, "--dataset", tiny_dataset) == 2
    assert "Give the float bundle" in capsys.readouterr().err
    assert not (bundle_copy / "calibration").exists()


def test_resumed_store_with_more_than_is_asked_for_says_so(
    policy: Policy, tiny_dataset: Path, tmp_path: Path
) -> None:
    told: list[str] = []

    def run(samples: int) -> int:
        done = capture(
            policy,
            DatasetSource(tiny_dataset, policy),
            tmp_path / "store",
            samples=samples,
            seed=SEED,
            resume=True,
            report=told.append,
        )
        return len(done.store)

    assert run(3) == run(3) == 3
    assert not [line for line in told if "keeps" in line]
    assert run(2) >= 3
    assert re.search(r"store keeps [1-3] samples .* not among the 2 chosen now", told[-1])
