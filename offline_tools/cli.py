"""The command `groot-int8`: one subcommand for each step.

Owns: the table of subcommands, exit codes and how an error reaches the user. Must not import
torch, rclpy or any step at import time: a subcommand's module is imported when it is asked for,
so the steps that a robot needs run on a machine without torch.

Exit codes: 0 done; 1 a check found that something is not right; 2 the input, the options or the
machine need a change, said in one message; 130 interrupted (SIGINT); 141 nobody reads the output
any more (SIGPIPE); 143 terminated (SIGTERM).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

from groot_int8_ros import __version__
from groot_int8_ros.errors import GrootError

EXIT_CHECK_FAILED = 1
EXIT_USER_ERROR = 2
# A step that a signal ended returns this plus the signal's number, as shells do.
EXIT_SIGNALLED = 128

_RESEND_AFTER_S = 0.05

# Subcommand -> (module, one line of help), in the order in which a user meets them.
SUBCOMMANDS: dict[str, tuple[str, str]] = {
    "parity": (
        "offline_tools.parity.command",
        "compare the model with recorded reference tensors at every boundary",
    ),
    "export": ("offline_tools.export.command", "write a bundle from a checkpoint"),
    "add-instruction": (
        "offline_tools.export.add_instruction",
        "put further instructions into a bundle of deployed graphs",
    ),
    "verify": ("offline_tools.verify.command", "compare PyTorch and ONNX Runtime on a bundle"),
    "calibrate": (
        "offline_tools.calibration.command",
        "capture calibration data from a dataset, a bag or a robot's recorder",
    ),
    "calibration-data": (
        "offline_tools.calibration.data_command",
        "report on calibration data; exchange it with the first public INT8 port",
    ),
    "quantize": (
        "offline_tools.quantize.command",
        "write an INT8 bundle from a float one and captured inputs",
    ),
    "pipeline": (
        "offline_tools.pipeline.command",
        "all steps from a checkpoint to an audited INT8 bundle, skipping what is up to date",
    ),
    "build-check": (
        "offline_tools.engine.check_command",
        "parse and build a bundle's graphs with TensorRT-RTX, which needs no GPU",
    ),
    "build": (
        "offline_tools.engine.build_command",
        "build a bundle's TensorRT engines on the device that will run them",
    ),
    "doctor": (
        "offline_tools.doctor.command",
        "check a running system: topics, frames, joints, clock, bundle, engine, memory, nodes",
    ),
    "verify-engines": (
        "offline_tools.verify.engines_command",
        "compare a bundle's TensorRT engines with its graphs on ONNX Runtime, on the device",
    ),
    "audit": (
        "offline_tools.engine.audit_command",
        "say of each layer whether it is INT8, from the built engine or from the graph",
    ),
    "gpu-proof": (
        "offline_tools.engine.gpu_proof",
        "build, run, compare, audit and time engines of every kind on the GPU here",
    ),
    "compare-quantization": (
        "offline_tools.compare_quantization.command",
        "measure quantisation schemes against each other, on models with and without outliers",
    ),
    "compare-calibration": (
        "offline_tools.compare_calibration.command",
        "measure what size and gaps of the calibration set do to the INT8 policy",
    ),
    "cost": (
        "offline_tools.cost.command",
        "count what an observation costs, and predict its time on a device",
    ),
    "open-loop": (
        "offline_tools.evaluate.open_loop_command",
        "evaluate recorded trajectories: predicted against recorded, float against INT8",
    ),
    "executor-params": (
        "offline_tools.executor_params.command",
        "begin the chunk executor's parameter file from a bundle",
    ),
    "chunk-replay": (
        "offline_tools.replay.command",
        "execute recorded motions with a policy's latency: dead time, seams and jerk",
    ),
    "benchmark": (
        "offline_tools.benchmark.command",
        "time bundles side by side on the same inputs, and measure their memory",
    ),
    "benchmark-node": (
        "offline_tools.benchmark.node_command",
        "measure what the node costs beside the engines, from a camera's message on",
    ),
    "soak": (
        "offline_tools.soak.command",
        "run policy node and executor for half an hour at full camera load",
    ),
    "benchmark-torch": (
        "offline_tools.benchmark.torch_command",
        "time reference and deployed graphs in PyTorch with CUDA graphs, on a GPU",
    ),
    "episode-to-bag": (
        "offline_tools.bags.episode_to_bag",
        "turn a LeRobot v2.1 episode into a rosbag2",
    ),
    "play-bag": ("offline_tools.bags.play_bag", "publish a rosbag2 through rclpy, with /clock"),
    "measure-dds": (
        "offline_tools.measure_dds.command",
        "count the camera frames that arrive whole between processes, for each transport",
    ),
    "make-dataset": ("offline_tools.demo.make_dataset", "generate episodes of an arm"),
    "make-sim-dataset": (
        "offline_tools.simulation.dataset_command",
        "record the scripted expert of the simulated robot",
    ),
    "make-checkpoint": (
        "offline_tools.demo.make_checkpoint",
        "generate an N1.6-shaped checkpoint with random weights for a dataset's robot",
    ),
    "simulate": (
        "offline_tools.simulation.simulate_command",
        "the simulated robot as a ROS 2 process: cameras and joint states out, commands in",
    ),
    "closed-loop": (
        "offline_tools.closed_loop.command",
        "let a bundle do its task on the simulated robot, and count how often it does",
    ),
    "compare-closed-loop": (
        "offline_tools.compare_closed_loop.command",
        "compare engines, steps, latencies and seams in the closed loop, with paired tests",
    ),
    "train-small": (
        "offline_tools.training.command",
        "train a small policy of N1.6's architecture on the simulated robot",
    ),
    "add-outliers": (
        "offline_tools.compare_quantization.add_outliers",
        "copy a checkpoint and give it the activation outliers of a real one",
    ),
    "demo": ("offline_tools.demo.command", "from the shipped policy to a simulated robot in INT8"),
}


class Subcommand(Protocol):
    """What a subcommand's module provides."""

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the subcommand's options."""

    def run(self, args: argparse.Namespace) -> int:
        """Do the step and return the exit code."""


