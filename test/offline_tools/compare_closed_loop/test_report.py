"""Hazards of the report: a verdict that says the opposite, a table that drops a cell."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from offline_tools.compare_closed_loop.comparison import MEASURES, SUCCESS, Difference, Row
from offline_tools.compare_closed_loop.plan import Cell, Section
from offline_tools.compare_closed_loop.report import verdicts, write_report

_NOTHING = Difference(0.0, (-0.04, 0.04), 1.0)


def _row(cell: Cell, baseline: Cell | None, **differences: Difference) -> Row:
    names = () if baseline is None else (SUCCESS, *MEASURES)
    return Row(
        cell=cell,
        baseline=baseline,
        episodes=100,
        successes=100,
        success_interval=(0.96, 1.0),
        means=dict.fromkeys(MEASURES, 1.0),
        largest_step_rad=0.1,
        action_error=None,
        differences={name: differences.get(name, _NOTHING) for name in names},
    )


def _verdict(row: Row) -> str:
    (line,) = verdicts([(Section("any", (), 100), [row])])
    return line


@pytest.mark.parametrize(
    ("name", "difference", "expected"),
    [
        ("success", Difference(-0.1, (-0.2, -0.05), 0.001, 0.01), "a loss of success"),
        ("success", Difference(-0.1, (-0.2, 0.01), 0.04, 0.2), "no significant loss"),
        ("success", Difference(0.1, (0.05, 0.2), 0.001, 0.01), "no significant loss"),
        ("jerk_rad_s3", Difference(9.0, (5.0, 13.0), 0.001, 0.01), ", more jerk"),
        ("jerk_rad_s3", Difference(-9.0, (-13.0, -5.0), 0.001, 0.01), "no more jerk"),
    ],
)
def test_auto_is_judged_by_what_is_real_and_worse(
    name: str, difference: Difference, expected: str
) -> None:
    row = _row(Cell(engine="int8-auto"), Cell(), **{name: difference})
    assert expected in _verdict(row)


def test_overlapped_execution_is_judged_by_the_share_that_it_keeps() -> None:
    late, at_once = Cell(latency_s=0.3, seam="rtc"), Cell(seam="rtc")
    lost = Difference(-0.06, (-0.1, -0.01), 0.03)
    row = replace(_row(late, at_once, success=lost), successes=88)
    # 88 of 94.
    assert "94 %" in _verdict(row)
    assert "less than 95 %" in _verdict(row)
    assert "at least 95 %" in _verdict(_row(late, at_once))


def test_both_forms_have_every_cell_and_stars_for_what_is_real(tmp_path: Path) -> None:
    real = Difference(3.0, (2.0, 4.0), 1e-4, 3e-4)
    rows = [
        _row(Cell(), None),
        replace(
            _row(Cell(engine="int8-row"), Cell(), jerk_rad_s3=real),
            action_error=(0.004, (0.003, 0.005), 0.05),
        ),
    ]
    empty = Section("nothing has been run", (), 50)
    text = write_report(tmp_path, [(Section("engines", (), 100), rows), (empty, [])])
    assert (tmp_path / "comparison.md").read_text(encoding="utf-8") == text
    assert "nothing has been run" not in text
    line = next(line for line in text.splitlines() if "int8-row" in line)
    assert line.count("\\*") == 1
    assert "+3.0 (+2.0 to +4.0) \\*" in line
    assert "4 (3 to 5), 50" in line
    header = next(line for line in text.splitlines() if line.startswith("| cell"))
    assert header.count("|") == line.count("|")
    content = json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8"))
    assert [row["cell"] for row in content["sections"][0]["rows"]] == [
        "plain.deployed",
        "plain.int8-row",
    ]
    assert content["sections"][0]["rows"][1]["differences"]["jerk_rad_s3"]["p"] == 1e-4
