"""Hazards of files and messages that are damaged, or made to do harm.

Whatever is read, nothing but this package's errors comes out of it: no other exception, no end
that never comes, no memory that a few bytes asked for. Real files are changed in bytes and, where
they hold JSON, in structure. `GROOT_FUZZ_EXAMPLES` sets how often each of them (`make fuzz`).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import struct
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from groot_int8_ros.capture.community import (
    ARCHIVE_FILE,
    METADATA_FILE,
    export_community,
    import_community,
)
from groot_int8_ros.capture.sample import BackboneInputs, CaptureSample
from groot_int8_ros.capture.store import INDEX_FILE, CaptureMeta, CaptureStore, CaptureWriter
from groot_int8_ros.control.urdf import urdf_limits
from groot_int8_ros.errors import (
    BundleError,
    CheckpointError,
    ConfigurationError,
    DatasetError,
    GrootError,
)
from groot_int8_ros.policy.bundle import open_bundle
from groot_int8_ros.policy.deployed_graphs import DeployedGraphs
from groot_int8_ros.policy.engines.base import TensorSpec
from groot_int8_ros.policy.engines.cuda import Device
from groot_int8_ros.policy.engines.tensorrt_manifest import (
    EngineManifest,
    EngineTensor,
    check_engine_fits,
    read_engine_manifest,
)
from groot_int8_ros.policy.families import REFERENCE
from groot_int8_ros.policy.npz import read_npz
from groot_int8_ros.policy.preprocess import PromptTokenizer
from groot_int8_ros.policy.processor import load_processor
from groot_int8_ros.policy.robot import load_robot
from groot_int8_ros.ros.images import load_bridge, rgb_from_compressed_image, rgb_from_image
from offline_tools.engine.calibration_cache import CacheRecord, scales_for_graph, write_cache
from offline_tools.parameter_file import read_parameter_file

EXAMPLES = int(os.environ.get("GROOT_FUZZ_EXAMPLES", "20"))
# Of processor time, so that a busy machine is no fault.
END_S = 20.0
LARGEST_PEAK_BYTES = 128 << 20

IS_SHORT = "GROOT_FUZZ_EXAMPLES" not in os.environ

fuzzed = settings(
    max_examples=EXAMPLES,
    deadline=None,
    # The short form is the same every time, and fails at once; the long one looks for what is new.
    derandomize=IS_SHORT,
    phases=[Phase.generate] if IS_SHORT else list(Phase),
    database=None,
    suppress_health_check=list(HealthCheck),
)


class NeverEndingError(BaseException):
    """Not an Exception, so that nothing that is tested can catch it."""


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Let pass what ends soon, in little memory, with a result or one of our errors."""

    def stop(*_: object) -> None:
        raise NeverEndingError(f"no end within {END_S} s of work")

    previous = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, END_S)
    tracemalloc.start()
    try:
        with contextlib.suppress(GrootError):
            yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        signal.signal(signal.SIGPROF, previous)
    assert peak < LARGEST_PEAK_BYTES, f"{peak >> 20} MiB for a file of kilobytes"


_DEEP: Any = 0
for _ in range(60):
    _DEEP = [_DEEP]
HOSTILE_VALUES = [
    *(None, True, False, -1, 0, 1, 2**31, 2**63, 10**400, 1e308, -0.5, float("nan"), float("inf")),
    *("", "..", "../../x", "/etc/passwd", "a\0b", "\ud800", "x" * 5000, "{0.__class__}", "-1"),
    *("{episode_index:0999999999d}", [], {}, [None], {"": None}, [[]], _DEEP, "int8", "fp16"),
]
HOSTILE_BYTES = [
    *(b"\0" * 8, b"\xff" * 8, b"\x7f", b"\x80", b"9" * 30, b"-1", b"[" * 20_000, b"{}", b"\r\n"),
    *(
        b'"',
        b"NaN",
        b"Infinity",
        b"1e999",
        b"..",
        b"/",
        b"*x",
        b"&x ",
        b"!!python/name:os.system ",
    ),
    *(
        struct.pack("<Q", 2**62),
        struct.pack("<I", 2**31),
        b"(999999999,)",
        b"'O'",
        b"<!DOCTYPE x>",
    ),
]


