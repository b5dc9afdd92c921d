"""LeRobot v2.1 datasets with GR00T's `meta/modality.json`, read an episode at a time.

Owns: `LeRobotDataset` and `Episode`. Must not import ROS or torch: converting, calibrating and
evaluating read the same values through it. LeRobot stores joints as flat vectors in parquet
files, one row a frame, and each camera as one video an episode; `modality.json` names the parts
of those vectors. Frames are decoded one at a time (`video.py`); joints are small and are loaded
whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet
from numpy.typing import NDArray

from groot_int8_ros.errors import DatasetError
from groot_int8_ros.policy.files import leads_outside, read_json
from groot_int8_ros.policy.types import Float32Array, Float64Array, UInt8Array
from offline_tools.dataset.video import read_rgb_frames

Modality = Literal["state", "action"]

_DEFAULT_COLUMN: dict[Modality, str] = {"state": "observation.state", "action": "action"}
_TASK_INDEX_COLUMN = "task_index"
# Of a path template, which comes from a file: a width such as {episode_index:0999999999d} would
# fill the memory.
_PLACEHOLDER = re.compile(r"\{(?:episode_chunk|episode_index|video_key)(?::0?[0-9]?d)?\}")


@dataclass(frozen=True)
class EpisodeInfo:
    """What `meta/episodes.jsonl` says of one episode.

    Attributes:
        index: Number of the episode in file names.
        length: Number of frames.
        tasks: Instructions that occur in it.
    """

    index: int
    length: int
    tasks: tuple[str, ...]


@dataclass(frozen=True)
class VectorKey:
    """Where the values of one state or action key stand.

    Attributes:
        column: Parquet column (`original_key` of `modality.json`, or the modality's default).
        start: First dimension within the column's vector.
        end: One past the last dimension.
    """

    column: str
    start: int
    end: int

    @property
    def span(self) -> slice:
        """The dimensions as a slice of the column's vector."""
        return slice(self.start, self.end)

    @property
    def dim(self) -> int:
        """Number of dimensions."""
        return self.end - self.start


@dataclass(frozen=True)
class Camera:
    """One camera of the dataset.

    Attributes:
        column: LeRobot's name of the video (`original_key` of `modality.json`).
        height: Frame height in pixels.
        width: Frame width in pixels.
    """

    column: str
    height: int
    width: int


@dataclass(frozen=True)
class Episode:
    """One recorded episode; its frames stay on disk until they are asked for.

    Attributes:
        index: Number of the episode.
        timestamps_s: Time of each frame since the episode's start, seconds, float64, shape (T,).
        state: State key to values as recorded, float32, shape (T, D).
        action: Action key to values as recorded, float32, shape (T, D).
        instructions: Instruction at each frame, T strings.
        videos: Camera key to (video file, height and width in pixels).
    """

    index: int
    timestamps_s: Float64Array
    state: Mapping[str, Float32Array]
    action: Mapping[str, Float32Array]
    instructions: tuple[str, ...]
    videos: Mapping[str, tuple[Path, tuple[int, int]]]

    def __len__(self) -> int:
        return len(self.timestamps_s)

    def frames(self, camera_key: str) -> Iterator[UInt8Array]:
        """Decode one camera's frames in order, holding one at a time.

        Args:
            camera_key: A key of `videos`.

        Yields:
            `len(self)` RGB frames, uint8, shape (height, width, 3).

        Raises:
            DatasetError: No such camera, or its video is missing, damaged, of another size or
                not as long as the episode.
        """
        if camera_key not in self.videos:
            raise DatasetError(
                f"the dataset has no camera {camera_key!r}; it has {_listed(self.videos)}."
            )
        path, size = self.videos[camera_key]
        yield from read_rgb_frames(path, len(self), size)


@dataclass(frozen=True)
class LeRobotDataset:
    """A dataset folder whose `meta` has been read and checked.

    Attributes:
        root: The dataset's folder.
        fps: Frames a second.
        episodes: In the order of `meta/episodes.jsonl`.
        tasks: Task index to instruction.
        cameras: Camera key to its source and size, in `modality.json`'s order.
        state_keys: State key to where its values stand, likewise.
        action_keys: Action key to where its values stand, likewise.
        annotations: Annotation key to parquet column; empty if the dataset has none.
        robot_type: LeRobot's name for the robot; empty if it has none.
    """

    root: Path
    fps: float
    episodes: tuple[EpisodeInfo, ...]
    tasks: Mapping[int, str]
    cameras: Mapping[str, Camera]
    state_keys: Mapping[str, VectorKey]
    action_keys: Mapping[str, VectorKey]
    annotations: Mapping[str, str]
    robot_type: str
    _info: Mapping[str, Any]

    @classmethod
    def open(cls, path: Path) -> LeRobotDataset:
        """Read and check a dataset's `meta` folder.

        Args:
            path: Folder with `meta`, `data` and `videos`.

        Raises:
            DatasetError: A file of `meta` is missing or damaged, the layout is not LeRobot v2.x,
                or `modality.json` names what `info.json` does not have.
        """
        meta = path / "meta"
        if not meta.is_dir():
            raise DatasetError(
                f"{path} has no folder 'meta', so it is not a LeRobot dataset; name the folder "
                "that holds meta, data and videos."
            )
        info = _read_json(meta / "info.json")
        version = str(info.get("codebase_version"))
        if not version.startswith("v2."):
            raise DatasetError(
                f"{meta / 'info.json'} says codebase_version {version}, but only v2.0 and v2.1 "
                "are read here; convert the dataset with LeRobot's own conversion scripts."
            )
        modality = _read_json(meta / "modality.json")
        features = _table(info, "features", meta / "info.json")
        source = meta / "modality.json"
        return cls(
            root=path,
            fps=_positive_number(info, "fps", meta / "info.json"),
            episodes=tuple(_read_episodes(meta / "episodes.jsonl")),
            tasks=_read_tasks(meta / "tasks.jsonl"),
            cameras={
                key: _camera(key, entry, features, source)
                for key, entry in _table(modality, "video", source, optional=True).items()
            },
            state_keys=_vector_keys(modality, "state", features, source),
            action_keys=_vector_keys(modality, "action", features, source),
            annotations={
                key: _annotation_column(key, entry, source)
                for key, entry in _table(modality, "annotation", source, optional=True).items()
            },
            robot_type=str(info.get("robot_type") or ""),
            _info=info,
        )

    def keys(self, modality: Modality) -> Mapping[str, VectorKey]:
        """Return `state_keys` or `action_keys`."""
        return self.state_keys if modality == "state" else self.action_keys

    def joint_names(self, modality: Modality, key: str) -> list[str] | None:
        """Return the recorded names of a key's dimensions, or None if the dataset has none.

        Args:
            modality: `state` or `action`.
            key: A key of that modality.

        Raises:
            DatasetError: No such key.
        """
        vectors = self.keys(modality)
        if key not in vectors:
            raise DatasetError(
                f"the dataset has no {modality} key {key!r}; it has {_listed(vectors)}."
            )
        vector = vectors[key]
        feature = self._info["features"].get(vector.column) or {}
        names = _flat_names(feature.get("names"))
        width = _vector_width(feature)
        if len(names) < vector.end or (width is not None and len(names) != width):
            return None
        return names[vector.span]

    def joint_names_or_default(self, modality: Modality, key: str) -> list[str]:
        """Return the recorded names of a key's dimensions, else `<key>_<i>`.

        Raises:
            DatasetError: No such key.
        """
        names = self.joint_names(modality, key)
        if names is not None:
            return names
        return [f"{key}_{index}" for index in range(self.keys(modality)[key].dim)]

    def episode(self, index: int, instruction_key: str | None = None) -> Episode:
        """Read one episode's joints, times and instructions.

        Args:
            index: Number of the episode.
            instruction_key: Annotation to take instructions from, with or without the leading
                `annotation.`; by default the first of `modality.json`, else `task_index`.

        Raises:
            DatasetError: The episode is unknown, or its parquet file is missing, damaged, lacks
                a column or contradicts `meta`.
        """
        known = {episode.index: episode for episode in self.episodes}
        if index not in known:
            raise DatasetError(
                f"{self.root} has no episode {index}; it has "
                f"{_ranges(sorted(known)) or 'none at all'}."
            )
        path = self._path("data_path", index)
        instruction_column = self._instruction_column(instruction_key)
        vectors = [*self.state_keys.values(), *self.action_keys.values()]
        columns = {vector.column for vector in vectors} | {"timestamp", instruction_column}
        table = _read_parquet(path, sorted(columns))
        if table.num_rows != known[index].length:
            raise DatasetError(
                f"{path} has {table.num_rows} rows, but meta/episodes.jsonl says that episode "
                f"{index} has {known[index].length} frames; one of the two is damaged: copy the "
                "dataset again."
            )
        if table.num_rows == 0:
            raise DatasetError(f"episode {index} of {self.root} has no frames; choose another.")
        matrices = {
            column: _matrix(table, column, path)
            for column in sorted({vector.column for vector in vectors})
        }
        timestamps_s = _matrix(table, "timestamp", path)[:, 0].astype(np.float64, copy=False)
        if not np.all(np.isfinite(timestamps_s)) or np.any(np.diff(timestamps_s) <= 0):
            raise DatasetError(
                f"the timestamps of {path} do not increase from row to row, so its frames cannot "
                "be put on a time line; record or convert the episode again."
            )
        return Episode(
            index=index,
            timestamps_s=timestamps_s,
            state=_select(matrices, self.state_keys, path),
            action=_select(matrices, self.action_keys, path),
            instructions=self._instructions(table, instruction_column, path),
            videos={
                key: (
                    self._path("video_path", index, camera.column),
                    (camera.height, camera.width),
                )
                for key, camera in self.cameras.items()
            },
        )

    def _path(self, template: str, index: int, video_key: str = "") -> Path:
        pattern = cast("str", self._info.get(template))
        try:
            chunk = index // int(self._info.get("chunks_size", 1000))
            if set("{}") & set(_PLACEHOLDER.sub("", pattern)):
                raise ValueError(pattern)
            name = pattern.format(episode_chunk=chunk, episode_index=index, video_key=video_key)
            if leads_outside(name):
                raise ValueError(name)
            return self.root / name
        except (AttributeError, LookupError, ValueError, TypeError, ArithmeticError):
            raise DatasetError(
                f"{self.root / 'meta/info.json'}: no file name can be made of {template} "
                f"{pattern!r} and chunks_size {self._info.get('chunks_size')!r}; compare them "
                "with a dataset that LeRobot v2.1 wrote."
            ) from None

    def _instruction_column(self, key: str | None) -> str:
        if key is None:
            return next(iter(self.annotations.values()), _TASK_INDEX_COLUMN)
        plain = key.removeprefix("annotation.")
        if plain not in self.annotations:
            raise DatasetError(
                f"the dataset has no annotation {key!r}; it has {_listed(self.annotations)}."
            )
        return self.annotations[plain]

    def _instructions(self, table: pa.Table, column: str, path: Path) -> tuple[str, ...]:
        values = table.column(column).to_pylist()
        if all(isinstance(value, str) for value in values):
            return tuple(values)
        instructions = []
        for row, value in enumerate(values):
            single = value[0] if isinstance(value, list) and len(value) == 1 else value
            if not isinstance(single, int) or single not in self.tasks:
                raise DatasetError(
                    f"row {row} of column {column!r} in {path} names task {single!r}, which "
                    f"meta/tasks.jsonl does not have; it has {_ranges(sorted(self.tasks))}."
                )
            instructions.append(self.tasks[single])
        return tuple(instructions)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except FileNotFoundError:
        hint = (
            " (GR00T's description of which dimension is which; Isaac-GR00T's guide to data "
            "preparation says how to write it)"
            if path.name == "modality.json"
            else ""
        )
        raise DatasetError(f"{path} is missing{hint}; add it to the dataset.") from None
    except (OSError, ValueError) as error:
        raise DatasetError(
            f"{path} cannot be read ({error}); copy the file again from where the dataset came "
            "from."
        ) from error
    if not isinstance(content, dict):
        raise DatasetError(f"{path} must hold a JSON object, not {content!r:.60}; correct it.")
    return content


def _read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(
            f"{path} cannot be read ({error}); every LeRobot v2.1 dataset has it: copy it again."
        ) from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DatasetError(
                f"line {number} of {path} is not JSON ({error}); copy the file again."
            ) from error
        if not isinstance(entry, dict):
            raise DatasetError(f"line {number} of {path} is not a JSON object; correct it.")
        yield number, entry


def _read_episodes(path: Path) -> Iterator[EpisodeInfo]:
    for number, entry in _read_json_lines(path):
        index, length, tasks = (entry.get(key) for key in ("episode_index", "length", "tasks"))
        if not isinstance(index, int) or not isinstance(length, int):
            raise DatasetError(
                f"line {number} of {path} needs whole numbers 'episode_index' and 'length'; "
                "correct it."
            )
        named = tasks if isinstance(tasks, list) else []
        yield EpisodeInfo(index, length, tuple(str(task) for task in named))


def _read_tasks(path: Path) -> dict[int, str]:
    tasks = {}
    for number, entry in _read_json_lines(path):
        index, task = entry.get("task_index"), entry.get("task")
        if not isinstance(index, int) or not isinstance(task, str):
            raise DatasetError(
                f"line {number} of {path} needs a whole number 'task_index' and a text 'task'; "
                "correct it."
            )
        tasks[index] = task
    return tasks


def _table(
    content: Mapping[str, Any], key: str, source: Path, *, optional: bool = False
) -> dict[str, Any]:
    value = content.get(key)
    if value is None and optional:
        return {}
    if not isinstance(value, dict):
        raise DatasetError(f"{source} needs a JSON object {key!r}, not {value!r:.60}; add it.")
    return value


def _positive_number(content: Mapping[str, Any], key: str, source: Path) -> float:
    value = content.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise DatasetError(f"{source} needs a positive number {key!r}, not {value!r:.60}.")
    return float(value)


def _vector_keys(
    modality: Mapping[str, Any], name: Modality, features: Mapping[str, Any], source: Path
) -> dict[str, VectorKey]:
    keys = {}
    for key, entry in _table(modality, name, source).items():
        where = f"{source}: {name}.{key}"
        if not isinstance(entry, dict):
            raise DatasetError(f"{where} must be a JSON object; correct it.")
        start, end = entry.get("start"), entry.get("end")
        if not isinstance(start, int) or not isinstance(end, int) or not 0 <= start < end:
            raise DatasetError(
                f"{where} needs whole numbers 0 <= start < end, not {start!r} and {end!r}."
            )
        column = str(entry.get("original_key") or _DEFAULT_COLUMN[name])
        feature = features.get(column)
        if not isinstance(feature, dict):
            raise DatasetError(
                f"{where} reads column {column!r}, which info.json does not have among its "
                f"features ({_listed(features)}); correct 'original_key'."
            )
        width = _vector_width(feature)
        if width is not None and end > width:
            raise DatasetError(
                f"{where} ends at dimension {end}, but column {column!r} has {width}; correct it."
            )
        keys[key] = VectorKey(column, start, end)
    return keys


def _vector_width(feature: Mapping[str, Any]) -> int | None:
    shape = feature.get("shape")
    if isinstance(shape, list) and len(shape) == 1 and isinstance(shape[0], int):
        return shape[0]
    return None


def _annotation_column(key: str, entry: object, source: Path) -> str:
    if not isinstance(entry, (dict, type(None))):
        raise DatasetError(f"{source}: annotation.{key} must be a JSON object; correct it.")
    return str((entry or {}).get("original_key") or f"annotation.{key}")


def _camera(key: str, entry: object, features: Mapping[str, Any], source: Path) -> Camera:
    column = f"observation.images.{key}"
    if isinstance(entry, dict) and entry.get("original_key"):
        column = str(entry["original_key"])
    feature = features.get(column)
    if not isinstance(feature, dict):
        raise DatasetError(
            f"{source}: video.{key} reads {column!r}, which info.json does not have among its "
            f"features ({_listed(features)}); correct 'original_key'."
        )
    if feature.get("dtype") != "video":
        raise DatasetError(
            f"camera {key!r} ({column}) is stored as {feature.get('dtype')!r}, but GR00T's layout "
            "stores videos; convert the dataset with LeRobot."
        )
    shape, names = feature.get("shape"), _flat_names(feature.get("names"))
    if not (isinstance(shape, list) and len(shape) == 3 and all(_is_size(v) for v in shape)):
        raise DatasetError(
            f"camera {key!r} ({column}) needs a shape of three sizes in info.json, not {shape!r}."
        )
    if "height" in names and "width" in names and len(names) == 3:
        return Camera(column, shape[names.index("height")], shape[names.index("width")])
    if shape[0] in (1, 3) and shape[2] not in (1, 3):
        return Camera(column, shape[1], shape[2])
    return Camera(column, shape[0], shape[1])


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _flat_names(names: object) -> list[str]:
    """Flatten LeRobot's forms: a list, a list in a list, `{"motors": [...]}`, `{"x": 0, ...}`."""
    if isinstance(names, str):
        return [names]
    if isinstance(names, dict):
        if all(isinstance(value, int) for value in names.values()):
            return [str(name) for name in sorted(names, key=names.__getitem__)]
        return _flat_names(list(names.values()))
    if isinstance(names, list):
        return [flat for name in names for flat in _flat_names(name)]
    return []


def _read_parquet(path: Path, columns: Sequence[str]) -> pa.Table:
    try:
        with pa.parquet.ParquetFile(path) as file:
            present = file.schema_arrow.names
            missing = [column for column in columns if column not in present]
            if missing:
                raise DatasetError(
                    f"{path} lacks the column {_listed(missing)}; it has {_listed(present)}. "
                    "Correct 'original_key' in meta/modality.json or convert the episode again."
                )
            return file.read(columns=list(columns))
    except FileNotFoundError:
        raise DatasetError(
            f"{path} is missing, so the episode cannot be read; copy it again from where the "
            "dataset came from."
        ) from None
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(
            f"{path} cannot be read ({error}); the file is truncated or damaged: copy it again "
            "from where the dataset came from."
        ) from error


def _matrix(table: pa.Table, column: str, path: Path) -> NDArray[Any]:
    """Return a column of numbers or of equally long vectors in its own dtype, shape (T, D)."""
    chunks = table.column(column)
    values = pa.concat_arrays(chunks.chunks) if chunks.num_chunks != 1 else chunks.chunk(0)
    nested = (
        pa.types.is_list(values.type)
        or pa.types.is_large_list(values.type)
        or pa.types.is_fixed_size_list(values.type)
    )
    flat = pa.compute.list_flatten(values) if nested else values
    widths = (
        np.unique(pa.compute.list_value_length(values).to_numpy(zero_copy_only=False))
        if nested and values.null_count == 0
        else np.array([1])
    )
    numeric = pa.types.is_floating(flat.type) or pa.types.is_integer(flat.type)
    if not numeric or values.null_count or flat.null_count or len(widths) != 1:
        raise DatasetError(
            f"column {column!r} of {path} must hold one vector of numbers of the same length in "
            f"each row, without gaps; it holds {values.type}. Convert the episode again."
        )
    matrix: NDArray[Any] = flat.to_numpy(zero_copy_only=False)
    return matrix.reshape(table.num_rows, int(widths[0]))


def _select(
    matrices: Mapping[str, NDArray[Any]], keys: Mapping[str, VectorKey], path: Path
) -> dict[str, Float32Array]:
    selected = {}
    for key, vector in keys.items():
        matrix = matrices[vector.column]
        if matrix.shape[1] < vector.end:
            raise DatasetError(
                f"key {key!r} takes dimensions {vector.start} to {vector.end} of column "
                f"{vector.column!r}, which has {matrix.shape[1]} in {path}; correct "
                "meta/modality.json."
            )
        selected[key] = np.ascontiguousarray(matrix[:, vector.span], np.float32)
    return selected


def _listed(names: Mapping[str, Any] | Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names) or "none"


def _ranges(numbers: Sequence[int]) -> str:
    """Write sorted numbers as `0-2, 5`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
