"""The manifest's quantisation record: what it says survives the file, what is wrong is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from groot_int8_ros.policy.quantization import LayerScheme, QuantizationRecord, parse_record

RECORD = QuantizationRecord(
    layers={
        "a": LayerScheme("static", "entropy"),
        "b": LayerScheme("static", "max", 0.5),
        "c": LayerScheme("row", None, 0.25, 64),
    },
    scheme="auto",
    source_sha256="0" * 64,
    calibration_sha256="f" * 64,
    calibration_samples=12,
    seed=3,
    options={"percentile": 99.9},
    errors={"relative_l2": 0.008},
)


def test_a_record_survives_the_manifest() -> None:
    assert parse_record(json.loads(json.dumps(RECORD.to_dict()))) == RECORD


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("dynamic",), "none of"),
        (("static",), "range method"),
        (("static", "mean"), "range method"),
        (("row", "max"), "needs no range"),
        (("row", None, 1.5), "from 0 to 1"),
        (("static", "entropy", 0.5), "takes the range method 'max'"),
        (("row", None, None, 48), "no power of two"),
        (("static", "max", None, 64), "goes with the activation 'row'"),
    ],
)
def test_a_scheme_that_does_not_exist_cannot_be_made(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LayerScheme(*arguments)


def _without_hash(content: dict[str, Any]) -> None:
    content["calibration_sha256"] = None


def _unknown_entry(content: dict[str, Any]) -> None:
    content["layers"]["a"]["bits"] = 4


def _no_count(content: dict[str, Any]) -> None:
    content["calibration_samples"] = -1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without_hash, "static scales without"),
        (_unknown_entry, "unknown entry 'bits'"),
        (_no_count, "not a whole number"),
    ],
)
def test_a_damaged_record_is_refused(
    damage: Callable[[dict[str, Any]], None], message: str
) -> None:
    content = RECORD.to_dict()
    damage(content)
    with pytest.raises((ValueError, TypeError), match=message):
        parse_record(content)
