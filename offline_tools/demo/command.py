"""`groot-int8 demo`: the whole road on generated data.

Owns: the order of the steps and the table at the end. Everything runs through the same modules as
a user's own data; what is generated are the episode, the robot and the checkpoint's weights.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import yaml

from groot_int8_ros.policy.bundle import open_bundle
from groot_int8_ros.policy.files import refuse_occupied
from groot_int8_ros.policy.policy import Policy
from offline_tools import cli
from offline_tools.arguments import positive_float, positive_int, seed
from offline_tools.bags.episode_to_bag import BagOptions
from offline_tools.dataset.lerobot import LeRobotDataset
from offline_tools.demo.arm_dataset import CAMERAS, FPS, JOINTS, write_arm_dataset
from offline_tools.demo.picture import draw_chunks
from offline_tools.demo.random_checkpoint import write_random_checkpoint
from offline_tools.evaluate.live_run import LiveRun, run_live
from offline_tools.evaluate.recompute import Recomputed, recompute
from offline_tools.pipeline.step import run_subcommand

# Marks a folder that this command may write into again.
_MARKER = ".groot-int8-demo"
# Observations to calibrate on: few, so that the demonstration is short.
_SAMPLES = 24
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
    paths = {name: output / name for name in ("dataset", "checkpoint", "bundles", "bag", "run")}
    bundles = {kind: paths["bundles"] / kind for kind in ("float", "int8")}

    _step("1/5 a generated episode and an N1.6-shaped checkpoint with random weights")
    write_arm_dataset(paths["dataset"], episodes=1, frames=args.frames, seed=args.seed)
    dataset = LeRobotDataset.open(paths["dataset"])
    write_random_checkpoint(
        paths["checkpoint"], dataset, seed=args.seed, absolute_keys=("gripper",)
    )
    robot_file = output / "robot.yaml"
    robot_file.write_text(yaml.safe_dump(_robot(), sort_keys=False), encoding="utf-8")

    _step("2/5 export, verify, calibrate, quantize, audit")
    run_subcommand(
        "pipeline",
        *("--checkpoint", str(paths["checkpoint"]), "--dataset", str(paths["dataset"])),
        *("--robot", str(robot_file), "--output", str(paths["bundles"])),
        *("--precision", "fp32", "--denoising-steps", "2"),
        *("--samples", str(_SAMPLES), "--seed", str(args.seed), "--refresh"),
    )
    if importlib.util.find_spec("tensorrt_rtx"):
        for bundle in bundles.values():
            run_subcommand("build-check", "--bundle", str(bundle))
    else:
        print("TensorRT-RTX is not installed: its build is left out (pip install '.[rtx]')")

    _step("3/5 the episode as a rosbag2")
    options = BagOptions()
    run_subcommand(
        "episode-to-bag",
        *("--dataset", str(paths["dataset"]), "--episode", "0", "--bundle", str(bundles["int8"])),
        *("--output", str(paths["bag"]), "--force"),
    )

    _step("4/5 policy_node in a process of its own, the bag played to it over DDS")
    lives, results = {}, {}
    episode = dataset.episode(0)
    for kind, bundle in bundles.items():
        lives[kind] = run_live(
            paths["bag"],
            {"bundle": str(bundle), "inference_rate_hz": 5.0},
            paths["run"] / kind,
            rate=args.rate,
        )
        policy = Policy.load(bundle, verify_hashes=False)
        results[kind] = recompute(policy, episode, options.start_time_ns, lives[kind].chunks)
        if kind == "int8":
            draw_chunks(output / "predicted_vs_recorded.png", policy, episode, results[kind])
        policy.close()

    _step("5/5 what happened")
    _print_table(bundles, lives, results)
    print(f"\nreport:  {paths['bundles'] / 'report' / 'report.md'}")
    print(f"picture: {output / 'predicted_vs_recorded.png'}")
    if not all(results.values()):
        print("FAIL: the node published no chunk; the diagnostics above say why")
        return cli.EXIT_CHECK_FAILED
    if not all(one.max_error <= _TOLERANCE for found in results.values() for one in found):
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


def _print_table(
    bundles: Mapping[str, Path],
    lives: Mapping[str, LiveRun],
    results: Mapping[str, Sequence[Recomputed]],
) -> None:
    """Print one column a bundle."""
    audit = json.loads((bundles["int8"].parent / "report" / "report.json").read_text())["audit"]
    int8_layers = sum(found["INT8"] for found in audit.values())
    layers = sum(sum(found.values()) for found in audit.values())
    manifests = {
        kind: open_bundle(folder, verify_hashes=False).manifest for kind, folder in bundles.items()
    }
    records = [graph.quantization for graph in manifests["int8"].graphs.values()]
    int8_errors = next((record.errors for record in records if record), {})
    rows: dict[str, list[str]] = {}
    for kind, live in lives.items():
        errors = int8_errors if kind == "int8" else {}
        size = sum(size for _, size in manifests[kind].files.values())
        worst = max((one.max_error for one in results[kind]), default=float("nan"))
        column = {
            "bundle": f"{size / 1e6:.1f} MB",
            "INT8 layers, by the audit of the ONNX": (
                f"{int8_layers} of {layers}" if errors else "0"
            ),
            "actions off the float bundle's, relative L2": (
                f"{100 * errors['relative_l2']:.3f} %" if errors else "-"
            ),
            **{
                f"  largest, {name.removeprefix('max_error/')} (joint units)": (
                    f"{errors[name]:.4g}" if errors else "-"
                )
                for name in int8_errors
                if name.startswith("max_error/")
            },
            "chunks published": f"{len(live.chunks)}, {len(live.chunks) / live.wall_s:.2f} /s",
            "node's peak memory": f"{live.node_peak_bytes / 1e6:.0f} MB",
            "published against Policy.infer, same frames": f"largest difference {worst:.1e}",
        }
        for stage in _STAGES:
            times = [chunk.info["timings_s"][stage] * 1e3 for chunk in live.chunks]
            column[f"latency, {stage}, median / p95 ms"] = (
                f"{np.median(times):.2f} / {np.percentile(times, 95):.2f}" if times else "-"
            )
        for name, (level, message) in sorted(live.statuses.items()):
            column[f"diagnostics, {name}"] = message if level == 0 else f"{level}: {message}"
        for name, text in column.items():
            rows.setdefault(name, []).append(text)
    width = max(map(len, rows))
    print(f"{'':{width}}  " + "".join(f"{kind:30}" for kind in lives))
    for name, cells in rows.items():
        print(f"{name:{width}}  " + "".join(f"{cell:30}" for cell in cells))
    print(
        "INT8 on this CPU is computed in floating point from the Q/DQ nodes: its latency says "
        "nothing about an INT8 engine."
    )
