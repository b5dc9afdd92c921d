"""What the published measurements say about work that nobody has timed.

Owns: the fitted model of every runtime, its errors on points it did not see, and predictions with
their intervals. Must not import torch.

Two things make an interval. The spread of the fit: the errors on engines whose whole device was
left out. And what INT8 really brings: at best, its products run at the INT8 fraction of the peak
and its weights move half the bytes; of the time that this would save, the published pairs of a
float and an INT8 engine saved only a part. The interval reaches from the best case to the least
that a pair saved; the middle takes the pairs' mean. Each pair is left out once as well: its INT8
engine is predicted from its float one and from what the other pairs saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from offline_tools.cost.devices import Device, find_device
from offline_tools.cost.published import (
    EAGER,
    RELEASED,
    TENSORRT,
    Row,
    int8_pairs,
    needs_stand_in,
    points_of,
    read_rows,
    row_work,
    why_not_predicted,
)
from offline_tools.cost.reference_work import reference_backbone, reference_head
from offline_tools.cost.roofline import (
    Efficiency,
    Fit,
    LeftOut,
    Point,
    factor,
    seconds,
    spread,
)
from offline_tools.cost.work import GraphWork, as_half, as_int8, observation, of_kinds


@dataclass(frozen=True)
class Prediction:
    """A predicted time in seconds.

    Attributes:
        middle_s: The value to expect.
        low_s: Lower end of the interval.
        high_s: Upper end of the interval.
        best_s: Without the spread of the fit, and with all of what INT8 could bring.
    """

    middle_s: float
    low_s: float
    high_s: float
    best_s: float


class PublishedModel:
    """The roofline of TensorRT engines, and the other runtimes beside it.

    Attributes:
        efficiency: Fitted to the published TensorRT engines.
        spread: Factor within which 90 % of unseen devices should lie.
        pairs: The published rows that differ in INT8 alone: (float, INT8).
        savings: Of the time that INT8 could save, what each published pair saved.
    """

    def __init__(self, rows: Sequence[Row] | None = None) -> None:
        self.rows = list(rows) if rows is not None else read_rows()
        self.points = points_of(self.rows)
        fit = Fit(self.points[TENSORRT])
        self.efficiency = fit.efficiency
        self._engines = fit.left_out()
        self.spread = spread(self._engines)
        self.pairs = int8_pairs(self.rows)
        self.savings = {
            _pair_label(quantised): (1 - _total_ms(quantised) / _total_ms(exact))
            / self._possible(quantised)
            for exact, quantised in self.pairs
        }

    def left_out(self) -> dict[str, list[LeftOut]]:
        """Return every N1.6 point, by runtime, with predictions that did not see it."""
        results = {TENSORRT: self._engines}
        for runtime, points in self.points.items():
            if runtime != TENSORRT:
                results[runtime] = [self._other(runtime, point) for point in points]
        return results

    def int8_left_out(self) -> list[tuple[str, float, float]]:
        """Return each pair's INT8 engine: label, published and predicted milliseconds.

        Predicted from its float engine's time, and from what the other pairs saved.
        """
        results = []
        for exact, quantised in self.pairs:
            label = _pair_label(quantised)
            others = [share for name, share in self.savings.items() if name != label]
            predicted = after_int8(_total_ms(exact), self._possible(quantised), others)
            results.append((label, _total_ms(quantised), predicted))
        return results

    def stand_ins(self) -> list[tuple[str, float, float]]:
        """Return float engines of unknown sizes: label, published and predicted milliseconds.

        N1.6's work stands in for theirs, by the fit to N1.6's engines; none of them is fitted,
        so none can be left out. What the source says of the time around the engines is added.
        """
        results = []
        for row in self.rows:
            if needs_stand_in(row):
                device = find_device(row.text("device_key"), row.text("mode"))
                launches = observation(_work_or_stand_in(row))
                engines_ms = 1e3 * seconds(launches, device, self.efficiency)
                label = f"{row.label}, cameras: {row.text('images') or 'not said'}"
                before_ms = row.number("preprocess_ms") or 0.0
                results.append((label, _total_ms(row), before_ms + engines_ms))
        return results

    def not_predicted(self) -> list[tuple[Row, str]]:
        """Return the rows without any prediction, each with the reason."""
        in_pairs = [quantised for _, quantised in self.pairs]
        return [
            (row, why_not_predicted(row))
            for row in self.rows
            if not row.text("backbone_runtime") and not needs_stand_in(row) and row not in in_pairs
        ]

    def totals(self) -> list[tuple[str, float, float]]:
        """Return whole inferences in TensorRT: label, published and fitted milliseconds.

        The fit has seen their parts; what stands around the engines is taken as published.
        """
        results = []
        for row in self.rows:
            total_ms, before = row.number("total_ms"), row.number("preprocess_ms")
            stages = {row.text("backbone_runtime"), row.text("head_runtime")}
            if stages != {TENSORRT} or total_ms is None or before is None:
                continue
            backbone, head = row_work(row)
            device = find_device(row.text("device_key"), row.text("mode"))
            engines = seconds(observation([backbone, *head]), device, self.efficiency)
            label = f"{row.label}, {row.text('steps')} steps"
            results.append((label, total_ms, before + 1e3 * engines))
        return results

    def predict(self, graphs: Sequence[GraphWork], device: Device) -> Prediction:
        """Predict one observation's time in TensorRT engines."""
        launches = observation(graphs)
        best = seconds(launches, device, self.efficiency)
        without = seconds(as_half(launches), device, self.efficiency)
        saved = [share * (without - best) for share in self.savings.values()] or [0.0]
        middle = without - sum(saved) / len(saved)
        return Prediction(middle, best / self.spread, (without - min(saved)) * self.spread, best)

    def kinds(self, graph: GraphWork, device: Device) -> dict[str, float]:
        """Return the expected seconds of each kind of layer in a graph.

        A launch's time does not depend on its neighbours, so they add up to the graph's.
        """
        return {
            kind: self.predict([replace(graph, launches=tuple(own))], device).middle_s
            for kind, own in of_kinds(graph.launches).items()
        }

    def _other(self, runtime: str, point: Point) -> LeftOut:
        others = [other for other in self.points[runtime] if other is not point]
        elsewhere = [other for other in others if other.group != point.group]
        return LeftOut(
            point,
            self._of_runtime(runtime, others, point),
            self._of_runtime(runtime, elsewhere, point) if elsewhere else None,
        )

    def _of_runtime(self, runtime: str, known: Sequence[Point], point: Point) -> float:
        """Predict a point of another runtime from other points of that runtime."""

        def engine(other: Point) -> float:
            return seconds(other.launches, other.device, self.efficiency)

        if runtime == EAGER:
            # Its time is that of its launches on the host, whatever the device.
            each = [max(p.seconds - engine(p), 0.0) / len(p.launches) for p in known]
            return engine(point) + len(point.launches) * sum(each) / len(each)
        return engine(point) * factor(known, engine)

    def _possible(self, quantised: Row) -> float:
        """Return the share of the time that INT8 could save at best in a row's work."""
        device = find_device(quantised.text("device_key"), quantised.text("mode"))
        graphs = _work_or_stand_in(quantised)
        without = seconds(observation(graphs), device, self.efficiency)
        best = seconds(observation([as_int8(g) for g in graphs]), device, self.efficiency)
        return 1 - best / without


