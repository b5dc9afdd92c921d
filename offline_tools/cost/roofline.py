"""How long a device takes for some work: a roofline with efficiencies fitted to measurements.

Owns: the model, its fit and what the fit is worth. Must not import torch.

A launch takes the longer of its arithmetic and its memory traffic, each at a fraction of the
device's peak, plus a fixed time. The three numbers (fraction of the arithmetic peak, fraction of
the bandwidth, seconds a launch) are the same for all devices and fitted to engines' published
times, on a grid, by the sum of squared logarithmic errors. Another kind of runtime has one number
of its own: a factor on the whole time, or the seconds of a launch.

What it is worth is asked of points that the fit did not see: each one left out alone, and each one
left out with everything that was measured on its device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from groot_int8_ros.policy.types import Float64Array
from offline_tools.cost.devices import Device
from offline_tools.cost.work import Launch, unique

# Grid of the fit. Neighbours differ by 4 to 6 %, which is below every error that it has.
_ARITHMETIC = np.geomspace(0.10, 1.0, 40)
_BANDWIDTH = np.geomspace(0.20, 1.0, 40)
_LAUNCH_S = np.geomspace(0.5e-6, 50e-6, 40)
# Two-sided 90 % of the normal distribution.
_NINETY = 1.645


@dataclass(frozen=True)
class Efficiency:
    """What a runtime reaches on every device.

    Attributes:
        arithmetic: Fraction of the peak of matrix products.
        bandwidth: Fraction of the memory bandwidth.
        launch_s: Seconds that a launch takes beside that.
    """

    arithmetic: float
    bandwidth: float
    launch_s: float


@dataclass(frozen=True)
class Point:
    """One measurement.

    Attributes:
        label: What was measured, for people.
        device: Where.
        launches: The work.
        seconds: How long it took.
        group: Points that say nothing new about each other: those of one device.
    """

    label: str
    device: Device
    launches: tuple[Launch, ...]
    seconds: float
    group: Hashable


@dataclass(frozen=True)
class LeftOut:
    """A point and what the model says that never saw it.

    Attributes:
        point: The measurement.
        alone_s: Prediction of a fit without this point.
        device_s: Prediction of a fit without any point of its group; None if nothing is left.
    """

    point: Point
    alone_s: float
    device_s: float | None


def seconds(launches: Sequence[Launch], device: Device, efficiency: Efficiency) -> float:
    """Return the time of some launches; INT8 products run at the INT8 peak's fraction."""
    grid = _times(
        launches,
        device,
        np.array([efficiency.arithmetic]),
        np.array([efficiency.bandwidth]),
        np.array([efficiency.launch_s]),
    )
    return float(grid[0, 0, 0])


def _times(
    launches: Sequence[Launch],
    device: Device,
    arithmetic: Float64Array,
    bandwidth: Float64Array,
    launch_s: Float64Array,
) -> Float64Array:
    """Return the time for every combination, shape (arithmetic, bandwidth, launch)."""
    busy = np.zeros((len(arithmetic), len(bandwidth)))
    for (flops, moved, is_int8), count in unique(launches).items():
        peak = device.int8_ops if is_int8 else device.fp16_flops
        of_arithmetic = flops / (peak * arithmetic)
        of_memory = moved / (device.bytes_per_s * bandwidth)
        busy += count * np.maximum(of_arithmetic[:, None], of_memory[None, :])
    return busy[:, :, None] + len(launches) * launch_s


class Fit:
    """A fit to measurements of one kind of runtime, and its trial.

    Args:
        points: The measurements; at least one more than there are numbers to fit.
    """

    def __init__(self, points: Sequence[Point]) -> None:
        self.points = tuple(points)
        self._logs = np.stack(
            [
                np.log(_times(p.launches, p.device, _ARITHMETIC, _BANDWIDTH, _LAUNCH_S))
                - math.log(p.seconds)
                for p in self.points
            ]
        )
        self.efficiency = self._without(lambda point: False)

    def _without(self, left_out: Callable[[Point], bool]) -> Efficiency:
        kept = [index for index, point in enumerate(self.points) if not left_out(point)]
        errors = np.square(self._logs[kept]).sum(axis=0)
        a, b, c = np.unravel_index(int(errors.argmin()), errors.shape)
        return Efficiency(float(_ARITHMETIC[a]), float(_BANDWIDTH[b]), float(_LAUNCH_S[c]))

    def left_out(self) -> list[LeftOut]:
        """Return each point with the predictions of fits that did not see it."""
        return [self._left_out(point) for point in self.points]

    def _left_out(self, point: Point) -> LeftOut:
        def without(left_out: Callable[[Point], bool]) -> float:
            return seconds(point.launches, point.device, self._without(left_out))

        return LeftOut(
            point,
            without(lambda other: other is point),
            without(lambda other: other.group == point.group),
        )


def factor(points: Sequence[Point], predicted: Callable[[Point], float]) -> float:
    """Return by what a runtime is slower than a prediction: the geometric mean of its points."""
    return math.exp(
        sum(math.log(point.seconds / predicted(point)) for point in points) / len(points)
    )


def spread(results: Sequence[LeftOut]) -> float:
    """Return the factor within which 90 % of unseen devices should lie.

    From the errors on points whose whole device was left out, where there are others, taken to be
    log-normal around zero.
    """
    errors = [
        math.log((r.alone_s if r.device_s is None else r.device_s) / r.point.seconds)
        for r in results
    ]
    return math.exp(_NINETY * math.sqrt(sum(e * e for e in errors) / len(errors)))