@st.composite
def harms(draw: st.DrawFn, original: bytes) -> bytes:
    """A harmed form of a file."""
    if draw(st.booleans()):
        with contextlib.suppress(ValueError):
            return _with_a_hostile_value(draw, json.loads(original))
    data = bytearray(original)
    for _ in range(draw(st.integers(1, 4))):
        size = len(data)
        # Sizes and types stand at the start and the end of binary files.
        start = draw(
            st.integers(0, min(300, size))
            | st.integers(max(0, size - 600), size)
            | st.integers(0, size)
        )
        end = min(size, start + draw(st.sampled_from([0, 1, 2, 8, size])))
        data[start:end] = draw(st.sampled_from([*HOSTILE_BYTES, b""]) | st.binary(max_size=4))
    return bytes(data)


def _with_a_hostile_value(draw: st.DrawFn, content: Any) -> bytes:
    node = content
    while isinstance(node, (dict, list)) and node:
        key = draw(st.sampled_from(list(node) if isinstance(node, dict) else range(len(node))))
        inner = node[key]
        if isinstance(inner, (dict, list)) and inner and draw(st.integers(0, 5)):
            node = inner
            continue
        if draw(st.integers(0, 3)):
            node[key] = draw(st.sampled_from(HOSTILE_VALUES))
        else:
            del node[key]
        break
    return json.dumps(content).encode()


@dataclass
class Case:
    """One kind of file among the whole ones that it is read with.

    Attributes:
        file: The file that is harmed.
        read: Reads it as its users do.
    """

    file: Path
    read: Callable[[], object]


@pytest.fixture(scope="module")
def bundle(small_deployed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(small_deployed, tmp_path_factory.mktemp("harm") / "bundle"))


def _policy_side(bundle: Path) -> dict[str, Case]:
    opened = open_bundle(bundle)
    prompts = opened.manifest.prompts
    assert prompts is not None

    def tokenizer() -> None:
        PromptTokenizer.from_file(bundle / "tokenizer.json").encode(
            "pick up the cube", [4], formalize=True
        )

    def manifest() -> None:
        DeployedGraphs(open_bundle(bundle, verify_hashes=False), {})

    cases = {
        name: Case(bundle / name, lambda: load_processor(bundle, opened.manifest.embodiment))
        for name in ("processor_config.json", "statistics.json", "embodiment_id.json")
    }
    return {
        **cases,
        "manifest": Case(bundle / "manifest.json", manifest),
        "tokenizer": Case(bundle / "tokenizer.json", tokenizer),
        "prompt": Case(bundle / prompts.instructions[0].file, lambda: DeployedGraphs(opened, {})),
    }


def _captures(folder: Path, bundle: Path) -> dict[str, Case]:
    manifest = open_bundle(bundle, verify_hashes=False).manifest
    tokens = np.arange(6, dtype=np.int64)
    sample = CaptureSample(
        instruction="pick up the cube",
        stamp_ns=5,
        source="episode 0",
        state={"arm": np.zeros(3, np.float32)},
        backbone=BackboneInputs(tokens, np.ones_like(tokens), np.zeros((2, 3, 4, 4), np.float32)),
    )
    meta = CaptureMeta.of_bundle(manifest, "test")
    meta = replace(meta, family=REFERENCE)
    store = folder / "store"
    with CaptureWriter(store, meta) as writer:
        writer.add(sample)
    export_community(CaptureStore.open(store), "backbone", folder / "community")

    def read_store() -> None:
        opened = CaptureStore.open(store, verify_hashes=False)
        assert all(isinstance(one, CaptureSample) for one in opened.samples())
        list(opened.feeds("backbone"))
        opened.check_bundle(manifest)

    spec = {
        "input_ids": TensorSpec("int64", (1, "s")),
        "attention_mask": TensorSpec("int64", (1, "s")),
        "pixel_values": TensorSpec("float32", (2, 3, 4, 4)),
    }
    reference: Any = SimpleNamespace(
        **{name: getattr(manifest, name) for name in ("checkpoint_sha256", "embodiment")},
        **{"family": REFERENCE, "action_horizon": 4, "denoising_steps": 2},
        graphs={"backbone": SimpleNamespace(inputs=spec, precision="fp32")},
    )

    def read_archive() -> None:
        shutil.rmtree(folder / "imported", ignore_errors=True)
        import_community(folder / "community" / ARCHIVE_FILE, reference, folder / "imported")

    return {
        "capture index": Case(store / INDEX_FILE, read_store),
        "capture shard": Case(store / "shard-00000.npz", read_store),
        "community archive": Case(folder / "community" / ARCHIVE_FILE, read_archive),
        "community metadata": Case(folder / "community" / METADATA_FILE, read_archive),
    }


