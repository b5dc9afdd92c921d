"""The demonstration's page: what was seen, and whether that is what was to be seen.

Owns: the checks, the tables and the HTML, which needs no other file. Must not import torch, and
computes nothing that a step has not written.
"""

from __future__ import annotations

import base64
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from groot_int8_ros import __version__
from groot_int8_ros.policy.bundle import open_bundle
from offline_tools.closed_loop.statistics import wilson_interval
from offline_tools.cost.command import count_bundle
from offline_tools.cost.report import sums_json
from offline_tools.demo.live_loop import LoopRun
from offline_tools.simulation.tasks import Task

# The shipped policy fulfils every task in floating point; some room for chance.
LEAST_SUCCESS = 0.8
_STAGES = ("read", "preprocess", "backbone", "action_head", "postprocess", "total")


@dataclass(frozen=True)
class Check:
    """One thing that had to come out.

    Attributes:
        text: What.
        passed: Whether it did.
    """

    text: str
    passed: bool


@dataclass(frozen=True)
class Table:
    """One table, a row a quantity.

    Attributes:
        title: Above it.
        columns: Heads of the columns behind the first.
        rows: First cell to the others.
        note: Below it.
    """

    title: str
    columns: Sequence[str]
    rows: Mapping[str, Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Page:
    """What the page says.

    Attributes:
        checks: What had to come out.
        tables: What was seen.
        films: Title, PNG and instruction of each film.
        commands: How to do the same by hand.
    """

    checks: Sequence[Check]
    tables: Sequence[Table]
    films: Sequence[tuple[str, Path, str]]
    commands: Sequence[str]

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    def html(self) -> str:
        """Return the page, with everything in it."""
        template = resources.files(__package__).joinpath("page.html.j2").read_text("utf-8")
        environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
        return environment.from_string(template).render(
            verdict="PASS" if self.passed else "FAIL",
            version=__version__,
            made=f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
            machine=f"{platform.machine()}, {os.cpu_count()} CPUs, Python "
            f"{platform.python_version()}",
            checks=self.checks,
            tables=self.tables,
            films=[
                (title, base64.b64encode(path.read_bytes()).decode(), instruction)
                for title, path, instruction in self.films
            ],
            commands=self.commands,
        )


def make_page(
    bundles: Mapping[str, Path],
    report: Path,
    runs: Mapping[str, LoopRun],
    films: Mapping[str, Path],
    commands: Sequence[str],
) -> Page:
    """Gather the page.

    Args:
        bundles: `float` and `int8` to their folders.
        report: The pipeline's `report.json`.
        runs: What each bundle's episodes gave.
        films: Picture of each bundle's first episode.
        commands: How to do the same by hand.
    """
    found = json.loads(report.read_text(encoding="utf-8"))
    return Page(
        checks=checks(found, runs),
        tables=[
            _bundle_table(bundles, found),
            _loop_table(runs),
            _latency_table(runs),
            _episode_table(runs),
        ],
        films=[
            (kind, path, Task(**runs[kind].episodes[0]["task"]).instruction)
            for kind, path in films.items()
        ],
        commands=commands,
    )


def checks(found: Mapping[str, Any], runs: Mapping[str, LoopRun]) -> list[Check]:
    """Judge what was seen.

    Args:
        found: Content of the pipeline's `report.json`.
        runs: What each bundle's episodes gave.
    """
    asked = {graph: sum(schemes.values()) for graph, schemes in found["schemes"].items()}
    are = {graph: audit["INT8"] for graph, audit in found["audit"].items()}
    return [
        Check("the float graphs compute what the checkpoint does", found["verified"]),
        Check(
            f"{sum(are.values())} of {sum(asked.values())} layers that should be INT8 are, by the "
            "audit of the ONNX",
            are == asked and sum(asked.values()) > 0,
        ),
        *(
            Check(
                f"{kind}: {run.successes} of {len(run.episodes)} episodes done "
                f"(asked: {LEAST_SUCCESS:.0%})",
                run.successes >= LEAST_SUCCESS * len(run.episodes),
            )
            for kind, run in runs.items()
        ),
    ]


def _bundle_table(bundles: Mapping[str, Path], found: Mapping[str, Any]) -> Table:
    costs = [
        sums_json(count_bundle(open_bundle(folder, verify_hashes=False)))
        for folder in bundles.values()
    ]
    errors, audit = found["errors"], found["audit"]
    rows = {
        "bundle": [f"{found['bytes'][kind] / 1e6:.1f} MB" for kind in bundles],
        **{
            f"INT8 layers of {graph}, by the audit of the ONNX": [
                "0",
                f"{verdicts['INT8']} of {sum(verdicts.values())}",
            ]
            for graph, verdicts in audit.items()
        },
        "actions off the float bundle's, relative L2": ["-", f"{errors['relative_l2']:.2%}"],
        **{
            f"largest error of {name.removeprefix('max_error/')}, degrees": [
                "-",
                f"{error:.2f} (p99 {errors[name.replace('max_', 'p99_', 1)]:.2f})",
            ]
            for name, error in errors.items()
            if name.startswith("max_error/")
        },
        "work of an observation": [f"{cost['flops'] / 1e9:.2f} GFLOP" for cost in costs],
        "of that in INT8": [f"{cost['int8_flops'] / cost['flops']:.0%}" for cost in costs],
        "weights read for an observation": [
            f"{cost['weight_bytes_read'] / 1e6:.1f} MB" for cost in costs
        ],
        "launches, at least": [str(cost["launches"]) for cost in costs],
    }
    note = (
        f"Errors: on captured observations that were not calibrated on. Calibrated on "
        f"{found['calibration']['samples']} of {found['calibration']['offered']} observations."
    )
    return Table("The two bundles", list(bundles), rows, note)


def _loop_table(runs: Mapping[str, LoopRun]) -> Table:
    rows: dict[str, list[str]] = {}

    def add(name: str, cell: str) -> None:
        rows.setdefault(name, []).append(cell)

    for run in runs.values():
        count = len(run.episodes)
        low, high = wilson_interval(run.successes, count)
        times = [episode["time_s"] for episode in run.episodes if episode["success"]]
        add("success", f"{run.successes} of {count}")
        add("  95 % interval", f"{low:.0%} to {high:.0%}")
        add("time to success, median", f"{np.median(times):.1f} s" if times else "-")
        add("  longest", f"{max(times):.1f} s" if times else "-")
        for key, name, unit in (
            ("largest_step_rad", "largest step of a command", "rad"),
            ("tracking_error_rad", "largest tracking error at rest", "rad"),
        ):
            worst = max(episode[key] for episode in run.episodes)
            add(name, f"{worst:.3f} {unit}")
        for node, size in run.peak_bytes.items():
            add(f"peak memory of {node}", f"{size / 1e6:.0f} MB")
        add("real time", f"{run.wall_s:.0f} s")
    return Table("The closed loop", list(runs), rows)


def _latency_table(runs: Mapping[str, LoopRun]) -> Table:
    rows = {
        stage: [
            "{:.1f} / {:.1f}".format(*1e3 * np.percentile(run.timings_s[stage], (50, 95)))
            if run.timings_s.get(stage)
            else "-"
            for run in runs.values()
        ]
        for stage in _STAGES
    }
    note = (
        "INT8 is computed in floating point here, from the Q/DQ nodes by ONNX Runtime: arithmetic "
        "and not speed. What an INT8 engine takes is in docs/performance.md."
    )
    return Table("Latency of an inference in the node, median / p95 ms", list(runs), rows, note)


def _episode_table(runs: Mapping[str, LoopRun]) -> Table:
    rows: dict[str, list[str]] = {}
    for run in runs.values():
        for episode in run.episodes:
            done = f"done, {episode['time_s']:.1f} s" if episode["success"] else "not done"
            name = f"{episode['seed']}: {Task(**episode['task']).instruction}"
            rows.setdefault(name, []).append(done)
    return Table("Episodes, by seed", list(runs), rows)
