"""The picture of an episode: evenly spaced frames side by side.

Owns: `film_strip`. Must not import MuJoCo or ROS.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from groot_int8_ros.policy.types import UInt8Array

_COLUMNS = 10


def film_strip(frames: Sequence[Mapping[str, UInt8Array]]) -> Image.Image:
    """Return some of an episode's frames, half as large, each camera in a row.

    Args:
        frames: One mapping of camera to RGB frame for each observation; at least one.
    """
    chosen = np.linspace(0, len(frames) - 1, min(_COLUMNS, len(frames))).round().astype(int)
    columns = [np.concatenate(list(frames[index].values())) for index in chosen]
    strip = Image.fromarray(np.concatenate(columns, axis=1))
    return strip.resize((strip.width // 2, strip.height // 2), Image.Resampling.BOX)
