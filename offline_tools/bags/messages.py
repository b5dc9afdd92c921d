"""ROS messages as bytes, without ROS.

Owns: the typestore and the messages that a converted episode consists of. Must not import rclpy:
a workstation without ROS writes bags too.

The typestore is rosbags' `ROS2_HUMBLE`. The messages used here (`sensor_msgs/Image`,
`CompressedImage`, `JointState`, `std_msgs/String` and what they contain) have one and the same
definition from Humble to Kilted; a test compares the type hashes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast, get_args

import cv2
import numpy as np
from rosbags.interfaces import (
    Qos,
    QosDurability,
    QosHistory,
    QosLiveliness,
    QosReliability,
    QosTime,
)
from rosbags.typesys import Stores, get_typestore

from groot_int8_ros.policy.types import Float64Array, UInt8Array

RawEncoding = Literal["rgb8", "bgr8", "rgba8", "bgra8", "mono8"]
Compression = Literal["jpeg", "png"]
RAW_ENCODINGS: tuple[RawEncoding, ...] = get_args(RawEncoding)
COMPRESSIONS: tuple[Compression, ...] = get_args(Compression)

IMAGE_TYPE = "sensor_msgs/msg/Image"
COMPRESSED_IMAGE_TYPE = "sensor_msgs/msg/CompressedImage"
JOINT_STATE_TYPE = "sensor_msgs/msg/JointState"
STRING_TYPE = "std_msgs/msg/String"

TYPESTORE = get_typestore(Stores.ROS2_HUMBLE)

_TYPES = TYPESTORE.types
_NANOSECONDS = 1_000_000_000
# rmw's RMW_DURATION_INFINITE: what a publisher that sets no deadline, lifespan or lease records.
_INFINITE = QosTime(9_223_372_036, 854_775_807)


def recorded_qos(*, depth: int, latched: bool = False) -> Qos:
    """Return the QoS of a reliable publisher as rosbag2 records it.

    Args:
        depth: Messages kept.
        latched: Whether late subscribers get the kept messages (transient local).
    """
    return Qos(
        history=QosHistory.KEEP_LAST,
        depth=depth,
        reliability=QosReliability.RELIABLE,
        durability=QosDurability.TRANSIENT_LOCAL if latched else QosDurability.VOLATILE,
        deadline=_INFINITE,
        lifespan=_INFINITE,
        liveliness=QosLiveliness.AUTOMATIC,
        liveliness_lease_duration=_INFINITE,
        avoid_ros_namespace_conventions=False,
    )


def image(frame: UInt8Array, encoding: RawEncoding, frame_id: str, stamp_ns: int) -> memoryview:
    """Serialize an RGB frame as `sensor_msgs/Image`.

    Args:
        frame: RGB, uint8, shape (height, width, 3).
        encoding: Channel order of the message.
        frame_id: For the header.
        stamp_ns: For the header, nanoseconds.

    Returns:
        The message in CDR.
    """
    pixels = _encoded(frame, encoding)
    message = _TYPES[IMAGE_TYPE](
        header=_header(frame_id, stamp_ns),
        height=frame.shape[0],
        width=frame.shape[1],
        encoding=encoding,
        is_bigendian=0,
        step=pixels.nbytes // frame.shape[0],
        data=pixels.reshape(-1),
    )
    return TYPESTORE.serialize_cdr(message, IMAGE_TYPE)


def compressed_image(
    frame: UInt8Array,
    compression: Compression,
    jpeg_quality: int,
    frame_id: str,
    stamp_ns: int,
) -> memoryview:
    """Serialize an RGB frame as `sensor_msgs/CompressedImage`.

    Args:
        frame: RGB, uint8, shape (height, width, 3).
        compression: `jpeg` (lossy) or `png` (exact).
        jpeg_quality: 1 to 100; not used for png.
        frame_id: For the header.
        stamp_ns: For the header, nanoseconds.

    Returns:
        The message in CDR.
    """
    suffix, options = {
        "jpeg": (".jpg", [cv2.IMWRITE_JPEG_QUALITY, jpeg_quality]),
        "png": (".png", [cv2.IMWRITE_PNG_COMPRESSION, 1]),
    }[compression]
    encoded, data = cv2.imencode(suffix, _encoded(frame, "bgr8"), options)
    if not encoded:
        raise RuntimeError(f"OpenCV could not encode a frame of shape {frame.shape} as {suffix}")
    message = _TYPES[COMPRESSED_IMAGE_TYPE](
        header=_header(frame_id, stamp_ns),
        format=compression,
        data=np.asarray(data, np.uint8).reshape(-1),
    )
    return TYPESTORE.serialize_cdr(message, COMPRESSED_IMAGE_TYPE)


def joint_state(names: Sequence[str], positions: Float64Array, stamp_ns: int) -> memoryview:
    """Serialize positions as `sensor_msgs/JointState`, without velocities and efforts.

    Args:
        names: Joint names.
        positions: float64, shape (len(names),).
        stamp_ns: For the header, nanoseconds.

    Returns:
        The message in CDR.
    """
    nothing = np.zeros(0, np.float64)
    message = _TYPES[JOINT_STATE_TYPE](
        header=_header("", stamp_ns),
        name=list(names),
        position=np.ascontiguousarray(positions, np.float64),
        velocity=nothing,
        effort=nothing,
    )
    return TYPESTORE.serialize_cdr(message, JOINT_STATE_TYPE)


def string(text: str) -> memoryview:
    """Serialize a text as `std_msgs/String`, in CDR."""
    return TYPESTORE.serialize_cdr(_TYPES[STRING_TYPE](data=text), STRING_TYPE)


def _header(frame_id: str, stamp_ns: int) -> Any:
    stamp = _TYPES["builtin_interfaces/msg/Time"](
        sec=stamp_ns // _NANOSECONDS, nanosec=stamp_ns % _NANOSECONDS
    )
    return _TYPES["std_msgs/msg/Header"](stamp=stamp, frame_id=frame_id)


def _encoded(frame: UInt8Array, encoding: RawEncoding) -> UInt8Array:
    if encoding == "rgb8":
        return np.ascontiguousarray(frame)
    conversion = {
        "bgr8": cv2.COLOR_RGB2BGR,
        "rgba8": cv2.COLOR_RGB2RGBA,
        "bgra8": cv2.COLOR_RGB2BGRA,
        "mono8": cv2.COLOR_RGB2GRAY,
    }[encoding]
    return cast("UInt8Array", cv2.cvtColor(frame, conversion))
