"""The comparison as Markdown for people and JSON for programs.

Owns: both forms and the verdicts under them. Must not run anything.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from groot_int8_ros import __version__
from offline_tools.compare_closed_loop.comparison import MEASURES, SUCCESS, Difference, Row
from offline_tools.compare_closed_loop.plan import REFERENCE, Section

MARKDOWN_FILE = "comparison.md"
JSON_FILE = "comparison.json"
AUTO_ENGINE = "int8-auto"
# The latency at which overlapped execution has to keep this share of the successes.
OVERLAP_S = 0.3
KEPT_SHARE = 0.95

Tables = Sequence[tuple[Section, Sequence[Row]]]

_LEGEND = (
    "Means over the scenes. In brackets the 95 % interval of the difference to the baseline on "
    "the same scenes, and a star where a paired test says that there is a difference: exact "
    "McNemar for the success, flipped signs for the rest, p below 0.05 after Holm's correction "
    "for all tests of a table. A failed episode counts with its whole time. The action error is "
    "that of the joint targets against the float deployed graphs on the same observations with "
    "the same noise. INT8 is what the Q/DQ nodes say, computed in float by ONNX Runtime: "
    "arithmetic, not speed."
)
_HEADER = (
    "| cell | scenes | success % | time to success s | jerk rad/s³ | largest step rad, of all "
    "| action error mrad, largest |"
)
_DIGITS = {"time_s": 2, "jerk_rad_s3": 1, "largest_step_rad": 3}


def write_report(folder: Path, tables: Tables) -> str:
    """Write both forms, and return the Markdown.

    Args:
        folder: Where to.
        tables: Sections with their rows; those without a row are left out.
    """
    shown = [(section, rows) for section, rows in tables if rows]
    said = verdicts(shown)
    text = "\n".join([_LEGEND, "", *_markdown(shown), *(f"- {line}" for line in said), ""])
    (folder / MARKDOWN_FILE).write_text(text, encoding="utf-8")
    content = {
        "version": __version__,
        "sections": [
            {"title": section.title, "rows": [_as_json(row) for row in rows]}
            for section, rows in shown
        ],
        "verdicts": said,
    }
    (folder / JSON_FILE).write_text(
        json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8"
    )
    return text


def verdicts(tables: Tables) -> list[str]:
    """Say what the tables say about the goals of the comparison."""
    said = []
    for _, rows in tables:
        for row in rows:
            if row.cell.engine == AUTO_ENGINE:
                said.append(_auto_verdict(row))
            if row.cell.engine == REFERENCE and row.action_error is not None:
                error, _, largest = row.action_error
                said.append(
                    f"{row.cell.name}: targets differ from the deployed graphs' by "
                    f"{1e3 * error:.2g} mrad, at most {1e3 * largest:.2g} mrad"
                )
            if row.baseline is not None and row.cell.latency_s == OVERLAP_S:
                said.append(_overlap_verdict(row))
    return said


def _auto_verdict(row: Row) -> str:
    success, jerk = row.differences[SUCCESS], row.differences["jerk_rad_s3"]
    lost = "a loss" if success.real and success.mean < 0.0 else "no significant loss"
    more = "more jerk" if jerk.real and jerk.mean > 0.0 else "no more jerk"
    return (
        f"{row.cell.name}: {lost} of success ({_shares(success)}, p {success.corrected_p:.2g}), "
        f"{more} ({_numbers(jerk, 1)} rad/s³, p {jerk.corrected_p:.2g})"
    )


def _overlap_verdict(row: Row) -> str:
    before = row.share - row.differences[SUCCESS].mean
    kept = row.share / before if before else float("nan")
    met = "at least" if kept >= KEPT_SHARE else "less than"
    return (
        f"{row.cell.name}: keeps {100 * kept:.0f} % of the success without latency, "
        f"{met} {100 * KEPT_SHARE:.0f} %"
    )


def _markdown(tables: Tables) -> list[str]:
    lines = []
    for section, rows in tables:
        lines += [f"#### {section.title}", "", _HEADER, "|" + "---|" * (_HEADER.count("|") - 1)]
        lines += [_line(row) for row in rows]
        lines.append("")
    return lines


def _line(row: Row) -> str:
    low, high = row.success_interval
    success = f"{100 * row.share:.0f} ({100 * low:.0f} to {100 * high:.0f})"
    if row.baseline is not None:
        success += f"; {_shares(row.differences[SUCCESS])}"
    cells = [f"`{row.cell.name}`", str(row.episodes), success]
    for name in MEASURES:
        digits = _DIGITS[name]
        text = f"{row.means[name]:.{digits}f}"
        if name == "largest_step_rad":
            text += f", {row.largest_step_rad:.{digits}f}"
        if row.baseline is not None:
            text += f"; {_numbers(row.differences[name], digits)}"
        cells.append(text)
    if row.action_error is None:
        cells.append("")
    else:
        error, (low, high), largest = row.action_error
        cells.append(
            f"{1e3 * error:.3g} ({1e3 * low:.3g} to {1e3 * high:.3g}), {1e3 * largest:.3g}"
        )
    return "| " + " | ".join(cells) + " |"


def _shares(difference: Difference) -> str:
    low, high = difference.interval
    return (
        f"{100 * difference.mean:+.0f} ({100 * low:+.0f} to {100 * high:+.0f}){_star(difference)}"
    )


def _numbers(difference: Difference, digits: int) -> str:
    low, high = difference.interval
    return (
        f"{difference.mean:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"
        f"{_star(difference)}"
    )


def _star(difference: Difference) -> str:
    return " \\*" if difference.real else ""


def _as_json(row: Row) -> dict[str, Any]:
    content = asdict(row)
    content["cell"] = row.cell.name
    content["baseline"] = None if row.baseline is None else row.baseline.name
    return content
