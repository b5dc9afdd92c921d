"""The image chain inside the graph: uint8 camera frames in, the network's pixels out.

Owns: the coefficients of each resize and the modules that apply them. Must not import OpenCV or
Pillow: what they compute is written down here as constants, and the tests compare.

The steps are those of `groot_int8_ros.policy.preprocess`: OpenCV's INTER_AREA to the shortest
edge, centre crop, INTER_AREA again, Pillow's antialiased bicubic to whole tokens (width first),
then (v - 127.5) / 127.5. A step whose sizes are equal vanishes; the crop is folded into the step
before it. Every step gives the bytes of the library on x86-64:

- INTER_AREA, shrinking: a box average of few neighbours, which OpenCV sums in float32, width first
  and pixel by pixel, with one rounding to nearest even. An average that lies exactly between two
  grey levels is common (one pixel in a thousand of a black-and-white image), and there the
  rounding errors of the sum decide. One level too much or too little can become two in the bicubic
  step, so the sum has OpenCV's order here: a constant gather, a product and a sum for each
  neighbour, no matrix product. An engine that contracts product and sum (as OpenCV's own builds
  for ARM may) decides some of these cases the other way, mostly by one level, rarely by two; how
  many depends on the size and the picture (of 480x640 and 360x640 a test says fewer than one pixel
  in 2,000, and fewer than one in 100,000 by two).
- INTER_AREA, enlarging: two neighbours per axis with 11-bit coefficients and OpenCV's own shifts,
  in whole numbers below 2 ** 24, which float32 holds: exact in every engine.
- Bicubic: products with Pillow's 22-bit coefficients, split into two matrices of 11 bits, again in
  whole numbers below 2 ** 24: exact in every engine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from groot_int8_ros.policy.image_sizes import ImageSizes, image_sizes
from groot_int8_ros.policy.processor import ImageChain
from groot_int8_ros.policy.types import CameraSpec, Float32Array, Int64Array
from offline_tools.model.deployed.constants import ConstantModule

_HALF_RANGE = 127.5
_COLOURS = 3

# OpenCV: a neighbour that a box covers by less than this is left out (computeResizeAreaTab).
_SMALLEST_OVERLAP = 1e-3
# OpenCV: bits of the coefficients of a two-tap resize (INTER_RESIZE_COEF_BITS).
_TAP_BITS = 11
# Pillow: bits of the coefficients of an 8-bit resize (PRECISION_BITS).
_BICUBIC_BITS = 22
_BICUBIC_SUPPORT = 2.0
_BICUBIC_A = -0.5
_SPLIT = 1 << (_BICUBIC_BITS // 2)


class FrameChain(nn.Module):
    """The image chain for frames of one size."""

    def __init__(self, height: int, width: int, chain: ImageChain) -> None:
        """Compute the coefficients.

        Args:
            height: Height of the frames in pixels.
            width: Width of the frames in pixels.
            chain: Scaling and cropping.

        Raises:
            ProcessorError: As `image_sizes`.
        """
        super().__init__()
        self.sizes: ImageSizes = image_sizes(height, width, chain)
        resized, cropped = self.sizes.resized, self.sizes.cropped
        top, left = (resized[0] - cropped[0]) // 2, (resized[1] - cropped[1]) // 2
        crop = (slice(top, top + cropped[0]), slice(left, left + cropped[1]))
        area: list[nn.Module] = []
        if (height, width) != resized:
            area.append(_area_resize((height, width), resized, crop))
        elif resized != cropped:
            area.append(_Crop(crop))
        if cropped != self.sizes.evaluation:
            whole = (slice(None), slice(None))
            area.append(_area_resize(cropped, self.sizes.evaluation, whole))
        bicubic: list[nn.Module] = []
        for axis in (1, 0):
            source, target = self.sizes.evaluation[axis], self.sizes.network[axis]
            if source != target:
                bicubic.append(_BicubicPass(source, target, along_width=axis == 1))
        self.area = nn.Sequential(*area)
        self.bicubic = nn.Sequential(*bicubic)

    def forward(self, frames: Tensor) -> Tensor:
        """Convert frames.

        Args:
            frames: RGB levels in float32, shape (N, height, width, 3).

        Returns:
            Pixels in [-1, 1], float32, shape (N, 3, H, W).
        """
        # Colours stay innermost while pixels are gathered, so that whole pixels are.
        evaluation: Tensor = self.area(frames)
        # Three axes, as a product with a constant of three takes them in every engine.
        channels = evaluation.permute(0, 3, 1, 2).flatten(0, 1)
        levels: Tensor = self.bicubic(channels)
        pixels = (levels - _HALF_RANGE) / _HALF_RANGE
        return pixels.reshape(-1, _COLOURS, *self.sizes.network)


class CameraFrames(nn.Module):
    """The image chain of all cameras; cameras of one size run as one batch."""

    def __init__(self, cameras: Sequence[CameraSpec], chain: ImageChain) -> None:
        """Compute the coefficients.

        Args:
            cameras: In the order in which the network sees them. All must reach the network at
                one size, which `Preprocessor` checks.
            chain: Scaling and cropping.

        Raises:
            ProcessorError: As `image_sizes`.
        """
        super().__init__()
        self._places: dict[str, list[int]] = {}
        for place, camera in enumerate(cameras):
            size = f"{camera.height}x{camera.width}"
            self._places.setdefault(size, []).append(place)
        self.chains = nn.ModuleDict(
            {
                size: FrameChain(cameras[places[0]].height, cameras[places[0]].width, chain)
                for size, places in self._places.items()
            }
        )

    def forward(self, *frames: Tensor) -> Tensor:
        """Convert one frame of each camera.

        Args:
            *frames: RGB, uint8, shape (height, width, 3) of each camera, in the cameras' order.

        Returns:
            Pixels in [-1, 1], float32, shape (cameras, 3, H, W).
        """
        # TensorRT takes uint8 only as the input of a cast.
        levels = [frame.to(torch.float32) for frame in frames]
        pixels: list[Tensor | None] = [None] * len(frames)
        for size, places in self._places.items():
            batch = self.chains[size](torch.stack([levels[place] for place in places]))
            if len(places) == len(frames):
                return torch.as_tensor(batch)
            for row, place in enumerate(places):
                pixels[place] = batch[row : row + 1]
        return torch.cat([one for one in pixels if one is not None])


class _Crop(nn.Module):
    def __init__(self, crop: tuple[slice, slice]) -> None:
        super().__init__()
        self._crop = crop

    def forward(self, levels: Tensor) -> Tensor:
        return levels[:, self._crop[0], self._crop[1]]


def _area_resize(
    source: tuple[int, int], target: tuple[int, int], crop: tuple[slice, slice]
) -> nn.Module:
    # OpenCV takes the box average only where no side grows.
    if source[0] >= target[0] and source[1] >= target[1]:
        return _BoxAverage(source, target, crop)
    return _TwoTaps(source, target, crop)


class _Neighbours(ConstantModule):
    """Which source pixels each target pixel reads along one axis, and what it reads there.

    Pixel k of every target stands in a constant of its own, `pixel_k`, as int64 (target,). Columns
    are read from (N, height, width, 3) and given as (N, height, 3 width), where a factor for each
    column is a plain row; rows are read and given in that form.
    """

    def __init__(self, pixels: Int64Array, *, of_columns: bool) -> None:
        super().__init__()
        self._of_columns = of_columns
        self.count = len(pixels)
        for number, indices in enumerate(pixels):
            self.add_constant(f"pixel_{number}", indices, torch.int64)

    def add_factors(self, name: str, factors: NDArray[Any]) -> None:
        """Declare float32 factors by which the pixels are multiplied, shape (count, target)."""
        for number, row in enumerate(factors.astype(np.float32)):
            shaped = np.repeat(row, _COLOURS) if self._of_columns else row[:, None]
            self.add_constant(f"{name}_{number}", shaped)

    def pixels(self, levels: Tensor, number: int) -> Tensor:
        """Return pixel `number` of each target pixel, shape (N, height, 3 width)."""
        indices: Tensor = getattr(self, f"pixel_{number}")
        if self._of_columns:
            return levels.index_select(2, indices).flatten(2)
        return levels.index_select(1, indices)

    def factor(self, name: str, number: int) -> Tensor:
        """Return the factors of pixel `number`, for broadcasting."""
        result: Tensor = getattr(self, f"{name}_{number}")
        return result

    def weighted_sum(self, levels: Tensor, name: str) -> Tensor:
        """Return the sum of the pixels times their factors, added one after the other."""
        total = self.pixels(levels, 0) * self.factor(name, 0)
        for number in range(1, self.count):
            total = total + self.pixels(levels, number) * self.factor(name, number)
        return total


def _as_pixels(rows: Tensor) -> Tensor:
    """Return (N, height, 3 width) as (N, height, width, 3)."""
    return rows.reshape(rows.shape[0], rows.shape[1], -1, _COLOURS)


class _BoxAverage(nn.Module):
    """INTER_AREA where no side grows: (N, *source, 3) to (N, *target, 3), cropped."""

    def __init__(
        self, source: tuple[int, int], target: tuple[int, int], crop: tuple[slice, slice]
    ) -> None:
        super().__init__()
        # Whole ratios have a road of their own in OpenCV: whole sums, then one factor; and two by
        # two rounds up in the middle.
        whole = source[0] % target[0] == source[1] % target[1] == 0
        area = (source[0] // target[0]) * (source[1] // target[1])
        self._factor = float(np.float32(1) / np.float32(area)) if whole else None
        self._two_by_two = whole and source == (2 * target[0], 2 * target[1])
        self.rows, self.columns = (
            self._neighbours(*box_overlaps(source[axis], target[axis]), crop[axis], whole, axis)
            for axis in (0, 1)
        )

    @staticmethod
    def _neighbours(
        pixels: Int64Array, weights: Float32Array, crop: slice, whole: bool, axis: int
    ) -> _Neighbours:
        result = _Neighbours(pixels[:, crop], of_columns=axis == 1)
        cropped = weights[:, crop]
        result.add_factors("weight", np.ones_like(cropped) if whole else cropped)
        return result

    def forward(self, levels: Tensor) -> Tensor:
        sums = self.rows.weighted_sum(self.columns.weighted_sum(levels, "weight"), "weight")
        if self._two_by_two:
            return _as_pixels(torch.floor((sums + 2) * 0.25))
        return _as_pixels(torch.round(sums if self._factor is None else sums * self._factor))


class _TwoTaps(nn.Module):
    """INTER_AREA where a side grows: (N, *source, 3) to (N, *target, 3), cropped.

    Horizontal sums have 8 + 11 bits. Of a vertical product of 15 and 11 bits OpenCV keeps
    floor(product / 2 ** 16); the coefficient is split at 6 bits so that no intermediate exceeds
    24: floor(b x / 2 ** 16) = floor((b_high x + floor(b_low x / 2 ** 6)) / 2 ** 10).
    """

    def __init__(
        self, source: tuple[int, int], target: tuple[int, int], crop: tuple[slice, slice]
    ) -> None:
        super().__init__()
        pixels, taps = two_taps(source[0], target[0])
        self.rows = _Neighbours(pixels[:, crop[0]], of_columns=False)
        high, low = np.divmod(taps[:, crop[0]], 64)
        self.rows.add_factors("high", high)
        self.rows.add_factors("low", low)
        pixels, taps = two_taps(source[1], target[1])
        self.columns = _Neighbours(pixels[:, crop[1]], of_columns=True)
        self.columns.add_factors("tap", taps[:, crop[1]])

    def forward(self, levels: Tensor) -> Tensor:
        sums = torch.floor(self.columns.weighted_sum(levels, "tap") * 2.0**-4)
        upper, lower = (self._product(sums, number) for number in (0, 1))
        return _as_pixels(torch.floor((upper + lower + 2) * 0.25))

    def _product(self, sums: Tensor, number: int) -> Tensor:
        pixels = self.rows.pixels(sums, number)
        rest = torch.floor(pixels * self.rows.factor("low", number) * 2.0**-6)
        return torch.floor((pixels * self.rows.factor("high", number) + rest) * 2.0**-10)


class _BicubicPass(ConstantModule):
    """Pillow's 8-bit bicubic along one axis of (C, height, width), rounded and clipped."""

    high: Tensor
    low: Tensor

    def __init__(self, source: int, target: int, *, along_width: bool) -> None:
        super().__init__()
        self._along_width = along_width
        high, low = np.divmod(bicubic_coefficients(source, target), _SPLIT)
        for name, matrix in (("high", high), ("low", low)):
            self.add_constant(name, (matrix.T if along_width else matrix)[None].astype(np.float64))

    def forward(self, levels: Tensor) -> Tensor:
        high, low = (
            torch.matmul(levels, matrix) if self._along_width else torch.matmul(matrix, levels)
            for matrix in (self.high, self.low)
        )
        # floor((high * 2 ** 11 + low + 2 ** 21) / 2 ** 22), in numbers that float32 holds.
        total = high + torch.floor(low * (1.0 / _SPLIT)) + _SPLIT // 2
        return torch.floor(total * (1.0 / _SPLIT)).clamp(0.0, 255.0)


