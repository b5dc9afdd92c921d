"""Published latencies as measurements that a roofline can be fitted to.

Owns: reading `published_latencies.csv`, the work behind each of its times, and which pairs of its
rows show what INT8 brings, or are of a network whose sizes are not known. Must not import torch.

Every published N1.6 engine ran the graphs of the reference implementation, so the work is that of
the reference graphs at the shapes that the source names or that `assumed` fills in. N1.7 is
another network, whose sizes are not known here: its rows are used as INT8 pairs, and predicted
with N1.6's sizes in their place, but never fitted. A row that nothing predicts is carried with
the reason.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from offline_tools.cost.devices import find_device
from offline_tools.cost.reference_work import reference_backbone, reference_head, reference_vision
from offline_tools.cost.roofline import Point
from offline_tools.cost.work import GraphWork, observation
from offline_tools.model.configuration import ModelConfig

FILE = Path(__file__).with_name("published_latencies.csv")

# Precisions of engines without quantised layers.
_FLOATS = frozenset({"bf16", "float"})

TENSORRT, COMPILE, EAGER, GGML = "tensorrt", "compile", "eager", "ggml"

# The released checkpoint's padded widths; they weigh nothing.
RELEASED = ModelConfig(max_state_dim=128, max_action_dim=128)


@dataclass(frozen=True)
class Row:
    """One published row; None is what the source does not say.

    Attributes:
        values: The cells by column.
    """

    values: dict[str, str]

    def text(self, column: str) -> str:
        """Return a cell."""
        return self.values[column]

    def number(self, column: str) -> float | None:
        """Return a cell as a number, None if it is empty."""
        return float(self.values[column]) if self.values[column] else None

    @property
    def label(self) -> str:
        """What was measured, in words."""
        return f"{self.text('model')} {self.text('device')}, {self.text('engine')}"


def read_rows(path: Path = FILE) -> list[Row]:
    """Read the published latencies."""
    with path.open(encoding="utf-8", newline="") as stream:
        lines = (line for line in stream if not line.startswith("#"))
        return [Row(values) for values in csv.DictReader(lines)]


def _whole(row: Row, column: str) -> int:
    value = row.number(column)
    if value is None:
        raise ValueError(f"{row.label}: the column {column} is empty")
    return int(value)


def row_work(row: Row) -> tuple[GraphWork, tuple[GraphWork, ...]]:
    """Return the backbone's and the head's work behind a row that names its shapes."""
    shape = (_whole(row, "height"), _whole(row, "width"))
    tokens = _whole(row, "tokens")
    backbone = reference_backbone(RELEASED, _whole(row, "images"), shape, tokens)
    head = reference_head(
        RELEASED,
        tokens,
        _whole(row, "horizon"),
        _whole(row, "steps"),
        cached=row.text("head_runtime") == GGML,
    )
    return backbone, head


def points_of(rows: Iterable[Row]) -> dict[str, list[Point]]:
    """Return the measurements by runtime; equal ones of one device count once."""
    points: dict[str, list[Point]] = {TENSORRT: [], COMPILE: [], EAGER: [], GGML: []}
    seen: set[tuple[object, ...]] = set()

    def add(row: Row, part: str, graphs: tuple[GraphWork, ...], ms: float, runtime: str) -> None:
        device = find_device(row.text("device_key"), row.text("mode"))
        launches = tuple(observation(graphs))
        key = (device, part, runtime, len(launches), ms)
        if key not in seen:
            seen.add(key)
            label = f"{row.label}: {part}"
            group = row.text("device_key")
            points[runtime].append(Point(label, device, launches, ms / 1e3, group))

    for row in rows:
        if not row.text("backbone_runtime"):
            continue
        backbone, head = row_work(row)
        stages = row.text("backbone_runtime"), row.text("head_runtime")
        before, total = row.number("preprocess_ms"), row.number("total_ms")
        backbone_ms, head_ms = row.number("backbone_ms"), row.number("head_ms")
        vision_ms = row.number("vision_ms")
        if vision_ms is not None:
            shape = (_whole(row, "height"), _whole(row, "width"))
            vision = reference_vision(RELEASED, _whole(row, "images"), shape)
            add(row, "vision", (vision,), vision_ms, stages[0])
        if backbone_ms is not None:
            add(row, "backbone", (backbone,), backbone_ms, stages[0])
            if head_ms is None and before is not None and total is not None:
                head_ms = total - before - backbone_ms
        if head_ms is not None:
            part = f"head, {row.text('steps')} steps"
            add(row, part, head, head_ms, stages[1])
        if backbone_ms is None and head_ms is None and total is not None:
            add(row, "backbone and head", (backbone, *head), total - (before or 0.0), stages[0])
    return points


def why_not_predicted(row: Row) -> str:
    """Return the reason for a quantised row that is no INT8 engine of a pair."""
    if row.text("precision").startswith("w4"):
        return "no other engine shows what 4 bits save"
    return "no float engine of the same source"


def needs_stand_in(row: Row) -> bool:
    """Whether a float engine's row is of a network whose sizes are not known here."""
    unknown = not row.text("backbone_runtime") and not row.text("tokens")
    return unknown and row.text("precision") in _FLOATS


def int8_pairs(rows: Iterable[Row]) -> list[tuple[Row, Row]]:
    """Return the rows that differ in INT8 alone: (float, INT8)."""
    known = list(rows)
    pairs = []
    for row in known:
        if row.text("precision") != "w8a8":
            continue
        same = [
            other
            for other in known
            if other.text("precision") in _FLOATS
            and other.text("engine").split(" + ")[0] == row.text("engine").split(" + ")[0]
            and all(
                other.text(column) == row.text(column)
                for column in ("model", "device", "images", "source")
            )
        ]
        pairs += [(other, row) for other in same[:1]]
    return pairs
