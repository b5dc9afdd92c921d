"""The capture store: what is read is what was written, whatever killed the writer."""

from __future__ import annotations

import json
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from groot_int8_ros.capture.sample import CaptureSample, sample_from_arrays
from groot_int8_ros.capture.store import INDEX_FILE, CaptureMeta, CaptureStore, CaptureWriter
from groot_int8_ros.errors import CaptureError, OutputError
from groot_int8_ros.policy.bundle import open_bundle
from groot_int8_ros.policy.types import CommittedActions

from ..full_disk import file_size_limit

MakeSample = Callable[..., CaptureSample]


def write(
    folder: Path, meta: CaptureMeta, samples: list[CaptureSample], shard: int = 3
) -> CaptureStore:
    with CaptureWriter(folder, meta, samples_per_shard=shard) as writer:
        for sample in samples:
            writer.add(sample)
    return CaptureStore.open(folder)


def assert_same(found: CaptureSample, wanted: CaptureSample) -> None:
    for name in ("instruction", "stamp_ns", "source", "seed"):
        assert getattr(found, name) == getattr(wanted, name)
    arrays, expected = found.arrays(), wanted.arrays()
    assert arrays.keys() == expected.keys()
    for name, array in arrays.items():
        assert array.dtype == expected[name].dtype
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_samples_come_back_bit_for_bit_and_as_often_as_asked(
    tmp_path: Path, meta: CaptureMeta, make_sample: MakeSample
) -> None:
    samples = [make_sample(number, tokens=5 + number) for number in range(7)]
    bare = replace(samples[0], backbone=None, dit=None, chunk=None, noise=None, source="bare")
    store = write(tmp_path / "store", meta, [*samples, bare])
    assert len(store) == 8
    assert store.index.finished
    for _ in range(2):
        for one, wanted in zip(store.samples(), [*samples, bare], strict=True):
            assert_same(one, wanted)


def test_committed_rows_come_back_and_without_them_the_store_is_as_it_was(
    tmp_path: Path, meta: CaptureMeta, make_sample: MakeSample
) -> None:
    free = make_sample(0)
    actions = {"arm": np.array([[0.1, 0.2, 0.3], [1e-45, -0.0, 3.0]], np.float32)}
    given = replace(free, committed=CommittedActions([2, 0], actions))
    assert given.sha256() != free.sha256()
    # Stores that were written before there were such arrays are those of free samples alone.
    assert not [name for name in free.arrays() if name.startswith("committed")]
    store = write(tmp_path / "store", meta, [free, given])
    first, second = store.samples()
    assert first.committed is None
    assert second.committed is not None
    assert list(second.committed.rows) == [2, 0]
    assert_same(second, given)
    content = json.loads((tmp_path / "store" / INDEX_FILE).read_text())
    assert content["schema_version"] == 2


def test_committed_rows_that_lack_a_part_are_refused(
    tmp_path: Path, meta: CaptureMeta, make_sample: MakeSample
) -> None:
    sample = make_sample(0)
    writer = CaptureWriter(tmp_path / "store", meta)
    short = CommittedActions([0, 1], {"arm": np.zeros((1, 3), np.float32)})
    with pytest.raises(CaptureError, match=r"differ in length: .*committed/arm': 1"):
        writer.add(replace(sample, committed=short))
    arrays = replace(sample, committed=CommittedActions([0], short.actions)).arrays()
    for name in ("committed_rows", "committed/arm"):
        with pytest.raises(KeyError, match="committed"):
            sample_from_arrays("a", 0, "b", None, {n: a for n, a in arrays.items() if n != name})


def test_feeds_have_the_graphs_names_and_a_batch_axis_and_start_again_each_time(
    tmp_path: Path, meta: CaptureMeta, make_sample: MakeSample
) -> None:
    samples = [make_sample(number) for number in range(4)]
    store = write(tmp_path / "store", meta, samples)
    dit = store.feeds("dit")
    assert len(dit) == 8
    for _ in range(2):
        feeds = list(dit)
        assert len(feeds) == 8
        inputs = samples[2].dit
        assert inputs is not None
        np.testing.assert_array_equal(feeds[5]["sa_embs"], inputs.sa_embs[1:2])
        np.testing.assert_array_equal(feeds[5]["vl_embs"], inputs.vl_embs[None])
        assert feeds[5]["timestep"].tolist() == [500]
    backbone = next(iter(store.feeds("backbone")))
    assert {name: array.shape for name, array in backbone.items()} == {
        "input_ids": (1, 6),
        "attention_mask": (1, 6),
        "pixel_values": (2, 3, 4, 4),
    }


