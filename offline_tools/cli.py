"""The command `groot-int8`: one subcommand for each step.

Owns: the table of subcommands, exit codes and how an error reaches the user. Must not import
torch, rclpy or any step at import time: a subcommand's module is imported when it is asked for,
so the steps that a robot needs run on a machine without torch.

Exit codes: 0 done; 1 a check found that something is not right; 2 the input, the options or the
machine need a change, said in one message; 130 interrupted (SIGINT); 143 terminated (SIGTERM).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Protocol, cast

from groot_int8_ros import __version__
from groot_int8_ros.errors import GrootError

EXIT_CHECK_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143

# Subcommand -> (module, one line of help), in the order in which a user meets them.
SUBCOMMANDS: dict[str, tuple[str, str]] = {
    "parity": (
        "offline_tools.parity.command",
        "compare the model with recorded reference tensors at every boundary",
    ),
    "export": ("offline_tools.export.command", "write a bundle from a checkpoint"),
    "verify": ("offline_tools.verify.command", "compare PyTorch and ONNX Runtime on a bundle"),
    "build-check": (
        "offline_tools.engine.command",
        "parse and build a bundle's graphs with TensorRT-RTX (no GPU needed) or TensorRT",
    ),
    "episode-to-bag": (
        "offline_tools.bags.episode_to_bag",
        "turn a LeRobot v2.1 episode into a rosbag2",
    ),
    "play-bag": ("offline_tools.bags.play_bag", "publish a rosbag2 through rclpy, with /clock"),
    "make-dataset": ("offline_tools.demo.make_dataset", "generate episodes of an arm"),
    "make-checkpoint": (
        "offline_tools.demo.make_checkpoint",
        "generate an N1.6-shaped checkpoint with random weights for a dataset's robot",
    ),
    "demo": ("offline_tools.demo.command", "run the whole road on generated data"),
}


class Subcommand(Protocol):
    """What a subcommand's module provides."""

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the subcommand's options."""

    def run(self, args: argparse.Namespace) -> int:
        """Do the step and return the exit code."""


class _Terminated(KeyboardInterrupt):
    """SIGTERM, raised where the step stands, so that it cleans up as after Ctrl-C."""


@contextlib.contextmanager
def _unwinding_on_sigterm() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # Python delivers signals to the main thread alone
        return

    def stop(_number: int, _frame: object) -> None:
        raise _Terminated

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous or signal.SIG_DFL)


def _overview() -> str:
    width = max(map(len, SUBCOMMANDS))
    lines = [f"  {name:{width}}  {text}" for name, (_, text) in SUBCOMMANDS.items()]
    return "subcommands:\n" + "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return the process's exit code.

    Args:
        argv: Arguments without the program's name; the process's own if None.
    """
    parser = argparse.ArgumentParser(
        prog="groot-int8",
        description="GR00T N1.6 on a Jetson: from a checkpoint to a bundle that the robot runs.",
        epilog=_overview() + "\n\n`groot-int8 SUBCOMMAND --help` shows a step's options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("subcommand", metavar="SUBCOMMAND", choices=list(SUBCOMMANDS))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    chosen = parser.parse_args(argv)

    module_name, help_text = SUBCOMMANDS[chosen.subcommand]
    try:
        with _unwinding_on_sigterm():
            module = cast("Subcommand", importlib.import_module(module_name))
            step = argparse.ArgumentParser(
                prog=f"groot-int8 {chosen.subcommand}", description=help_text
            )
            module.configure(step)
            return module.run(step.parse_args(chosen.arguments))
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in {"groot_int8_ros", "offline_tools"}:
            raise
        print(
            f"groot-int8: this step needs the Python package '{error.name}', which is not "
            "installed; README.md, 'Install', lists what each step needs.",
            file=sys.stderr,
        )
        return EXIT_USER_ERROR
    except GrootError as error:
        print(f"groot-int8: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except _Terminated:
        print("groot-int8: terminated; nothing half-written was kept.", file=sys.stderr)
        return EXIT_TERMINATED
    except KeyboardInterrupt:
        print("groot-int8: interrupted; nothing half-written was kept.", file=sys.stderr)
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
