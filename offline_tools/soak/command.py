"""`groot-int8 soak`: policy node and chunk executor for half an hour at full camera load.

Owns: the processes and the sequence. Both nodes are the real ones, each in its own process, and so
are the cameras, those of `benchmark-node`; the robot stands still whatever it is commanded. It
runs in a ROS domain of its own and commands no robot.

What has to hold at the end: no process has ended; resident memory does not grow faster than
`--max-growth` (judged on runs of more than ten minutes), and neither threads nor open files have
become more; every chunk that the policy node published was accepted or refused by the executor;
within no second did the executor miss more than a fifth of its deadlines; both nodes end with
exit code 0 on SIGTERM.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from groot_int8_ros.errors import ConfigurationError
from groot_int8_ros.policy.bundle import Bundle, open_bundle
from offline_tools.arguments import positive_float
from offline_tools.evaluate.node_processes import LiveRunError, NodeProcess, node_process
from offline_tools.executor_params.command import parameters as executor_parameters
from offline_tools.soak.report import Outcome, faults, lines
from offline_tools.soak.samples import Sample, read_sample

if TYPE_CHECKING:
    from offline_tools.soak.listener import Listener

# Neither the default domain nor one that a robot or another of these commands uses.
_DOMAIN = 88
_STEP_S = 180.0
_SAMPLE_PERIOD_S = 5.0
# Of the whole time, and at most: allocators and caches fill up first.
_WARM_UP_SHARE, _WARM_UP_S = 0.2, 300.0
# Lenient: what a random policy commands is not the matter.
_VELOCITY, _ACCELERATION = 2.0, 20.0


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's options."""
    add = parser.add_argument
    add("--bundle", type=Path, required=True, help="its cameras are published and read")
    add("--minutes", type=positive_float, default=30.0, help="default: %(default)s")
    add("--rate-hz", type=positive_float, default=30.0, help="of a camera (default: %(default)s)")
    add(
        "--inference-rate-hz",
        type=positive_float,
        default=3.0,
        help="chunks a second, about what an Orin NX gives (default: %(default)s)",
    )
    add(
        "--max-growth",
        type=positive_float,
        default=10.0,
        metavar="MB_PER_H",
        help="slope of the resident memory above which it is not flat (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Run both nodes and print what was seen; return 1 where something is not right."""
    bundle = open_bundle(args.bundle, verify_hashes=False)
    os.environ.setdefault("ROS_DOMAIN_ID", str(_DOMAIN))
    try:
        from offline_tools.soak.listener import Listener
    except ImportError as error:
        raise ConfigurationError(
            f"{error}. The nodes need rclpy: source the ROS 2 distribution, or install the extra "
            "`ros`"
        ) from error
    with folder_of_logs() as folder, Listener() as listener:
        outcome = _soak(args, bundle, listener, folder)
    cameras = bundle.manifest.robot.cameras
    sizes = ", ".join(f"{camera.width}x{camera.height}" for camera in cameras)
    print(
        f"\n{args.minutes:g} min, {len(cameras)} cameras ({sizes}) at {args.rate_hz:g} Hz, "
        f"{args.inference_rate_hz:g} chunks a second wanted; load average "
        f"{os.getloadavg()[2]:.1f} on {os.cpu_count()} cores\n"
    )
    print("\n".join(lines(outcome)))
    wrong = list(faults(outcome, args.max_growth))
    print()
    for fault in wrong:
        print(f"NOT OK: {fault}")
    if not wrong:
        print("OK: nothing lost, nothing grown, nothing ended")
    return int(bool(wrong))


@contextlib.contextmanager
def folder_of_logs() -> Iterator[Path]:
    """Make a folder that goes with the block, but stays for an error that names a log in it."""
    folder = Path(tempfile.mkdtemp(prefix="groot_int8_soak_"))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder)
        try:
            yield folder
        except LiveRunError:
            stack.pop_all()
            raise


