"""`groot-int8 benchmark`: bundles side by side on the same inputs, in one run.

Owns: the subcommand. Must not import torch: it runs on the robot too.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from groot_int8_ros.errors import ConfigurationError
from groot_int8_ros.policy.bundle import Bundle, open_bundle
from groot_int8_ros.policy.engines import ENGINE_KINDS
from groot_int8_ros.policy.engines.engine_report import engines_here
from groot_int8_ros.policy.engines.onnxruntime_engine import VERSION
from groot_int8_ros.policy.files import atomic_directory, refuse_occupied
from groot_int8_ros.policy.policy import Policy
from groot_int8_ros.policy.types import ActionChunk, Float32Array, Observation
from offline_tools.arguments import not_negative_int, positive_int
from offline_tools.arguments import seed as seed_type
from offline_tools.benchmark import report
from offline_tools.benchmark.fixture import (
    FrozenInputs,
    generate_inputs,
    instructions_of,
    read_inputs,
    refuse_other_robot,
    write_inputs,
)
from offline_tools.benchmark.memory import Memory, measure
from offline_tools.benchmark.profile import (
    GraphProfile,
    GraphRuns,
    profile_bundle,
    record_runs,
)
from offline_tools.benchmark.runs import (
    STAGES,
    Answer,
    Times,
    figure,
    relative_l2,
    run_interleaved,
)
from offline_tools.evaluate.same_policy import refuse_other_policy

REPORT_FILE = "benchmark.json"
PICTURE_FILE = "benchmark.png"
REPORT_FOLDER = "reports/benchmark"
INPUTS = 4
_INSTRUCTION = "pick up the object"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's options."""
    add = parser.add_argument
    add(
        "--bundle",
        type=Path,
        nargs="+",
        required=True,
        help="bundles of one checkpoint, such as reference and deployed, float and INT8; the "
        "others are measured by the first",
    )
    add(
        "--engine",
        choices=ENGINE_KINDS,
        default="onnxruntime",
        help="runs all of them (default: %(default)s)",
    )
    add("--rounds", type=positive_int, default=20, help="counted answers (default: %(default)s)")
    add("--warmup", type=not_negative_int, default=3, help="before them (default: %(default)s)")
    add("--threads", type=positive_int, help="CPU threads of ONNX Runtime (default: its choice)")
    add(
        "--int8-kernels",
        action="store_true",
        help="let ONNX Runtime fuse Q/DQ into its int8 kernels: fast on a CPU with VNNI or AMX, "
        "but the result then depends on the CPU",
    )
    add("--inputs", type=Path, help="frozen inputs of an earlier run (default: made from --seed)")
    add("--write-inputs", type=Path, help="write the inputs to this file, for others to repeat")
    add("--seed", type=seed_type, default=0, help="of the made inputs (default: %(default)s)")
    add("--no-memory", action="store_true", help="do not measure memory (a process a bundle)")
    add(
        "--profile",
        action="store_true",
        help="after the timing, run every graph under ONNX Runtime's profiler and print what its "
        "kernels spend their time on (a TensorRT engine: groot-int8 audit --time)",
    )
    add(
        "--output",
        type=Path,
        help=f"folder for JSON and picture (default: {REPORT_FOLDER} in the first bundle)",
    )


@dataclass(frozen=True)
class _Contender:
    name: str
    bundle: Bundle

    @property
    def description(self) -> str:
        """Family and precision, as the report says them."""
        manifest = self.bundle.manifest
        precisions = {manifest.graphs[name].precision for name in manifest.engine_graphs}
        largest = next(p for p in ("int8", "fp16", "fp32") if p in precisions)
        return f"{manifest.family} graphs, {largest}, {manifest.denoising_steps} steps"

    @property
    def weight_bytes(self) -> int:
        """Bytes of the files of the graphs that an engine runs."""
        manifest = self.bundle.manifest
        files = [manifest.graphs[name].file for name in manifest.engine_graphs]
        return sum(
            manifest.files[name][1]
            for file in files
            for name in (file, f"{file}.data")
            if name in manifest.files
        )


