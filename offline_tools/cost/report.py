"""The tables of `groot-int8 cost`, as text and as JSON.

Owns: what is printed. Must not import torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from offline_tools.cost.devices import Device
from offline_tools.cost.prediction import PublishedModel, efficiency_text
from offline_tools.cost.roofline import LeftOut
from offline_tools.cost.work import GraphWork, Sums, by_kind, observation, total

_HEADER = (
    f"{'GFLOP':>10}{'INT8':>7}{'stored MB':>11}{'weights MB':>12}{'activ. MB':>11}{'launches':>10}"
)


def _numbers(sums: Sums, stored_bytes: int | None) -> str:
    stored = "" if stored_bytes is None else f"{stored_bytes / 1e6:.1f}"
    return (
        f"{sums.flops / 1e9:>10.2f}{sums.int8_share:>7.0%}{stored:>11}"
        f"{sums.weight_bytes / 1e6:>12.1f}{sums.activation_bytes / 1e6:>11.1f}{sums.launches:>10}"
    )


def graph_table(
    graphs: Sequence[GraphWork], model: PublishedModel, devices: Sequence[Device]
) -> Iterator[str]:
    """Yield what each graph costs an observation, and each kind of layer in it.

    Args:
        graphs: Of one observation.
        model: Predicts.
        devices: A column of expected milliseconds for each of them.
    """
    for number, device in enumerate(devices, 1):
        yield f"ms {number}: expected in TensorRT engines on {device.name}"
    names = "".join(f"{f'ms {number}':>9}" for number, _ in enumerate(devices, 1))
    yield f"{'for one observation':32}{_HEADER}{names}"
    for graph in graphs:
        launches = observation([graph])
        title = f"{graph.name}, runs: {graph.runs}"
        yield (
            f"{title:32}{_numbers(total(launches), graph.stored_bytes)}"
            f"{_expected(model, [graph], devices)}"
        )
        times = [model.kinds(graph, device) for device in devices]
        for kind, sums in by_kind(launches).items():
            cells = "".join(f"{1e3 * own[kind]:>9.2f}" for own in times)
            yield f"  {kind:30}{_numbers(sums, None)}{cells}"
    yield (
        f"{'total':32}{_numbers(total(observation(graphs)), stored(graphs))}"
        f"{_expected(model, graphs, devices)}"
    )


def _expected(
    model: PublishedModel, graphs: Sequence[GraphWork], devices: Sequence[Device]
) -> str:
    return "".join(f"{1e3 * model.predict(graphs, one).middle_s:>9.2f}" for one in devices)


def stored(graphs: Sequence[GraphWork]) -> int:
    """Return the bytes of all constants of some graphs."""
    return sum(graph.stored_bytes for graph in graphs)


def prediction_table(
    model: PublishedModel,
    columns: Mapping[str, Sequence[GraphWork]],
    devices: Sequence[Device],
) -> Iterator[str]:
    """Yield the predicted milliseconds of each device, with their intervals."""
    yield "predicted TensorRT engines, ms for one observation: expected (low to high) [at best]"
    yield f"{'':44}" + "".join(f"{name:>34}" for name in columns)
    for device in devices:
        cells = []
        for graphs in columns.values():
            p = model.predict(graphs, device)
            low, middle, high = (1e3 * s for s in (p.low_s, p.middle_s, p.high_s))
            cells.append(f"{middle:.0f} ({low:.0f} to {high:.0f}) [{1e3 * p.best_s:.0f}]")
        yield f"  {device.name:42}" + "".join(f"{cell:>34}" for cell in cells)


def model_text(model: PublishedModel) -> Iterator[str]:
    """Yield what was fitted, and what it is worth."""
    yield f"fitted to published TensorRT engines: {efficiency_text(model.efficiency)}"
    yield f"90 % of unseen devices within a factor of {model.spread:.2f}, by the errors below"
    yield "of what INT8 could save at best, published pairs of engines saved:"
    for name, share in model.savings.items():
        yield f"  {share:4.0%}  {name}"
    yield ""
    yield f"{'published, ms':72}{'was':>7}{'left out':>16}{'device left out':>18}"
    for runtime, results in model.left_out().items():
        yield f"{runtime}:"
        for result in results:
            yield f"  {result.point.label:70}{_errors(result)}"
    yield "whole inferences in TensorRT, with the time around the engines as published:"
    for label, was, fitted in model.totals():
        yield f"  {label:70}{was:>7.1f}   fitted {fitted:.1f} ({fitted / was - 1:+.0%})"
    yield (
        "INT8 engines, from the float engine beside them and what the other pairs saved "
        "(N1.7: N1.6's sizes stand in):"
    )
    for label, was, predicted in model.int8_left_out():
        yield f"  {label:70}{was:>7.1f}{f'{predicted:.1f} ({predicted / was - 1:+.0%})':>16}"
    yield (
        "float engines of a network whose sizes are not known here (N1.6's stand in; neither "
        "fitted nor left out):"
    )
    for label, was, predicted in model.stand_ins():
        yield f"  {label:70}{was:>7.1f}{f'{predicted:.1f} ({predicted / was - 1:+.0%})':>16}"
    yield "not predicted:"
    for row, reason in model.not_predicted():
        label = f"{row.label}, {row.text('precision')}"
        yield f"  {label:70}{row.text('total_ms'):>7}   {reason}"


def _errors(result: LeftOut) -> str:
    was = result.point.seconds

    def cell(predicted: float | None) -> str:
        if predicted is None:
            return "-"
        return f"{1e3 * predicted:.1f} ({predicted / was - 1:+.0%})"

    return f"{1e3 * was:>7.1f}{cell(result.alone_s):>16}{cell(result.device_s):>18}"


def sums_json(graphs: Sequence[GraphWork]) -> dict[str, Any]:
    """Return the numbers of some graphs."""
    return {**_sums_json(total(observation(graphs))), "stored_bytes": stored(graphs)}


def _sums_json(sums: Sums) -> dict[str, Any]:
    return {
        "flops": sums.flops,
        "int8_flops": sums.int8_flops,
        "weight_bytes_read": sums.weight_bytes,
        "activation_bytes": sums.activation_bytes,
        "launches": sums.launches,
    }


def graphs_json(
    graphs: Sequence[GraphWork], model: PublishedModel, devices: Sequence[Device]
) -> dict[str, Any]:
    """Return the numbers of each graph and each kind of layer, as `graph_table` prints them."""
    results = {}
    for graph in graphs:
        times = {device.name: model.kinds(graph, device) for device in devices}
        results[graph.name] = {
            "runs": graph.runs,
            **sums_json([graph]),
            "expected_ms": {name: 1e3 * sum(own.values()) for name, own in times.items()},
            "kinds": {
                kind: {
                    **_sums_json(sums),
                    "expected_ms": {name: 1e3 * own[kind] for name, own in times.items()},
                }
                for kind, sums in by_kind(observation([graph])).items()
            },
        }
    return results


def predictions_json(
    model: PublishedModel, graphs: Sequence[GraphWork], devices: Sequence[Device]
) -> dict[str, dict[str, float]]:
    """Return the predictions in milliseconds, by device."""
    results = {}
    for device in devices:
        p = model.predict(graphs, device)
        results[device.name] = {
            "expected_ms": 1e3 * p.middle_s,
            "low_ms": 1e3 * p.low_s,
            "high_ms": 1e3 * p.high_s,
            "at_best_ms": 1e3 * p.best_s,
        }
    return results
