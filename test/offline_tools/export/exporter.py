"""Runs `groot-int8` commands in forks of a process that has imported torch once.

Importing torch and its exporter takes longer than a small export; a test that interrupts an
export at many moments would spend its time there. Each line of standard input is a JSON object
with `arguments`, `log` (a file for the output), `first_graph` and `file_limit_bytes` (or null);
the answers are the child's process id, and when it has ended, its exit code.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from offline_tools.cli import main
from offline_tools.export import bundle_writer
from offline_tools.export.graph import GraphInput, GraphSpec, trace
from offline_tools.export.graphs import ReferenceGraph, reference_graphs


def beginning_with(name: str) -> Callable[..., dict[str, ReferenceGraph]]:
    """Return `reference_graphs` in another order.

    A small graph that is exported first shows what happens while graphs are written, without
    waiting for the large ones to be traced.
    """

    def reordered(*args: Any, **kwargs: Any) -> dict[str, ReferenceGraph]:
        graphs = reference_graphs(*args, **kwargs)
        return {name: graphs.pop(name), **graphs}

    return reordered


def _run(request: dict[str, object]) -> int:
    log = os.open(str(request["log"]), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    limit = request["file_limit_bytes"]
    if isinstance(limit, int):
        # Python ignores SIGXFSZ, so that a write beyond the limit fails as on a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    first = request["first_graph"]
    if isinstance(first, str):
        bundle_writer.reference_graphs = beginning_with(first)  # type: ignore[attr-defined]
    arguments = request["arguments"]
    assert isinstance(arguments, list)
    code = main([str(argument) for argument in arguments])
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    torch.set_num_threads(1)
    # The exporter imports most of itself when it is first used.
    inputs = {"x": GraphInput(("batch", 4), torch.float32)}
    layer = nn.Linear(4, 4)
    trace(
        GraphSpec(lambda: nn.Linear(4, 4), inputs, ("y",), torch.float32),
        lambda name: layer.state_dict()[name],
    )
    print("ready", flush=True)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            # Ends without the parent's clean-up, as a process of its own would after `main`.
            os._exit(_run(json.loads(line)))
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
