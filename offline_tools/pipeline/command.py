"""`groot-int8 pipeline`: from a checkpoint and a dataset to an audited INT8 bundle.

Owns: which steps there are, in which order, and what each depends on. Every step is the subcommand
of its name; what it makes lies in one folder::

    OUTPUT/float         bundle in floating point, verified against the checkpoint
    OUTPUT/calibration   captured inputs of the two large graphs, and their coverage report
    OUTPUT/int8          bundle with INT8 layers; engines in it, where they can be built, and how
                         far their answers are from the graphs' (reports/verify_engines)
    OUTPUT/report        audit.json, audit_engines.json, report.json, report.md
    OUTPUT/.pipeline     what each step was made from, and how long it took; the videos' hashes
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from groot_int8_ros.capture.store import CaptureStore
from groot_int8_ros.errors import ConfigurationError, EngineError
from groot_int8_ros.policy.bundle import MANIFEST_FILE, TOKENIZER_FILE, open_bundle
from groot_int8_ros.policy.engines.cuda import Cuda
from groot_int8_ros.policy.engines.engine_report import report_path
from groot_int8_ros.policy.engines.tensorrt_manifest import engine_folder
from groot_int8_ros.policy.families import DEPLOYED, FAMILIES
from groot_int8_ros.policy.files import atomic_file, refuse_occupied, sha256_of_file
from groot_int8_ros.policy.processor import load_processor
from offline_tools.arguments import positive_float, positive_int, seed
from offline_tools.cli import EXIT_CHECK_FAILED
from offline_tools.engine.library import open_library
from offline_tools.pipeline.file_hashes import FileHashes
from offline_tools.pipeline.report import REPORT_FILES, write_report
from offline_tools.pipeline.step import (
    STATE_FOLDER,
    Step,
    StepFailedError,
    StepState,
    digest,
    digest_of_files,
    read_state,
    run_subcommand,
    write_state,
)
from offline_tools.quantize.command import parse_joint_limits
from offline_tools.quantize.int8_bundle import (
    AUTO,
    FIXED_SCHEMES,
    STATIC_CACHE,
    check_limit_keys,
    eligible_layers,
)

STEPS = (
    "export",
    "verify",
    "calibrate",
    "quantize",
    "build",
    "audit",
    "audit-engines",
    "verify-engines",
)

AUDIT_FILE = "audit.json"
ENGINE_AUDIT_FILE = "audit_engines.json"

# The scales of a calibrator's cache are for a graph that has been exported already.
_SCHEMES = (AUTO, *(name for name in FIXED_SCHEMES if name != STATIC_CACHE))
_MARKER = f"{STATE_FOLDER}/about.txt"

# Seconds for each gigabyte of the checkpoint, measured on two x86-64 cores with the 5.9 GB of a
# true-size model, deployed graphs at four steps. `auto` took 76 min with 16 samples, a fixed
# scheme (`row`) 150 s; capturing those samples 188 s, of which one sample's share is given. With
# TensorRT 8.6 the INT8 backbone took 17 min, and the action head was stopped after as many.
_ROUGH_S_PER_GB = {
    "export": 45.0,
    "verify": 20.0,
    "calibrate": 2.0,
    "quantize": 26.0,
    "quantize auto": 800.0,
    "build": 400.0,
    "audit": 1.0,
    "verify-engines": 20.0,
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's options."""
    parser.add_argument("--checkpoint", type=Path, required=True, help="fine-tuned N1.6 folder")
    parser.add_argument("--dataset", type=Path, required=True, help="LeRobot v2.1 folder")
    parser.add_argument("--output", type=Path, required=True, help="folder for all results")
    for name in ("tokenizer", "eagle-config", "robot"):
        parser.add_argument(f"--{name}", type=Path, help="as for export")
    parser.add_argument("--embodiment", help="as for export")
    parser.add_argument(
        "--graphs", choices=FAMILIES, default=DEPLOYED, help="as export (default: %(default)s)"
    )
    parser.add_argument("--instruction", nargs="+", default=[], help="as for export")
    parser.add_argument("--max-prefix-tokens", type=positive_int, help="as for export")
    parser.add_argument("--prefix-model", action="store_true", help="as for export")
    parser.add_argument("--precision", choices=["fp16", "fp32"], default="fp16", help="as export")
    parser.add_argument("--denoising-steps", type=int, choices=(1, 2, 4), help="as for export")
    parser.add_argument(
        "--samples", type=positive_int, default=128, help="as for calibrate (default: 128)"
    )
    parser.add_argument(
        "--scheme", choices=_SCHEMES, default=AUTO, help="as for quantize (default: %(default)s)"
    )
    parser.add_argument("--budget", type=positive_float, help="as for quantize")
    parser.add_argument("--max-joint-error", nargs="+", default=[], help="as for quantize")
    parser.add_argument("--layers", nargs="+", default=[], help="as for quantize")
    parser.add_argument("--accept", action="store_true", help="as for quantize")
    parser.add_argument("--seed", type=seed, default=0, help="of noise and search (default: 0)")
    parser.add_argument(
        "--low-memory", action="store_true", help="as for build, where engines are built"
    )
    parser.add_argument("--builder-level", type=int, choices=range(6), help="as for build")
    parser.add_argument("--no-library-tactics", action="store_true", help="as for build")
    parser.add_argument("--ignore-forecast", action="store_true", help="as for build")
    parser.add_argument(
        "--refresh",
        nargs="?",
        const=STEPS[0],
        choices=STEPS,
        help="run again from this step on (default: from the first)",
    )
    parser.add_argument("--plan", action="store_true", help="say what would be done, and end")