def box_overlaps(source: int, target: int) -> tuple[Int64Array, Float32Array]:
    """Return the source pixels that each target pixel covers, and the part of it that each takes.

    Follows OpenCV's computeResizeAreaTab (modules/imgproc/src/resize.cpp).

    Args:
        source: Length of the axis.
        target: Its length afterwards, not larger.

    Returns:
        Source pixels in ascending order, int64 (K, target), and their weights, float32
        (K, target). Where a target pixel covers fewer than K, the rest have weight 0.
    """
    scale = 1.0 / (target / source)
    covered: list[list[tuple[int, float]]] = []
    for place in range(target):
        start = place * scale
        end = start + scale
        width = min(scale, source - start)
        last = min(math.floor(end), source - 1)
        first = min(math.ceil(start), last)
        parts = [(pixel, 1.0 / width) for pixel in range(first, last)]
        if first - start > _SMALLEST_OVERLAP:
            parts.insert(0, (first - 1, (first - start) / width))
        if end - last > _SMALLEST_OVERLAP:
            parts.append((last, min(end - last, 1.0, width) / width))
        covered.append(parts)
    most = max(len(parts) for parts in covered)
    padded = [parts + [(parts[-1][0], 0.0)] * (most - len(parts)) for parts in covered]
    table = np.array(padded).transpose(2, 1, 0)
    return table[0].astype(np.int64), table[1].astype(np.float32)