def _engine_side(folder: Path) -> dict[str, Case]:
    device = Device("Orin NX", "8.7", 8, 16 << 30, True)
    engine = folder / "dit.engine"
    engine.write_bytes(b"plan")
    shape = ((1, 4), (2, 4), (8, 4))
    manifest = EngineManifest(
        graph="onnx/dit.onnx",
        graph_sha256={"onnx/dit.onnx": "a" * 64},
        engine_sha256=hashlib.sha256(b"plan").hexdigest(),
        engine_bytes=4,
        device_memory_bytes=7,
        precision="int8",
        quantization="qdq",
        layer_precision={"block.0": "INT8"},
        calibration={"samples_sha256": "c" * 64},
        library="tensorrt",
        library_version="10.3.0",
        device=device,
        inputs={"x": EngineTensor(TensorSpec("float16", ("batch", 4)), shape)},
        outputs={"y": EngineTensor(TensorSpec("float32", (1, 4)), None)},
        build_options=("--graph", "dit"),
        build_flags=("strongly typed",),
        seconds=1.5,
        peak_memory_bytes=3,
    )
    engine.with_suffix(".json").write_text(manifest.to_json())
    cache = folder / "calibration.cache"
    write_cache(cache, b"TRT-101401-EntropyCalibration2\nx: 3c010a14\n", CacheRecord("g", "s", 8))

    def read_engine() -> None:
        found = read_engine_manifest(engine.with_suffix(".json"), folder)
        check_engine_fits(
            found,
            engine,
            folder,
            library_version="10.3.0",
            device=device,
            recorded_sha256={"onnx/dit.onnx": "a" * 64},
        )

    def read_cache() -> None:
        scales_for_graph(cache, "g", ["x"])

    return {
        "engine manifest": Case(engine.with_suffix(".json"), read_engine),
        "calibration cache": Case(cache, read_cache),
        "calibration record": Case(cache.with_name(cache.name + ".json"), read_cache),
    }


_URDF = """<?xml version="1.0"?><robot name="r"><joint name="a" type="revolute">
<limit lower="-1" upper="1" velocity="2" effort="1"/></joint></robot>"""
_ROBOT = """action_period_s: 0.05
cameras: {front: {width: 64, height: 48}}
state_joints:
  arm: [{name: a, unit: degrees, sign: -1, offset: 0.5}, b]
"""
_PARAMETERS = """/**:
  ros__parameters: {bundle: /x, cameras: {front: {topic: /a}}, list: [1, 2]}
"""


def _text_files(folder: Path) -> dict[str, Case]:
    for name, text in (("r.urdf", _URDF), ("robot.yaml", _ROBOT), ("node.yaml", _PARAMETERS)):
        (folder / name).write_text(text)
    return {
        "urdf": Case(folder / "r.urdf", lambda: urdf_limits(folder / "r.urdf", ["a"])),
        "robot": Case(folder / "robot.yaml", lambda: load_robot(folder / "robot.yaml")),
        "parameters": Case(
            folder / "node.yaml", lambda: read_parameter_file(folder / "node.yaml")
        ),
    }


