"""What a bundle takes of memory: measured in a process of its own, which does nothing else.

Owns: the measuring process and how it is read. Must not import torch. In one process several
bundles' memory cannot be told apart, so each is loaded in a child that reports

- `runtime_bytes`: resident once everything is imported and before a graph is loaded;
- `loaded_bytes`: resident after the bundle was loaded and has answered once;
- `peak_bytes`: the most that was ever resident.

Pages of mapped weights count where they are resident. On a machine with a GPU of its own the
engine's device memory is not among them; on a Jetson it is the same memory.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from groot_int8_ros.errors import EngineError


@dataclass(frozen=True)
class Memory:
    """Resident memory of a process that runs one bundle; see the module.

    Attributes:
        runtime_bytes: Before a graph is loaded.
        loaded_bytes: Loaded, and one observation answered.
        peak_bytes: The most.
    """

    runtime_bytes: int
    loaded_bytes: int
    peak_bytes: int


def measure(
    bundle: Path, inputs: Path, *, engine: str, threads: int | None, int8_kernels: bool
) -> Memory:
    """Run a bundle in a process of its own and return what it took.

    Args:
        bundle: The bundle.
        inputs: File of `fixture.write_inputs`; its first observation is answered.
        engine: Which engine runs the graphs.
        threads: CPU threads inside an operator; the engine's choice if None.
        int8_kernels: See `OnnxRuntimeEngine`.

    Raises:
        EngineError: The process failed; the message ends with its last line.
    """
    command = [sys.executable, "-m", __name__, str(bundle), str(inputs), engine]
    command += ["--threads", str(threads)] if threads else []
    command += ["--int8-kernels"] if int8_kernels else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip() or "it said nothing").splitlines()[-1]
        raise EngineError(f"measuring the memory of {bundle} failed: {last}")
    return Memory(**json.loads(done.stdout.splitlines()[-1]))


def process_memory(field: str, pid: int | None = None) -> int:
    """Return a field of a process's status in bytes: `VmRSS` or `VmHWM`.

    Args:
        field: Which.
        pid: Of which process; this one if None.

    Raises:
        OSError: There is no such process.
    """
    status = Path(f"/proc/{'self' if pid is None else pid}/status")
    for line in status.read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"{status} has no {field}")


def main(argv: list[str] | None = None) -> int:
    """Load a bundle, answer one observation, print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("inputs", type=Path)
    parser.add_argument("engine")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--int8-kernels", action="store_true")
    args = parser.parse_args(argv)

    from groot_int8_ros.policy.policy import Policy
    from offline_tools.benchmark.fixture import read_inputs

    inputs = read_inputs(args.inputs)
    importlib.import_module(args.engine)
    runtime = process_memory("VmRSS")
    policy = Policy.load(
        args.bundle, engine=args.engine, threads=args.threads, int8_kernels=args.int8_kernels
    )
    policy.infer(inputs.observations[0], noise=inputs.noise[0])
    loaded = process_memory("VmRSS")
    policy.close()
    peak = process_memory("VmHWM")
    figures = {"runtime_bytes": runtime, "loaded_bytes": loaded, "peak_bytes": peak}
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