def two_taps(source: int, target: int) -> tuple[Int64Array, Int64Array]:
    """Return OpenCV's taps of an INTER_AREA resize in which some axis grows.

    Args:
        source: Length of the axis.
        target: Its length afterwards.

    Returns:
        The two source pixels of each target pixel, int64 (2, target), and their coefficients in
        units of 2 ** -11, int64 (2, target).
    """
    inverse = target / source
    scale = 1.0 / inverse
    place = np.arange(target)
    first = np.floor(place * scale).astype(np.int64)
    next_weight = ((place + 1) - (first + 1) * inverse).astype(np.float32)
    next_weight = np.where(next_weight <= 0, np.float32(0), next_weight - np.floor(next_weight))
    last = first >= source - 1
    first = np.where(last, source - 1, first)
    next_weight = np.where(last, np.float32(0), next_weight)
    one = np.float32(1 << _TAP_BITS)
    taps = np.stack([(np.float32(1) - next_weight) * one, next_weight * one])
    return np.stack([first, np.minimum(first + 1, source - 1)]), np.rint(taps).astype(np.int64)


def bicubic_coefficients(source: int, target: int) -> Int64Array:
    """Return Pillow's coefficients of an antialiased bicubic resize of 8-bit images.

    Follows precompute_coeffs and normalize_coeffs_8bpc of Pillow's Resample.c.

    Args:
        source: Length of the axis.
        target: Its length afterwards.

    Returns:
        Coefficients in units of 2 ** -22, int64 (target, source).
    """
    scale = source / target
    stretch = max(scale, 1.0)
    support = _BICUBIC_SUPPORT * stretch
    result = np.zeros((target, source), np.int64)
    for place in range(target):
        center = (place + 0.5) * scale
        start = max(int(center - support + 0.5), 0)
        stop = min(int(center + support + 0.5), source)
        weights = [
            _bicubic((pixel - center + 0.5) * (1.0 / stretch)) for pixel in range(start, stop)
        ]
        # Summed one by one, as Pillow does: NumPy sums in pairs.
        total = 0.0
        for weight in weights:
            total += weight
        for pixel, weight in zip(range(start, stop), weights, strict=True):
            scaled = weight / total * (1 << _BICUBIC_BITS)
            result[place, pixel] = int(scaled - 0.5 if scaled < 0 else scaled + 0.5)
    return result


def _bicubic(x: float) -> float:
    a, x = _BICUBIC_A, abs(x)
    if x < 1.0:
        return ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    if x < 2.0:
        return (((x - 5) * x + 8) * x - 4) * a
    return 0.0
