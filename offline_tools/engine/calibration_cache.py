"""TensorRT's calibration cache: reading it, and using its scales for explicit Q/DQ.

Owns: the file format and the check that a cache belongs to a graph. Must not import torch or
TensorRT: a cache that another TensorRT wrote is read here too. The format is one header line,
`TRT-<version>-<algorithm>`, and then a line a tensor, `<name>: <scale as the hexadecimal digits
of a big-endian float32>`; the scale is the largest kept magnitude over 127.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from groot_int8_ros.errors import CalibrationError
from groot_int8_ros.policy.files import atomic_file, read_json

_HEADER = "TRT-"
_RECORD_SUFFIX = ".json"


@dataclass(frozen=True)
class CalibrationCache:
    """The scales of one calibration.

    Attributes:
        tensorrt_version: As the header has it, such as `101401` for 10.14.1.
        algorithm: Such as `EntropyCalibration2`.
        scales: Scale by tensor name: value of one step of an int8, positive and finite.
    """

    tensorrt_version: str
    algorithm: str
    scales: Mapping[str, float]


@dataclass(frozen=True)
class CacheRecord:
    """What a cache was made from; it stands beside the cache, since the format has no room for it.

    Attributes:
        graph_sha256: Hash over the ONNX graph and its weights.
        samples_sha256: Hash of the captured samples.
        batches: How many of them the calibrator consumed.
    """

    graph_sha256: str
    samples_sha256: str
    batches: int


def hash_of_graph(files: Mapping[str, str]) -> str:
    """Return the hash over a graph and its weights.

    Args:
        files: Path inside the bundle to SHA-256, of the graph's file and of its external data.
    """
    lines = (f"{sha256}  {name}" for name, sha256 in sorted(files.items()))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def read_cache(path: Path) -> CalibrationCache:
    """Read a calibration cache.

    Raises:
        CalibrationError: The file is missing or is no calibration cache; the line is named.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path} cannot be read as a calibration cache: {error}") from error
    header = lines[0] if lines else ""
    version, separator, algorithm = header.removeprefix(_HEADER).partition("-")
    if not header.startswith(_HEADER) or not separator:
        raise CalibrationError(
            f"{path} is no calibration cache of TensorRT: its first line is {header!r:.60}, not "
            "TRT-<version>-<algorithm>. Calibrate again."
        )
    scales: dict[str, float] = {}
    for number, line in enumerate(lines[1:], start=2):
        if not line.strip():
            continue
        name, separator, digits = line.rpartition(": ")
        try:
            # TensorRT leaves leading zeros out: a scale of zero is written as `0`.
            if not separator or not 1 <= len(digits) <= 8:
                raise ValueError
            (scale,) = struct.unpack(">f", bytes.fromhex(digits.zfill(8)))
        except ValueError:
            raise CalibrationError(
                f"{path}, line {number}: {line!r:.80} is no `name: hexadecimal digits`; the "
                "file is damaged. Calibrate again."
            ) from None
        if not math.isfinite(scale) or scale < 0:
            raise CalibrationError(
                f"{path}, line {number}: the scale of {name} is {scale}. Calibrate again, with "
                "samples that are finite."
            )
        scales[name] = scale
    if not scales:
        raise CalibrationError(f"{path} holds no scales. Calibrate again.")
    return CalibrationCache(version, algorithm, scales)


def scales_of_tensors(
    cache: CalibrationCache, tensors: Iterable[str], source: str
) -> dict[str, float]:
    """Return the static Q/DQ scale of each tensor, from a cache made on the same graph.

    Args:
        cache: The cache.
        tensors: Names in the graph that are to be quantised.
        source: Where the cache comes from, for the message.

    Raises:
        CalibrationError: A tensor has no scale, or a scale of zero: the cache is of another graph,
            or the tensor never left zero.
    """
    wanted = list(tensors)
    missing = [name for name in wanted if not cache.scales.get(name)]
    if missing:
        shown = ", ".join(missing[:3]) + (" …" if len(missing) > 3 else "")
        raise CalibrationError(
            f"{source} has no scale for {len(missing)} of {len(wanted)} tensors ({shown}): it was "
            "made on another graph. Calibrate on this bundle's graph, or quantise with its own "
            "captured samples."
        )
    return {name: cache.scales[name] for name in wanted}


def scales_for_graph(
    path: Path, graph_sha256: str, tensors: Iterable[str]
) -> tuple[dict[str, float], bool]:
    """Return the scales that a cache has for tensors of a graph.

    Args:
        path: The cache. Beside one that `groot-int8 build` wrote stands what it was made from.
        graph_sha256: Hash of the graph that is to be quantised.
        tensors: Names in that graph.

    Returns:
        Scale by tensor, and whether the cache is known to be of that very graph.

    Raises:
        CalibrationError: The cache is damaged, stale, or lacks a tensor.
    """
    known = path.with_name(path.name + _RECORD_SUFFIX).exists()
    if known:
        check_cache(path, graph_sha256, None)
    return scales_of_tensors(read_cache(path), tensors, str(path)), known


def check_cache(path: Path, graph_sha256: str, samples_sha256: str | None) -> CacheRecord:
    """Refuse a cache of another graph or of other samples.

    Args:
        path: The cache.
        graph_sha256: Hash of the graph that is built now.
        samples_sha256: Hash of the samples given now, or None if none were given.

    Raises:
        CalibrationError: The cache is stale, or nothing says what it was made from.
    """
    read_cache(path)
    record = path.with_name(path.name + _RECORD_SUFFIX)
    remedy = f"Remove {path} to calibrate again (--captures)."
    try:
        found = CacheRecord(**read_json(record))
    except (OSError, ValueError, TypeError) as error:
        raise CalibrationError(
            f"nothing says which graph {path} was made from ({record.name} cannot be read: "
            f"{error}). {remedy}"
        ) from error
    if found.graph_sha256 != graph_sha256:
        raise CalibrationError(
            f"{path} was made from another ONNX graph: it is stale and is not used. {remedy}"
        )
    if samples_sha256 is not None and found.samples_sha256 != samples_sha256:
        raise CalibrationError(f"{path} was made from other samples than those given. {remedy}")
    return found


def write_cache(path: Path, content: bytes, record: CacheRecord) -> None:
    """Write a cache, and before it what it was made from: a cache without is refused."""
    with atomic_file(path.with_name(path.name + _RECORD_SUFFIX)) as temporary:
        temporary.write_text(json.dumps(vars(record), indent=2) + "\n", encoding="utf-8")
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)
