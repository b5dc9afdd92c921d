"""Reading `.npz` files that may be damaged, or made to do harm.

Owns: `read_npz`, and its parts for a reader that goes row by row. Must not import anything of the
package. `numpy.load` believes what such a file says of itself: it allocates what an array's header
announces before a byte of it was read, inflates whatever is compressed, and what it raises over
damage depends on where the damage is. Here every size is held against the size of the file first,
and all that can be wrong is a `ValueError`.

What is read is what `numpy.savez` writes: entries that are not compressed, arrays of numbers,
truth values or text. Pickled objects are refused by their type, before anything of them is read.
"""

from __future__ import annotations

import contextlib
import io
import math
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

_SUFFIX = ".npy"
# Truth values, whole numbers, floating numbers and text.
_KINDS = "biufU"
_ENCRYPTED = 0x1
_BLOCK_BYTES = 1 << 18


def read_npz(
    source: Path | IO[bytes], wanted: Callable[[str], bool] = lambda name: True
) -> dict[str, NDArray[Any]]:
    """Read the arrays of an uncompressed `.npz` file.

    Args:
        source: The file, or a stream that can seek.
        wanted: Whether an array of this name is read; the others are skipped.

    Returns:
        Name to array.

    Raises:
        ValueError: It cannot be read, is no such file, or contradicts itself.
    """
    try:
        opened = source.open("rb") if isinstance(source, Path) else contextlib.nullcontext(source)
        with naming_damage(), opened as stream, zipfile.ZipFile(stream) as archive:
            arrays = {}
            for name, entry in npz_entries(archive).items():
                if wanted(name):
                    with archive.open(entry) as member:
                        arrays[name] = _read_array(member, entry.file_size, name)
            return arrays
    except OSError as error:
        raise ValueError(f"it cannot be read: {error}") from error


def npz_entries(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Return the arrays of an open archive by name, in the order in which they were written.

    Raises:
        ValueError: An entry is no array or compressed, is there twice, or they announce more than
            the file holds.
    """
    entries: dict[str, zipfile.ZipInfo] = {}
    for entry in archive.infolist():
        name = _name(entry)
        if name in entries:
            raise ValueError(f"it holds {name!r:.80} twice")
        entries[name] = entry
    stream = archive.fp
    assert stream is not None
    # Entries that overlap could announce more than there is.
    size = stream.seek(0, io.SEEK_END)
    if sum(entry.file_size for entry in entries.values()) > size:
        raise ValueError(f"its arrays are larger than its {size} bytes")
    return entries


@contextlib.contextmanager
def naming_damage() -> Iterator[None]:
    """Turn what `zipfile` raises over a damaged archive into a `ValueError`."""
    try:
        yield
    # NotImplementedError, for versions and compressions of the future, is a RuntimeError.
    except (EOFError, zipfile.BadZipFile, RuntimeError, OverflowError, struct.error) as error:
        raise ValueError(f"it is damaged: {error}") from error


def read_array_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Read the header of one array, as it stands at the start of a `.npy` file.

    Returns:
        Shape, whether the values are in Fortran order, and dtype.

    Raises:
        ValueError: It is damaged, or the dtype is neither of numbers, truth values nor text.
    """
    readers: dict[tuple[int, int], Callable[[IO[bytes]], Any]] = {
        (1, 0): npy_format.read_array_header_1_0,
        (2, 0): npy_format.read_array_header_2_0,
    }
    version = npy_format.read_magic(stream)
    if version not in readers:
        raise ValueError(f"npy version {version} is not understood")
    try:
        shape, in_fortran_order, dtype = readers[version](stream)
        lengths = tuple(map(int, shape))
    except Exception as error:
        # NumPy reads it as a Python literal: a parser and a tokenizer have errors of their own.
        raise ValueError(f"its header is damaged ({type(error).__name__})") from error
    if dtype.kind not in _KINDS or not dtype.itemsize:
        raise ValueError(f"{dtype} is no type of numbers or text")
    if any(length < 0 for length in lengths):
        raise ValueError(f"{lengths} is no shape")
    return lengths, bool(in_fortran_order), dtype


def _name(entry: zipfile.ZipInfo) -> str:
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & _ENCRYPTED:
        raise ValueError(f"{entry.filename!r:.80} is compressed or encrypted")
    if not entry.filename.endswith(_SUFFIX):
        raise ValueError(f"{entry.filename!r:.80} is no array")
    return entry.filename.removesuffix(_SUFFIX)


def _read_array(member: IO[bytes], file_size: int, name: str) -> NDArray[Any]:
    shape, in_fortran_order, dtype = read_array_header(member)
    promised, there = math.prod(shape) * dtype.itemsize, file_size - member.tell()
    # The second for shapes without values, whose other axes could have any length.
    if promised != there or max(shape, default=0) > file_size:
        raise ValueError(f"{name!r:.80} is {dtype} of shape {shape}, but has {there} bytes")
    array = np.empty(math.prod(shape), dtype)
    room = array.view(np.uint8)
    for start in range(0, there, _BLOCK_BYTES):
        block = member.read(min(_BLOCK_BYTES, there - start))
        if len(block) != min(_BLOCK_BYTES, there - start):
            raise ValueError(f"{name!r:.80} is cut off")
        room[start : start + len(block)] = np.frombuffer(block, np.uint8)
    return array.reshape(shape, order="F" if in_fortran_order else "C")
