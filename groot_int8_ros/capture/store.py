"""The capture store: a folder of shards and an index that is always true.

Owns: `CaptureWriter`, `CaptureStore`, the index's schema. Must not import ROS, torch or an engine.

Layout::

    capture.json        schema version, what the samples were captured for, every shard's SHA-256
                        and samples, whether the run ended as it should
    shard-00000.npz     arrays named `<position>/<flat name>`; see `sample.CaptureSample.arrays`

Both are written beside their place and renamed, the shard before the index: whatever kills the
writer, the index names whole shards only, and at most the samples since the last one are lost. The
writer holds `samples_per_shard` samples in memory and a reader one, whatever the run's length.

A live recorder replaces kept samples by better ones (`selection`). A sample in a written shard is
only struck from the index; a shard that has lost half of its samples hands the others over to the
next shard and is deleted, so that the folder stays below about twice the size of what it holds.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from groot_int8_ros import __version__
from groot_int8_ros.capture.feeds import Feeds, backbone_feeds, deployed_feeds, dit_feeds
from groot_int8_ros.capture.sample import CaptureSample, check_sample, sample_from_arrays
from groot_int8_ros.errors import CaptureError, OutputError
from groot_int8_ros.policy.bundle import Bundle, Manifest
from groot_int8_ros.policy.families import DEPLOYED, LARGE_GRAPHS
from groot_int8_ros.policy.files import (
    RUN_AGAIN,
    atomic_file,
    check_types,
    read_json,
    refuse_occupied,
    remove_leftovers,
    sha256_of_file,
)
from groot_int8_ros.policy.npz import read_npz

SCHEMA_VERSION = 2
INDEX_FILE = "capture.json"
DEFAULT_SAMPLES_PER_SHARD = 16
LIVE = "live"

# What the index's JSON must hold.
_META_TYPES: Mapping[str, type | tuple[type, ...]] = {
    "checkpoint_sha256": str,
    "family": str,
    "embodiment": str,
    "action_horizon": int,
    "denoising_steps": int,
    "origin": str,
    "seed": (int, type(None)),
    "engine": str,
    "precision": (dict, type(None)),
}
_SAMPLE_TYPES: Mapping[str, type | tuple[type, ...]] = {
    "position": int,
    "sha256": str,
    "instruction": str,
    "stamp_ns": int,
    "source": str,
    "seed": (int, type(None)),
    "graphs": tuple,
}

_CAPTURE_AGAIN = "Capture again: groot-int8 calibrate --bundle BUNDLE --dataset DATASET"


@dataclass(frozen=True)
class CaptureMeta:
    """What a store's samples were captured for.

    Attributes:
        checkpoint_sha256: The bundle's.
        family: The bundle's: which graphs' inputs the samples hold, where they hold any.
        embodiment: The bundle's.
        action_horizon: Action tokens that the model runs.
        denoising_steps: Euler steps.
        origin: Dataset, bag or `LIVE`, for a person.
        seed: Seed of the noise, or None where samples have their own.
        engine: Engine that computed the tensors; empty where none did.
        precision: Graph to the precision it was run in; empty where none was run.
    """

    checkpoint_sha256: str
    family: str
    embodiment: str
    action_horizon: int
    denoising_steps: int
    origin: str
    seed: int | None = None
    engine: str = ""
    precision: Mapping[str, str] | None = None

    @classmethod
    def of_bundle(
        cls, manifest: Manifest, origin: str, *, seed: int | None = None, engine: str = ""
    ) -> CaptureMeta:
        """Return the description of samples for a bundle.

        Args:
            manifest: The bundle's.
            origin: See `CaptureMeta`.
            seed: See `CaptureMeta`.
            engine: Engine that runs the bundle's graphs to fill in tensors; empty if none does.
        """
        precision = {name: graph.precision for name, graph in manifest.graphs.items()}
        return cls(
            checkpoint_sha256=manifest.checkpoint_sha256,
            family=manifest.family,
            embodiment=manifest.embodiment,
            action_horizon=manifest.action_horizon,
            denoising_steps=manifest.denoising_steps,
            origin=origin,
            seed=seed,
            engine=engine,
            precision=precision if engine else None,
        )

    def check_bundle(self, manifest: Manifest, where: str) -> None:
        """Refuse a bundle whose observations the samples are not.

        Args:
            manifest: The bundle's; its graphs may be of another family.
            where: The store, for the message.

        Raises:
            CaptureError: Checkpoint, embodiment, horizon or denoising steps differ.
        """
        for name in ("checkpoint_sha256", "embodiment", "action_horizon", "denoising_steps"):
            mine, theirs = getattr(self, name), getattr(manifest, name)
            if mine != theirs:
                raise CaptureError(
                    f"{where} was captured with {name} {_short(mine)}, but the bundle has "
                    f"{_short(theirs)}: its samples say nothing about this bundle. "
                    + _CAPTURE_AGAIN
                )


@dataclass(frozen=True)
class SampleRecord:
    """A sample as the index lists it.

    Attributes:
        position: Its number within the shard's file.
        sha256: Hash of its content.
        instruction: See `CaptureSample`.
        stamp_ns: See `CaptureSample`.
        source: See `CaptureSample`.
        seed: See `CaptureSample`.
        graphs: Graphs whose inputs it has.
    """

    position: int
    sha256: str
    instruction: str
    stamp_ns: int
    source: str
    seed: int | None
    graphs: tuple[str, ...]


@dataclass(frozen=True)
class Shard:
    """One file of samples.

    Attributes:
        file: Its name.
        sha256: Hash of the file.
        samples: Those that count, in order of their positions.
    """

    file: str
    sha256: str
    samples: tuple[SampleRecord, ...]


@dataclass(frozen=True)
class Index:
    """What `capture.json` says.

    Attributes:
        meta: What the samples were captured for.
        shards: In order of their files.
        finished: Whether the run ended as it should.
        offered: Observations among which the samples were chosen.
    """

    meta: CaptureMeta
    shards: tuple[Shard, ...] = ()
    finished: bool = False
    offered: int = 0

    @property
    def content_sha256(self) -> str:
        """Hash of the set: of checkpoint and samples, whatever their order and files."""
        samples = sorted(sample.sha256 for shard in self.shards for sample in shard.samples)
        text = "\n".join([self.meta.checkpoint_sha256, *samples])
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> str:
        """Return the file's text."""
        content = {
            "schema_version": SCHEMA_VERSION,
            "writer_version": __version__,
            "finished": self.finished,
            "offered": self.offered,
            "content_sha256": self.content_sha256,
            "meta": asdict(self.meta),
            "shards": [asdict(shard) for shard in self.shards],
        }
        return json.dumps(content, indent=1) + "\n"