def test_feeds_of_samples_without_tensors_name_the_command_that_computes_them(
    tmp_path: Path, meta: CaptureMeta, make_sample: MakeSample
) -> None:
    store = write(
        tmp_path / "store", meta, [make_sample(0), replace(make_sample(1), dit=None, source="me")]
    )
    assert len(store.feeds("backbone")) == 2
    with pytest.raises(CaptureError, match=r"1 of 2 samples .*dit.*first: me.*--complete"):
        store.feeds("dit")


def test_content_hash_depends_on_the_samples_and_not_on_files_or_order(
    tmp_path: Path, meta: CaptureMeta, make_sample: MakeSample
) -> None:
    samples = [make_sample(number) for number in range(5)]
    first = write(tmp_path / "a", meta, samples, shard=2)
    other = write(tmp_path / "b", meta, samples[::-1], shard=5)
    assert first.content_sha256 == other.content_sha256
    fewer = write(tmp_path / "c", meta, samples[:4])
    assert fewer.content_sha256 != first.content_sha256
    elsewhere = write(tmp_path / "d", replace(meta, checkpoint_sha256="b" * 64), samples)
    assert elsewhere.content_sha256 != first.content_sha256


@pytest.mark.parametrize(
    "name", ["state/arm", "noise", "action_pred", "backbone/pixel_values", "dit/vl_embs"]
)
def test_sample_with_a_nan_is_refused_with_the_arrays_name_and_nothing_is_stored(
    tmp_path: Path, meta: CaptureMeta, make_sample: MakeSample, name: str
) -> None:
    spoilt = make_sample(3)
    spoilt.arrays()[name].reshape(-1)[-1] = np.nan
    writer = CaptureWriter(tmp_path / "store", meta)
    writer.add(make_sample(0))
    with pytest.raises(CaptureError, match=rf"episode 0 frame 3: array {name} holds NaN"):
        writer.add(spoilt)
    writer.finish()
    assert len(CaptureStore.open(tmp_path / "store")) == 1


def test_sample_of_other_lengths_types_or_denoising_steps_is_refused(
    tmp_path: Path, meta: CaptureMeta, make_sample: MakeSample
) -> None:
    sample = make_sample(0)
    assert sample.dit is not None
    writer = CaptureWriter(tmp_path / "store", meta)
    with pytest.raises(CaptureError, match=r"differ in length.*dit/image_mask': 5"):
        writer.add(replace(sample, dit=replace(sample.dit, image_mask=np.ones(5, np.bool_))))
    floating: Any = np.zeros(2)
    with pytest.raises(CaptureError, match=r"dit/timestep is float64"):
        writer.add(replace(sample, dit=replace(sample.dit, timestep=floating)))
    three = replace(sample.dit, timestep=np.arange(3), sa_embs=np.zeros((3, 5, 6), np.float32))
    with pytest.raises(CaptureError, match="3 denoising steps"):
        writer.add(replace(sample, dit=three))
    with pytest.raises(CaptureError, match="no sample was captured"):
        writer.finish()


def test_bundle_of_another_checkpoint_is_refused(
    tmp_path: Path, tiny_bundle: Path, make_sample: MakeSample, meta: CaptureMeta
) -> None:
    manifest = open_bundle(tiny_bundle, verify_hashes=False).manifest
    store = write(tmp_path / "store", meta, [make_sample(0)])
    with pytest.raises(CaptureError, match=r"checkpoint_sha256 aaaaaaaaaaaa….*calibrate"):
        store.check_bundle(manifest)
    right = CaptureMeta.of_bundle(manifest, "test", engine="onnxruntime")
    right.check_bundle(manifest, "store")
    with pytest.raises(CaptureError, match="denoising_steps 9"):
        replace(right, denoising_steps=9).check_bundle(manifest, "store")


def test_folder_with_something_in_it_is_left_alone(tmp_path: Path, meta: CaptureMeta) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(OutputError, match="not empty"):
        CaptureWriter(tmp_path, meta)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_error_in_the_block_keeps_what_was_captured_and_does_not_call_it_finished(
    tmp_path: Path, meta: CaptureMeta, make_sample: MakeSample
) -> None:
    def fail() -> None:
        with CaptureWriter(tmp_path / "store", meta, samples_per_shard=10) as writer:
            writer.add(make_sample(0))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    store = CaptureStore.open(tmp_path / "store")
    assert len(store) == 1
    assert not store.index.finished


