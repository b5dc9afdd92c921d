"""The reader gives what the dataset holds, or says what is wrong with it."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from groot_int8_ros.errors import DatasetError
from offline_tools.dataset.lerobot import LeRobotDataset

PARQUET_0 = "data/chunk-000/episode_000000.parquet"
FRONT_0 = "videos/chunk-000/observation.images.front/episode_000000.mp4"


def _edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def _edit_table(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    pa.parquet.write_table(change(pa.parquet.read_table(path)), path)


def _truncate(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def _replace_column(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, values)


# --- a real recording -------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 1, 2])
def test_real_episode_has_the_values_of_its_parquet_file(g1_dataset_dir: Path, index: int) -> None:
    episode = LeRobotDataset.open(g1_dataset_dir).episode(index)
    path = g1_dataset_dir / f"data/chunk-000/episode_{index:06d}.parquet"
    rows = pa.parquet.read_table(path).to_pydict()
    for values, column in ((episode.state, "observation.state"), (episode.action, "action")):
        assert [v.shape[1] for v in values.values()] == [7, 7, 6, 6]
        joined = np.concatenate(list(values.values()), axis=1)
        assert joined.dtype == np.float32
        np.testing.assert_array_equal(joined, np.asarray(rows[column], np.float32))
    assert episode.timestamps_s.dtype == np.float64
    np.testing.assert_array_equal(episode.timestamps_s, rows["timestamp"])
    assert set(episode.instructions) == {"Pick up the yellow bottle on the table."}
    assert len(episode.instructions) == len(episode)


def test_real_names_nested_in_a_list_are_cut_to_their_key(g1_dataset_dir: Path) -> None:
    dataset = LeRobotDataset.open(g1_dataset_dir)
    assert dataset.joint_names("state", "right_arm") == [
        "kRightShoulderPitch",
        "kRightShoulderRoll",
        "kRightShoulderYaw",
        "kRightElbow",
        "kRightWristRoll",
        "kRightWristPitch",
        "kRightWristYaw",
    ]


def test_av1_frames_come_one_at_a_time_and_are_as_many_as_rows(g1_dataset_dir: Path) -> None:
    episode = LeRobotDataset.open(g1_dataset_dir).episode(0)
    tracemalloc.start()
    try:
        count = 0
        for frame in episode.frames("cam_high"):
            assert frame.shape == (480, 640, 3)
            assert frame.dtype == np.uint8
            count += 1
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == len(episode)
    assert peak < 10 * 480 * 640 * 3


# --- forms that datasets take -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a", "b", "c", "d"], ["b", "c"]),
        ([["a", "b", "c", "d"]], ["b", "c"]),
        ({"motors": ["a", "b", "c", "d"]}, ["b", "c"]),
        ({"left": ["a", "b"], "right": ["c", "d"]}, ["b", "c"]),
        ({"d": 3, "c": 2, "b": 1, "a": 0}, ["b", "c"]),
        (["a", "b", "c"], None),
        (None, None),
    ],
)
def test_every_form_of_feature_names_is_understood(
    generated_dataset: Path, names: object, expected: list[str] | None
) -> None:
    def change_info(info: dict[str, Any]) -> None:
        info["features"]["observation.state"]["names"] = names

    _edit_json(generated_dataset / "meta/info.json", change_info)
    _edit_json(
        generated_dataset / "meta/modality.json",
        lambda modality: modality["state"].update(middle={"start": 1, "end": 3}),
    )
    dataset = LeRobotDataset.open(generated_dataset)
    assert dataset.joint_names("state", "middle") == expected
    assert dataset.joint_names_or_default("state", "middle") == (
        expected or ["middle_0", "middle_1"]
    )


@pytest.mark.parametrize(
    ("shape", "names"),
    [
        ([48, 64, 3], None),
        ([3, 48, 64], None),
        ([3, 48, 64], ["channels", "height", "width"]),
        ([64, 48, 3], ["width", "height", "channels"]),
    ],
)
def test_camera_size_does_not_depend_on_the_order_of_its_axes(
    generated_dataset: Path, shape: list[int], names: list[str] | None
) -> None:
    _edit_json(
        generated_dataset / "meta/info.json",
        lambda info: info["features"]["observation.images.front"].update(shape=shape, names=names),
    )
    camera = LeRobotDataset.open(generated_dataset).cameras["front"]
    assert (camera.height, camera.width) == (48, 64)


def test_original_key_reads_another_column_even_a_scalar_or_double_one(
    generated_dataset: Path,
) -> None:
    width = np.linspace(0.0, 1.0, 12)
    _edit_table(
        generated_dataset / PARQUET_0,
        lambda table: table.append_column("observation.opening", pa.array(width)),
    )
    _edit_json(
        generated_dataset / "meta/info.json",
        lambda info: info["features"].update(
            {"observation.opening": {"dtype": "float64", "shape": [1], "names": ["opening"]}}
        ),
    )
    _edit_json(
        generated_dataset / "meta/modality.json",
        lambda modality: modality["state"].update(
            opening={"start": 0, "end": 1, "original_key": "observation.opening"}
        ),
    )
    dataset = LeRobotDataset.open(generated_dataset)
    np.testing.assert_array_equal(
        dataset.episode(0).state["opening"], width.astype(np.float32)[:, None]
    )
    assert dataset.joint_names("state", "opening") == ["opening"]


def test_variable_length_lists_read_like_fixed_ones(generated_dataset: Path) -> None:
    before = LeRobotDataset.open(generated_dataset).episode(0)
    _edit_table(
        generated_dataset / PARQUET_0,
        lambda table: _replace_column(
            table, "action", table.column("action").combine_chunks().cast(pa.list_(pa.float32()))
        ),
    )
    after = LeRobotDataset.open(generated_dataset).episode(0)
    np.testing.assert_array_equal(after.action["arm"], before.action["arm"])


def test_instruction_follows_the_rows_and_can_be_chosen(generated_dataset: Path) -> None:
    _edit_table(
        generated_dataset / PARQUET_0,
        lambda table: table.append_column(
            "annotation.human.detail", pa.array([f"step {row}" for row in range(12)])
        ),
    )
    _edit_json(
        generated_dataset / "meta/modality.json",
        lambda modality: modality["annotation"].update({"human.detail": None}),
    )
    dataset = LeRobotDataset.open(generated_dataset)
    assert dataset.episode(0).instructions == ("pick",) * 9 + ("place",) * 3
    for key in ("human.detail", "annotation.human.detail"):
        assert dataset.episode(0, key).instructions[11] == "step 11"
    with pytest.raises(DatasetError, match=r"no annotation 'other'.*'human\.detail'"):
        dataset.episode(0, "other")


def test_timestamps_in_seconds_since_1970_keep_their_resolution(generated_dataset: Path) -> None:
    stamps = 1.7e9 + np.arange(12) / 30.0
    _edit_table(
        generated_dataset / PARQUET_0,
        lambda table: _replace_column(table, "timestamp", pa.array(stamps)),
    )
    episode = LeRobotDataset.open(generated_dataset).episode(0)
    np.testing.assert_array_equal(episode.timestamps_s, stamps)


# --- bad input --------------------------------------------------------------------------------


def _remove(relative: str) -> Callable[[Path], None]:
    return lambda root: (root / relative).unlink()


def _info(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda root: _edit_json(root / "meta/info.json", change)


def _modality(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda root: _edit_json(root / "meta/modality.json", change)


def _table_0(change: Callable[[pa.Table], pa.Table]) -> Callable[[Path], None]:
    return lambda root: _edit_table(root / PARQUET_0, change)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_remove("meta/info.json"), r"info\.json is missing"),
        (_remove("meta/modality.json"), r"modality\.json is missing \(GR00T's description"),
        (_remove("meta/episodes.jsonl"), r"episodes\.jsonl cannot be read"),
        (lambda root: _truncate(root / "meta/info.json", 0.5), r"info\.json cannot be read"),
        (lambda root: (root / "meta/info.json").write_text("[]"), "must hold a JSON object"),
        (lambda root: _truncate(root / "meta/tasks.jsonl", 0.8), r"line 2 of .*not JSON"),
        (
            lambda root: (root / "meta/episodes.jsonl").write_text('{"episode_index": 0}'),
            r"line 1 of .*'length'",
        ),
        (_info(lambda info: info.update(codebase_version="v3.0")), r"codebase_version v3\.0"),
        (_info(lambda info: info.pop("codebase_version")), "codebase_version None"),
        (_info(lambda info: info.update(fps=0)), "positive number 'fps'"),
        (
            _info(lambda info: info["features"]["observation.images.front"].update(dtype="image")),
            r"camera 'front'.*stored as 'image'",
        ),
        (
            _info(lambda info: info["features"]["observation.images.front"].pop("shape")),
            r"camera 'front'.*shape of three sizes",
        ),
        (
            _modality(lambda modality: modality["state"]["arm"].update(end=9)),
            r"state\.arm ends at dimension 9.*has 4",
        ),
        (
            _modality(lambda modality: modality["state"]["arm"].update(start=3)),
            r"0 <= start < end, not 3 and 3",
        ),
        (
            _modality(lambda modality: modality["action"]["arm"].update(original_key="motor")),
            r"action\.arm reads column 'motor'.*'observation\.state'",
        ),
        (
            _modality(lambda modality: modality["video"]["front"].update(original_key="top")),
            r"video\.front reads 'top'",
        ),
    ],
)
def test_damaged_meta_is_named_when_the_dataset_is_opened(
    generated_dataset: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(generated_dataset)
    with pytest.raises(DatasetError, match=message):
        LeRobotDataset.open(generated_dataset)


def test_folder_that_is_no_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no folder 'meta'"):
        LeRobotDataset.open(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_remove(PARQUET_0), r"episode_000000\.parquet is missing"),
        (lambda root: _truncate(root / PARQUET_0, 0.6), "truncated or damaged"),
        (lambda root: _truncate(root / PARQUET_0, 0.0), "truncated or damaged"),
        (_table_0(lambda table: table.drop_columns(["action"])), "lacks the column 'action'"),
        (
            _table_0(lambda table: table.drop_columns(["timestamp"])),
            "lacks the column 'timestamp'",
        ),
        (_table_0(lambda table: table.slice(0, 11)), r"11 rows, but .* 12 frames"),
        (
            _table_0(lambda table: _replace_column(table, "action", pa.array(["x"] * 12))),
            "'action'.*one vector of numbers.*string",
        ),
        (
            _table_0(
                lambda table: _replace_column(
                    table, "action", pa.array([[1.0, 2.0, 3.0, 4.0]] * 11 + [[1.0]])
                )
            ),
            "'action'.*same length in each row",
        ),
        (
            _table_0(
                lambda table: _replace_column(
                    table, "action", pa.array([[1.0, 2.0, 3.0, 4.0]] * 11 + [None])
                )
            ),
            "'action'.*without gaps",
        ),
        (
            _table_0(lambda table: _replace_column(table, "action", pa.array([[1.0, 2.0]] * 12))),
            "'arm' takes dimensions 0 to 3 .*has 2",
        ),
        (
            _table_0(lambda table: _replace_column(table, "timestamp", pa.array([0.5] * 12))),
            "do not increase",
        ),
        (
            _table_0(lambda table: _replace_column(table, "task_index", pa.array([7] * 12))),
            r"row 0 .*names task 7.*it has 0-1",
        ),
        (_info(lambda info: info.update(data_path="data/{nothing}.parquet")), "data_path"),
        (_info(lambda info: info.pop("data_path")), "data_path None"),
    ],
)
def test_damaged_joints_are_named_when_the_episode_is_read(
    generated_dataset: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(generated_dataset)
    with pytest.raises(DatasetError, match=message):
        LeRobotDataset.open(generated_dataset).episode(0)


def test_unknown_episode_lists_the_ones_there_are(generated_dataset: Path) -> None:
    listing = generated_dataset / "meta/episodes.jsonl"
    listing.write_text(
        "".join(
            json.dumps({"episode_index": index, "tasks": [], "length": 5}) + "\n"
            for index in (0, 1, 2, 7, 9, 10)
        )
    )
    with pytest.raises(DatasetError, match=r"no episode 3; it has 0-2, 7, 9-10\."):
        LeRobotDataset.open(generated_dataset).episode(3)


def _longer_parquet(root: Path) -> None:
    rows = pa.parquet.read_table(root / PARQUET_0)
    extra = rows.slice(11, 1)
    extra = _replace_column(extra, "timestamp", pa.array([9.0], pa.float32()))
    pa.parquet.write_table(pa.concat_tables([rows, extra]), root / PARQUET_0)
    listing = root / "meta/episodes.jsonl"
    listing.write_text(listing.read_text().replace('"length": 12', '"length": 13'))


def _shorter_parquet(root: Path) -> None:
    _edit_table(root / PARQUET_0, lambda table: table.slice(0, 11))
    listing = root / "meta/episodes.jsonl"
    listing.write_text(listing.read_text().replace('"length": 12', '"length": 11'))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_remove(FRONT_0), r"episode_000000\.mp4 is missing"),
        (lambda root: _truncate(root / FRONT_0, 0.0), "truncated or damaged"),
        (lambda root: _truncate(root / FRONT_0, 0.5), "truncated or damaged"),
        (lambda root: (root / FRONT_0).write_bytes(b"no video" * 500), "truncated or damaged"),
        (_longer_parquet, "ends after 12 frames, but the episode has 13 rows"),
        (_shorter_parquet, "more frames than the episode's 11 rows"),
        (
            _info(
                lambda info: info["features"]["observation.images.front"].update(shape=[64, 48, 3])
            ),
            r"frame 0 of .* is 48 x 64 pixels, but .* 64 x 48",
        ),
    ],
)
def test_damaged_video_is_named_when_its_frames_are_read(
    generated_dataset: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(generated_dataset)
    episode = LeRobotDataset.open(generated_dataset).episode(0)
    with pytest.raises(DatasetError, match=message):
        list(episode.frames("front"))


def test_real_av1_video_cut_off_inside_its_data_is_refused(
    g1_dataset_dir: Path, tmp_path: Path
) -> None:
    dataset = LeRobotDataset.open(g1_dataset_dir)
    path, _ = dataset.episode(0).videos["cam_high"]
    content = bytearray(path.read_bytes())
    # The index stays whole, the frames' bytes in the middle are lost: what a bad copy leaves.
    middle = len(content) // 2
    content[middle : middle + 4000] = bytes(4000)
    root = tmp_path / "copy"
    (root / "data/chunk-000").mkdir(parents=True)
    (root / "meta").symlink_to(g1_dataset_dir / "meta")
    (root / PARQUET_0).symlink_to(g1_dataset_dir / PARQUET_0)
    damaged = root / path.relative_to(g1_dataset_dir)
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(content)
    with pytest.raises(DatasetError, match=r"truncated|damaged"):
        list(LeRobotDataset.open(root).episode(0).frames("cam_high"))


def test_unknown_camera_lists_the_ones_there_are(generated_dataset: Path) -> None:
    episode = LeRobotDataset.open(generated_dataset).episode(0)
    with pytest.raises(DatasetError, match="no camera 'top'; it has 'front', 'wrist'"):
        next(episode.frames("top"))
