"""Implicit INT8: TensorRT's own entropy calibration, for the versions that still have it.

Owns: the calibrator and the batches it is fed. Must not import torch. TensorRT drops exceptions
that a calibrator raises and goes on with the batches it got, so everything that goes wrong is kept
and raised after the build, and a build that consumed fewer batches than were captured has failed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from groot_int8_ros.errors import CalibrationError
from groot_int8_ros.policy.engines.base import TensorSpec, checked_feeds
from groot_int8_ros.policy.engines.cuda import Cuda

Feeds = Mapping[str, NDArray[Any]]
SEQUENCE_AXIS = "sequence"


@dataclass(frozen=True)
class CalibrationBatches:
    """The captured inputs of one graph, all of one shape.

    Attributes:
        open: Starts over and gives the feeds one after the other, unpadded.
        count: How many there are.
        shapes: Shape of each input after padding.
        specs: The graph's inputs.
    """

    open: Callable[[], Iterable[Feeds]]
    count: int
    shapes: Mapping[str, tuple[int, ...]]
    specs: Mapping[str, TensorSpec]

    def __iter__(self) -> Any:
        """Give every feed, padded on the left to the longest.

        An instruction's length varies from sample to sample and a calibration has one shape. The
        padding is zeros, which the masks switch off, on the left as the prompt itself is padded.
        """
        for number, feeds in enumerate(self.open()):
            checked = checked_feeds(f"calibration sample {number}", self.specs, feeds)
            for name, array in checked.items():
                if not np.isfinite(array).all():
                    raise CalibrationError(
                        f"calibration sample {number}: {name} holds NaN or infinity, which would "
                        "spoil every scale. Capture again without it."
                    )
            yield {name: _padded(array, self.shapes[name]) for name, array in checked.items()}


def describe_batches(
    specs: Mapping[str, TensorSpec], open_feeds: Callable[[], Iterable[Feeds]], source: str
) -> CalibrationBatches:
    """Look through captured feeds once for their number and largest shape.

    Args:
        specs: The graph's inputs.
        open_feeds: Starts over and gives the feeds.
        source: Where they come from, for the message.

    Raises:
        CalibrationError: There are none, or they differ in more than the length of the sequence.
    """
    count = 0
    largest: dict[str, tuple[int, ...]] = {}
    for feeds in open_feeds():
        count += 1
        for name, spec in specs.items():
            if name not in feeds:
                raise CalibrationError(f"{source}: sample {count - 1} has no {name}")
            shape, before = feeds[name].shape, largest.get(name, feeds[name].shape)
            if len(shape) != len(spec.shape) or any(
                have != want and axis != SEQUENCE_AXIS
                for have, want, axis in zip(shape, before, spec.shape, strict=True)
            ):
                raise CalibrationError(
                    f"{source}: {name} of sample {count - 1} has the shape {list(shape)}, others "
                    f"have {list(before)}; they are of different robots or cameras. Capture again."
                )
            largest[name] = tuple(map(max, shape, before))
    if count == 0:
        raise CalibrationError(
            f"{source} holds no samples for this graph: an empty calibration would leave every "
            "scale to chance. Capture some first: groot-int8 calibrate."
        )
    return CalibrationBatches(open_feeds, count, largest, specs)


@dataclass
class CalibrationResult:
    """What happened inside a calibrator, to be looked at after the build.

    Attributes:
        consumed: Batches that TensorRT took.
        cache: What it wrote as its calibration cache, if it did.
        errors: Exceptions raised in calls from TensorRT.
    """

    consumed: int = 0
    cache: bytes | None = None
    errors: list[BaseException] = field(default_factory=list)

    def check(self, batches: CalibrationBatches | None) -> None:
        """Raise what TensorRT swallowed.

        Args:
            batches: What it was given, or None if it was given a cache.

        Raises:
            CalibrationError: A batch could not be given, or some were not taken.
        """
        if self.errors:
            error = self.errors[0]
            raise CalibrationError(
                f"calibration failed at batch {self.consumed}: {error}"
            ) from error
        if batches is not None and self.consumed != batches.count:
            raise CalibrationError(
                f"TensorRT took {self.consumed} of {batches.count} captured batches, so the "
                "scales say nothing about the others; the engine is not kept"
            )


def make_entropy_calibrator(
    trt: Any,
    cuda: Cuda | None,
    batches: CalibrationBatches | None,
    cache: bytes | None,
    input_dtypes: Mapping[str, np.dtype[Any]],
) -> tuple[Any, CalibrationResult]:
    """Make an `IInt8EntropyCalibrator2`.

    Args:
        trt: A TensorRT that has it.
        cuda: Where the batches are put; may be None beside a cache.
        batches: The samples; None where a cache replaces them.
        cache: Content of a calibration cache that fits, or None.
        input_dtypes: The network's own element types, which for integers are narrower in 8.6.

    Returns:
        The calibrator, and what happens inside it.
    """
    result = CalibrationResult()
    feeds = iter(batches) if batches is not None else iter(())
    pointers: dict[str, int] = {}

    class Calibrator(trt.IInt8EntropyCalibrator2):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IInt8EntropyCalibrator2.__init__(self)

        def get_batch_size(self) -> int:
            return 1

        def get_batch(self, names: list[str]) -> list[int] | None:
            try:
                feed = next(feeds, None)
                if feed is None:
                    return None
                assert cuda is not None
                for name in names:
                    array = np.ascontiguousarray(feed[name].astype(input_dtypes[name]))
                    if name not in pointers:
                        pointers[name] = cuda.allocate(array.nbytes)
                    cuda.upload(pointers[name], array)
                result.consumed += 1
                return [pointers[name] for name in names]
            except BaseException as error:
                result.errors.append(error)
                return None

        def read_calibration_cache(self) -> bytes | None:
            return cache

        def write_calibration_cache(self, content: Any) -> None:
            result.cache = bytes(content)

    return Calibrator(), result


def _padded(array: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    missing = [(want - have, 0) for want, have in zip(shape, array.shape, strict=True)]
    return np.pad(array, missing) if any(before for before, _ in missing) else array
