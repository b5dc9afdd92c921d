"""How large a camera frame is after each stage of the image chain, and how many tokens it becomes.

Owns: that arithmetic. Must not import torch, OpenCV or Pillow: a machine that only builds engines
has to know how long a prompt is, and touches no picture.
"""

from __future__ import annotations

from dataclasses import dataclass

from groot_int8_ros.errors import ProcessorError
from groot_int8_ros.policy.processor import ImageChain

# Eagle-Block2A-2B-v2: 14-pixel patches, merged 2 by 2 into one token.
_TOKEN_SIDE_PIXELS = 28
_PIXELS_PER_TOKEN = _TOKEN_SIDE_PIXELS * _TOKEN_SIDE_PIXELS

# Beyond these its processor resizes in a way of its own, which no robot camera needs.
_MIN_NETWORK_PIXELS = 4 * _PIXELS_PER_TOKEN
_MAX_NETWORK_PIXELS = 4096 * _PIXELS_PER_TOKEN
_MAX_NETWORK_SIDE_PIXELS = 7000
_MAX_ASPECT_RATIO = 200


@dataclass(frozen=True)
class ImageSizes:
    """Size of a frame after each stage of the image chain, as (height, width) in pixels.

    Attributes:
        resized: After the first scaling.
        cropped: After the centre crop.
        evaluation: After the second scaling.
        network: What the network sees.
    """

    resized: tuple[int, int]
    cropped: tuple[int, int]
    evaluation: tuple[int, int]
    network: tuple[int, int]

    @property
    def tokens(self) -> int:
        """Number of image tokens."""
        return self.network[0] * self.network[1] // _PIXELS_PER_TOKEN


def _scaled(size: tuple[int, int], shortest_edge: int) -> tuple[int, int]:
    # Python's round (ties to even) of a product of floats: what albumentations' SmallestMaxSize
    # computes, to the bit.
    scale = shortest_edge / min(size)
    return size if scale == 1.0 else (round(size[0] * scale), round(size[1] * scale))


def network_side(side: int) -> int:
    """Return the side nearest to one of so many pixels that is a whole number of tokens."""
    return max(_TOKEN_SIDE_PIXELS, round(side / _TOKEN_SIDE_PIXELS) * _TOKEN_SIDE_PIXELS)


def image_sizes(height: int, width: int, chain: ImageChain) -> ImageSizes:
    """Return a frame's size after each stage.

    Args:
        height: Frame height in pixels.
        width: Frame width in pixels.
        chain: Scaling and cropping.

    Returns:
        The sizes and the number of image tokens.

    Raises:
        ProcessorError: The frame is empty, or so large, small or narrow at the network that the
            Eagle processor would treat it in a way that is not implemented.
    """
    if height < 1 or width < 1:
        raise ProcessorError(
            f"a camera frame of {height}x{width} (height x width) has no pixels. Correct the "
            "camera's size."
        )
    edge = chain.shortest_image_edge
    resized = _scaled((height, width), edge)
    cropped = (
        max(1, int(resized[0] * chain.crop_fraction)),
        max(1, int(resized[1] * chain.crop_fraction)),
    )
    evaluation = _scaled(cropped, edge)
    network = (network_side(evaluation[0]), network_side(evaluation[1]))
    if (
        not _MIN_NETWORK_PIXELS <= network[0] * network[1] <= _MAX_NETWORK_PIXELS
        or max(network) > _MAX_NETWORK_SIDE_PIXELS
        or max(evaluation) > _MAX_ASPECT_RATIO * min(evaluation)
    ):
        raise ProcessorError(
            f"a camera frame of {height}x{width} (height x width) with shortest_image_edge {edge} "
            f"becomes {network[0]}x{network[1]} at the network, outside the limits within which "
            f"sizes are computed here ({_MIN_NETWORK_PIXELS} to {_MAX_NETWORK_PIXELS} pixels, "
            f"{_MAX_NETWORK_SIDE_PIXELS} per side, aspect ratio {_MAX_ASPECT_RATIO}). Use another "
            "camera resolution or fine-tune with another shortest_image_edge."
        )
    return ImageSizes(resized, cropped, evaluation, network)
