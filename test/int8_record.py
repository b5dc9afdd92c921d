"""What a manifest records of a graph that `groot-int8 quantize` made."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def quantization_record(layers: Iterable[str]) -> dict[str, Any]:
    """Return the entry `quantization` of a graph whose layers are INT8 with row scales."""
    return {
        "scheme": "row",
        "source_sha256": "a" * 64,
        "calibration_sha256": None,
        "calibration_samples": 0,
        "seed": 0,
        "options": {},
        "errors": {},
        "layers": {layer: {"activation": "row"} for layer in layers},
    }
