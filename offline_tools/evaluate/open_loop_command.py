"""`groot-int8 open-loop`: trajectories predicted against recorded, float against INT8.

Owns: the subcommand, its report and its tables. Must not import torch unless `--checkpoint` asks
for the checkpoint's own answers: a robot evaluates its engines with this command.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from groot_int8_ros.errors import ConfigurationError
from groot_int8_ros.policy.bundle import Bundle, open_bundle
from groot_int8_ros.policy.engines import ENGINE_KINDS
from groot_int8_ros.policy.files import atomic_directory, refuse_occupied
from groot_int8_ros.policy.policy import DEFAULT_SEED, Policy
from groot_int8_ros.policy.types import Float64Array
from offline_tools.arguments import not_negative_int, positive_int
from offline_tools.arguments import seed as seed_type
from offline_tools.evaluate.action_metrics import ActionErrors, action_errors
from offline_tools.evaluate.open_loop import (
    DEFAULT_STEPS,
    PYTORCH_BFLOAT16,
    Answers,
    RecordedErrors,
    Trajectory,
    answer,
    plan_trajectories,
    predicted_actions,
    recorded_errors,
)
from offline_tools.evaluate.same_policy import refuse_other_policy

REPORT_FILE = "open_loop.json"
REPORT_FOLDER = "reports/open_loop"
STAGES = ("preprocess", "backbone", "action_head", "postprocess", "total")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's options."""
    add = parser.add_argument
    add(
        "--bundle",
        type=Path,
        nargs="+",
        required=True,
        help="bundles to evaluate, forms of one policy such as float and INT8, on the same frames "
        "and noise; the others are judged by the first",
    )
    add("--dataset", type=Path, required=True, help="LeRobot dataset with recorded actions")
    add(
        "--traj-ids",
        type=not_negative_int,
        nargs="+",
        default=[0],
        metavar="ID",
        help="episodes to evaluate (default: 0)",
    )
    add(
        "--steps",
        type=positive_int,
        default=DEFAULT_STEPS,
        help="frames of an episode to evaluate at most (default: %(default)s)",
    )
    add(
        "--action-horizon",
        type=positive_int,
        metavar="N",
        help="frames between two chunks (default: the whole chunk)",
    )
    add(
        "--denoising-steps",
        type=positive_int,
        metavar="N",
        help="Euler steps (default: those of each bundle)",
    )
    add(
        "--engine",
        choices=ENGINE_KINDS,
        nargs="+",
        default=["onnxruntime"],
        help="one for all bundles, or one for each (default: onnxruntime)",
    )
    add(
        "--checkpoint",
        type=Path,
        help="answer with this checkpoint in PyTorch too, in float32, which all others are then "
        "judged by, and in bfloat16",
    )
    add("--eagle-config", type=Path, help="as it was given to export")
    add("--instruction-key", help="annotation of the dataset with the instructions")
    add("--seed", type=seed_type, default=DEFAULT_SEED, help="of the noise (default: %(default)s)")
    add(
        "--warmup",
        type=not_negative_int,
        default=1,
        metavar="N",
        help="first answers of a bundle that the latencies leave out (default: %(default)s)",
    )
    add("--threads", type=positive_int, help="CPU threads of ONNX Runtime (default: its choice)")
    add(
        "--output",
        type=Path,
        help=f"folder for report and pictures (default: {REPORT_FOLDER} in the first bundle)",
    )


@dataclass(frozen=True)
class _Candidate:
    """A bundle, the engine that runs it, and what the two are called."""

    bundle: Bundle
    engine: str
    name: str