def test_full_disk_leaves_earlier_shards_readable_and_the_rest_can_be_written_later(
    tmp_path: Path, meta: CaptureMeta, make_sample: MakeSample
) -> None:
    folder = tmp_path / "store"
    writer = CaptureWriter(folder, meta, samples_per_shard=2, go_on="do the next thing")
    for number in range(3):
        writer.add(make_sample(number))
    large = replace(make_sample(3), images={"front": np.zeros((300, 300, 3), np.uint8)})
    with (
        file_size_limit(100_000),
        pytest.raises(OutputError, match=r"shard-00001.*The 2 samples .* are whole") as told,
    ):
        writer.add(large)
    assert str(told.value).endswith("can be used. Free space, then do the next thing.")
    assert "Nothing was left behind" not in str(told.value)
    assert not list(folder.glob(".partial*"))
    store = CaptureStore.open(folder)
    assert len(list(store.samples())) == 2
    writer.finish()
    found = list(CaptureStore.open(folder).samples())
    assert [sample.stamp_ns for sample in found] == [make_sample(n).stamp_ns for n in range(4)]


def test_full_disk_before_the_first_shard_leaves_nothing_as_it_says(
    tmp_path: Path, meta: CaptureMeta, make_sample: MakeSample
) -> None:
    folder = tmp_path / "store"

    def write_it(limit: int) -> CaptureStore:
        with (
            file_size_limit(limit),
            CaptureWriter(folder, meta, samples_per_shard=2, go_on="go on") as writer,
        ):
            for number in range(2):
                writer.add(make_sample(number))
        return CaptureStore.open(folder)

    with pytest.raises(OutputError, match=r"shard-00000.*Nothing was left behind") as told:
        write_it(4000)
    assert "samples in" not in str(told.value)
    assert not folder.exists()
    assert len(write_it(100_000)) == 2


def test_samples_whose_index_did_not_fit_are_not_counted_as_written(
    tmp_path: Path, meta: CaptureMeta, make_sample: MakeSample
) -> None:
    folder = tmp_path / "store"
    wordy = [replace(make_sample(number), instruction="x" * 60_000) for number in range(2)]

    def write_it(samples: Sequence[CaptureSample]) -> None:
        with CaptureWriter(folder, meta, samples_per_shard=1, go_on="go on") as writer:
            for sample in samples:
                writer.add(sample)

    # The shard of a long instruction is smaller than the index that names two of them.
    with (
        file_size_limit(100_000),
        pytest.raises(OutputError, match=r"capture\.json.*The 1 samples .* are whole"),
    ):
        write_it(wordy)
    assert len(CaptureStore.open(folder)) == 1