class CaptureWriter:
    """Writes a store.

    As a context manager it finishes the store when the block ends well. When the block raises, the
    samples so far are written and the store stays marked as unfinished; without any it is removed.
    """

    def __init__(
        self,
        folder: Path,
        meta: CaptureMeta,
        *,
        samples_per_shard: int = DEFAULT_SAMPLES_PER_SHARD,
        resume: bool = False,
        go_on: str | None = None,
    ) -> None:
        """Begin a store, or go on with one.

        Args:
            folder: New or empty; with `resume` it may hold a store of the same `meta`.
            meta: What the samples are captured for.
            samples_per_shard: Samples held in memory, and lost at most when the process is killed.
            resume: Go on with what `folder` holds.
            go_on: What a user does, once there is room, to go on with the samples of a store whose
                next write failed; None where nobody keeps such a store.

        Raises:
            OutputError: `folder` is occupied or cannot be written.
            CaptureError: What `folder` holds is damaged or of another `meta`.
        """
        if samples_per_shard < 1:
            raise ValueError(f"samples_per_shard must be at least 1, not {samples_per_shard}")
        self.folder = folder
        self._samples_per_shard = samples_per_shard
        self._go_on = go_on
        self._index = Index(meta)
        if resume and (folder / INDEX_FILE).is_file():
            self._index = _resumed(folder, meta)
        else:
            refuse_occupied(folder)
        # Number of a sample, as `add` gave it, to where it is.
        self._pending: dict[int, CaptureSample] = {}
        self._written: dict[int, tuple[str, int]] = {}
        self._retired: set[str] = set()
        for shard in self._index.shards:
            for record in shard.samples:
                self._written[len(self._written)] = shard.file, record.position
        self._next_sample = len(self._written)
        self._next_shard = 1 + max(
            (_shard_number(shard.file) for shard in self._index.shards), default=-1
        )
        remove_leftovers(folder)
        self._remove_strays()
        self._write_index(self._index)

    def __enter__(self) -> CaptureWriter:
        """Return the writer."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Finish the store, or keep what there is of it."""
        if error is None:
            self.finish()
            return
        # The error that is under way says what went wrong; a second one would only hide it.
        with contextlib.suppress(OutputError):
            self.flush()
        if not self._index.shards:
            self._remove()

    def __len__(self) -> int:
        """Samples kept so far."""
        return len(self._pending) + len(self._written)

    @property
    def sources(self) -> frozenset[tuple[str, int]]:
        """Source and stamp of every sample in a written shard: what a resumed run has already."""
        return frozenset(
            (record.source, record.stamp_ns)
            for shard in self._index.shards
            for record in shard.samples
        )

    @property
    def is_full(self) -> bool:
        """Whether enough samples are held for a shard."""
        return len(self._pending) >= self._samples_per_shard

    def add(self, sample: CaptureSample) -> int:
        """Add a sample, and write a shard if it is full.

        Returns:
            The sample's number, for `discard`.

        Raises:
            CaptureError: The sample has NaN or does not fit together; nothing was added.
            OutputError: A shard could not be written. Every earlier shard is whole, the samples
                since are still held: `flush` tries again.
        """
        number = self.hold(sample)
        if self.is_full:
            self.flush()
        return number

    def hold(self, sample: CaptureSample) -> int:
        """Add a sample without writing anything; the caller flushes when `is_full`.

        Returns:
            The sample's number, for `discard`.

        Raises:
            CaptureError: The sample has NaN or does not fit together; nothing was added.
        """
        check_sample(sample)
        steps = self._index.meta.denoising_steps
        if sample.dit is not None and len(sample.dit.timestep) != steps:
            raise CaptureError(
                f"{sample.source}: it has {len(sample.dit.timestep)} denoising steps, but the "
                f"store {self.folder} is for {steps}. Capture it with the same bundle."
            )
        number = self._next_sample
        self._next_sample += 1
        self._pending[number] = sample
        return number

    def discard(self, number: int) -> None:
        """Drop a sample that `add` numbered; a written one leaves the index with the next shard.

        Raises:
            CaptureError: A shard that is to be cleared out cannot be read any more.
        """
        if self._pending.pop(number, None) is not None:
            return
        file, _ = self._written.pop(number)
        left = [n for n, (name, _) in self._written.items() if name == file]
        if 2 * len(left) <= self._samples_per_shard:
            for other in left:
                # It stays in its old shard too, until the index names the new one.
                self._pending[other] = _load(
                    self.folder, self._index.meta.family, *self._record(other)
                )
                del self._written[other]
            self._retired.add(file)

    def flush(self, offered: int | None = None) -> None:
        """Write what is held, and the index.

        Args:
            offered: See `Index`; None leaves it as it is.

        Raises:
            OutputError: The disk is full or the folder cannot be written.
        """
        places = set(self._written.values())
        kept = {
            shard.file: replace(
                shard,
                samples=tuple(r for r in shard.samples if (shard.file, r.position) in places),
            )
            for shard in self._index.shards
            if shard.file not in self._retired
        }
        written = dict(self._written)
        if self._pending:
            shard = self._write_shard()
            kept[shard.file] = shard
            for record, number in zip(shard.samples, self._pending, strict=True):
                written[number] = shard.file, record.position
        self._write_index(
            replace(
                self._index,
                shards=tuple(shard for shard in kept.values() if shard.samples),
                offered=self._index.offered if offered is None else offered,
            )
        )
        self._pending.clear()
        self._written = written
        self._retired.clear()
        self._remove_strays()

    def finish(self, offered: int | None = None) -> None:
        """Write what is held and mark the store as finished.

        Raises:
            OutputError: As `flush`.
            CaptureError: There is no sample; the empty store is removed.
        """
        self.flush(offered)
        if not self._written:
            self._remove()
            raise CaptureError(
                f"no sample was captured, so {self.folder} is not written. Check that the source "
                "has observations with every camera, joint and an instruction."
            )
        self._write_index(replace(self._index, finished=True))

    def _record(self, number: int) -> tuple[Shard, SampleRecord]:
        file, position = self._written[number]
        for shard in self._index.shards:
            for record in shard.samples:
                if (shard.file, record.position) == (file, position):
                    return shard, record
        raise AssertionError(f"{file} {position} is not in the index")

    def _write_shard(self) -> Shard:
        file = f"shard-{self._next_shard:05d}.npz"
        arrays = {
            f"{position:05d}/{name}": array
            for position, sample in enumerate(self._pending.values())
            for name, array in sample.arrays().items()
        }
        with atomic_file(self.folder / file, advice=self._advice()) as temporary:
            np.savez(temporary, **arrays)  # type: ignore[arg-type]
            sha256 = sha256_of_file(temporary)
        self._next_shard += 1
        return Shard(
            file=file,
            sha256=sha256,
            samples=tuple(
                SampleRecord(
                    position=position,
                    sha256=sample.sha256(),
                    instruction=sample.instruction,
                    stamp_ns=sample.stamp_ns,
                    source=sample.source,
                    seed=sample.seed,
                    graphs=tuple(
                        graph
                        for graph in LARGE_GRAPHS[self._index.meta.family]
                        if sample.has(self._index.meta.family, graph)
                    ),
                )
                for position, sample in enumerate(self._pending.values())
            ),
        )

    def _write_index(self, index: Index) -> None:
        with atomic_file(self.folder / INDEX_FILE, advice=self._advice()) as temporary:
            temporary.write_text(index.to_json(), encoding="utf-8")
        self._index = index

    def _advice(self) -> str:
        kept = sum(len(shard.samples) for shard in self._index.shards)
        if not kept or self._go_on is None:
            return RUN_AGAIN
        return (
            f"The {kept} samples in {self.folder} that were written before are whole and can be "
            f"used. Free space, then {self._go_on}."
        )

    def _remove(self) -> None:
        """Remove a store that holds no sample, and shards that its index did not come to name."""
        (self.folder / INDEX_FILE).unlink(missing_ok=True)
        self._remove_strays()
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _remove_strays(self) -> None:
        # Shards that the index does not name: written, but killed before the index was.
        named = {shard.file for shard in self._index.shards}
        for path in self.folder.glob("shard-*.npz"):
            if path.name not in named:
                path.unlink(missing_ok=True)


