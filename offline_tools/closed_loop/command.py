"""`groot-int8 closed-loop`: how often a bundle's policy does its task on the simulated robot.

Owns: the subcommand and its table. An interrupted run goes on where it was; see `results`.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from groot_int8_ros.control.seams import SEAM_KINDS, SeamSettings
from groot_int8_ros.errors import ConfigurationError
from groot_int8_ros.policy.policy import Policy
from groot_int8_ros.policy.types import UInt8Array
from offline_tools.arguments import positive_float, positive_int, seed
from offline_tools.closed_loop.episode import ChunkPolicy, LoopSettings, run_episode
from offline_tools.closed_loop.results import Results, digest_of_model
from offline_tools.closed_loop.statistics import wilson_interval
from offline_tools.simulation.environment import Tabletop
from offline_tools.simulation.film import film_strip
from offline_tools.simulation.robot import robot_description
from offline_tools.simulation.tasks import TASKS, other_task, task_of


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's options."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--bundle", type=Path, help="bundle of the simulated robot")
    source.add_argument(
        "--checkpoint", type=Path, help="a checkpoint of its policy: PyTorch in float32"
    )
    source.add_argument(
        "--node",
        action="store_true",
        help="the running policy_node, over DDS, with /clock stepped (docs/closed_loop.md)",
    )
    parser.add_argument("--episodes", type=positive_int, default=100, help="default: %(default)s")
    parser.add_argument(
        "--first-seed", type=seed, default=0, help="of the scenes (default: %(default)s)"
    )
    parser.add_argument(
        "--wrong-instruction",
        action="store_true",
        help="tell the policy of another cube and plate; success is of the asked task still",
    )
    parser.add_argument("--denoising-steps", type=positive_int, help="default: the bundle's own")
    parser.add_argument(
        "--latency-s", type=float, default=0.0, help="of an inference (default: %(default)s)"
    )
    parser.add_argument(
        "--inference-period-s",
        type=positive_float,
        default=0.2,
        help="from one observation to the next, at least (default: %(default)s)",
    )
    parser.add_argument(
        "--seam",
        choices=SEAM_KINDS,
        default="linear_blend",
        help="from chunk to chunk; rtc needs --bundle (default: %(default)s)",
    )
    parser.add_argument("--seed", type=seed, default=0, help="of the noise (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="file of results, one JSON line an episode")
    parser.add_argument("--film", type=Path, help="picture of the first episode to write")


def run(args: argparse.Namespace) -> int:
    """Run the episodes that the file of results lacks, and print the table."""
    if not 0.0 <= args.latency_s <= 1.0:
        raise ConfigurationError("--latency-s must be from 0 to 1: chunks reach 1.5 s ahead")
    if args.seam == "rtc" and not args.bundle:
        raise ConfigurationError(
            "--seam rtc gives the graphs the rows that are executed meanwhile: it needs --bundle"
        )
    settings = LoopSettings(
        inference_period_s=args.inference_period_s,
        latency_s=args.latency_s,
        seam=SeamSettings(args.seam),
        seed=args.seed,
        stop_at_success=not args.wrong_instruction,
    )
    if args.node and args.output and args.output.exists():
        raise ConfigurationError(
            f"{args.output} exists, and which bundle a node runs is not known here: the results "
            "of two would be mixed. Give another --output."
        )
    with contextlib.ExitStack() as closing:
        policy, setup = _policy(args, closing)
        simulation = Tabletop()
        closing.callback(simulation.close)
        setup = {**setup, "wrong_instruction": args.wrong_instruction, **asdict(settings)}
        results = Results(args.output, setup) if args.output else None
        done = dict(results.episodes) if results else {}
        numbers = range(args.first_seed, args.first_seed + args.episodes)
        for number in numbers:
            if number in done:
                continue
            done[number] = _run_one(args, simulation, policy, number, settings)
            if results:
                results.add(done[number])
    _print([done[number] for number in numbers], args.wrong_instruction)
    return 0


def _run_one(
    args: argparse.Namespace,
    simulation: Tabletop,
    policy: ChunkPolicy,
    number: int,
    settings: LoopSettings,
) -> dict[str, Any]:
    """Run the episode of a seed, whose task follows from it."""
    asked = task_of(number)
    told = other_task(asked, number // len(TASKS)) if args.wrong_instruction else asked
    film: list[Mapping[str, UInt8Array]] = []

    def keep(frames: Mapping[str, UInt8Array]) -> None:
        film.append(frames)

    filmed = args.film is not None and number == args.first_seed
    result = run_episode(
        simulation, policy, number, asked, told, settings, keep if filmed else None
    )
    if filmed:
        film_strip(film).save(args.film)
        print(f"{args.film}: {told.instruction}")
    return {"seed": number, **asdict(result)}


def _policy(
    args: argparse.Namespace, closing: contextlib.ExitStack
) -> tuple[ChunkPolicy, dict[str, Any]]:
    """Return the policy and what tells its results from those of another."""
    if args.bundle:
        policy = Policy.load(args.bundle, denoising_steps=args.denoising_steps)
        closing.callback(policy.close)
        return policy, {
            "bundle": digest_of_model(args.bundle),
            "denoising_steps": policy.manifest.denoising_steps,
        }
    if args.node:
        from offline_tools.closed_loop.ros_policy import NodePolicy

        if args.denoising_steps:
            raise ConfigurationError("--denoising-steps is decided by the node's bundle")
        return closing.enter_context(NodePolicy(robot_description())), {"node": True}
    from offline_tools.closed_loop.torch_policy import TorchPolicy

    torch_policy = TorchPolicy(args.checkpoint, robot_description(), args.denoising_steps)
    return torch_policy, {
        "checkpoint": digest_of_model(args.checkpoint),
        "denoising_steps": torch_policy.denoising_steps,
    }


def _print(results: Sequence[dict[str, Any]], wrong: bool) -> None:
    count = len(results)
    for key, title in (("success", "asked task"), ("told_success", "told task")):
        if key == "told_success" and not wrong:
            continue
        successes = sum(result[key] for result in results)
        low, high = wilson_interval(successes, count)
        print(
            f"{title}: {successes} of {count} episodes, {100 * successes / count:.0f} % "
            f"(95 % interval {100 * low:.0f} to {100 * high:.0f} %)"
        )
    times = [result["time_s"] for result in results if result["success"]]
    if times:
        print(f"time to success: median {np.median(times):.1f} s, longest {max(times):.1f} s")
    print(f"largest step of a command: {max(r['largest_step_rad'] for r in results):.3f} rad")
    print(f"jerk, root mean square: {np.mean([r['jerk_rad_s3'] for r in results]):.1f} rad/s³")
    print(f"held: {sum(r['held_s'] for r in results) / count:.2f} s an episode")