def run(args: argparse.Namespace) -> int:
    """Say what will be done, do it, and print the report."""
    output: Path = args.output
    for folder in (args.checkpoint, args.dataset):
        if not folder.is_dir():
            raise ConfigurationError(f"no such folder: {folder}")
    refuse_occupied(output, marker=_MARKER, what="a pipeline's results", replace=True)
    _check_limits(args)
    steps = _steps(args)
    _print_plan(steps, output, args.refresh)
    if args.plan:
        return 0
    with atomic_file(output / _MARKER) as temporary:
        temporary.write_text("This folder is rewritten by `groot-int8 pipeline`.\n")
    refreshing, code = False, 0
    for step in steps:
        refreshing |= step.name == args.refresh
        try:
            _bring_up_to_date(step, output, refresh=refreshing)
            if step.name == "export" and args.layers:
                # What --layers can name is known from here on, long before quantize asks.
                eligible_layers(open_bundle(output / "float", verify_hashes=False), args.layers)
        except StepFailedError as error:
            if not (step.is_verdict and error.code == EXIT_CHECK_FAILED):
                print(f"groot-int8 pipeline: stopped, since {error}")
                return error.code
            code = error.code
    print("\n== report")
    left_out = {step.name: step.left_out for step in steps if step.left_out}
    states = {step.name: read_state(output, step.name) for step in steps}
    page = write_report(
        output / "report",
        float_bundle=output / "float",
        int8_bundle=output / "int8",
        captures=output / "calibration",
        audit=output / "report" / AUDIT_FILE,
        audit_of_engines=(
            None if "audit-engines" in left_out else output / "report" / ENGINE_AUDIT_FILE
        ),
        answers_of_engines=(
            None
            if "verify-engines" in left_out
            else report_path(output / "int8", _engines_here(output / "int8"))
        ),
        seconds={name: state.seconds if state else None for name, state in states.items()},
        left_out=left_out,
    )
    print(page + "\n" + "\n".join(str(output / "report" / name) for name in REPORT_FILES))
    return code


def _check_limits(args: argparse.Namespace) -> None:
    """Refuse joint limits that quantize would refuse, hours before it does."""
    limits = parse_joint_limits(args.max_joint_error)
    if limits:
        check_limit_keys(limits, load_processor(args.checkpoint, args.embodiment))


def _print_plan(steps: Sequence[Step], output: Path, refresh: str | None) -> None:
    """Say of each step whether it will run, why, and for how long."""
    print(f"{'step':15}{'':10}{'about':>10}   why")
    stale, total_s = "", 0.0
    for step in steps:
        state = read_state(output, step.name)
        if step.left_out:
            print(f"{step.name:15}{'left out':10}{'':>10}   {step.left_out}")
            continue
        if step.name == refresh:
            stale = "asked for by --refresh"
        reason = stale or step.why_stale(state)
        if not reason:
            print(f"{step.name:15}{'skip':10}{'':>10}   up to date")
            continue
        if not stale and step.name != "verify":
            stale = f"{step.name} runs before it"
        known = state is not None and state.seconds is not None
        seconds = state.seconds if state and state.seconds is not None else step.rough_s
        total_s += seconds
        basis = "as the last time" if known else "a guess from the checkpoint's size"
        print(f"{step.name:15}{'run':10}{_duration(seconds):>10}   {reason} ({basis})")
    print(f"about {_duration(total_s)} in all\n", flush=True)


