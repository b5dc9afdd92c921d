"""`groot-int8 doctor`: checks a running system from outside and says what to do.

Owns: the options, the order of the checks and the exit code: 0 all is well, 1 there is a fault,
2 something could not be checked. Must not import torch; rclpy only where it is there.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offline_tools.arguments import positive_float
from offline_tools.doctor.findings import Finding, Level, as_json, exit_code
from offline_tools.doctor.machine import (
    examine_bundle,
    examine_clock,
    examine_engine,
    examine_middleware,
    examine_power,
)
from offline_tools.parameter_file import read_parameter_file

if TYPE_CHECKING:
    from offline_tools.doctor.system import System

_LISTEN_S = 4.0


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "--node",
        default="/policy_node",
        help="the policy node, with its namespace (default: %(default)s)",
    )
    parser.add_argument(
        "--params-file",
        type=Path,
        help="the node's YAML, for what a running node does not say itself",
    )
    parser.add_argument("--bundle", type=Path, help="default: the node's parameter 'bundle'")
    parser.add_argument(
        "--seconds",
        type=positive_float,
        default=_LISTEN_S,
        help="how long to listen to the topics (default: %(default)s)",
    )
    parser.add_argument(
        "--no-hashes", action="store_true", help="compare sizes of the bundle's files alone"
    )
    parser.add_argument("--offline", action="store_true", help="leave the running system out")
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")


def run(args: argparse.Namespace) -> int:
    """Examine everything and print what was found."""
    findings: list[Finding] = []
    for finding in _examine(args):
        findings.append(finding)
        if not args.json:
            print(finding.text(), flush=True)
    if args.json:
        print(as_json(findings))
    return exit_code(findings)


def _examine(args: argparse.Namespace) -> Iterator[Finding]:
    values = read_parameter_file(args.params_file) if args.params_file else {}
    yield examine_clock()
    yield examine_power()
    with contextlib.ExitStack() as stack:
        system: System | None = None
        if not args.offline:
            try:
                from offline_tools.doctor.system import System
            except ImportError as error:
                yield Finding(
                    Level.UNCHECKED,
                    "running system",
                    f"rclpy cannot be imported ({error}), so topics and nodes were not looked at",
                    "source the ROS 2 distribution first, or give --offline",
                )
            else:
                yield examine_middleware()
                system = stack.enter_context(System(args.node, args.seconds))
                told, found = system.parameters()
                yield from found
                values |= told
        folder = args.bundle or (Path(str(values["bundle"])) if values.get("bundle") else None)
        bundle, found = examine_bundle(
            folder.expanduser() if folder else None, verify_hashes=not args.no_hashes
        )
        yield from found
        if bundle is not None:
            yield from examine_engine(
                bundle,
                _engine(values),
                verify_hashes=not args.no_hashes,
                is_loaded=system is not None and system.is_loaded,
            )
        if system is not None:
            yield from system.examine(values, bundle.manifest.robot if bundle else None)


def _engine(values: Mapping[str, Any]) -> str:
    return str(values.get("engine", "onnxruntime"))