@dataclass(frozen=True)
class _Judged:
    """One policy's answers and everything that was found out about them.

    `recorded` and `predicted` have an entry a trajectory; the first policy of a run has no
    `reference` and no `errors`. `times_bfloat16` is its relative L2 over that of PyTorch in
    bfloat16, where that has answered.
    """

    answers: Answers
    recorded: tuple[RecordedErrors, ...]
    predicted: tuple[Mapping[str, Float64Array], ...]
    reference: str | None
    errors: ActionErrors | None
    times_bfloat16: float | None
    latency_ms: Mapping[str, Mapping[str, float]]

    def mean(self, figure: str) -> float:
        """Return `mse` or `mae` averaged over the trajectories, as the public script does."""
        return float(np.mean([getattr(errors, figure) for errors in self.recorded]))

    def joints(self) -> list[dict[str, Any]]:
        """Return each joint's errors, averaged over the trajectories."""
        return [
            {
                "key": same[0].key,
                "joint": same[0].joint,
                "unit": same[0].unit,
                "mse": float(np.mean([one.mse for one in same])),
                "mae": float(np.mean([one.mae for one in same])),
            }
            for same in zip(*(errors.joints for errors in self.recorded), strict=True)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the predictions as JSON values."""
        return {
            "name": self.answers.name,
            "runs_on": self.answers.runs_on,
            "denoising_steps": self.answers.denoising_steps,
            "recorded": {
                "mse": self.mean("mse"),
                "mae": self.mean("mae"),
                "joints": self.joints(),
                "trajectories": [asdict(errors) for errors in self.recorded],
            },
            "against": None
            if self.errors is None
            else {
                "reference": self.reference,
                "times_bfloat16": self.times_bfloat16,
                **self.errors.to_dict(),
            },
            "latency_ms": self.latency_ms,
        }


def run(args: argparse.Namespace) -> int:
    """Evaluate, print the tables, write the report and a picture a trajectory."""
    output: Path = args.output or args.bundle[0] / REPORT_FOLDER
    candidates = _candidates(args.bundle, args.engine)
    first = candidates[0].bundle
    refuse_occupied(output, marker=REPORT_FILE, what="an open-loop report", replace=True)
    trajectories = plan_trajectories(
        first,
        args.dataset,
        args.traj_ids,
        action_horizon=args.action_horizon,
        steps=args.steps,
        instruction_key=args.instruction_key,
    )
    for trajectory in trajectories:
        print(
            f"trajectory {trajectory.episode.index}: {trajectory.frames} of "
            f"{len(trajectory.episode)} frames, {len(trajectory.starts)} chunks",
            flush=True,
        )
    judged = _judge(first, trajectories, _answers(args, candidates, trajectories), args.warmup)
    _print(judged)
    with atomic_directory(output) as folder:
        report = {
            "schema_version": 1,
            "dataset": args.dataset.resolve().name,
            "seed": args.seed,
            "trajectories": [
                {
                    "id": trajectory.episode.index,
                    "frames": trajectory.frames,
                    "asked_at": trajectory.starts,
                }
                for trajectory in trajectories
            ],
            "policies": [one.to_dict() for one in judged],
        }
        text = json.dumps(report, indent=1, allow_nan=False) + "\n"
        (folder / REPORT_FILE).write_text(text, encoding="utf-8")
        drawn = _draw(folder, first, trajectories, judged)
    print(f"\nreport{' and pictures' if drawn else ''}: {output}")
    return 0


def _candidates(folders: Sequence[Path], engines: Sequence[str]) -> list[_Candidate]:
    """Pair bundles with engines and open them, or refuse what cannot be compared."""
    if len(engines) not in (1, len(folders)):
        raise ConfigurationError(
            f"--engine names {len(engines)} engines for {len(folders)} bundles: give one for all, "
            "or one for each"
        )
    kinds = list(engines) * (len(folders) if len(engines) == 1 else 1)
    pairs = [(folder.resolve(), kind) for folder, kind in zip(folders, kinds, strict=True)]
    names = [folder.name for folder, _ in pairs]
    if len(set(names)) < len(names):
        names = [f"{folder} on {kind}" for folder, (_, kind) in zip(folders, pairs, strict=True)]
    if len(set(pairs)) < len(pairs):
        raise ConfigurationError(
            "--bundle names the same bundle twice for the same engine: its answers are the same"
        )
    found: list[_Candidate] = []
    for folder, kind, name in zip(folders, kinds, names, strict=True):
        bundle = open_bundle(folder)
        if found:
            refuse_other_policy(found[0].bundle, bundle)
        found.append(_Candidate(bundle, kind, name))
    return found


def _answers(
    args: argparse.Namespace, candidates: Sequence[_Candidate], trajectories: Sequence[Trajectory]
) -> list[Answers]:
    found: list[Answers] = []
    if args.checkpoint is not None:
        from offline_tools.evaluate.torch_answers import torch_answers

        found += torch_answers(
            candidates[0].bundle,
            args.checkpoint,
            args.eagle_config,
            trajectories,
            seed=args.seed,
            denoising_steps=args.denoising_steps,
        )
        print("PyTorch: answered", flush=True)
    for one in candidates:
        # One at a time: two forms of a model of true size need not fit side by side.
        policy = Policy.load(
            one.bundle.folder,
            engine=one.engine,
            threads=args.threads,
            # `open_bundle` has compared the bundle's own files; TensorRT's engines lie beside.
            verify_hashes=one.engine == "tensorrt",
            denoising_steps=args.denoising_steps,
        )
        try:
            found.append(answer(policy, one.name, one.engine, trajectories, args.seed))
        finally:
            policy.close()
        print(f"{one.name}: answered", flush=True)
    return found


def _judge(
    bundle: Bundle, trajectories: Sequence[Trajectory], answers: Sequence[Answers], warmup: int
) -> list[_Judged]:
    robot, processor = bundle.manifest.robot, bundle.processor
    states = [state for trajectory in trajectories for state in trajectory.states()]
    reference, bfloat16 = answers[0], None
    judged = []
    for one in answers:
        chunks = iter(one.action_pred)
        predicted = tuple(
            predicted_actions(processor, trajectory, [next(chunks) for _ in trajectory.starts])
            for trajectory in trajectories
        )
        recorded = tuple(
            recorded_errors(robot, trajectory, lines)
            for trajectory, lines in zip(trajectories, predicted, strict=True)
        )
        errors = None
        if one is not reference:
            errors = action_errors(
                processor, robot, reference.action_pred, one.action_pred, states
            )
        if one.name == PYTORCH_BFLOAT16:
            bfloat16 = errors
        judged.append(
            _Judged(
                answers=one,
                recorded=recorded,
                predicted=predicted,
                reference=reference.name if errors else None,
                errors=errors,
                times_bfloat16=(
                    errors.relative_l2 / bfloat16.relative_l2 if errors and bfloat16 else None
                ),
                latency_ms=_latency_ms(one, warmup),
            )
        )
    return judged


def _latency_ms(answers: Answers, warmup: int) -> dict[str, dict[str, float]]:
    """Return each stage's median and 99th percentile; nothing if all was warm-up."""
    timings = answers.timings_s[warmup:]
    if not timings:
        return {}
    times_ms = {stage: [one[stage] * 1e3 for one in timings] for stage in STAGES}
    return {
        stage: {
            "median": float(np.median(values)),
            "p99": float(np.percentile(values, 99)),
            "answers": len(values),
        }
        for stage, values in times_ms.items()
    }


def _draw(
    folder: Path, bundle: Bundle, trajectories: Sequence[Trajectory], judged: Sequence[_Judged]
) -> bool:
    # A robot has no use for matplotlib; a user who wants pictures is told how.
    if importlib.util.find_spec("matplotlib") is None:
        print("\nno picture: matplotlib is not installed (pip install '.[offline]')")
        return False
    from offline_tools.evaluate.open_loop_picture import draw_trajectory

    for number, trajectory in enumerate(trajectories):
        draw_trajectory(
            folder / f"trajectory_{trajectory.episode.index}.png",
            bundle.manifest.robot,
            trajectory,
            {one.answers.name: one.predicted[number] for one in judged},
        )
    return True


def _print(judged: Sequence[_Judged]) -> None:
    width = max(len(one.answers.name) for one in judged)
    print("\npredicted against recorded actions, mean over frames and joints, policy units:")
    print(f"{'':{width}} {'MSE':>11} {'MAE':>11}")
    for one in judged:
        setting = f"{one.answers.runs_on}; {one.answers.denoising_steps} denoising steps"
        print(
            f"{one.answers.name:{width}} {one.mean('mse'):11.5g} {one.mean('mae'):11.5g}  "
            f"({setting})"
        )
    _print_joints(judged)
    for one in judged:
        if one.errors is not None:
            _print_errors(one.answers.name, str(one.reference), one.errors, one.times_bfloat16)
    _print_latency([one for one in judged if one.answers.timings_s])


def _print_joints(judged: Sequence[_Judged]) -> None:
    rows = list(zip(*(one.joints() for one in judged), strict=True))
    labels = [f"{row[0]['key']}: {row[0]['joint']} ({row[0]['unit']})" for row in rows]
    width = max(map(len, labels))
    print("\nof each joint, MSE / MAE, policy units:")
    for index, one in enumerate(judged):
        print(f"{'':{width}}   [{index}] {one.answers.name}")
    print(f"{'':{width}} " + " ".join(f"{f'[{index}]':>23}" for index in range(len(judged))))
    for label, row in zip(labels, rows, strict=True):
        cells = (f"{cell['mse']:10.4g} / {cell['mae']:10.4g}" for cell in row)
        print(f"{label:{width}} " + " ".join(cells))


def _print_errors(
    name: str, reference: str, errors: ActionErrors, times_bfloat16: float | None
) -> None:
    print(f"\n{name} against {reference}, {errors.samples} chunks from the same noise:")
    print(
        f"  cosine {errors.cosine:.7f}, relative L2 {100 * errors.relative_l2:.4f} % "
        f"(worst chunk {100 * errors.worst_relative_l2:.4f} %)"
    )
    if times_bfloat16 is not None:
        print(f"  {times_bfloat16:.2f} times what bfloat16 costs")
    for unit, one in errors.by_unit.items():
        print(
            f"  joints in {unit}: p99 {one.p99:.4g}, max {one.maximum:.4g}, "
            f"jerk x {one.jerk_ratio:.4f}"
        )


def _print_latency(timed: Sequence[_Judged]) -> None:
    print("\nlatency on this machine, ms, median / 99th percentile:")
    for one in timed:
        if not one.latency_ms:
            print(
                f"{one.answers.name}: no figure, all {len(one.answers.timings_s)} answers were "
                "warm-up (see --warmup)"
            )
            continue
        print(f"{one.answers.name}, {one.latency_ms['total']['answers']} answers:")
        for stage, cell in one.latency_ms.items():
            print(f"  {stage:12} {cell['median']:9.2f} / {cell['p99']:9.2f}")
