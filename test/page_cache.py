"""What of this process's memory and of files is in memory, by the kernel's own word."""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
from pathlib import Path

PAGE = mmap.PAGESIZE

_PROBE_BYTES = 1 << 20


def resident_bytes(address: int, size: int) -> int:
    """Bytes of a span's whole pages that are there, be it as the process's own or as a file's."""
    first, behind = -(-address // PAGE) * PAGE, (address + size) // PAGE * PAGE
    pages = (ctypes.c_ubyte * ((behind - first) // PAGE))()
    library = ctypes.CDLL(None, use_errno=True)
    status = library.mincore(ctypes.c_void_p(first), ctypes.c_size_t(behind - first), pages)
    assert status == 0, os.strerror(ctypes.get_errno())
    return sum(page & 1 for page in pages) * PAGE


def resident_file_bytes(path: Path) -> int:
    """Bytes of a file's whole pages that the kernel keeps."""
    with path.open("rb") as stream:
        return _of_file(stream.fileno(), path.stat().st_size)


def keeps_files_in_memory(folder: Path) -> bool:
    """Whether a folder's files cannot leave memory, as on a tmpfs."""
    with tempfile.TemporaryFile(dir=folder) as stream:
        stream.write(bytes(_PROBE_BYTES))
        stream.flush()
        os.fdatasync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return _of_file(stream.fileno(), _PROBE_BYTES) > _PROBE_BYTES // 2


def _of_file(file: int, size: int) -> int:
    # A private mapping has an address for ctypes; nobody touches it, so it loads nothing.
    with mmap.mmap(file, size, access=mmap.ACCESS_COPY) as mapped:
        start = ctypes.c_char.from_buffer(mapped)
        resident = resident_bytes(ctypes.addressof(start), size)
        del start
    return resident
