"""`groot-int8 demo`: from the shipped checkpoint to a simulated robot that INT8 moves.

Owns: the order of the steps, what a run that was interrupted goes on with, and the verdict. Every
step runs through the same modules as a user's own data; nothing is made for the demonstration but
its page.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from groot_int8_ros import __version__
from groot_int8_ros.policy.files import atomic_file, refuse_occupied
from offline_tools import cli
from offline_tools.arguments import positive_int, seed
from offline_tools.demo.live_loop import LoopRun, run_loop
from offline_tools.demo.page import Page, make_page
from offline_tools.pipeline.step import run_subcommand
from offline_tools.simulation.config_files import DESCRIPTION, config_file
from offline_tools.simulation.tasks import TASKS
from offline_tools.training.shipped import POLICY_FOLDER

# Marks a folder that this command may write into again, and tells what it is in the middle of.
_MARKER = ".groot-int8-demo"
_REPORT = "report.html"
# So many that each of the six tasks is among them.
_DATA_EPISODES = "12"
# Observations to calibrate on: enough that a quarter of them can be held out to judge by.
_SAMPLES = 48
_SCHEME = ("--scheme", "row-smooth", "--accept")
_KINDS = ("float", "int8")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's options."""
    parser.add_argument(
        "--output", type=Path, default=Path("demo_output"), help="folder (default: %(default)s)"
    )
    parser.add_argument(
        "--episodes",
        type=positive_int,
        default=10,
        help="of each bundle on the robot (default: %(default)s)",
    )
    parser.add_argument("--seed", type=seed, default=0, help="of the calibration (default: 0)")


def run(args: argparse.Namespace) -> int:
    """Run every step, write the page, and fail if something on it should not be."""
    output: Path = args.output
    refuse_occupied(output, marker=_MARKER, what="an output of `groot-int8 demo`", replace=True)
    setup = {"version": __version__, "episodes": args.episodes, "seed": args.seed}
    _begin_or_go_on(output, setup)
    dataset, made, report = output / "dataset", output / "bundles", output / _REPORT
    bundles = {kind: made / kind for kind in _KINDS}

    _step("1/4 episodes of the scripted expert, to calibrate on")
    if dataset.exists():
        print(f"{dataset}: there since the run that was interrupted")
    else:
        run_subcommand("make-sim-dataset", "--output", str(dataset), "--episodes", _DATA_EPISODES)

    _step("2/4 export, verify, calibrate, quantize, audit")
    run_subcommand(
        "pipeline",
        *("--checkpoint", str(POLICY_FOLDER), "--dataset", str(dataset)),
        *("--robot", str(config_file(DESCRIPTION)), "--output", str(made)),
        *("--instruction", *(task.instruction for task in TASKS)),
        *("--precision", "fp32", "--samples", str(_SAMPLES), "--seed", str(args.seed), *_SCHEME),
    )

    _step("3/4 policy node, executor and robot as three processes, over DDS, time stepped")
    runs, films = {}, {}
    for kind, bundle in bundles.items():
        folder = output / "runs" / kind
        films[kind], kept = folder / "film.png", folder / "run.json"
        if kept.exists():
            print(f"{kind}: done before the interruption")
            runs[kind] = LoopRun.from_json(kept.read_text(encoding="utf-8"))
            continue
        print(f"{kind}: {bundle}")
        runs[kind] = run_loop(bundle, folder, episodes=args.episodes)
        with atomic_file(kept) as temporary:
            temporary.write_text(runs[kind].to_json(), encoding="utf-8")

    _step("4/4 what happened")
    page = make_page(
        bundles,
        made / "report" / "report.json",
        runs,
        films,
        ["groot-int8 pipeline --help", "groot-int8 simulate --help", "docs/closed_loop.md"],
    )
    with atomic_file(report) as temporary:
        temporary.write_text(page.html(), encoding="utf-8")
    _write_state(output, setup, is_finished=True)
    _print(page)
    print(f"\nreport: {report.resolve()}")
    print("PASS" if page.passed else "FAIL")
    return 0 if page.passed else cli.EXIT_CHECK_FAILED


def _begin_or_go_on(output: Path, setup: Mapping[str, Any]) -> None:
    """Empty the folder, unless a run with the same options was interrupted in it."""
    try:
        state = json.loads((output / _MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        state = {}
    if state == {**setup, "finished": False}:
        print(f"{output}: going on with the run that was interrupted")
        return
    _write_state(output, setup, is_finished=False)
    for name in ("dataset", "bundles", "runs"):
        shutil.rmtree(output / name, ignore_errors=True)
    (output / _REPORT).unlink(missing_ok=True)


def _write_state(output: Path, setup: Mapping[str, Any], *, is_finished: bool) -> None:
    output.mkdir(parents=True, exist_ok=True)
    with atomic_file(output / _MARKER) as temporary:
        temporary.write_text(json.dumps({**setup, "finished": is_finished}), encoding="utf-8")


def _step(title: str) -> None:
    print(f"\n== {title}", flush=True)


def _print(page: Page) -> None:
    """Print the tables, one column a bundle."""
    for table in page.tables:
        width = max(map(len, (*table.rows, table.title)))
        heads = "".join(f"  {name:24}" for name in table.columns)
        print(f"\n{table.title:{width}}{heads}".rstrip())
        for name, cells in table.rows.items():
            print(f"{name:{width}}{''.join(f'  {cell:24}' for cell in cells)}".rstrip())
        if table.note:
            print(table.note)
    print()
    for check in page.checks:
        print(f"{'yes' if check.passed else 'NO ':4}{check.text}")