def _soak(args: argparse.Namespace, bundle: Bundle, listener: Listener, folder: Path) -> Outcome:
    from lifecycle_msgs.msg import Transition

    with contextlib.ExitStack() as stack:
        processes = _Processes(folder, stack)
        # The executor is there before the first chunk, so that it has to hear all of them.
        processes.node("chunk_executor", _executor_parameters(bundle))
        processes.node("policy_node", _policy_parameters(args, bundle))
        # Each camera is a process, as drivers are.
        for stream in (*(camera.key for camera in bundle.manifest.robot.cameras), "joint_states"):
            processes.start(
                f"sensor {stream}",
                "offline_tools.benchmark.cameras",
                *(str(args.bundle), "--only", stream, "--rate-hz", str(args.rate_hz)),
                *("--seconds", str(60.0 * args.minutes + 10 * _STEP_S)),
            )
        change = listener.change
        change(Transition.TRANSITION_CONFIGURE, "unconfigured", "inactive", _STEP_S)
        listener.until(
            lambda: listener.node.count_subscribers("/policy_node/action_chunk") >= 1,
            "the executor's subscription",
            _STEP_S,
        )
        listener.fresh(_STEP_S)
        change(Transition.TRANSITION_ACTIVATE, "inactive", "active", _STEP_S)
        listener.enable(_STEP_S)
        listener.fresh(_STEP_S)

        print(f"measuring for {args.minutes:g} min", flush=True)
        listener.forget_deadlines()
        begin, messages, began_s = listener.ledger(), _messages(listener), time.monotonic()
        samples: dict[str, list[Sample]] = {name: [] for name in processes.nodes}
        while True:
            now_s = time.monotonic()
            processes.check()
            for name, process in processes.nodes.items():
                samples[name].append(read_sample(process.pid, now_s))
            if now_s - began_s >= 60.0 * args.minutes and len(samples["policy_node"]) > 2:
                break
            listener.spin(min(_SAMPLE_PERIOD_S, 60.0 * args.minutes / 4))
        end, worst_second = listener.ledger(), listener.worst_second
        seconds, received = time.monotonic() - began_s, _messages(listener)
        change(Transition.TRANSITION_DEACTIVATE, "active", "inactive", _STEP_S)
        listener.fresh(_STEP_S)
        inference = listener.statuses["policy_node: inference"]
        return Outcome(
            samples=samples,
            warm_up_s=min(_WARM_UP_S, _WARM_UP_SHARE * 60.0 * args.minutes),
            begin=begin,
            end=end,
            final=listener.ledger(),
            worst_second=worst_second,
            received={
                name: (count - messages[name]) / (args.rate_hz * seconds)
                for name, count in received.items()
            },
            stages_ms=(inference["total mean ms"], inference["total max ms"]),
            exit_codes=processes.terminate(),
        )


def _messages(listener: Listener) -> dict[str, int]:
    """Return how many messages of each stream the policy node has received."""
    return {
        name.removeprefix("policy_node: "): int(values["messages"])
        for name, values in listener.statuses.items()
        if name.startswith("policy_node: ") and "messages" in values
    }


def _executor_parameters(bundle: Bundle) -> dict[str, Any]:
    (parameters,) = executor_parameters(bundle, None, _VELOCITY, _ACCELERATION).values()
    values: dict[str, Any] = parameters["ros__parameters"]
    return values | {"autostart": True, "on_outside": "ignore", "on_outside_state": "ignore"}


def _policy_parameters(args: argparse.Namespace, bundle: Bundle) -> dict[str, Any]:
    prompts = bundle.manifest.prompts
    known = [one.text for one in prompts.instructions] if prompts is not None else []
    return {
        "bundle": str(args.bundle.resolve()),
        "instruction": known[0] if known else "do it",
        "inference_rate_hz": args.inference_rate_hz,
        "threads": 1,
        "sensor_qos": {"reliability": "reliable"},
    }


class _Processes:
    """The nodes and the cameras; they end with the stack."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self._folder = folder
        self._stack = stack
        self._all: list[NodeProcess] = []
        self.nodes: dict[str, NodeProcess] = {}

    def start(self, name: str, module: str, *words: str) -> NodeProcess:
        """Start a module as a process, whose output is kept for an error's message."""
        log = self._folder / f"{name.replace('/', '_')}.log"
        # In sessions of their own, as services are: the kernel shares the processor among these.
        self._all.append(self._stack.enter_context(node_process(["-m", module, *words], log)))
        return self._all[-1]

    def node(self, name: str, parameters: Mapping[str, Any]) -> None:
        """Start one of the package's nodes."""
        file = self._folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump({"/**": {"ros__parameters": dict(parameters)}}))
        module = "groot_int8_ros." + {"chunk_executor": "chunk_executor_node"}.get(name, name)
        self.nodes[name] = self.start(name, module, "--ros-args", "--params-file", str(file))

    def check(self) -> None:
        """Raise where a process has ended."""
        for process in self._all:
            process.check_running()

    def terminate(self) -> dict[str, int]:
        """End the nodes with SIGTERM and return their exit codes."""
        for process in self.nodes.values():
            process.send_signal(signal.SIGTERM)
        return {name: process.wait(_STEP_S) for name, process in self.nodes.items()}
