"""Exchange with the first public INT8 port of GR00T N1.6: `calib_data.npz` and `metadata.json`.

Owns: that format, in both directions. Must not import ROS, torch or an engine. Source: Isaac-GR00T
in alansrobotlab2's fork, branch orin-nx-16gb-int8-tensorrt-workflow (commit 8bcfcfd),
scripts/deployment: `collect_calibration_data.py` writes it, `build_tensorrt_engine.py` reads it.

One folder holds one target. `backbone`: `input_ids` and `attention_mask` int64 (N, S),
`pixel_values` float32 (N * cameras, 3, H, W). `dit`: `sa_embs` (N, 1 + horizon, E) and `vl_embs`
(N, S, D) float32, `timestep` int64 (N,), `image_mask` and `backbone_attention_mask` bool (N, S),
one row a denoising step. Sequences of different lengths are padded with zeros at the end, token
ids too; `metadata.json` says whether any were. `N` is its `num_samples`.

The two targets are the reference graphs. Deployed graphs have other inputs, for which that port
has no format: both directions refuse them.

The format does not say which checkpoint it is of, so an import is taken at the user's word; shapes
are compared with the bundle's graphs. Both directions hold one row in memory: a set of 500 is
gigabytes.
"""

from __future__ import annotations

import contextlib
import json
import math
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from groot_int8_ros.capture.feeds import Feeds
from groot_int8_ros.capture.sample import (
    BACKBONE_NAMES,
    DIT_NAMES,
    BackboneInputs,
    CaptureSample,
    DitInputs,
)
from groot_int8_ros.capture.store import CaptureMeta, CaptureStore, CaptureWriter
from groot_int8_ros.errors import CaptureError, OutputError
from groot_int8_ros.policy.bundle import Manifest
from groot_int8_ros.policy.families import REFERENCE
from groot_int8_ros.policy.files import atomic_directory, read_json, refuse_occupied
from groot_int8_ros.policy.npz import naming_damage, npz_entries, read_array_header

ARCHIVE_FILE = "calib_data.npz"
METADATA_FILE = "metadata.json"
# In the order in which the first port writes them.
_KEYS: Mapping[str, tuple[str, ...]] = {
    "backbone": ("input_ids", "attention_mask", "pixel_values"),
    "dit": ("sa_embs", "vl_embs", "timestep", "image_mask", "backbone_attention_mask"),
}
assert all(set(_KEYS[g]) == set(n) for g, n in (("backbone", BACKBONE_NAMES), ("dit", DIT_NAMES)))
_DTYPES: Mapping[str, str] = {
    "input_ids": "int64",
    "attention_mask": "int64",
    "pixel_values": "float32",
    "sa_embs": "float32",
    "vl_embs": "float32",
    "timestep": "int64",
    "image_mask": "bool",
    "backbone_attention_mask": "bool",
}
_AXES: Mapping[str, int] = {
    "input_ids": 2,
    "attention_mask": 2,
    "pixel_values": 4,
    "sa_embs": 3,
    "vl_embs": 3,
    "timestep": 1,
    "image_mask": 2,
    "backbone_attention_mask": 2,
}
# Tensors whose first axis after the batch is the sequence.
_SEQUENCES = {"input_ids", "attention_mask", "vl_embs", "image_mask", "backbone_attention_mask"}


def export_community(store: CaptureStore, graph: str, folder: Path) -> None:
    """Write one graph's inputs in the first port's format.

    Args:
        store: The samples.
        graph: `backbone` or `dit`.
        folder: New folder for both files.

    Raises:
        CaptureError: The samples lack the graph's inputs.
        OutputError: `folder` is occupied or cannot be written; nothing is left behind.
    """
    _refuse_deployed(store.meta.family, str(store.folder))
    feeds = store.feeds(graph)
    refuse_occupied(folder)
    shapes = _shapes(feeds, graph)
    with atomic_directory(folder) as temporary:
        with _naming(folder), zipfile.ZipFile(temporary / ARCHIVE_FILE, "w") as archive:
            for name in _KEYS[graph]:
                with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
                    _write_rows(stream, feeds, name, shapes[name])
        metadata = json.dumps(_metadata(feeds, graph, shapes), indent=2)
        (temporary / METADATA_FILE).write_text(metadata, encoding="utf-8")


