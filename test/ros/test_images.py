"""Camera messages: every accepted encoding with known pixels, every kind of damage by name."""

from __future__ import annotations

import array
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

pytest.importorskip("rclpy", reason="needs the ROS 2 Python packages")

from sensor_msgs.msg import CompressedImage, Image

from groot_int8_ros.errors import ObservationError
from groot_int8_ros.ros.images import load_bridge, rgb_from_compressed_image, rgb_from_image

TOPIC = "/cameras/front/image_raw"
RNG = np.random.default_rng(7)
RGB = RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (6, 8), dtype=np.uint8)
ALPHA = RNG.integers(0, 256, (6, 8, 1), dtype=np.uint8)


def raw(encoding: str, rows: np.ndarray, padding: int = 0) -> Image:
    height, width = rows.shape[:2]
    flat = rows.reshape(height, -1)
    # Padding of 0xAB would show as colour if it were taken for pixels.
    data = np.pad(flat, ((0, 0), (0, padding)), constant_values=0xAB)
    return Image(
        height=height, width=width, encoding=encoding, step=data.shape[1], data=data.tobytes()
    )


def convert(message: Image, size: tuple[int, int] = (6, 8)) -> np.ndarray:
    return rgb_from_image(message, TOPIC, size, load_bridge()[1])


def decode(message: CompressedImage) -> np.ndarray:
    return rgb_from_compressed_image(message, TOPIC, (48, 64))


@pytest.mark.parametrize("padding", [0, 1, 5, 64])
@pytest.mark.parametrize(
    ("encoding", "rows", "expected"),
    [
        ("rgb8", RGB, RGB),
        ("bgr8", RGB[:, :, ::-1], RGB),
        ("rgba8", np.concatenate([RGB, ALPHA], axis=2), RGB),
        ("bgra8", np.concatenate([RGB[:, :, ::-1], ALPHA], axis=2), RGB),
        ("mono8", GREY, np.repeat(GREY[:, :, None], 3, axis=2)),
    ],
)
def test_channel_order_and_row_padding(
    encoding: str, rows: np.ndarray, expected: np.ndarray, padding: int
) -> None:
    frame = convert(raw(encoding, rows, padding))
    assert frame.dtype == np.uint8
    assert frame.flags.c_contiguous
    np.testing.assert_array_equal(frame, expected)


def test_a_raw_rgb_frame_is_the_message_itself() -> None:
    name, bridge = load_bridge()
    if name != "rosbags-image":
        pytest.skip(f"{name} converts frames here, and may copy them")
    message = raw("rgb8", RGB)
    message.data = array.array("B", RGB.tobytes())  # as rclpy hands it over
    frame = rgb_from_image(message, TOPIC, (6, 8), bridge)
    assert np.shares_memory(frame, np.frombuffer(message.data, np.uint8))


def bt601(y: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """ITU-R BT.601, limited range: the conversion that the cameras' drivers assume."""
    y, u, v = 1.164383 * (y - 16.0), u - 128.0, v - 128.0
    rgb = np.stack([y + 1.596027 * v, y - 0.391762 * u - 0.812968 * v, y + 2.017232 * u], axis=-1)
    return np.clip(np.rint(rgb), 0, 255)


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize(
    ("encoding", "order"),
    [("yuv422", "UYVY"), ("uyvy", "UYVY"), ("yuv422_yuy2", "YUYV"), ("yuyv", "YUYV")],
)
def test_yuv_byte_order_and_matrix(encoding: str, order: str, padding: int) -> None:
    y = RNG.integers(16, 236, (6, 8)).astype(np.float64)
    u, v = (RNG.integers(16, 241, (6, 4)).astype(np.float64) for _ in range(2))
    rows = np.empty((6, 8, 2), np.uint8)
    luma, chroma = (1, 0) if order == "UYVY" else (0, 1)
    rows[:, :, luma] = y
    rows[:, 0::2, chroma] = u
    rows[:, 1::2, chroma] = v
    expected = bt601(y, np.repeat(u, 2, axis=1), np.repeat(v, 2, axis=1))
    frame = convert(raw(encoding, rows, padding))
    assert np.abs(frame - expected).max() <= 1  # OpenCV computes in integers


def test_last_row_may_lack_its_padding() -> None:
    message = raw("rgb8", RGB, padding=4)
    message.data = bytes(message.data)[:-4]
    np.testing.assert_array_equal(convert(message), RGB)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"data": bytes(100)}, "truncated"),
        ({"data": b""}, "truncated"),
        ({"step": 8}, "truncated"),
        ({"height": 0}, "8x0 pixels"),
        ({"width": 0}, "0x6 pixels"),
        ({"encoding": "RGB8"}, "not understood"),
        ({"encoding": "16UC1"}, "not understood"),
        ({"encoding": ""}, "not understood"),
        ({"height": 8, "width": 6}, "exported for 8x6"),
        ({"step": 2**32 - 1}, "truncated"),
    ],
)
def test_damaged_raw_image_is_refused_by_topic_and_encoding(
    change: dict[str, object], word: str
) -> None:
    message = raw("rgb8", RGB)
    for name, value in change.items():
        setattr(message, name, value)
    with pytest.raises(ObservationError, match=word) as caught:
        convert(message)
    assert TOPIC in str(caught.value)
    assert repr(message.encoding) in str(caught.value)


