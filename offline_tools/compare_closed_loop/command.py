"""`groot-int8 compare-closed-loop`: what engines, steps, latencies and seams do to the task.

Owns: the subcommand.
"""

from __future__ import annotations

import argparse
import fnmatch
from pathlib import Path

from groot_int8_ros.errors import ConfigurationError
from offline_tools.arguments import positive_int, seed
from offline_tools.closed_loop.results import read_results
from offline_tools.compare_closed_loop.comparison import Episodes, compare_section
from offline_tools.compare_closed_loop.episodes import Job, run_jobs
from offline_tools.compare_closed_loop.models import Models, Sources
from offline_tools.compare_closed_loop.plan import Cell, episodes_of, sections
from offline_tools.compare_closed_loop.report import write_report

MODEL_FOLDER = "models"
RESULT_FOLDER = "episodes"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's options."""
    parser.add_argument("--checkpoint", type=Path, required=True, help="of the trained policy")
    parser.add_argument("--robot", type=Path, required=True, help="as for export")
    parser.add_argument(
        "--dataset", type=Path, required=True, help="recording to calibrate INT8 on"
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="folder of models, episodes and tables; what it has already is kept",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=["*"],
        metavar="PATTERN",
        help="cells to run now, such as 'plain.*' (default: all); the tables show what is there",
    )
    parser.add_argument("--list", action="store_true", help="print the cells and run nothing")
    parser.add_argument(
        "--engine-episodes",
        type=positive_int,
        default=100,
        help="scenes for each engine (default: %(default)s)",
    )
    parser.add_argument(
        "--factor-episodes",
        type=positive_int,
        default=50,
        help="scenes for each number of steps, latency and seam (default: %(default)s)",
    )
    parser.add_argument(
        "--calibration-samples", type=positive_int, default=128, help="default: %(default)s"
    )
    parser.add_argument("--workers", type=positive_int, default=2, help="default: %(default)s")
    parser.add_argument("--seed", type=seed, default=0, help="of the noise (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Make the models, run the episodes that are missing, and write the tables."""
    plan = sections(args.engine_episodes, args.factor_episodes)
    wanted = episodes_of(plan)
    chosen = {
        cell: count
        for cell, count in wanted.items()
        if any(fnmatch.fnmatchcase(cell.name, pattern) for pattern in args.only)
    }
    if args.list:
        for cell, count in chosen.items():
            print(f"{cell.name}: {count}")
        return 0
    if not chosen:
        raise ConfigurationError(
            f"no cell is named like {' '.join(args.only)}; --list prints their names"
        )
    models = Models(
        args.output / MODEL_FOLDER,
        Sources(args.checkpoint, args.robot, args.dataset, args.calibration_samples),
        _tell,
    )
    # One at a time: while the next model is made, the cells before it are run.
    jobs = (
        Job(
            cell,
            models.of(cell),
            models.float_of(cell),
            _result_file(args.output, cell),
            count,
            args.seed,
        )
        for cell, count in chosen.items()
    )
    run_jobs(jobs, args.workers, _tell)
    results: dict[Cell, Episodes] = {}
    for cell in wanted:
        path = _result_file(args.output, cell)
        if path.exists():
            results[cell] = read_results(path)[1]
    tables = [(section, compare_section(section, results)) for section in plan]
    print(write_report(args.output, tables), end="")
    return 0


def _result_file(output: Path, cell: Cell) -> Path:
    return output / RESULT_FOLDER / f"{cell.name}.jsonl"


def _tell(line: str) -> None:
    print(line, flush=True)
