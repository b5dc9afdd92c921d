"""The arithmetic of INT8 layers in NumPy: what the Q/DQ graph computes, operand by operand.

Owns: weight scales, migration factors and the simulation of a layer. Must not import onnx or
torch. The graph rewrite takes its constants from here, and the sensitivity search judges a scheme
by the same functions.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from groot_int8_ros.policy.types import Float32Array
from offline_tools.quantize.ranges import INT8_MAX

# An activation row below this is nothing in any network; dividing by it instead of by zero leaves
# rows of zeros, such as padding, at zero. FP16's smallest number is 6e-8.
SMALLEST_ROW_MAX = 1e-12

# Channels whose maxima are below this share of the largest are taken as that: a dead channel must
# neither divide by zero nor get a factor that its first live value would overflow with.
_SMALLEST_CHANNEL_SHARE = 1e-5

_LONGEST_BLOCK = 64
_SHORTEST_BLOCK = 16


def weight_scales(weight: Float32Array) -> Float32Array:
    """Return the scale of each output channel, symmetric, from its largest magnitude.

    Args:
        weight: float32 (K, N).

    Returns:
        float32 (N,), positive.
    """
    largest = np.abs(weight).max(axis=0)
    scales: Float32Array = (largest / INT8_MAX).astype(np.float32)
    # A channel of zeros, or one that underflows, is zero under any scale.
    return np.where(scales > 0.0, scales, np.float32(1.0))


def quantise(values: Float32Array, scale: Float32Array | np.float32) -> NDArray[np.int8]:
    """Round to int8 as ONNX's QuantizeLinear does: half to even, then saturate."""
    rounded = np.rint(values / scale)
    codes: NDArray[np.int8] = np.clip(rounded, -INT8_MAX - 1, INT8_MAX).astype(np.int8)
    return codes


def input_channel_max(weights: Iterable[Float32Array]) -> Float32Array:
    """Return the largest magnitude of each input channel over weights that share an input.

    Args:
        weights: At least one, float32 (K, N) each; read one at a time.

    Returns:
        float32 (K,).
    """
    largest: Float32Array = functools.reduce(
        np.maximum, (np.abs(weight).max(axis=1) for weight in weights)
    )
    return largest


def migration_factors(
    channel_sizes: Float32Array, weight_max: Float32Array, alpha: float
) -> Float32Array:
    """Return SmoothQuant's factors: how much larger a weight's input channels become.

    s_j = max|X_j|**alpha / max|W_j|**(1 - alpha) (Xiao et al., "SmoothQuant", 2023, eq. 4), with
    the maximum over all weights that share the input. The input's channel j is divided by s_j and
    the weights' multiplied by it, which leaves the product as it was.

    Args:
        channel_sizes: Size of each input channel, float32 (K,), the maximum in the paper; see
            `statistics.migration_sizes`.
        weight_max: Largest magnitude of each row of the weights that share the input, float32
            (K,).
        alpha: From 0 to 1.

    Returns:
        float32 (K,), positive, with a geometric mean of 1.
    """
    x = _floored(channel_sizes.astype(np.float64))
    w = _floored(weight_max.astype(np.float64))
    logarithms = alpha * np.log(x) - (1.0 - alpha) * np.log(w)
    # A common factor changes nothing after quantisation; without one the input keeps its size.
    factors: Float32Array = np.exp(logarithms - logarithms.mean()).astype(np.float32)
    return factors


def rotation_block(channels: int) -> int | None:
    """Return the longest block for a rotation: a power of two that divides the channels.

    Up to 64, beyond which nothing is gained on heavy tails; None if only blocks fit that are too
    short to even anything out.
    """
    block = min(channels & -channels, _LONGEST_BLOCK)
    return block if block >= _SHORTEST_BLOCK else None


def hadamard(length: int) -> Float32Array:
    """Return Sylvester's Hadamard matrix scaled to be orthogonal; it is its own inverse.

    Args:
        length: A power of two.

    Returns:
        float32 (length, length).
    """
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < length:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    scaled: Float32Array = (matrix / np.sqrt(np.float32(length))).astype(np.float32)
    return scaled


def rotated(rows: Float32Array, block: int) -> Float32Array:
    """Mix each block of channels with a Hadamard matrix.

    An input is multiplied by a block-diagonal orthogonal matrix and the weights by its inverse,
    which leaves the product as it was. A value that stands out in its row is spread over its
    block, so the row's maximum shrinks (Ashkboos et al., "QuaRot", 2024).

    Args:
        rows: float32 (R, K).
        block: A power of two that divides K.

    Returns:
        float32 (R, K).
    """
    blocks = rows.reshape(len(rows), -1, block)
    result: Float32Array = (blocks @ hadamard(block)).reshape(rows.shape)
    return result


def transformed_weight(
    weight: Float32Array, factors: Float32Array | None, rotation: int | None
) -> Float32Array:
    """Return a weight, float32 (K, N), after migration and rotation of its input channels."""
    if factors is not None:
        weight = weight * factors[:, None]
    if rotation is not None:
        blocks = weight.reshape(-1, rotation, weight.shape[1])
        weight = (hadamard(rotation) @ blocks).reshape(weight.shape)
    return weight


def static_input(rows: Float32Array, scale: float) -> Float32Array:
    """Return rows as they are after QuantizeLinear and DequantizeLinear with one scale."""
    single = np.float32(scale)
    return quantise(rows, single).astype(np.float32) * single


def row_input(rows: Float32Array) -> Float32Array:
    """Return rows as they are after per-row quantisation."""
    largest = np.maximum(np.abs(rows).max(axis=-1, keepdims=True), np.float32(SMALLEST_ROW_MAX))
    restored: Float32Array = static_input(rows / largest, 1.0 / INT8_MAX) * largest
    return restored


def dequantised_weight(weight: Float32Array) -> Float32Array:
    """Return a weight as it is after quantisation with its own scales."""
    scales = weight_scales(weight)
    return quantise(weight, scales).astype(np.float32) * scales


def _floored(maxima: NDArray[np.float64]) -> NDArray[np.float64]:
    largest = float(maxima.max(initial=0.0))
    return np.maximum(maxima, largest * _SMALLEST_CHANNEL_SHARE if largest else 1.0)
