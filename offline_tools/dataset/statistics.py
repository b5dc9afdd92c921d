"""The statistics that GR00T normalises state and actions with.

Owns: computing them from recorded values. Must not import torch.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from groot_int8_ros.policy.types import Float32Array, Float64Array


def dimension_statistics(values: Float32Array) -> dict[str, Any]:
    """Return minimum, maximum, mean, deviation and outer percentiles over the first axis.

    Args:
        values: Frames first: (T, D), or (T, steps, D) for chunks of relative actions.

    Returns:
        `min`, `max`, `mean`, `std`, `q01` and `q99`, each nested as one frame is.
    """
    wide: Float64Array = values.astype(np.float64)
    return {
        "mean": wide.mean(axis=0).tolist(),
        "std": wide.std(axis=0).tolist(),
        "min": wide.min(axis=0).tolist(),
        "max": wide.max(axis=0).tolist(),
        "q01": np.quantile(wide, 0.01, axis=0).tolist(),
        "q99": np.quantile(wide, 0.99, axis=0).tolist(),
    }
