"""The comparison's table, its verdicts and its picture.

Owns: how results read. Must not compute any.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

from groot_int8_ros.policy.files import atomic_file
from offline_tools.compare_quantization.comparison import BFLOAT16, Refusal, Row

mpl.use("Agg")

from matplotlib import pyplot


def header(units: Sequence[str]) -> str:
    """Return the table's head for joints of these units."""
    columns = ["model", "scheme", "INT8 layers", "weights", "cosine", "rel. L2", "worst", "x bf16"]
    for unit in units:
        columns += [f"p99 {unit}", f"max {unit}", f"jerk {unit}"]
    columns += ["worst layer (rel. L2)"]
    return _line(columns) + "\n" + _line(["---"] * len(columns))


def line(row: Row, yardstick: float | None) -> str:
    """Return one row of the table.

    Args:
        row: What was measured.
        yardstick: bfloat16's relative L2 on the same model, if it was measured.
    """
    errors = row.errors
    times = errors.relative_l2 / yardstick if yardstick else math.nan
    cells = [
        row.model,
        row.scheme,
        f"{row.int8_layers}/{row.layers}" if row.layers else "-",
        f"{100 * row.int8_share:.0f} %" if row.layers else "-",
        f"{errors.cosine:.5f}",
        _percent(errors.relative_l2),
        _percent(errors.worst_relative_l2),
        "-" if math.isnan(times) else f"{times:.2f}",
    ]
    for one in errors.by_unit.values():
        cells += [f"{one.p99:.3g}", f"{one.maximum:.3g}", f"x{one.jerk_ratio:.3f}"]
    return _line([*cells, _worst_layer(row)])


def verdicts(rows: Sequence[Row], refusals: Sequence[Refusal] = ()) -> list[str]:
    """Say which schemes stay at or below bfloat16 on every model, and where the others fail."""
    models = list(dict.fromkeys(row.model for row in rows))
    yardsticks = {row.model: row.errors.relative_l2 for row in rows if row.scheme == BFLOAT16}
    if set(yardsticks) != set(models):
        return ["no verdict: bfloat16 was not measured on every model"]
    lines = []
    for scheme in dict.fromkeys(row.scheme for row in rows if row.layers):
        over = {
            row.model: row.errors.relative_l2 / yardsticks[row.model]
            for row in rows
            if row.scheme == scheme and row.errors.relative_l2 > yardsticks[row.model]
        }
        none = [refusal.model for refusal in refusals if refusal.scheme == scheme]
        if over or none:
            listed = [f"{model} {times:.1f} x" for model, times in over.items()]
            listed += [f"{model} (no graph)" for model in none]
            lines.append(f"{scheme}: above bfloat16 on {', '.join(listed)}")
        else:
            lines.append(f"{scheme}: at or below bfloat16 on every model")
    return lines


def draw(path: Path, rows: Sequence[Row]) -> None:
    """Draw each scheme's relative L2 of the actions, a panel a model, with bfloat16's as a line.

    Args:
        path: The PNG to write.
        rows: All rows.
    """
    models = list(dict.fromkeys(row.model for row in rows))
    schemes = list(dict.fromkeys(row.scheme for row in rows))
    figure, axes = pyplot.subplots(
        1,
        len(models),
        figsize=(2.0 + 2.6 * len(models), 1.2 + 0.3 * len(schemes)),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    finite = [r.errors.relative_l2 for r in rows if math.isfinite(r.errors.relative_l2)]
    top = 2.0 * max(finite, default=1.0)
    for axis, model in zip(axes.flat, models, strict=True):
        own = {row.scheme: row.errors.relative_l2 for row in rows if row.model == model}
        limit = own.get(BFLOAT16)
        for position, scheme in enumerate(schemes):
            value = own.get(scheme)
            if value is None:
                continue
            good = limit is not None and value <= limit
            axis.barh(position, min(value, top), color="tab:green" if good else "tab:orange")
        if limit is not None:
            axis.axvline(limit, color="black", linewidth=1, linestyle="--")
        axis.set_xscale("log")
        axis.set_title(model, fontsize=9)
        axis.set_yticks(range(len(schemes)), schemes, fontsize=8)
    axes.flat[0].invert_yaxis()
    figure.supxlabel("relative L2 of action_pred against float32 (dashed: bfloat16)", fontsize=9)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    pyplot.close(figure)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _percent(value: float) -> str:
    return f"{100 * value:.3g} %" if math.isfinite(value) else "not finite"


def _worst_layer(row: Row) -> str:
    if not row.by_layer:
        return "-"
    name, found = max(row.by_layer.items(), key=lambda item: _rank(item[1].relative_l2))
    return f"{_shorten(name)} {_percent(found.relative_l2)}"


def _rank(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _shorten(layer: str) -> str:
    """Leave out the parts of a layer's name that all of its neighbours share."""
    for long, short in (
        ("backbone.model.vision_model.vision_model.encoder.layers.", "vision."),
        ("backbone.model.vision_model.vision_model.", "vision."),
        ("backbone.model.language_model.model.layers.", "llm."),
        ("backbone.model.", ""),
        ("transformer_blocks.", "dit."),
    ):
        if layer.startswith(long):
            return short + layer.removeprefix(long)
    return layer
