"""Camera messages to RGB frames.

Owns: the conversion of `sensor_msgs/Image` and `sensor_msgs/CompressedImage` to the policy's
uint8 RGB, and every check that a camera message needs before it may be believed. Must not import
rclpy or the policy: it works on any object with the messages' fields, so a bag reader uses it too.

Raw frames go through `cv_bridge` where it can be imported and through `rosbags-image` where it
cannot. Neither is handed a message as it came: `rosbags-image` 0.11 ignores `step`, and old
`cv_bridge` releases do so for some widths, so rows are stripped of their padding first. Compressed
frames are decoded with OpenCV, as both of them do inside, because their own wrappers stumble over
PNG with alpha and answer damaged data with an assertion.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from groot_int8_ros.errors import ConfigurationError, ObservationError
from groot_int8_ros.policy.types import UInt8Array

# Bytes of one pixel in every raw encoding that is understood. The others (16 bit, Bayer, depth)
# are not what the policy was trained on, so they are refused by name.
BYTES_PER_PIXEL = {
    "rgb8": 3,
    "bgr8": 3,
    "rgba8": 4,
    "bgra8": 4,
    "mono8": 1,
    "yuv422": 2,
    "uyvy": 2,
    "yuv422_yuy2": 2,
    "yuyv": 2,
}

_JPEG_START = b"\xff\xd8\xff"
_JPEG_END = b"\xff\xd9"
_PNG_START = b"\x89PNG\r\n\x1a\n"
_PNG_END = b"IEND\xaeB`\x82"

Bridge = Callable[[Any], Any]


def load_bridge() -> tuple[str, Bridge]:
    """Choose the converter for raw frames.

    The package called `cv-bridge` on PyPI is not the one of ROS, and ROS's own fails at import
    beside a NumPy it was not built for; both count as not there.

    Returns:
        The converter's name for the log, and a function from an unpadded raw image message to
        an RGB frame as an array.

    Raises:
        ConfigurationError: Neither converter can be imported.
    """
    try:
        from cv_bridge import CvBridge

        to_cv2 = CvBridge().imgmsg_to_cv2
    except (ImportError, AttributeError):
        pass
    else:
        return "cv_bridge", lambda message: to_cv2(message, desired_encoding="rgb8")
    try:
        from rosbags.image import message_to_cvimage
    except ImportError as error:
        raise ConfigurationError(
            "no converter for camera images: neither cv_bridge of ROS nor rosbags-image can be "
            "imported. Install ros-<distro>-cv-bridge, or `pip install "
            '"rosbags-image[opencv-headless]"`.'
        ) from error
    return "rosbags-image", lambda message: message_to_cvimage(message, "rgb8")


def rgb_from_image(message: Any, topic: str, size: tuple[int, int], bridge: Bridge) -> UInt8Array:
    """Convert a `sensor_msgs/Image`.

    Args:
        message: The message, or any object with its fields.
        topic: Where it came from; named in errors.
        size: Height and width that it must have, in pixels.
        bridge: From `load_bridge`.

    Returns:
        RGB, uint8, shape (height, width, 3), contiguous. YUV is taken as BT.601 limited range.

    Raises:
        ObservationError: Of another size, truncated, of an encoding that is not understood, or
            not convertible.
    """
    encoding = str(message.encoding)
    height, width, step = int(message.height), int(message.width), int(message.step)
    where = f"image on {topic} (encoding {encoding!r})"
    pixel_bytes = BYTES_PER_PIXEL.get(encoding)
    if pixel_bytes is None:
        raise ObservationError(
            f"{where}: this encoding is not understood; have the driver publish one of "
            f"{', '.join(BYTES_PER_PIXEL)}."
        )
    _check_size((height, width), size, where)
    if pixel_bytes == 2 and width % 2:
        raise ObservationError(
            f"{where}: 4:2:2 data shares colour between pairs of pixels, so the width must be "
            "even; check the camera driver."
        )
    row_bytes = width * pixel_bytes
    data = np.frombuffer(message.data, np.uint8)
    # The last row may come without its padding.
    needed = step * (height - 1) + row_bytes
    if step < row_bytes or data.size < needed:
        raise ObservationError(
            f"{where}: truncated: {data.size} bytes with step {step}, but these dimensions need "
            f"{max(needed, row_bytes * height)} bytes with a step of at least {row_bytes}; check "
            "the camera driver and the transport."
        )
    rows = np.lib.stride_tricks.as_strided(
        data, shape=(height, row_bytes), strides=(step, 1), writeable=False
    )
    unpadded = SimpleNamespace(
        encoding=encoding,
        height=height,
        width=width,
        step=row_bytes,
        is_bigendian=0,
        data=np.ascontiguousarray(rows).reshape(-1),
    )
    try:
        frame = bridge(unpadded)
    except Exception as error:  # each converter has errors of its own, OpenCV's among them
        raise ObservationError(f"{where}: cannot be converted to RGB: {error}") from error
    return _checked(frame, size, where)


def rgb_from_compressed_image(message: Any, topic: str, size: tuple[int, int]) -> UInt8Array:
    """Decode a `sensor_msgs/CompressedImage` that holds JPEG or PNG.

    The content decides, not the `format` field, which drivers fill in many ways. A damaged JPEG
    that is complete cannot be told from a noisy one, for the format has no checksum. The size is
    read from the header first: a damaged one can announce gigabytes.

    Args:
        message: The message, or any object with its fields.
        topic: Where it came from; named in errors.
        size: Height and width that it must have, in pixels.

    Returns:
        RGB, uint8, shape (height, width, 3), contiguous. Grey is repeated, alpha is dropped.

    Raises:
        ObservationError: Of another size, truncated, damaged, or neither JPEG nor PNG.
    """
    import cv2

    where = f"compressed image on {topic} (format {str(message.format)!r})"
    data = bytes(message.data)
    if data.startswith(_JPEG_START):
        # Decoders paint the missing rest of a cut JPEG grey and call it a frame.
        complete = data.rstrip(b"\0").endswith(_JPEG_END)
        announced = _jpeg_size(data)
    elif data.startswith(_PNG_START):
        complete = _PNG_END in data[-64:]
        announced = int.from_bytes(data[20:24], "big"), int.from_bytes(data[16:20], "big")
    else:
        raise ObservationError(
            f"{where}: {len(data)} bytes that are neither JPEG nor PNG; set the camera's "
            "transport to one of these, or to raw."
        )
    if not complete:
        raise ObservationError(
            f"{where}: truncated: the end of the file is missing after {len(data)} bytes; check "
            "the camera driver and the transport."
        )
    if announced is None:
        raise ObservationError(
            f"{where}: corrupt: no frame header in {len(data)} bytes; check the camera driver and "
            "the transport."
        )
    _check_size(announced, size, where)
    try:
        frame = cv2.imdecode(
            np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
        )
    except cv2.error as error:
        raise ObservationError(f"{where}: corrupt: {error}") from error
    if frame is None:
        raise ObservationError(
            f"{where}: corrupt: {len(data)} bytes that cannot be decoded; check the camera driver "
            "and the transport."
        )
    return _checked(frame[:, :, ::-1], size, where)


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    # (height, width) from the frame header (ITU-T T.81, B.2.2), or None where there is none.
    place = 2
    while place + 9 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return (
                int.from_bytes(data[place + 5 : place + 7], "big"),
                int.from_bytes(data[place + 7 : place + 9], "big"),
            )
        # A marker may be preceded by any number of fill bytes.
        place += 1 if marker == 0xFF else 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return None


def _check_size(found: tuple[int, int], wanted: tuple[int, int], where: str) -> None:
    if found != wanted:
        raise ObservationError(
            f"{where}: {found[1]}x{found[0]} pixels, but the bundle was exported for "
            f"{wanted[1]}x{wanted[0]}; set the driver to that size, or export the bundle again "
            "with this one (groot-int8 export, with --robot or --dataset that say so)."
        )


def _checked(frame: Any, size: tuple[int, int], where: str) -> UInt8Array:
    if frame.shape != (*size, 3) or frame.dtype != np.uint8:
        raise ObservationError(
            f"{where}: the converter gave {frame.dtype} {frame.shape} instead of uint8 "
            f"{(*size, 3)}."
        )
    rgb: UInt8Array = np.ascontiguousarray(frame)
    return rgb