def _bring_up_to_date(step: Step, output: Path, *, refresh: bool) -> None:
    if step.left_out:
        return
    state = read_state(output, step.name)
    if not refresh and not step.why_stale(state):
        print(f"== {step.name}: up to date", flush=True)
        return
    key = step.key()
    interrupted = state is not None and state.key == key and state.output is None and not refresh
    # Before the step is announced: whoever sees it begin and kills it finds it interrupted.
    write_state(output, step.name, StepState(key, None, state.seconds if state else None))
    print(f"\n== {step.name}", flush=True)
    start = time.perf_counter()
    run_subcommand(step.subcommand or step.name, *step.arguments(interrupted))
    step.finish()
    seconds = time.perf_counter() - start
    write_state(output, step.name, StepState(key, step.output(), seconds))


def _steps(args: argparse.Namespace) -> list[Step]:
    output: Path = args.output
    folders = {name: output / name for name in ("float", "calibration", "int8", "report")}
    fresh_int8, audit = output / ".new-int8", folders["report"] / AUDIT_FILE
    checkpoint, dataset = args.checkpoint, args.dataset
    weights_gb: float = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors")) / 1e9

    def rough_s(name: str, times: int = 1) -> float:
        return max(5.0, times * _ROUGH_S_PER_GB[name] * weights_gb)

    exported = [
        *_given(args, "graphs", "embodiment", "precision", "denoising_steps"),
        *_given(args, "max_prefix_tokens"),
        *_listed("--instruction", args.instruction),
        *(["--prefix-model"] if args.prefix_model else []),
    ]
    quantised = [
        *_given(args, "scheme", "budget", "seed"),
        *_listed("--max-joint-error", args.max_joint_error),
        *_listed("--layers", args.layers),
        *(["--accept"] if args.accept else []),
    ]
    captured = _given(args, "samples", "seed")
    built = [
        *(["--low-memory"] if args.low_memory else []),
        *(["--no-library-tactics"] if args.no_library_tactics else []),
        *_given(args, "builder_level"),
    ]

    hashes = FileHashes(output / STATE_FOLDER)

    def read_of_dataset() -> str:
        return _digest_of_dataset(dataset, hashes)

    def read_by_export() -> str:
        tokenizer = args.tokenizer or checkpoint
        tokenizer = tokenizer if tokenizer.is_file() else tokenizer / TOKENIZER_FILE
        single = [path for path in (tokenizer, args.eagle_config, args.robot) if path]
        return digest(
            [
                _digest_of_checkpoint(checkpoint),
                read_of_dataset(),
                *map(sha256_of_file, single),
            ]
        )

    def float_bundle() -> str:
        return _digest_of_bundle(folders["float"])

    def captures() -> str:
        return CaptureStore.open(folders["calibration"]).content_sha256

    def int8_bundle() -> str:
        return _digest_of_bundle(folders["int8"])

    def calibrate_arguments(interrupted: bool) -> list[str]:
        store = folders["calibration"]
        if not interrupted:
            shutil.rmtree(store, ignore_errors=True)
        return [
            *("--bundle", str(folders["float"]), "--dataset", str(dataset), *captured),
            *("--output", str(store)),
            *(["--resume"] if store.exists() else []),
        ]

    def quantize_arguments(_: bool) -> list[str]:
        shutil.rmtree(fresh_int8, ignore_errors=True)
        return [
            *("--bundle", str(folders["float"]), "--calibration", str(folders["calibration"])),
            *("--output", str(fresh_int8), *quantised),
        ]

    def replace_int8() -> None:
        # The old bundle stays until the new one is whole.
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(folders["int8"])
        fresh_int8.rename(folders["int8"])

    def built_engines() -> str:
        # Each engine's manifest holds the engine's hash.
        manifests = sorted(_engines_here(folders["int8"]).glob("*.json"))
        if not manifests:
            raise EngineError(f"{folders['int8']} has no engine for the device here")
        return digest_of_files(manifests, folders["int8"])

    no_engines = _why_no_engines(folders["int8"])
    audit_of_engines = folders["report"] / ENGINE_AUDIT_FILE
    steps = [
        Step(
            "export",
            options=exported,
            inputs=read_by_export,
            output=float_bundle,
            arguments=lambda _: [
                *("--checkpoint", str(checkpoint), "--dataset", str(dataset)),
                *_given(args, "tokenizer", "eagle_config", "robot"),
                *exported,
                *("--bundle", str(folders["float"]), "--force"),
            ],
            rough_s=rough_s("export"),
        ),
        Step(
            "verify",
            options=[],
            inputs=lambda: digest([float_bundle(), read_of_dataset()]),
            output=lambda: sha256_of_file(folders["float"] / "reports" / "verify.json"),
            arguments=lambda _: [
                *("--bundle", str(folders["float"]), "--checkpoint", str(checkpoint)),
                *_given(args, "eagle_config"),
                *("--dataset", str(dataset)),
            ],
            rough_s=rough_s("verify"),
        ),
        Step(
            "calibrate",
            options=captured,
            inputs=lambda: digest([float_bundle(), read_of_dataset()]),
            output=captures,
            arguments=calibrate_arguments,
            rough_s=rough_s("calibrate", args.samples),
        ),
        Step(
            "quantize",
            options=quantised,
            inputs=lambda: digest([float_bundle(), captures()]),
            output=int8_bundle,
            arguments=quantize_arguments,
            finish=replace_int8,
            rough_s=rough_s("quantize auto" if args.scheme == AUTO else "quantize"),
        ),
        Step(
            "build",
            options=built,
            inputs=int8_bundle,
            output=built_engines,
            arguments=lambda _: [
                *("--bundle", str(folders["int8"]), *built),
                *(["--ignore-forecast"] if args.ignore_forecast else []),
            ],
            rough_s=rough_s("build"),
            left_out=no_engines,
        ),
        Step(
            "audit",
            options=[],
            inputs=int8_bundle,
            output=lambda: sha256_of_file(audit),
            arguments=lambda _: ["--bundle", str(folders["int8"]), "--json", str(audit)],
            rough_s=rough_s("audit"),
            is_verdict=True,
        ),
        Step(
            "audit-engines",
            options=[],
            inputs=built_engines,
            output=lambda: sha256_of_file(audit_of_engines),
            arguments=lambda _: [
                *(
                    "--bundle",
                    str(folders["int8"]),
                    "--engines",
                    str(_engines_here(folders["int8"])),
                ),
                *("--json", str(audit_of_engines)),
            ],
            rough_s=rough_s("audit"),
            left_out=no_engines,
            subcommand="audit",
            is_verdict=True,
        ),
        Step(
            "verify-engines",
            options=[],
            inputs=lambda: digest([built_engines(), read_of_dataset()]),
            output=lambda: sha256_of_file(
                report_path(folders["int8"], _engines_here(folders["int8"]))
            ),
            arguments=lambda _: ["--bundle", str(folders["int8"]), "--dataset", str(dataset)],
            rough_s=rough_s("verify-engines"),
            left_out=no_engines,
            is_verdict=True,
        ),
    ]
    return [replace(step, options=tuple(step.options)) for step in steps]