def _refuse_deployed(family: str, what: str) -> None:
    if family != REFERENCE:
        raise CaptureError(
            f"{what} is of {family} graphs, and {ARCHIVE_FILE} holds inputs of the reference "
            "graphs alone: export a bundle with --graphs reference, and capture with that one"
        )


def _shapes(feeds: Feeds, graph: str) -> dict[str, tuple[int, ...]]:
    """Return the shape of each array: all rows, padded to the longest."""
    rows = dict.fromkeys(_KEYS[graph], 0)
    shapes: dict[str, tuple[int, ...]] = {}
    for feed in feeds:
        for name in _KEYS[graph]:
            array = feed[name]
            rows[name] += len(array)
            longest = shapes.setdefault(name, array.shape[1:])
            fits = longest == array.shape[1:]
            if name in _SEQUENCES and longest[1:] == array.shape[2:]:
                shapes[name] = (max(longest[0], array.shape[1]), *longest[1:])
            elif not fits:
                raise CaptureError(
                    f"{name} has the shapes {list(longest)} and {list(array.shape[1:])}; the "
                    "format holds one. The samples are of different robots."
                )
    return {name: (rows[name], *shape) for name, shape in shapes.items()}


def _write_rows(stream: IO[bytes], feeds: Feeds, name: str, shape: tuple[int, ...]) -> None:
    dtype = np.dtype(_DTYPES[name])
    header = {"descr": npy_format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    npy_format.write_array_header_1_0(stream, header)
    for feed in feeds:
        rows = feed[name].astype(dtype, copy=False)
        padding = [(0, 0)] * rows.ndim
        if name in _SEQUENCES:
            padding[1] = (0, shape[1] - rows.shape[1])
        stream.write(np.ascontiguousarray(np.pad(rows, padding)).data)


def _metadata(feeds: Feeds, graph: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    def padded(name: str) -> bool:
        return len({feed[name].shape[1] for feed in feeds}) > 1

    if graph == "backbone":
        return {
            "capture_target": "backbone",
            "num_samples": len(feeds),
            **{f"{name}_shape": list(shapes[name]) for name in _KEYS["backbone"]},
            "padded_sequences": padded("input_ids"),
        }
    return {
        "capture_target": "dit",
        "num_samples": len(feeds),
        "sa_embs_shape": list(shapes["sa_embs"]),
        "vl_embs_shape": list(shapes["vl_embs"]),
        "has_image_mask": True,
        "has_backbone_mask": True,
        "padded_sa_embs": False,
        "padded_vl_embs": padded("vl_embs"),
    }


@dataclass(frozen=True)
class Imported:
    """What an import gave.

    Attributes:
        store: The new store.
        graph: Whose inputs it holds.
        left_over: Rows at the end that are no whole observation, as a limit on samples leaves.
    """

    store: CaptureStore
    graph: str
    left_over: int


def import_community(archive: Path, manifest: Manifest, folder: Path) -> Imported:
    """Read the first port's format into a store.

    Args:
        archive: `calib_data.npz`; `metadata.json` is read if it lies beside it.
        manifest: Of the bundle whose checkpoint the data were captured with, by the user's word.
        folder: New folder of the store.

    Raises:
        CaptureError: A key is missing, the file is damaged or empty, or tensors or timesteps are
            not those of the bundle's graphs; nothing is left behind.
        OutputError: `folder` is occupied or cannot be written.
    """
    _refuse_deployed(manifest.family, "the bundle")
    refuse_occupied(folder)
    meta = CaptureMeta.of_bundle(manifest, f"import of {archive.name}")
    try:
        with _Archive(archive) as opened, CaptureWriter(folder, meta) as writer:
            read = _backbone_samples if opened.graph == "backbone" else _dit_samples
            left_over = [0]
            for sample in read(opened, manifest, left_over):
                writer.add(sample)
            graph = opened.graph
    except BaseException:
        _remove_store(folder)
        raise
    store = CaptureStore.open(folder, verify_hashes=False)
    return Imported(store, graph, left_over[0])


def _remove_store(folder: Path) -> None:
    for path in (*folder.glob("shard-*.npz"), *folder.glob("capture.json")):
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


class _Archive:
    """An open `calib_data.npz`, read row by row."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stack = contextlib.ExitStack()
        if not path.is_file():
            raise CaptureError(f"there is no {path}; name a {ARCHIVE_FILE}.")
        with self._stack:
            with self.naming_damage():
                self._zip = self._stack.enter_context(zipfile.ZipFile(path))
                self._entries = npz_entries(self._zip)
            # What either target alone has tells which one it is.
            self.graph = (
                "dit" if self._entries.keys() & {"sa_embs", "vl_embs", "timestep"} else "backbone"
            )
            missing = [name for name in _KEYS[self.graph] if name not in self._entries]
            if missing:
                raise CaptureError(
                    f"{path} lacks {', '.join(missing)}. A set for the backbone has "
                    f"{', '.join(_KEYS['backbone'])}; one for the DiT has "
                    f"{', '.join(_KEYS['dit'])}. Capture it again with them."
                )
            with self.naming_damage():
                self._check_shapes()
            self.metadata = self._metadata()
            self._stack = self._stack.pop_all()

    def __enter__(self) -> _Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _metadata(self) -> Mapping[str, Any]:
        path = self.path.with_name(METADATA_FILE)
        if not path.is_file():
            return {}
        try:
            content = read_json(path)
            target = content.get("capture_target", self.graph)
        except (OSError, ValueError, AttributeError) as error:
            raise CaptureError(f"{path} is damaged ({error}); copy it again.") from error
        if target != self.graph:
            raise CaptureError(
                f"{path} says capture_target {target!r}, but {self.path.name} holds inputs of "
                f"{self.graph}; the two files do not belong together."
            )
        return dict(content)

    @property
    def padded(self) -> bool:
        """Whether sequences may end in padding."""
        name = "padded_sequences" if self.graph == "backbone" else "padded_vl_embs"
        return bool(self.metadata.get(name, True))

    def _check_shapes(self) -> None:
        rows = set()
        for name in _KEYS[self.graph]:
            shape = self.shape(name)
            if len(shape) != _AXES[name]:
                raise ValueError(f"{name} has shape {shape} instead of {_AXES[name]} axes")
            if name != "pixel_values" or not shape[0]:
                rows.add(shape[0])
        if len(rows) > 1:
            raise ValueError(f"its arrays have {' and '.join(map(str, sorted(rows)))} rows")
        if rows == {0}:
            raise CaptureError(
                f"{self.path} holds no samples (0 rows): whatever wrote it ended before its first "
                "observation. Capture it again."
            )

    def shape(self, name: str) -> tuple[int, ...]:
        with self.naming_damage(), self._zip.open(self._entries[name]) as stream:
            return _header(stream, self._entries[name].file_size)[0]

    def rows(self, name: str, together: int = 1) -> Iterator[NDArray[Any]]:
        """Yield an array's rows, `together` at a time, in the type that it should have."""
        with self.naming_damage(), self._zip.open(self._entries[name]) as stream:
            shape, dtype = _header(stream, self._entries[name].file_size)
            size = together * math.prod(shape[1:]) * dtype.itemsize
            for _ in range(shape[0] // together):
                data = stream.read(size)
                if len(data) != size:
                    raise ValueError(f"{name} is cut off")
                row = np.frombuffer(data, dtype).reshape(together, *shape[1:])
                yield row.astype(_DTYPES[name])

    @contextlib.contextmanager
    def naming_damage(self) -> Iterator[None]:
        try:
            with naming_damage():
                yield
        except (OSError, ValueError) as error:
            raise CaptureError(
                f"{self.path} cannot be read ({error}); it is damaged or was not written by "
                "np.savez: copy it again."
            ) from error


def _header(stream: IO[bytes], file_size: int) -> tuple[tuple[int, ...], np.dtype[Any]]:
    shape, fortran_order, dtype = read_array_header(stream)
    if dtype.kind not in "fiub" or fortran_order or not shape:
        raise ValueError(f"an array of {dtype} {shape}, in Fortran order: {fortran_order}")
    promised = math.prod(shape) * dtype.itemsize
    # A row without values could be there any number of times.
    if 0 in shape[1:] or promised != file_size - stream.tell():
        raise ValueError(f"an array of {dtype} {shape} in {file_size} bytes")
    return shape, dtype


def _backbone_samples(
    archive: _Archive, manifest: Manifest, _: list[int]
) -> Iterator[CaptureSample]:
    count, frames = archive.shape("input_ids")[0], archive.shape("pixel_values")[0]
    if frames % count:
        raise CaptureError(
            f"{archive.path} has {frames} images for {count} samples, which is no whole number of "
            "cameras; the file is incomplete."
        )
    rows = zip(
        archive.rows("input_ids"),
        archive.rows("attention_mask"),
        archive.rows("pixel_values", together=frames // count),
        strict=True,
    )
    for index, (input_ids, attention_mask, pixel_values) in enumerate(rows):
        end = _end(attention_mask[0]) if archive.padded else None
        inputs = BackboneInputs(input_ids[0, :end], attention_mask[0, :end], pixel_values)
        feed = {
            "input_ids": inputs.input_ids[None],
            "attention_mask": inputs.attention_mask[None],
            "pixel_values": pixel_values,
        }
        _check_shapes(archive.path, manifest, "backbone", feed)
        yield CaptureSample("", index, f"{archive.path.name} row {index}", backbone=inputs)


def _dit_samples(
    archive: _Archive, manifest: Manifest, left_over: list[int]
) -> Iterator[CaptureSample]:
    names = _KEYS["dit"]
    steps = manifest.denoising_steps
    group: list[dict[str, NDArray[Any]]] = []
    number = 0
    for index, arrays in enumerate(zip(*(archive.rows(name) for name in names), strict=True)):
        row = dict(zip(names, arrays, strict=True))
        same = bool(group) and (
            int(row["timestep"][0]) > int(group[-1]["timestep"][0])
            # A NaN is refused by its name later, and is no other observation.
            and np.array_equal(row["vl_embs"], group[0]["vl_embs"], equal_nan=True)
        )
        if group and not same:
            raise CaptureError(
                f"{archive.path}: the observation that ends before row {index} has {len(group)} "
                f"denoising steps, but the bundle has {steps}. Export the bundle with "
                f"--denoising-steps {len(group)}, or capture again."
            )
        group.append(row)
        if len(group) == steps:
            yield _dit_sample(archive, manifest, group, number)
            group, number = [], number + 1
    left_over[0] = len(group)


def _dit_sample(
    archive: _Archive, manifest: Manifest, group: list[dict[str, NDArray[Any]]], number: int
) -> CaptureSample:
    first = group[0]
    found = tuple(int(row["timestep"][0]) for row in group)
    if found != manifest.timesteps:
        raise CaptureError(
            f"{archive.path}: observation {number} has the timesteps {_listed(found)}, but the "
            f"bundle's {manifest.denoising_steps} denoising steps have "
            f"{_listed(manifest.timesteps)}. Capture it again with as many steps, or export the "
            "bundle from the checkpoint that it was captured with."
        )
    end = _end(first["backbone_attention_mask"][0]) if archive.padded else None
    inputs = DitInputs(
        vl_embs=first["vl_embs"][0, :end],
        image_mask=first["image_mask"][0, :end],
        backbone_attention_mask=first["backbone_attention_mask"][0, :end],
        sa_embs=np.concatenate([row["sa_embs"] for row in group]),
        timestep=np.concatenate([row["timestep"] for row in group]),
    )
    feed = {**first, "vl_embs": inputs.vl_embs[None]}
    _check_shapes(
        archive.path, manifest, "dit", {n: feed[n] for n in ("sa_embs", "vl_embs", "timestep")}
    )
    return CaptureSample("", number, f"{archive.path.name} observation {number}", dit=inputs)


def _listed(timesteps: tuple[int, ...]) -> str:
    return ", ".join(map(str, timesteps))


def _end(mask: NDArray[Any]) -> int:
    """Return where padding at the end begins."""
    real = np.flatnonzero(mask)
    return int(real[-1]) + 1 if real.size else len(mask)


def _check_shapes(
    path: Path, manifest: Manifest, graph: str, feed: Mapping[str, NDArray[Any]]
) -> None:
    for name, array in feed.items():
        spec = manifest.graphs[graph].inputs[name]
        if not spec.fits(array.shape):
            raise CaptureError(
                f"{path}: {name} is {list(array.shape)}, but the bundle's {graph} takes "
                f"{spec.describe()}; the data are of another model or robot."
            )


@contextlib.contextmanager
def _naming(folder: Path) -> Iterator[None]:
    # zipfile reports a full disk while it closes, sometimes as an error of its own.
    try:
        yield
    except (zipfile.LargeZipFile, ValueError) as error:
        raise OutputError(f"cannot write {folder}: {error}. Nothing was left behind.") from error