@dataclass
class _StopRequest:
    """Which signal asked the step to stop, if one did."""

    number: int | None = None


@contextlib.contextmanager
def _unwinding_on_signals() -> Iterator[_StopRequest]:
    """Let SIGINT, SIGTERM and SIGHUP unwind the step where it stands, so that it cleans up."""
    request = _StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # Python delivers signals to the main thread alone
        return

    def stop(number: int, _frame: object) -> None:
        request.number = number
        raise KeyboardInterrupt

    # Python drops what is raised in a `__del__` or a weak reference's callback, of which torch has
    # many: an interrupt that lands there is sent again.
    main_thread = threading.main_thread().ident
    report = sys.unraisablehook
    resent: list[threading.Timer] = []

    def resend(dropped: sys.UnraisableHookArgs) -> None:
        if request.number is None or not issubclass(dropped.exc_type, KeyboardInterrupt):
            report(dropped)
            return
        timer = threading.Timer(
            _RESEND_AFTER_S, signal.pthread_kill, (main_thread, request.number)
        )
        resent.append(timer)
        timer.start()

    previous = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            previous[number] = signal.signal(number, stop)
    sys.unraisablehook = resend
    try:
        yield request
    finally:
        for timer in resent:
            timer.cancel()
        sys.unraisablehook = report
        for number, handler in previous.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _overview() -> str:
    width = max(map(len, SUBCOMMANDS))
    lines = [f"  {name:{width}}  {text}" for name, (_, text) in SUBCOMMANDS.items()]
    return "subcommands:\n" + "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return the process's exit code.

    Args:
        argv: Arguments without the program's name; the process's own if None.
    """
    try:
        try:
            return _main(sys.argv[1:] if argv is None else list(argv))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # As in `groot-int8 verify … | head`. What is still buffered goes nowhere, or the
        # interpreter would complain about it at its end.
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)
        return EXIT_SIGNALLED + signal.SIGPIPE


def _main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="groot-int8",
        description="GR00T N1.6 on a Jetson: from a checkpoint to a bundle that the robot runs.",
        epilog=_overview() + "\n\n`groot-int8 SUBCOMMAND --help` shows a step's options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("subcommand", metavar="SUBCOMMAND", choices=list(SUBCOMMANDS))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    if not words:
        parser.print_help(sys.stderr)
        return EXIT_USER_ERROR
    chosen = parser.parse_args(words)

    with _unwinding_on_signals() as request:
        try:
            return _run_step(chosen.subcommand, chosen.arguments)
        except (Exception, KeyboardInterrupt) as error:
            # Torch's exporter turns an interrupt into an error of its own, so it is the signal
            # that tells, not the type.
            number = request.number
            if number is None and isinstance(error, KeyboardInterrupt):
                number = signal.SIGINT
            if number is None:
                return _explain(error)
            what = "terminated" if number == signal.SIGTERM else "interrupted"
            print(f"groot-int8: {what}; nothing half-written was kept.", file=sys.stderr)
            return EXIT_SIGNALLED + number


def _run_step(name: str, arguments: Sequence[str]) -> int:
    module_name, help_text = SUBCOMMANDS[name]
    module = cast("Subcommand", importlib.import_module(module_name))
    step = argparse.ArgumentParser(prog=f"groot-int8 {name}", description=help_text)
    module.configure(step)
    return module.run(step.parse_args(arguments))


def _explain(error: BaseException) -> int:
    """Print what the user can mend and return the exit code; raise anything else again."""
    if isinstance(error, GrootError):
        print(f"groot-int8: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    own = {"groot_int8_ros", "offline_tools"}
    if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] not in own:
        print(
            f"groot-int8: this step needs the Python package '{error.name}', which is not "
            "installed; README.md, 'Install', lists what each step needs.",
            file=sys.stderr,
        )
        return EXIT_USER_ERROR
    if isinstance(error, OSError) and error.filename is not None:
        print(
            f"groot-int8: {error.filename}: {error.strerror}. Check that it is there, its "
            "permissions and the disk, then run the command again.",
            file=sys.stderr,
        )
        return EXIT_USER_ERROR
    raise error


if __name__ == "__main__":
    sys.exit(main())