def run(args: argparse.Namespace) -> int:
    """Measure, print the tables, write JSON and a picture."""
    if args.profile and args.engine != "onnxruntime":
        raise ConfigurationError(
            "--profile asks ONNX Runtime's profiler; for a TensorRT engine use groot-int8 audit "
            "--time"
        )
    if args.profile:
        import onnx  # noqa: F401  # used after the timing; that it is missing is said before it
    output: Path = args.output or args.bundle[0] / REPORT_FOLDER
    refuse_occupied(output, marker=REPORT_FILE, what="a benchmark's report", replace=True)
    contenders = _open(args.bundle)
    # Here an absence is one sentence; in the process that measures memory it is a traceback.
    (library,) = {_library(args.engine, one.bundle) for one in contenders}
    inputs = _inputs(args, [one.bundle for one in contenders])
    with tempfile.TemporaryDirectory() as scratch:
        path = args.write_inputs or Path(scratch) / "inputs.npz"
        write_inputs(path, inputs)
        memory: list[Memory | None] = [None] * len(contenders)
        if not args.no_memory:
            for place, one in enumerate(contenders):
                memory[place] = measure(
                    one.bundle.folder,
                    path,
                    engine=args.engine,
                    threads=args.threads,
                    int8_kernels=args.int8_kernels,
                )
    times, fed = _timed(args, contenders, inputs)
    profiles: list[list[GraphProfile] | None] = [None] * len(contenders)
    if args.profile:
        profiles = [
            profile_bundle(one.bundle, runs, threads=args.threads, int8_kernels=args.int8_kernels)
            for one, runs in zip(contenders, fed, strict=True)
        ]
    rows = [
        report.Row(
            name=one.name,
            description=one.description,
            weight_bytes=one.weight_bytes,
            memory=taken,
            figures={stage: figure(own, times[0], stage) for stage in STAGES},
            warmup_ms=[1e3 * float(value) for value in own.warmup_s],
            relative_l2=relative_l2(own.answers, times[0].answers),
            profile=profile,
        )
        for one, taken, own, profile in zip(contenders, memory, times, profiles, strict=True)
    ]
    settings = {
        "engine": args.engine,
        "library": library,
        "rounds": args.rounds,
        "warmup": args.warmup,
        "threads": args.threads,
        "int8_kernels": args.int8_kernels,
        "inputs": len(inputs),
        "inputs_sha256": inputs.sha256,
        "seed": args.seed if args.inputs is None else None,
    }
    print(_heading(args, settings))
    print(report.table(rows))
    if args.profile:
        print(f"\n{report.profile_table(rows)}")
    with atomic_directory(output) as folder:
        text = json.dumps(report.to_json(rows, settings), indent=1) + "\n"
        (folder / REPORT_FILE).write_text(text, encoding="utf-8")
        # A robot has no use for matplotlib.
        if importlib.util.find_spec("matplotlib") is not None:
            report.draw(rows, folder / PICTURE_FILE)
    print(f"\nreport: {output}")
    return 0


def _library(engine: str, bundle: Bundle) -> str:
    """Return what runs a bundle: the library's version, and the GPU where it has one.

    Raises:
        EngineError: It is missing, or the bundle's engines are.
    """
    return engines_here(bundle).device if engine == "tensorrt" else f"ONNX Runtime {VERSION}"


def _open(folders: Sequence[Path]) -> list[_Contender]:
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ConfigurationError("--bundle names the same bundle twice")
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    found = [
        _Contender(name, open_bundle(folder)) for name, folder in zip(names, folders, strict=True)
    ]
    for other in found[1:]:
        refuse_other_policy(found[0].bundle, other.bundle)
    return found


def _inputs(args: argparse.Namespace, bundles: Sequence[Bundle]) -> FrozenInputs:
    if args.inputs is not None:
        inputs = read_inputs(args.inputs)
    else:
        known = instructions_of(bundles)
        with_bank = any(bundle.manifest.prompts is not None for bundle in bundles)
        if with_bank and not known:
            raise ConfigurationError(
                "the bundles' prompt banks have no instruction in common; add one to each: "
                "groot-int8 add-instruction"
            )
        instruction = known[0] if known else _INSTRUCTION
        inputs = generate_inputs(bundles[0], instruction, INPUTS, args.seed)
    for bundle in bundles:
        refuse_other_robot(inputs, bundle)
    return inputs


def _timed(
    args: argparse.Namespace, contenders: Sequence[_Contender], inputs: FrozenInputs
) -> tuple[list[Times], list[GraphRuns]]:
    """Return each contender's times and, to profile it, what its graphs are fed."""
    with contextlib.ExitStack() as stack:
        policies: list[Policy] = []
        for one in contenders:
            policy = Policy.load(
                one.bundle.folder,
                engine=args.engine,
                threads=args.threads,
                int8_kernels=args.int8_kernels,
                # Compared when the bundle was opened.
                verify_hashes=args.engine == "tensorrt",
            )
            stack.callback(policy.close)
            policies.append(policy)
        answers = [_answer(policy) for policy in policies]
        times = run_interleaved(answers, inputs, rounds=args.rounds, warmup=args.warmup)
        fed = [
            record_runs(policy, inputs.observations[0], inputs.noise[0])
            for policy in policies
            if args.profile
        ]
        return times, fed


def _answer(policy: Policy) -> Answer:
    def answer(observation: Observation, noise: Float32Array) -> ActionChunk:
        return policy.infer(observation, noise=noise)

    return answer


def _heading(args: argparse.Namespace, settings: dict[str, object]) -> str:
    machine = report.machine()
    int8 = ", ".join(machine["int8_instructions"]) or "none: int8 is not faster than float here"
    return (
        f"{machine['processor']}, {machine['cores']} cores, int8 instructions: {int8}\n"
        f"{settings['library']}, {settings['rounds']} rounds after {settings['warmup']} of "
        f"warm-up, {settings['inputs']} inputs in turn\n"
        f"inputs: sha256 {settings['inputs_sha256']}\n"
    )
