"""`groot-int8 cost`: what an observation costs, and what that takes on a device.

Owns: the subcommand. A bundle is counted without torch, so a robot can run it; the table of the
transformations needs torch, and no weights.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from groot_int8_ros.policy.bundle import Bundle, open_bundle
from groot_int8_ros.policy.families import DEPLOYED
from groot_int8_ros.policy.files import atomic_file
from offline_tools.arguments import positive_int
from offline_tools.cost import report
from offline_tools.cost.devices import DEVICES, Device, find_device
from offline_tools.cost.onnx_count import count_graph
from offline_tools.cost.prediction import PublishedModel
from offline_tools.cost.work import GraphWork, as_int8, observation, total, with_row_maxima
from offline_tools.engine.profiles import lengths_of

if TYPE_CHECKING:
    from offline_tools.cost.stages import Line, Setup
    from offline_tools.model.configuration import ModelConfig

# Graphs of the reference family that every denoising step runs again.
_EVERY_STEP = ("action_encoder", "dit", "action_decoder")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's options."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--bundle", type=Path, help="count the graphs of a bundle")
    what.add_argument(
        "--checkpoint", type=Path, help="count every transformation at a checkpoint's sizes"
    )
    what.add_argument("--size", choices=["full"], help="the same at the public model's sizes")
    parser.add_argument("--eagle-config", type=Path, help="as it was given to export")
    parser.add_argument(
        "--device",
        action="append",
        default=[],
        metavar="NAME[:MODE]",
        help="predict for this device alone, layer kind by layer kind; may be given several "
        "times. Known: "
        + "; ".join(f"{name} ({', '.join(modes)})" for name, modes in DEVICES.items()),
    )
    parser.add_argument("--output", type=Path, help="write the numbers to this JSON file as well")
    setup = parser.add_argument_group("what is counted without a bundle")
    setup.add_argument("--cameras", type=positive_int, default=4, help="default: %(default)s")
    setup.add_argument(
        "--frame-size",
        type=_frame_size,
        default=(576, 640),
        metavar="HxW",
        help="the cameras' frames in pixels (default: 576x640, which the network sees as 252x280)",
    )
    setup.add_argument(
        "--text-tokens",
        type=positive_int,
        default=51,
        help="tokens of the prompt beside the images' (default: %(default)s)",
    )
    setup.add_argument(
        "--denoising-steps", type=int, choices=(1, 2, 4), default=2, help="default: %(default)s"
    )


def run(args: argparse.Namespace) -> int:
    """Print the tables."""
    devices = [find_device(*name.split(":", 1)) for name in args.device] or [
        device for modes in DEVICES.values() for device in modes.values()
    ]
    model = PublishedModel()
    content = _of_bundle(args, model, devices) if args.bundle else _of_size(args, model, devices)
    print()
    for line in report.model_text(model):
        print(line)
    if args.output:
        with atomic_file(args.output) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0


def count_bundle(bundle: Bundle) -> list[GraphWork]:
    """Count the graphs that a robot runs for one observation.

    Raises:
        BundleError: A graph cannot be read.
    """
    manifest = bundle.manifest
    lengths = {axis: best for axis, (_, best, _) in lengths_of(bundle).axes.items()}
    repeated = () if manifest.family == DEPLOYED else _EVERY_STEP
    return [
        count_graph(
            bundle.graph_path(name),
            name,
            manifest.denoising_steps if name in repeated else 1,
            lengths,
        )
        for name in manifest.engine_graphs
    ]


def _of_bundle(
    args: argparse.Namespace, model: PublishedModel, devices: list[Device]
) -> dict[str, Any]:
    bundle = open_bundle(args.bundle, verify_hashes=False)
    graphs = count_bundle(bundle)
    manifest = bundle.manifest
    is_float32 = manifest.graphs["backbone"].precision == "fp32"
    devices = [] if is_float32 else devices
    profiled = _profiled(args, devices)
    print(f"{args.bundle}: {manifest.family} graphs, {manifest.denoising_steps} denoising steps")
    for line in report.graph_table(graphs, model, profiled):
        print(line)
    print()
    if is_float32:
        print("no prediction: the graphs are FP32, and the engines it is fitted to run in FP16")
    else:
        for line in report.prediction_table(model, {"this bundle": graphs}, devices):
            print(line)
    return {
        "bundle": str(args.bundle),
        "graphs": report.graphs_json(graphs, model, profiled),
        "predicted": report.predictions_json(model, graphs, devices),
    }


def _of_size(
    args: argparse.Namespace, model: PublishedModel, devices: list[Device]
) -> dict[str, Any]:
    from offline_tools.cost.stages import Setup, cost_lines  # needs torch

    setup = Setup(args.cameras, args.frame_size, args.text_tokens, args.denoising_steps)
    lines = cost_lines(_sizes(args), setup)
    _print_lines(lines, setup)
    last = lines[-1]
    quantised = [as_int8(graph) for graph in last.graphs]
    print("\nafter the last transformation, with every layer that may be in INT8")
    profiled = _profiled(args, devices)
    for line in report.graph_table(quantised, model, profiled):
        print(line)
    columns = {
        "reference, FP16": list(lines[0].graphs),
        "deployed, FP16": list(last.graphs),
        "deployed, INT8": quantised,
        "deployed, INT8 row": [with_row_maxima(graph) for graph in quantised],
    }
    print()
    for line in report.prediction_table(model, columns, devices):
        print(line)
    return {
        "transformations": {
            line.name: {
                "backbone": report.sums_json(line.backbone),
                "action_head": report.sums_json(line.head),
            }
            for line in lines
        },
        "deployed, INT8": report.graphs_json(quantised, model, profiled),
        "predicted": {
            name: report.predictions_json(model, graphs, devices)
            for name, graphs in columns.items()
        },
    }


def _profiled(args: argparse.Namespace, devices: list[Device]) -> list[Device]:
    """Return whose times are split by kinds of layers: those that were named, or the first."""
    return devices if args.device else devices[:1]


def _sizes(args: argparse.Namespace) -> ModelConfig:
    from offline_tools.demo.random_checkpoint import SIZES
    from offline_tools.model.configuration import load_model_config

    if args.checkpoint is None:
        return SIZES[args.size]
    config, notes = load_model_config(args.checkpoint, args.eagle_config)
    for note in notes:
        print(f"note: {note}")
    return config


def _print_lines(lines: list[Line], setup: Setup) -> None:
    height, width = setup.frame
    print(
        f"{setup.cameras} cameras {height}x{width}, {setup.text_tokens} text tokens, "
        f"{setup.steps} denoising steps, {setup.precision}; for one observation"
    )
    print(
        f"{'after':24}{'head GFLOP':>11}{'fewer':>8}{'all GFLOP':>11}{'fewer':>8}"
        f"{'stored MB':>11}{'weights MB':>12}{'activ. MB':>11}{'launches':>10}{'graphs':>8}"
    )
    first_head = total(observation(lines[0].head)).flops
    first = total(observation(lines[0].graphs)).flops
    for line in lines:
        head, everything = total(observation(line.head)), total(observation(line.graphs))
        print(
            f"{line.name:24}{head.flops / 1e9:>11.2f}{first_head / head.flops:>7.2f}x"
            f"{everything.flops / 1e9:>11.2f}{first / everything.flops:>7.2f}x"
            f"{report.stored(line.graphs) / 1e6:>11.1f}{everything.weight_bytes / 1e6:>12.1f}"
            f"{everything.activation_bytes / 1e6:>11.1f}{everything.launches:>10}"
            f"{sum(graph.runs for graph in line.graphs):>8}"
        )


def _frame_size(text: str) -> tuple[int, int]:
    height, separator, width = text.partition("x")
    if not separator or not height.isdecimal() or not width.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH, such as 480x640")
    return int(height), int(width)