_KILLED = """
import os, pickle, signal, sys
from pathlib import Path
from groot_int8_ros.capture.store import CaptureWriter
import groot_int8_ros.policy.files as files
meta, samples = pickle.load(open(sys.argv[1], "rb"))
writer = CaptureWriter(Path(sys.argv[2]), meta, samples_per_shard=3)
renames = 0
rename = os.replace
def kill_at(source, target):
    global renames
    if renames == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    renames += 1
    rename(source, target)
os.replace = kill_at
for sample in samples:
    writer.add(sample)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("renames_before", [0, 1, 2, 3, 99])
def test_killed_writer_loses_one_shard_at_most_and_can_be_gone_on_with(
    tmp_path: Path, meta: CaptureMeta, make_sample: MakeSample, renames_before: int
) -> None:
    samples = [make_sample(number) for number in range(8)]
    (tmp_path / "samples").write_bytes(pickle.dumps((meta, samples)))
    folder = tmp_path / "store"
    done = subprocess.run(
        [
            *(sys.executable, "-c", _KILLED, str(tmp_path / "samples"), str(folder)),
            str(renames_before),
        ],
        capture_output=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    # Two renames a shard: the shard, then the index that names it.
    whole = 6 if renames_before >= 4 else 3 if renames_before >= 2 else 0
    if whole:
        store = CaptureStore.open(folder)
        assert not store.index.finished
        assert len(list(store.samples())) == whole
    else:
        with pytest.raises(CaptureError, match="holds no samples"):
            CaptureStore.open(folder)
    with CaptureWriter(folder, meta, samples_per_shard=3, resume=True) as writer:
        have = writer.sources
        assert len(have) == whole
        for sample in samples:
            if (sample.source, sample.stamp_ns) not in have:
                writer.add(sample)
    whole_run = write(tmp_path / "other", meta, samples)
    resumed = CaptureStore.open(folder)
    assert resumed.content_sha256 == whole_run.content_sha256
    listed = {shard.file for shard in resumed.index.shards}
    assert {path.name for path in folder.iterdir() if path.suffix == ".npz"} == listed


def test_resuming_with_other_options_is_refused(
    tmp_path: Path, meta: CaptureMeta, make_sample: MakeSample
) -> None:
    write(tmp_path / "store", meta, [make_sample(0)])
    with pytest.raises(CaptureError, match="differs in seed"):
        CaptureWriter(tmp_path / "store", replace(meta, seed=8), resume=True)


def test_discarded_samples_leave_the_store_and_their_space_is_given_back(
    tmp_path: Path, meta: CaptureMeta, make_sample: MakeSample
) -> None:
    folder = tmp_path / "store"
    writer = CaptureWriter(folder, meta, samples_per_shard=4)
    kept: dict[int, int] = {}
    for number in range(60):
        kept[writer.add(make_sample(number))] = number
        if len(kept) > 6:
            # Not only the oldest: a few of each shard stay.
            victim = sorted(kept)[number % 5]
            writer.discard(victim)
            del kept[victim]
        on_disk = len(list(folder.glob("shard-*.npz")))
        assert on_disk <= 6, "space is not given back"
    assert len(writer) == 6
    writer.finish()
    store = CaptureStore.open(folder)
    stamps = sorted(sample.stamp_ns for sample in store.samples())
    assert stamps == sorted(make_sample(number).stamp_ns for number in kept.values())


def damage_shard(folder: Path) -> None:
    path = folder / "shard-00000.npz"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def damage_index(folder: Path) -> None:
    text = (folder / INDEX_FILE).read_text()
    (folder / INDEX_FILE).write_text(text[: len(text) // 2])


def lie_in_index(change: Callable[[dict[str, object]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = json.loads((folder / INDEX_FILE).read_text())
        change(content)
        (folder / INDEX_FILE).write_text(json.dumps(content))

    return damage


def test_a_sample_that_lacks_what_the_index_promises_is_refused(
    tmp_path: Path, meta: CaptureMeta, make_sample: MakeSample
) -> None:
    folder = tmp_path / "store"
    write(folder, meta, [make_sample(0)])
    lie_in_index(lambda c: c["shards"][0]["samples"][0].update(position=1))(folder)  # type: ignore[index]
    with pytest.raises(CaptureError, match="although the index says so"):
        list(CaptureStore.open(folder).samples())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_shard, r"shard-00000\.npz is not the file that was captured"),
        (lambda folder: (folder / "shard-00000.npz").unlink(), r"lacks .*shard-00000\.npz"),
        (damage_index, r"capture\.json is damaged"),
        (lambda folder: (folder / INDEX_FILE).unlink(), r"is no capture store"),
        (lie_in_index(lambda c: c.update(schema_version=99)), "schema version 99"),
        (lie_in_index(lambda c: c.update(content_sha256="0" * 64)), "content_sha256"),
        (lie_in_index(lambda c: c.pop("meta")), "damaged"),
        (
            lie_in_index(lambda c: c["shards"][0]["samples"][0].update(graphs=[None])),  # type: ignore[index]
            "graphs that there are not",
        ),
        (
            lie_in_index(lambda c: c["shards"][0]["samples"][0].update(position=True)),  # type: ignore[index]
            "position of a sample in shard-00000.npz is of another type",
        ),
        (
            lie_in_index(lambda c: c["shards"][0].update(file="../shard-00000.npz")),  # type: ignore[index]
            "no shard's name",
        ),
    ],
)
def test_damaged_store_is_refused_with_what_to_do(
    tmp_path: Path,
    meta: CaptureMeta,
    make_sample: MakeSample,
    damage: Callable[[Path], None],
    message: str,
) -> None:
    folder = tmp_path / "store"
    write(folder, meta, [make_sample(0)])
    damage(folder)
    with pytest.raises(CaptureError, match=message) as caught:
        CaptureStore.open(folder)
    assert "groot-int8 calibrate" in str(caught.value)