def _why_no_engines(bundle: Path) -> str:
    """Return why no engine can be built here, or nothing."""
    try:
        _engines_here(bundle)
    except EngineError as error:
        return (
            f"{error} (on the robot: groot-int8 build --bundle {bundle.name}, then verify-engines)"
        )
    return ""


def _given(args: argparse.Namespace, *names: str) -> list[str]:
    """Return options as they were given, those without a value left out."""
    return [
        word
        for name in names
        if getattr(args, name) is not None
        for word in (f"--{name.replace('_', '-')}", str(getattr(args, name)))
    ]


def _listed(option: str, values: Sequence[str]) -> list[str]:
    return [option, *values] if values else []


def _digest_of_checkpoint(folder: Path) -> str:
    files = [path for path in folder.iterdir() if path.suffix in (".json", ".safetensors")]
    return digest_of_files(files, folder)


def _digest_of_dataset(folder: Path, hashes: FileHashes) -> str:
    # Videos are too large to be read each time.
    videos = sorted(folder.rglob("*.mp4"))
    others = [path for name in ("meta", "data") for path in (folder / name).rglob("*.*")]
    contents = (
        f"{path.relative_to(folder).as_posix()} {sha256}"
        for path, sha256 in zip(videos, hashes.of(videos), strict=True)
    )
    return digest([digest_of_files(filter(Path.is_file, others), folder), *contents])


def _digest_of_bundle(folder: Path) -> str:
    # The manifest holds the hash of every other file, and opening compares them.
    open_bundle(folder)
    return sha256_of_file(folder / MANIFEST_FILE)


def _engines_here(bundle: Path) -> Path:
    """Return the folder of a bundle's engines for the device here."""
    return engine_folder(bundle, open_library("tensorrt").version, Cuda().device())


def _duration(seconds: float) -> str:
    if seconds < 100.0:
        return f"{seconds:.0f} s"
    return f"{seconds / 60.0:.0f} min"
