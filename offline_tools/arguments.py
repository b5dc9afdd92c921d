"""Types of command-line options, so that a number out of range is a usage error.

Owns: the ranges that several subcommands share. Must not import any step. argparse shows the text
of an `ArgumentTypeError` behind the option's name.
"""

from __future__ import annotations

import argparse
import math

# NumPy's RandomState takes seeds of 32 bits.
_LARGEST_SEED = 2**32 - 1


def positive_int(text: str) -> int:
    """Return a whole number of at least 1."""
    return _whole(text, 1, None, "a whole number of at least 1")


def not_negative_int(text: str) -> int:
    """Return a whole number of at least 0."""
    return _whole(text, 0, None, "a whole number of at least 0")


def seed(text: str) -> int:
    """Return a seed for NumPy's RandomState."""
    return _whole(text, 0, _LARGEST_SEED, f"a whole number from 0 to {_LARGEST_SEED}")


def positive_float(text: str) -> float:
    """Return a finite number above 0."""
    return _real(text, "a number above 0", allow_zero=False)


def not_negative_float(text: str) -> float:
    """Return a finite number of at least 0."""
    return _real(text, "a number of at least 0", allow_zero=True)


def camera_size(text: str) -> tuple[int, int]:
    """Return height and width; video codecs take even numbers alone."""
    width, found, height = text.partition("x")
    if not found or not width.isdecimal() or not height.isdecimal():
        raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT such as 640x480, not {text!r}")
    size = int(height), int(width)
    if any(not 64 <= side <= 4096 or side % 2 for side in size):
        raise argparse.ArgumentTypeError(f"expected even numbers from 64 to 4096, not {text!r}")
    return size


def _whole(text: str, low: int, high: int | None, expected: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = low - 1
    if value < low or (high is not None and value > high):
        raise argparse.ArgumentTypeError(f"expected {expected}, not {text!r}")
    return value


def _real(text: str, expected: str, *, allow_zero: bool) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0.0 or (value == 0.0 and not allow_zero):
        raise argparse.ArgumentTypeError(f"expected {expected}, not {text!r}")
    return value
