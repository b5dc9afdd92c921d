"""What a bundle says about its INT8 layers: data, not code.

Owns: `LayerScheme` and `QuantizationRecord`, how they stand in the manifest and what is refused
there. Must not import onnx or an engine: the robot reads the record without either.

A layer is a matrix product with a constant weight, named as its node is without the trailing
`/MatMul` or `/Gemm`. A layer that the record does not list is float.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ACTIVATIONS = ("static", "row")
# Of `static`: from captured samples, or from a calibration cache that TensorRT wrote.
SAMPLED_RANGE_METHODS = ("max", "entropy", "percentile")
CACHE = "cache"
RANGE_METHODS = (*SAMPLED_RANGE_METHODS, CACHE)

_SHA256_DIGITS = 64


@dataclass(frozen=True)
class LayerScheme:
    """How one layer's operands become int8. Its weight always has a scale an output channel.

    Attributes:
        activation: `static`, one scale for the whole input tensor from calibration; `row`, each
            row's own absolute maximum, found at run time.
        range_method: How the scale of `static` was chosen, one of `RANGE_METHODS`; None for `row`.
        migration_alpha: Strength of the SmoothQuant migration from input to weight channels, from
            0 (the weights alone decide) to 1 (the input alone); None for no migration.
        rotation: Length of the blocks of channels that a Hadamard rotation mixes, a power of two
            that divides the number of channels; None for no rotation.
    """

    activation: str
    range_method: str | None = None
    migration_alpha: float | None = None
    rotation: int | None = None

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is none of {ACTIVATIONS}")
        if self.activation == "row" and self.range_method is not None:
            raise ValueError("the activation 'row' needs no range method")
        if self.activation == "static" and self.range_method not in RANGE_METHODS:
            raise ValueError(f"range method {self.range_method!r} is none of {RANGE_METHODS}")
        if self.rotation is not None:
            if self.rotation < 2 or self.rotation & (self.rotation - 1):
                raise ValueError(f"rotation blocks of {self.rotation} are no power of two")
            if self.activation == "static":
                raise ValueError("a rotation goes with the activation 'row'")
        if self.migration_alpha is not None:
            if not 0.0 <= self.migration_alpha <= 1.0:
                raise ValueError(f"migration alpha {self.migration_alpha} is not from 0 to 1")
            # The histogram is that of the unmigrated input; only its channels' maxima can be
            # divided by the migration's factors afterwards.
            if self.activation == "static" and self.range_method != "max":
                raise ValueError("migration takes the range method 'max'")

    @property
    def name(self) -> str:
        """The scheme as tables print it, such as `static-entropy` or `row+migration`."""
        name = f"static-{self.range_method}" if self.activation == "static" else "row"
        name += "" if self.migration_alpha is None else "+migration"
        return name if self.rotation is None else f"{name}+rotation"

    def to_dict(self) -> dict[str, Any]:
        """Return the scheme as it stands in the manifest."""
        entries = {
            "activation": self.activation,
            "range_method": self.range_method,
            "migration_alpha": self.migration_alpha,
            "rotation": self.rotation,
        }
        return {key: value for key, value in entries.items() if value is not None}


@dataclass(frozen=True)
class QuantizationRecord:
    """How one graph was quantised and what that did to the actions.

    Attributes:
        layers: INT8 layer to its scheme; every other layer is float.
        scheme: What the user asked for, such as `auto` or `row`.
        source_sha256: SHA-256 of the float graph's manifest entry: its files' hashes.
        calibration_sha256: Content hash of the calibration set, or of TensorRT's calibration cache
            where the scales are its; None where no scale needs one.
        calibration_samples: Feeds that the statistics come from.
        seed: Seed of what was drawn at random.
        options: Further options by name, as the user gave them.
        errors: Measured error of the whole bundle's actions against the float bundle's, by
            metric; empty if it was not measured.
    """

    layers: Mapping[str, LayerScheme]
    scheme: str
    source_sha256: str
    calibration_sha256: str | None
    calibration_samples: int
    seed: int
    options: Mapping[str, Any] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the record as it stands in the manifest."""
        return {
            "scheme": self.scheme,
            "source_sha256": self.source_sha256,
            "calibration_sha256": self.calibration_sha256,
            "calibration_samples": self.calibration_samples,
            "seed": self.seed,
            "options": dict(self.options),
            "errors": dict(self.errors),
            "layers": {name: scheme.to_dict() for name, scheme in self.layers.items()},
        }


def parse_record(content: Mapping[str, Any]) -> QuantizationRecord:
    """Read a record from the manifest.

    Raises:
        KeyError, TypeError, ValueError: An entry is missing, of another type or not allowed.
    """
    layers = {}
    for name, entry in content["layers"].items():
        unknown = set(entry) - {"activation", "range_method", "migration_alpha", "rotation"}
        if unknown:
            raise ValueError(f"the layer {name} has the unknown entry {min(unknown)!r}")
        try:
            layers[name] = LayerScheme(
                activation=entry["activation"],
                range_method=entry.get("range_method"),
                migration_alpha=entry.get("migration_alpha"),
                rotation=entry.get("rotation"),
            )
        except ValueError as error:
            raise ValueError(f"the layer {name}: {error}") from error
    if not layers:
        raise ValueError("the quantisation record lists no layer")
    calibration = content["calibration_sha256"]
    if calibration is None and any(s.activation == "static" for s in layers.values()):
        raise ValueError("static scales without the hash of the calibration set they come from")
    return QuantizationRecord(
        layers=layers,
        scheme=_text(content["scheme"]),
        source_sha256=_sha256(content["source_sha256"]),
        calibration_sha256=None if calibration is None else _sha256(calibration),
        calibration_samples=_whole(content["calibration_samples"]),
        seed=_whole(content["seed"]),
        options=dict(content["options"]),
        errors={_text(name): float(value) for name, value in content["errors"].items()},
    )


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.80} is not a text")
    return value


def _sha256(value: object) -> str:
    text = _text(value)
    if len(text) != _SHA256_DIGITS or set(text) - set("0123456789abcdef"):
        raise ValueError(f"{text!r:.80} is not a SHA-256")
    return text


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise TypeError(f"{value!r:.80} is not a whole number")
    return value