class CaptureStore:
    """A store that was read and verified; see `CaptureStore.open`.

    Attributes:
        folder: Where it lies.
        index: What it holds.
    """

    def __init__(self, folder: Path, index: Index) -> None:
        """Take over a checked index; users call `CaptureStore.open`."""
        self.folder = folder
        self.index = index

    @classmethod
    def open(cls, folder: Path, *, verify_hashes: bool = True) -> CaptureStore:
        """Read a store's index and check its files.

        An unfinished store, whose writer was killed, is as usable as any; `index.finished` tells.

        Args:
            folder: The store.
            verify_hashes: Read every shard and compare its SHA-256; False only checks that it is
                there.

        Raises:
            CaptureError: The folder is no store, is empty, of another schema or damaged.
        """
        index = _read_index(folder)
        for shard in index.shards:
            path = folder / shard.file
            if not path.is_file():
                raise CaptureError(
                    f"the capture store lacks {path}. Copy the store again, or: " + _CAPTURE_AGAIN
                )
            if verify_hashes and sha256_of_file(path) != shard.sha256:
                raise CaptureError(
                    f"{path} is not the file that was captured (SHA-256 differs): it is damaged "
                    "or was changed. Copy the store again, or: " + _CAPTURE_AGAIN
                )
        if not index.shards:
            raise CaptureError(f"{folder} holds no samples. " + _CAPTURE_AGAIN)
        return cls(folder, index)

    def __len__(self) -> int:
        """Number of samples."""
        return sum(len(shard.samples) for shard in self.index.shards)

    @property
    def meta(self) -> CaptureMeta:
        """What the samples were captured for."""
        return self.index.meta

    @property
    def content_sha256(self) -> str:
        """Hash of the set of samples: the calibration hash of everything made from it."""
        return self.index.content_sha256

    @property
    def unfinished(self) -> str:
        """What a run that did not end has left out, and what to do; empty if the run ended."""
        if self.index.finished:
            return ""
        if self.meta.origin == LIVE:
            return f"the recording into {self.folder} did not end: what came last is not in it"
        return (
            f"the capture into {self.folder} did not end, so its {len(self)} samples are the "
            "first ones and not spread over the recording; the same groot-int8 calibrate command "
            "with --resume finishes it"
        )

    def records(self) -> list[SampleRecord]:
        """Return what the index says of each sample, in the order of `samples`."""
        return [record for shard in self.index.shards for record in shard.samples]

    def samples(self) -> Iterator[CaptureSample]:
        """Read the samples one after the other; one is in memory at a time.

        Raises:
            CaptureError: A shard cannot be read.
        """
        for shard in self.index.shards:
            for record in shard.samples:
                yield _load(self.folder, self.meta.family, shard, record)

    def feeds(self, graph: str, bundle: Bundle | None = None) -> Feeds:
        """Return a graph's inputs over all samples, as often as one likes.

        Args:
            graph: One of the family's large graphs.
            bundle: Whose graphs; only the reference family's inputs can do without.

        Returns:
            An iterable of input name to array with a batch axis of 1. For `dit` there is one feed
            for each observation and denoising step.

        Raises:
            CaptureError: A sample lacks these inputs, or they are of the other family.
        """
        family = self.meta.family
        if graph not in LARGE_GRAPHS[family]:
            raise CaptureError(
                f"{self.folder} holds no inputs of {graph}, but of the {family} graphs "
                f"{' and '.join(LARGE_GRAPHS[family])}"
            )
        if bundle is not None:
            self.check_graphs(bundle.manifest)
        lacking = [record for record in self.records() if graph not in record.graphs]
        if lacking:
            raise CaptureError(
                f"{len(lacking)} of {len(self)} samples in {self.folder} lack the inputs of "
                f"{graph} (first: {lacking[0].source}). For those of a live recorder compute "
                f"them: {self._complete_command}. An import holds one graph's inputs and no more: "
                "capture again for the other"
            )
        if family == DEPLOYED:
            if bundle is None:
                raise ValueError("feeds of deployed graphs need the bundle and its prompt bank")
            return Feeds(self.samples, len(self), deployed_feeds(bundle, graph))
        if graph == "backbone":
            return Feeds(self.samples, len(self), backbone_feeds)
        return Feeds(self.samples, len(self), dit_feeds, self.meta.denoising_steps)

    def check_bundle(self, manifest: Manifest) -> None:
        """Refuse a bundle whose observations the samples are not; see `CaptureMeta`."""
        self.meta.check_bundle(manifest, str(self.folder))

    def check_graphs(self, manifest: Manifest) -> None:
        """Refuse a bundle whose graphs' inputs the samples do not hold.

        Raises:
            CaptureError: As `check_bundle`, or the graphs are of the other family.
        """
        self.check_bundle(manifest)
        if self.meta.family != manifest.family:
            raise CaptureError(
                f"{self.folder} was captured with {self.meta.family} graphs, and the bundle has "
                f"{manifest.family} ones. "
                + (
                    f"Compute theirs: {self._complete_command}"
                    if next(self.samples()).images is not None
                    else f"Its samples hold no frames to compute them from. {_CAPTURE_AGAIN}"
                )
            )

    @property
    def _complete_command(self) -> str:
        return f"groot-int8 calibrate --bundle BUNDLE --complete {self.folder} --output NEW_FOLDER"


