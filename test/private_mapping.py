"""Memory of its own for a large allocation, as glibc takes it from the kernel.

`malloc` itself would do so in a fresh process alone: in one that has freed much it takes that.
"""

from __future__ import annotations

import ctypes
import mmap

# What glibc keeps for itself in front of an allocation.
_HEADER_BYTES = 16


def private_mapping(content: bytes) -> mmap.mmap:
    """Return memory that belongs to no file, with some bytes in it; closing it frees it."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, _HEADER_BYTES + len(content), flags=flags)
    memory[_HEADER_BYTES:] = content
    return memory


def address_in(memory: mmap.mmap) -> int:
    """Return where the bytes are that the memory was made with."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory)) + _HEADER_BYTES