def after_int8(before: float, possible: float, shares: Sequence[float]) -> float:
    """Return a float engine's time after INT8, in the unit it was given in.

    Args:
        before: The float engine's time.
        possible: Share of it that INT8 could save at best.
        shares: Of that, what each known pair saved; none: nothing is saved.
    """
    saved = sum(shares) / len(shares) if shares else 0.0
    return before * (1 - saved * possible)


def efficiency_text(efficiency: Efficiency) -> str:
    """Return the fitted numbers in words."""
    return (
        f"{efficiency.arithmetic:.0%} of the dense arithmetic peak, "
        f"{efficiency.bandwidth:.0%} of the bandwidth, "
        f"{efficiency.launch_s * 1e6:.1f} us a launch"
    )


def _pair_label(quantised: Row) -> str:
    return f"{quantised.label}, cameras: {quantised.text('images')}"


def _total_ms(row: Row) -> float:
    value = row.number("total_ms")
    assert value is not None
    return value


def _work_or_stand_in(row: Row) -> tuple[GraphWork, ...]:
    """Return a row's work; N1.6's for as many cameras where the network is another."""
    if row.text("tokens"):
        backbone, head = row_work(row)
        return backbone, *head
    images = int(row.number("images") or 1)
    tokens = 33 + 81 * images
    return (
        reference_backbone(RELEASED, images, (252, 252), tokens),
        *reference_head(RELEASED, tokens, 16, 4),
    )