def _resumed(folder: Path, meta: CaptureMeta) -> Index:
    index = _read_index(folder)
    if index.meta != meta:
        different = [
            name for name, value in asdict(index.meta).items() if value != asdict(meta)[name]
        ]
        raise CaptureError(
            f"{folder} cannot be gone on with: it differs in {', '.join(different)}. Name another "
            "folder, or the same options as before."
        )
    if index.shards:
        CaptureStore.open(folder)
    return replace(index, finished=False)


def _load(folder: Path, family: str, shard: Shard, record: SampleRecord) -> CaptureSample:
    path = folder / shard.file
    prefix = f"{record.position:05d}/"
    try:
        arrays = read_npz(path, lambda name: name.startswith(prefix))
        sample = sample_from_arrays(
            record.instruction,
            record.stamp_ns,
            record.source,
            record.seed,
            {name.removeprefix(prefix): array for name, array in arrays.items()},
        )
    except (ValueError, KeyError) as error:
        raise CaptureError(
            f"{path} cannot be read ({type(error).__name__}: {error}). Copy the store again, or: "
            + _CAPTURE_AGAIN
        ) from error
    check_sample(sample)
    lacking = [graph for graph in record.graphs if not sample.has(family, graph)]
    if lacking:
        raise CaptureError(
            f"{path} has no inputs of {', '.join(lacking)} for its sample {record.position}, "
            "although the index says so. Copy the store again, or: " + _CAPTURE_AGAIN
        )
    return sample