def _checkpoint(folder: Path, golden_dir: Path) -> dict[str, Case]:
    torch = pytest.importorskip("torch", reason="checkpoints are read with torch")
    from safetensors.torch import save_file

    from offline_tools.model.checkpoint import CheckpointReader
    from offline_tools.model.configuration import INDEX_FILE as SHARDS
    from offline_tools.model.configuration import load_model_config

    save_file({"a": torch.zeros(2, 3), "b": torch.ones(4)}, folder / "one.safetensors")
    index = {"metadata": {}, "weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}
    (folder / SHARDS).write_text(json.dumps(index))
    for source in (golden_dir / "checkpoint").glob("*.json"):
        shutil.copyfile(source, folder / source.name)
    shutil.copyfile(golden_dir / "eagle_config.json", folder / "eagle_config.json")

    def read_weights() -> None:
        reader = CheckpointReader(folder)
        assert len(list(reader.tensors(reader.keys))) == len(reader.keys)

    return {
        "safetensors": Case(folder / "one.safetensors", read_weights),
        "safetensors index": Case(folder / SHARDS, read_weights),
        **{
            name: Case(folder / name, lambda: load_model_config(folder))
            for name in ("config.json", "eagle_config.json")
        },
    }


def _dataset(folder: Path, tiny_dataset: Path) -> dict[str, Case]:
    from offline_tools.dataset.lerobot import LeRobotDataset

    root = Path(shutil.copytree(tiny_dataset, folder / "dataset"))

    def read() -> None:
        dataset = LeRobotDataset.open(root)
        for entry in dataset.episodes[:2]:
            episode = dataset.episode(entry.index)
            for camera in dataset.cameras:
                next(episode.frames(camera))

    return {
        f"dataset {path.name}": Case(path, read)
        for path in sorted((root / "meta").iterdir())
        if path.name in ("info.json", "modality.json", "episodes.jsonl", "tasks.jsonl")
    }


CASES = [
    *("processor_config.json", "statistics.json", "embodiment_id.json"),
    *("manifest", "tokenizer", "prompt", "capture index", "capture shard", "community archive"),
    *("community metadata", "engine manifest", "calibration cache", "calibration record"),
    *("urdf", "robot", "parameters", "safetensors", "safetensors index", "config.json"),
    *("dataset info.json", "dataset modality.json", "dataset episodes.jsonl"),
    *("dataset tasks.jsonl", "eagle_config.json"),
]


@pytest.fixture(scope="module")
def cases(
    bundle: Path,
    golden_dir: Path,
    tiny_dataset: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Case]:
    folder = tmp_path_factory.mktemp("files")
    for name in ("captures", "engine", "text", "checkpoint", "dataset"):
        (folder / name).mkdir()
    return {
        **_policy_side(bundle),
        **_captures(folder / "captures", bundle),
        **_engine_side(folder / "engine"),
        **_text_files(folder / "text"),
        **_checkpoint(folder / "checkpoint", golden_dir),
        **_dataset(folder / "dataset", tiny_dataset),
    }


@pytest.mark.parametrize("name", CASES)
def test_a_harmed_file_is_read_or_refused_and_does_nothing_else(
    cases: dict[str, Case], name: str
) -> None:
    case = cases[name]
    original = case.file.read_bytes()

    @fuzzed
    @given(harms(original))
    def check(data: bytes) -> None:
        case.file.write_bytes(data)
        with watched():
            case.read()

    case.read()
    try:
        check()
    finally:
        case.file.write_bytes(original)


def _npz(entries: dict[str, bytes], **options: Any) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", **options) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return stream.getvalue()


def _npy(header: str, data: bytes = b"", version: bytes = b"\1\0") -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY" + version + struct.pack("<H", len(text)) + text + data


def _array(shape: str, dtype: str = "'<f4'", data: bytes = b"") -> bytes:
    return _npy(f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}}}", data)


