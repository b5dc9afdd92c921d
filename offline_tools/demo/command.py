"""`groot-int8 demo`: the whole road on generated data.

Owns: the order of the steps and the table at the end. Everything runs through the same modules as
a user's own data; what is generated are the episode, the robot and the checkpoint's weights.
"""

from __future__ import annotations

import argparse
import importlib.util
import signal
import time
from pathlib import Path

import numpy as np
import yaml

from groot_int8_ros.errors import BundleError
from groot_int8_ros.policy.files import refuse_occupied
from groot_int8_ros.policy.policy import Policy
from offline_tools import cli
from offline_tools.arguments import positive_float, positive_int, seed
from offline_tools.bags.episode_to_bag import BagOptions
from offline_tools.dataset.lerobot import Episode, LeRobotDataset
from offline_tools.demo.arm_dataset import CAMERAS, FPS, JOINTS, write_arm_dataset
from offline_tools.demo.picture import draw_chunks, mean_error
from offline_tools.demo.random_checkpoint import write_random_checkpoint
from offline_tools.evaluate.live_run import LiveRun, run_live
from offline_tools.evaluate.recompute import Recomputed, recompute

# Marks a folder that this command may write into again.
_MARKER = ".groot-int8-demo"
_STAGES = ("read", "preprocess", "backbone", "action_head", "postprocess", "total")
# A chunk crosses DDS as float64 and is computed from radians that were degrees: float32 rounding.
_TOLERANCE = 1e-5


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's options."""
    parser.add_argument(
        "--output", type=Path, default=Path("demo_output"), help="folder (default: %(default)s)"
    )
    parser.add_argument("--seed", type=seed, default=0, help="of data and weights (default: 0)")
    parser.add_argument(
        "--frames",
        type=positive_int,
        default=240,
        help="length of the episode at 30 Hz (default: 240)",
    )
    parser.add_argument(
        "--rate", type=positive_float, default=1.0, help="speed of the bag (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Run every step, print what happened, and fail if a chunk cannot be reproduced."""
    output: Path = args.output
    refuse_occupied(output, marker=_MARKER, what="an output of `groot-int8 demo`", replace=True)
    output.mkdir(parents=True, exist_ok=True)
    (output / _MARKER).write_text("This folder is rewritten by `groot-int8 demo`.\n")
    paths = {name: output / name for name in ("dataset", "checkpoint", "bundle", "bag", "run")}

    _step("1/6 a generated episode and an N1.6-shaped checkpoint with random weights")
    write_arm_dataset(paths["dataset"], episodes=1, frames=args.frames, seed=args.seed)
    dataset = LeRobotDataset.open(paths["dataset"])
    write_random_checkpoint(
        paths["checkpoint"], dataset, seed=args.seed, absolute_keys=("gripper",)
    )
    robot_file = output / "robot.yaml"
    robot_file.write_text(yaml.safe_dump(_robot(), sort_keys=False), encoding="utf-8")

    _step("2/6 export")
    bundle, checkpoint = str(paths["bundle"]), str(paths["checkpoint"])
    _must_pass(
        "export",
        *("--checkpoint", checkpoint, "--robot", str(robot_file), "--bundle", bundle),
        *("--precision", "fp32", "--denoising-steps", "2", "--force"),
    )

    _step("3/6 verify: ONNX Runtime against PyTorch, and TensorRT-RTX's parser and builder")
    _must_pass(
        "verify",
        *("--bundle", bundle, "--checkpoint", checkpoint, "--dataset", str(paths["dataset"])),
    )
    if importlib.util.find_spec("tensorrt_rtx"):
        _must_pass("build-check", "--bundle", bundle)
    else:
        print("TensorRT-RTX is not installed: its build is left out (pip install '.[rtx]')")

    _step("4/6 the episode as a rosbag2")
    options = BagOptions()
    _must_pass(
        "episode-to-bag",
        *("--dataset", str(paths["dataset"]), "--episode", "0", "--bundle", bundle),
        *("--output", str(paths["bag"]), "--force"),
    )

    _step("5/6 policy_node in a process of its own, the bag played to it over DDS")
    live = run_live(
        paths["bag"],
        {"bundle": bundle, "inference_rate_hz": 5.0},
        paths["run"],
        rate=args.rate,
    )

    _step("6/6 what happened")
    episode = dataset.episode(0)
    policy = Policy.load(paths["bundle"], verify_hashes=False)
    results = recompute(policy, episode, options.start_time_ns, live.chunks)
    _print_table(live, results, policy, episode)
    draw_chunks(output / "predicted_vs_recorded.png", policy, episode, results)
    policy.close()
    print(f"\npicture: {output / 'predicted_vs_recorded.png'}")
    if not results:
        print("FAIL: the node published no chunk; the diagnostics above say why")
        return cli.EXIT_CHECK_FAILED
    if not all(result.max_error <= _TOLERANCE for result in results):
        print(f"FAIL: a published chunk is not within {_TOLERANCE} of Policy.infer")
        return cli.EXIT_CHECK_FAILED
    print("PASS")
    return 0


def _robot() -> dict[str, object]:
    arm = [{"name": name, "unit": "degrees"} for name in JOINTS["single_arm"]]
    gripper = [{"name": name} for name in JOINTS["gripper"]]
    return {
        "action_period_s": 1.0 / FPS,
        "cameras": {
            key: {"width": width, "height": height} for key, (height, width) in CAMERAS.items()
        },
        "state_joints": {"single_arm": arm, "gripper": gripper},
    }


def _step(title: str) -> None:
    print(f"\n== {title}", flush=True)


def _must_pass(*arguments: str) -> None:
    start = time.perf_counter()
    print(f"$ groot-int8 {' '.join(arguments)}", flush=True)
    code = cli.main(arguments)
    if code == cli.EXIT_SIGNALLED + signal.SIGPIPE:
        raise BrokenPipeError
    if code >= cli.EXIT_SIGNALLED:
        raise KeyboardInterrupt
    if code != 0:
        raise BundleError(f"`groot-int8 {arguments[0]}` failed; see above")
    print(f"  {time.perf_counter() - start:.1f} s")


def _print_table(
    live: LiveRun, results: list[Recomputed], policy: Policy, episode: Episode
) -> None:
    rows = [
        ("chunks published", f"{len(live.chunks)}"),
        ("rate", f"{len(live.chunks) / live.wall_s:.2f} chunks/s"),
        (
            "chunk",
            f"{policy.processor.action_steps} steps x "
            f"{sum(map(len, policy.robot.action_joints.values()))} joints, "
            f"{policy.manifest.denoising_steps} denoising steps",
        ),
        ("node's peak memory", f"{live.node_peak_bytes / 1e6:.0f} MB"),
    ]
    for stage in _STAGES:
        times = [chunk.info["timings_s"][stage] * 1e3 for chunk in live.chunks]
        if times:
            rows.append(
                (
                    f"latency, {stage}",
                    f"median {np.median(times):7.2f} ms   p95 {np.percentile(times, 95):7.2f} ms",
                )
            )
    if results:
        worst = max(result.max_error for result in results)
        rows.append(
            (
                "published against Policy.infer on the same frames",
                f"largest difference {worst:.1e}",
            )
        )
        rows.append(
            (
                "predicted against recorded (random weights: no meaning)",
                f"mean {mean_error(policy, episode, results):.2f} in policy units",
            )
        )
    for name, (level, message) in sorted(live.statuses.items()):
        rows.append((f"diagnostics, {name}", f"level {level}: {message}"))
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        print(f"{name:{width}}  {text}")
