"""The report of a benchmark: as text, as JSON, as a picture.

Owns: their form. Must not import torch, nor matplotlib unless a picture is asked for.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from offline_tools.benchmark.memory import Memory
from offline_tools.benchmark.profile import KINDS, WEIGHT_PRODUCTS, GraphProfile
from offline_tools.benchmark.runs import STAGES, Figure

SCHEMA_VERSION = 1

# Instructions with which a CPU multiplies int8 faster than float32; without them it does not.
_INT8_FLAGS = ("avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm")


@dataclass(frozen=True)
class Row:
    """One contender.

    Attributes:
        name: As the report calls it.
        description: Family, precision and engine.
        weight_bytes: Size of the files of the graphs that an engine runs.
        memory: What a process that runs it takes, or None where it was not measured.
        figures: Stage to what is reported of it.
        warmup_ms: Total of each warm-up answer.
        relative_l2: Of its normalised actions against the first contender's.
        profile: Kernel time of each of its graphs, or None where it was not profiled.
    """

    name: str
    description: str
    weight_bytes: int
    memory: Memory | None
    figures: Mapping[str, Figure]
    warmup_ms: Sequence[float]
    relative_l2: float
    profile: Sequence[GraphProfile] | None


def machine() -> dict[str, Any]:
    """Return what the machine is: processor, cores, int8 instructions."""
    name, flags = platform.processor() or platform.machine(), ""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        field, _, value = line.partition(":")
        if field.strip() == "model name":
            name = value.strip()
        if field.strip() in ("flags", "Features"):
            flags = value
    return {
        "processor": name,
        "cores": os.cpu_count(),
        "int8_instructions": [flag for flag in _INT8_FLAGS if flag in flags.split()],
    }


def to_json(rows: Sequence[Row], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything as JSON values."""
    return {
        "schema_version": SCHEMA_VERSION,
        "machine": machine(),
        "settings": dict(settings),
        "contenders": [asdict(row) for row in rows],
    }


def table(rows: Sequence[Row]) -> str:
    """Return the report as Markdown tables: what each is and takes, then its times."""
    lines = [
        "| | what it is | weights GB | resident GB | peak GB | rel. L2 of the actions |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        resident, peak = (
            (f"{row.memory.loaded_bytes / 1e9:.2f}", f"{row.memory.peak_bytes / 1e9:.2f}")
            if row.memory
            else ("", "")
        )
        lines.append(
            f"| {row.name} | {row.description} | {row.weight_bytes / 1e9:.3f} | {resident} | "
            f"{peak} | {row.relative_l2:.1e} |"
        )
    lines += [
        "",
        f"ms, median / 99th percentile; ratio: {rows[0].name}'s time over this one's",
        "",
    ]
    lines.append("| | " + " | ".join(STAGES) + " | ratio (5 to 95 % of the rounds) |")
    lines.append("|---" * (len(STAGES) + 2) + "|")
    for row in rows:
        cells = [
            f"{row.figures[stage].median_ms:.1f} / {row.figures[stage].p99_ms:.1f}"
            for stage in STAGES
        ]
        total = row.figures["total"]
        ratio = f"{total.ratio:.2f} ({total.ratio_low:.2f} to {total.ratio_high:.2f})"
        lines.append(f"| {row.name} | " + " | ".join(cells) + f" | {ratio} |")
    return "\n".join(lines)


def profile_table(rows: Sequence[Row]) -> str:
    """Return the profiles as a Markdown table, a line for each graph."""
    lines = [
        "kernel time by ONNX Runtime's profiler, quickest answer: ms an observation, share of the "
        "graph's",
        "",
        "| | graph, runs | kernels | " + " | ".join(KINDS) + " | GFLOP/s with weights |",
        "|---" * (len(KINDS) + 4) + "|",
    ]
    for row in rows:
        for graph in row.profile or ():
            total = sum(graph.kernel_ms.values())
            cells = [
                f"{graph.kernel_ms[kind]:.1f}, {100 * graph.kernel_ms[kind] / total:.1f} %"
                for kind in KINDS
            ]
            spent = graph.kernel_ms[WEIGHT_PRODUCTS]
            cells.append(f"{1e3 * graph.weight_gflop / spent:.0f}" if spent else "")
            name = f"{graph.graph}, {graph.runs}"
            lines.append(f"| {row.name} | {name} | {total:.1f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw each contender's median times, stage behind stage, as a `.png`."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 1 + 0.6 * len(rows)))
    names = [row.name for row in rows]
    start = [0.0] * len(rows)
    for stage in STAGES[:-1]:
        widths = [row.figures[stage].median_ms for row in rows]
        axes.barh(names, widths, left=start, label=stage)
        start = [a + b for a, b in zip(start, widths, strict=True)]
    for place, row in enumerate(rows):
        total = row.figures["total"]
        axes.text(
            start[place], place, f" {total.median_ms:.1f} ms, x{total.ratio:.2f}", va="center"
        )
    axes.invert_yaxis()
    axes.set_xlabel("median, ms")
    axes.set_xlim(0, 1.25 * max(start))
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
