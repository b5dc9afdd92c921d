"""Cameras that go on stamping the same picture.

Owns: noticing that a camera's pixels have stopped changing although its stamps advance, which no
age can show. Must not import rclpy. It is asked in the thread that converts frames, never in a
callback, and looks at every eighth row only: 35 microseconds for a frame of 640x480.

A camera at rest is not frozen: a sensor's noise changes some pixel of every frame. Drivers that
publish each frame two or three times to keep up a rate are not frozen either, so it is time that
counts, with at least three frames seen in it. What is rendered, or was recorded from a still scene
with a lossy codec, may really stand still: for such sources the check can be switched off.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

from groot_int8_ros.policy.types import UInt8Array

_EVERY_ROW = 8
# Two equal frames may be one that was published twice, however far apart they were looked at.
_LEAST_FRAMES = 3
_NANOSECONDS = 1e9


@dataclass(frozen=True)
class _Picture:
    checksum: int
    first_stamp_ns: int
    last_stamp_ns: int
    frames: int


class FrozenImageWatch:
    """Remembers since when a camera shows the same pixels. Not for use from several threads."""

    def __init__(self) -> None:
        self._picture: _Picture | None = None

    @property
    def same_pixels_s(self) -> float:
        """How long, by its stamps, the newest frame's pixels have been the same; 0 if new."""
        picture = self._picture
        if picture is None or picture.frames < _LEAST_FRAMES:
            return 0.0
        return (picture.last_stamp_ns - picture.first_stamp_ns) / _NANOSECONDS

    def see(self, frame: UInt8Array, stamp_ns: int) -> None:
        """Look at one frame.

        Args:
            frame: uint8, shape (height, width, 3).
            stamp_ns: The frame's own. The same stamp again is the same frame; an earlier one is
                another pass of a recording, and begins anew.
        """
        checksum = zlib.crc32(np.ascontiguousarray(frame[::_EVERY_ROW]).data)
        before = self._picture
        if before is None or checksum != before.checksum or stamp_ns < before.last_stamp_ns:
            self._picture = _Picture(checksum, stamp_ns, stamp_ns, 1)
        elif stamp_ns > before.last_stamp_ns:
            self._picture = _Picture(checksum, before.first_stamp_ns, stamp_ns, before.frames + 1)