def test_odd_width_of_shared_colour_is_refused() -> None:
    rows = np.zeros((4, 7, 2), np.uint8)
    with pytest.raises(ObservationError, match="width must be even"):
        convert(raw("yuv422", rows), (4, 7))


def smooth_picture() -> np.ndarray:
    y, x = np.mgrid[0:48, 0:64]
    return np.stack([x * 4, y * 5, (x + y) * 2], axis=-1).astype(np.uint8)


def encoded(extension: str, rgb: np.ndarray) -> bytes:
    picture = rgb if rgb.ndim == 2 else np.ascontiguousarray(rgb[:, :, ::-1])
    done, data = cv2.imencode(extension, picture)
    assert done
    return bytes(data)


def compressed(data: bytes, declared: str = "jpeg") -> CompressedImage:
    return CompressedImage(format=declared, data=data)


def test_png_is_exact_and_jpeg_is_close_with_red_and_blue_in_place() -> None:
    picture = smooth_picture()
    png = decode(compressed(encoded(".png", picture), "png"))
    np.testing.assert_array_equal(png, picture)
    jpeg = decode(compressed(encoded(".jpg", picture), "rgb8; jpeg compressed bgr8"))
    assert np.abs(jpeg.astype(int) - picture).mean() < 4


def test_grey_jpeg_and_png_with_alpha_become_three_channels() -> None:
    grey = smooth_picture()[:, :, 0]
    frame = decode(compressed(encoded(".png", grey)))
    np.testing.assert_array_equal(frame, np.repeat(grey[:, :, None], 3, axis=2))
    assert decode(compressed(encoded(".jpg", grey))).shape == (48, 64, 3)
    picture = smooth_picture()
    with_alpha = np.dstack([picture[:, :, ::-1], np.full((48, 64), 128, np.uint8)])
    done, data = cv2.imencode(".png", with_alpha)
    assert done
    frame = decode(compressed(bytes(data)))
    np.testing.assert_array_equal(frame, picture)


def test_trailing_zeros_of_a_fixed_size_buffer_are_no_damage() -> None:
    data = encoded(".jpg", smooth_picture())
    whole = decode(compressed(data))
    np.testing.assert_array_equal(decode(compressed(data + bytes(100))), whole)


@pytest.mark.parametrize("extension", [".jpg", ".png"])
@pytest.mark.parametrize("kept", [0.99, 0.5, 0.1])
def test_cut_file_is_refused_and_not_painted_grey(extension: str, kept: float) -> None:
    data = encoded(extension, smooth_picture())
    with pytest.raises(ObservationError, match="truncated") as caught:
        decode(compressed(data[: int(len(data) * kept)]))
    assert TOPIC in str(caught.value)
    assert "'jpeg'" in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"hello", bytes(1000), b"RIFF\0\0\0\0WEBPVP8 "])
def test_neither_jpeg_nor_png_is_refused(data: bytes) -> None:
    with pytest.raises(ObservationError, match="neither JPEG nor PNG"):
        decode(compressed(data))


def test_corrupt_content_between_good_ends_is_refused() -> None:
    jpeg = encoded(".jpg", smooth_picture())
    broken_header = jpeg[:4] + b"\xff" * 40 + jpeg[44:]
    png = bytearray(encoded(".png", smooth_picture()))
    for place in range(60, 100):
        png[place] ^= 0x5A
    for data in (broken_header, bytes(png)):
        with pytest.raises(ObservationError, match="corrupt"):
            decode(compressed(data))


@pytest.mark.parametrize("extension", [".jpg", ".png"])
def test_other_size_is_refused_before_its_gigabytes_are_allocated(
    extension: str,
) -> None:
    picture = smooth_picture()
    with pytest.raises(ObservationError, match=r"64x32 pixels, but .* exported for 64x48"):
        decode(compressed(encoded(extension, picture[:32])))
    data = bytearray(encoded(extension, picture))
    if extension == ".jpg":
        start = data.index(b"\xff\xc0") + 5
        assert data[start : start + 4] == bytes([0, 48, 0, 64])
        data[start : start + 4] = b"\xff\xf0\xff\xf0"
    else:
        assert data[16:24] == bytes([0, 0, 0, 64, 0, 0, 0, 48])
        data[16:24] = b"\0\0\xff\xf0\0\0\xff\xf0"
    with pytest.raises(ObservationError, match="65520x65520 pixels"):
        decode(compressed(bytes(data)))


def test_random_bytes_never_escape_as_another_error() -> None:
    source = {".jpg": encoded(".jpg", smooth_picture()), ".png": encoded(".png", smooth_picture())}
    for data in source.values():
        for _ in range(60):
            broken = bytearray(data)
            for place in RNG.integers(3, len(data), 20):
                broken[place] = RNG.integers(0, 256)
            try:
                frame = decode(compressed(bytes(broken)))
            except ObservationError:
                continue
            assert frame.dtype == np.uint8
            assert frame.shape[2] == 3


def test_a_stranger_called_cv_bridge_is_not_taken_for_the_one_of_ros(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cv_bridge.py").write_text("def imread(path): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cv_bridge", raising=False)
    name, bridge = load_bridge()
    sys.modules.pop("cv_bridge", None)
    assert name == "rosbags-image"
    np.testing.assert_array_equal(
        rgb_from_image(raw("bgr8", RGB), TOPIC, (6, 8), bridge), RGB[:, :, ::-1]
    )