def _overlapping() -> bytes:
    # A hundred names for one megabyte.
    whole = _array("(262144,)", data=bytes(1 << 20))
    data = bytearray(_npz({"a.npy": whole}))
    start = data.index(b"PK\1\2")
    end = data.index(b"PK\5\6")
    entry = bytes(data[start:end])
    entries = b"".join(entry.replace(b"a.npy", b"%c.npy" % (65 + n)) for n in range(50))
    tail = bytearray(data[end:])
    tail[8:12] = struct.pack("<HH", 50, 50)
    tail[12:16] = struct.pack("<I", len(entries))
    return bytes(data[:start]) + entries + bytes(tail)


class Bomb:
    """What a pickle runs when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (NeverEndingError, ("a pickle was run",))


def _pickled() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, np.array([Bomb()], dtype=object))
    return stream.getvalue()


LYING_ARCHIVES: dict[str, tuple[bytes, str]] = {
    "an array of terabytes": (_npz({"a.npy": _array("(999999999999,)")}), "but has 0 bytes"),
    "more than a machine can count": (
        _npz({"a.npy": _array("(99999999999, 9999999999999)")}),
        "but has 0 bytes",
    ),
    "rows without end and without values": (
        _npz({"a.npy": _array("(999999999999999, 0)")}),
        "but has 0 bytes",
    ),
    "a shape that is negative": (_npz({"a.npy": _array("(-1,)")}), "no shape"),
    "text of gigabytes": (_npz({"a.npy": _array("()", "'<U99999999'")}), "but has 0 bytes"),
    "values of no size": (_npz({"a.npy": _array("(99999999,)", "'<U0'")}), "no type"),
    "a structure": (_npz({"a.npy": _array("(1,)", "[('x', '<f4')]", b"1234")}), "no type"),
    "pickled objects": (_pickled(), "object is no type"),
    "a header that is nested deeply": (_npz({"a.npy": _npy("(" * 900)}), "header is damaged"),
    "a header with a thousand signs": (_npz({"a.npy": _npy("-" * 9000 + "1")}), "header"),
    "a header that calls a function": (
        _npz({"a.npy": _npy("__import__('os').abort()")}),
        "header is damaged",
    ),
    "a version of the future": (_npz({"a.npy": _npy("{}", version=b"\4\0")}), "version"),
    "a bomb of zeros": (
        _npz(
            {"a.npy": _array("(262144,)", data=bytes(1 << 20))},
            compression=zipfile.ZIP_DEFLATED,
        ),
        "compressed",
    ),
    "the same bytes many times": (_overlapping(), "larger than its"),
    "another kind of file": (_npz({"a.txt": b"x"}), "is no array"),
    "no array at all": (_npz({"a.npy": b"xxxx"}), "magic string"),
}


@pytest.mark.parametrize("lie", LYING_ARCHIVES)
def test_an_archive_that_lies_is_refused_before_memory_is_taken(tmp_path: Path, lie: str) -> None:
    data, message = LYING_ARCHIVES[lie]
    path = tmp_path / "lie.npz"
    path.write_bytes(data)
    with watched(), pytest.raises(ValueError, match=message):
        read_npz(path)


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x, x, x]\nb: &b [*a, *a, *a]\nc: &c [*b, *b, *b]\n",
        "a: &a\n  b: *a\n",
        "[" * 5_000,
        "a: !!python/object/apply:os.abort []\n",
        "a: 2026-13-01\n",
    ],
)
def test_yaml_that_grows_or_runs_something_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "file.yaml"
    path.write_text(text)
    for read in (load_robot, read_parameter_file):
        with watched(), pytest.raises(ConfigurationError, match=r"file\.yaml"):
            read(path)


def test_a_link_out_of_the_bundle_is_not_followed(bundle: Path, tmp_path: Path) -> None:
    target = bundle / "tokenizer.json"
    outside = tmp_path / "tokenizer.json"
    shutil.move(target, outside)
    try:
        target.symlink_to(outside)
        with pytest.raises(BundleError, match="a link that leads out of the bundle"):
            open_bundle(bundle)
    finally:
        target.unlink()
        shutil.move(outside, target)
    # The bundle itself may be reached through a link, and have links inside.
    (tmp_path / "link").symlink_to(bundle)
    assert open_bundle(tmp_path / "link").manifest == open_bundle(bundle).manifest


def test_an_index_of_shards_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="checkpoints are read with torch")
    from offline_tools.model.checkpoint import CheckpointReader
    from offline_tools.model.configuration import INDEX_FILE as SHARDS

    for name in ("../model.safetensors", "/etc/passwd"):
        (tmp_path / SHARDS).write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(CheckpointError, match="which cannot be in its folder"):
            CheckpointReader(tmp_path)


def test_a_dataset_cannot_name_files_elsewhere(tiny_dataset: Path, tmp_path: Path) -> None:
    from offline_tools.dataset.lerobot import LeRobotDataset

    root = Path(shutil.copytree(tiny_dataset, tmp_path / "dataset"))
    info = json.loads((root / "meta/info.json").read_text())
    for pattern in ("../x.parquet", "/etc/passwd", "{episode_index:0999999999d}", "{0.__class__}"):
        (root / "meta/info.json").write_text(json.dumps({**info, "data_path": pattern}))
        with watched(), pytest.raises(DatasetError, match="no file name can be made"):
            LeRobotDataset.open(root).episode(0)
    for size in (float("inf"), float("nan"), 0, "many"):
        (root / "meta/info.json").write_text(json.dumps({**info, "chunks_size": size}))
        with watched(), pytest.raises(DatasetError, match="no file name can be made"):
            LeRobotDataset.open(root).episode(0)


SIZE = (24, 32)


def _picture(extension: str, options: tuple[int, ...] = ()) -> bytes:
    random = np.random.default_rng(3)
    frame = cv2.resize(random.integers(0, 256, (6, 8, 3), np.uint8), SIZE[::-1])
    return bytes(cv2.imencode(extension, frame, options)[1])


PICTURES = {
    "jpeg": _picture(".jpg"),
    "progressive jpeg": _picture(".jpg", (cv2.IMWRITE_JPEG_PROGRESSIVE, 1)),
    "png": _picture(".png"),
}


@pytest.mark.parametrize("kind", PICTURES)
def test_a_harmed_compressed_image_is_a_frame_or_refused(kind: str) -> None:
    @fuzzed
    @given(harms(PICTURES[kind]))
    def check(data: bytes) -> None:
        message = SimpleNamespace(format="jpeg", data=data)
        with watched():
            frame = rgb_from_compressed_image(message, "/camera", SIZE)
            assert frame.shape == (*SIZE, 3)
            assert frame.dtype == np.uint8

    check()


_FIELD = st.integers(0, 2**32 - 1) | st.sampled_from([0, 1, 23, 24, 25, 31, 32, 33, 64, 96, 128])


@fuzzed
@given(
    encoding=st.sampled_from(["rgb8", "bgra8", "mono8", "yuyv", "16UC1", "bayer_rggb8", "", "\0"]),
    height=_FIELD,
    width=_FIELD,
    step=_FIELD,
    size=st.sampled_from([0, 1, 767, 768, 2303, 2304, 2400, 3072, 5000]),
    right=st.booleans(),
)
def test_a_raw_image_that_contradicts_itself_is_a_frame_or_refused(
    encoding: str, height: int, width: int, step: int, size: int, right: bool
) -> None:
    if right:
        height, width = SIZE
    message = SimpleNamespace(
        encoding=encoding,
        height=height,
        width=width,
        step=step,
        is_bigendian=0,
        data=np.zeros(size, np.uint8),
    )
    with watched():
        frame = rgb_from_image(message, "/camera", SIZE, load_bridge()[1])
        assert frame.shape == (*SIZE, 3)
