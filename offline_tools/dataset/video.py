"""RGB frames out of and into a video file, one at a time.

Owns: decoding and encoding with PyAV. Must not import ROS or torch, and never holds a whole
video: an episode of some minutes is gigabytes once it is decoded. OpenCV's wheel cannot decode
AV1, the usual codec of LeRobot datasets, which is why PyAV does it here.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import av.error
import numpy as np
from av.codec.context import CodecContext
from av.video.stream import VideoStream

from groot_int8_ros.errors import ConfigurationError, DatasetError
from groot_int8_ros.policy.types import UInt8Array

_RECOPY = "copy the file again from where the dataset came from"


def read_rgb_frames(path: Path, count: int, size: tuple[int, int]) -> Iterator[UInt8Array]:
    """Decode a video from its first frame to its last.

    Args:
        path: Video file in any container and codec that FFmpeg reads (AV1 and H.264 among them).
        count: Number of frames the video must have.
        size: Height and width in pixels that every frame must have.

    Yields:
        RGB frames, uint8, shape (height, width, 3).

    Raises:
        DatasetError: The file is missing or damaged, a frame has another size, or the video has
            fewer or more than `count` frames.
    """
    if not path.is_file():
        raise DatasetError(
            f"the video {path} is missing, so its camera cannot be read; {_RECOPY}."
        )
    decoded = 0
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise DatasetError(f"{path} holds no video stream; {_RECOPY}.")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            for frame in container.decode(stream):
                if frame.is_corrupt:
                    raise DatasetError(f"frame {decoded} of {path} is damaged; {_RECOPY}.")
                if (frame.height, frame.width) != size:
                    raise DatasetError(
                        f"frame {decoded} of {path} is {frame.height} x {frame.width} pixels, "
                        f"but meta/info.json says {size[0]} x {size[1]}; correct the shape there."
                    )
                if decoded == count:
                    raise DatasetError(
                        f"{path} has more frames than the episode's {count} rows, so frames and "
                        f"joints cannot be paired; {_RECOPY}."
                    )
                decoded += 1
                yield cast("UInt8Array", frame.to_ndarray(format="rgb24"))
    except av.error.FFmpegError as error:
        raise DatasetError(
            f"{path} cannot be decoded after frame {decoded} of {count} ({error}); the file is "
            f"truncated or damaged: {_RECOPY}."
        ) from error
    if decoded < count:
        raise DatasetError(
            f"{path} ends after {decoded} frames, but the episode has {count} rows; the file is "
            f"truncated: {_RECOPY}."
        )


def write_rgb_frames(
    path: Path, frames: Iterable[UInt8Array], fps: float, codec: str = "libsvtav1"
) -> int:
    """Encode frames as they come.

    Args:
        path: Video file to write; its suffix picks the container.
        frames: RGB frames, uint8, shape (height, width, 3), all of one size, both sides even
            (4:2:0 chroma is stored at half the resolution).
        fps: Frames a second.
        codec: Name of an FFmpeg encoder: `libsvtav1` as LeRobot writes, `libx264`, `mpeg4`.

    Returns:
        Number of frames written.

    Raises:
        ConfigurationError: This PyAV has no such encoder, or it refuses the frames' size.
        OSError: The file cannot be written.
    """
    # SVT-AV1 prints a banner for each file, whatever FFmpeg's own log level is.
    os.environ.setdefault("SVT_LOG", "1")
    written = 0
    try:
        with av.open(str(path), "w") as container:
            stream: VideoStream | None = None
            for image in frames:
                if stream is None:
                    stream = cast(
                        "VideoStream",
                        container.add_stream(codec, rate=Fraction(fps).limit_denominator(100_000)),
                    )
                    stream.height, stream.width = image.shape[:2]
                    stream.pix_fmt = "yuv420p"
                    _open_without_real_time_threads(stream.codec_context)
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
                container.mux(stream.encode(frame))
                written += 1
            if stream is not None:
                container.mux(stream.encode(None))
    except OSError:
        raise
    except (av.error.FFmpegError, av.codec.codec.UnknownCodecError) as error:
        raise ConfigurationError(
            f"the encoder {codec!r} cannot write {path.name} ({error}); use another codec, such "
            "as libx264 or mpeg4, and frames with even sides."
        ) from error
    return written


def _open_without_real_time_threads(encoder: CodecContext) -> None:
    """Open an encoder, and undo what SVT-AV1 does to the scheduling of this process then.

    Where it may (as root, so in most containers), it makes its own threads and the one that opens
    it real-time threads of the highest priority. Every thread and process that is started later
    inherits that: together they shut out all else, and one that is busy shuts out the others.
    """
    before = _real_time_threads()
    # A thread that ends here: the C library remembers the priority of one that goes on, and Fast
    # DDS gives its own threads what it remembers.
    with ThreadPoolExecutor(1) as opener:
        opener.submit(encoder.open).result()
    for thread in _real_time_threads() - before:
        with contextlib.suppress(ProcessLookupError):
            os.sched_setscheduler(thread, os.SCHED_OTHER, os.sched_param(0))


def _real_time_threads() -> set[int]:
    """Return those threads of this process that others wait for until they sleep."""
    found = set()
    for folder in Path("/proc/self/task").iterdir():
        with contextlib.suppress(ProcessLookupError):
            if os.sched_getscheduler(int(folder.name)) in (os.SCHED_FIFO, os.SCHED_RR):
                found.add(int(folder.name))
    return found