def _read_index(folder: Path) -> Index:
    path = folder / INDEX_FILE
    if not path.is_file():
        raise CaptureError(
            f"{folder} is no capture store: it has no {INDEX_FILE}. " + _CAPTURE_AGAIN
        )
    try:
        content = read_json(path)
        schema = content["schema_version"]
        if schema != SCHEMA_VERSION:
            raise CaptureError(
                f"{path} has schema version {schema!r}, and groot_int8_ros {__version__} reads "
                f"{SCHEMA_VERSION}. " + _CAPTURE_AGAIN
            )
        index = Index(
            meta=_meta(content["meta"]),
            shards=tuple(_shard(shard) for shard in content["shards"]),
            finished=content["finished"],
            offered=content["offered"],
        )
        if index.content_sha256 != content["content_sha256"]:
            raise ValueError("its content_sha256 is not that of its samples")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CaptureError(f"{path} is damaged: {error!r}. " + _CAPTURE_AGAIN) from error
    return index


def _meta(content: Mapping[str, Any]) -> CaptureMeta:
    meta = CaptureMeta(**content)
    check_types(meta, _META_TYPES, " of meta")
    if meta.family not in LARGE_GRAPHS:
        raise ValueError(f"{meta.family!r:.80} is no family of graphs")
    return meta


def _shard(content: Mapping[str, Any]) -> Shard:
    file = content["file"]
    _shard_number(file)
    samples = tuple(_sample_record(record, file) for record in content["samples"])
    return Shard(file=file, sha256=content["sha256"], samples=samples)


def _sample_record(content: Mapping[str, Any], file: str) -> SampleRecord:
    record = SampleRecord(**{**content, "graphs": tuple(content["graphs"])})
    check_types(record, _SAMPLE_TYPES, f" of a sample in {file}")
    if not set(record.graphs) <= {graph for graphs in LARGE_GRAPHS.values() for graph in graphs}:
        raise ValueError(f"a sample in {file} has inputs of graphs that there are not")
    return record


def _shard_number(file: str) -> int:
    # The index comes from disk like everything else: it must not lead out of the folder.
    match = re.fullmatch(r"shard-([0-9]{5,9})\.npz", file)
    if match is None:
        raise ValueError(f"{file!r} is no shard's name")
    return int(match[1])


def _short(value: object) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 else text
