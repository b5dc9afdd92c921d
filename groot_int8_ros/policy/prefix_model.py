"""Computing the prefix of a new instruction on the robot's CPU.

Owns: running the bundle's prefix model, in this process (`compute_prefix`) or in one of its own
(`PrefixProcess`). Must not import ROS or torch.

The node uses a process of its own. The model's weights are larger than everything else the robot
runs on the CPU; they stay in the mapped file and are cast one at a time, but only a process that
ends gives back all of its memory for certain, and one that is killed for want of memory takes
nothing else with it. It runs at the lowest priority, so that inferences under way keep their pace.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

import numpy as np

from groot_int8_ros.errors import BundleError, EngineError, GrootError
from groot_int8_ros.policy.bundle import Bundle, open_bundle
from groot_int8_ros.policy.deployed_graphs import DeployedGraphs
from groot_int8_ros.policy.engines.onnxruntime_engine import OnnxRuntimeEngine
from groot_int8_ros.policy.families import PREFIX_GRAPH
from groot_int8_ros.policy.prompt_bank import PromptPrefix, read_prefix

_LOWEST_PRIORITY = 19
# Of the values that the kernel takes from a process: the first to be killed for want of memory.
_KILL_FIRST = "1000"
_EXIT_USER_ERROR = 2


def compute_prefix(
    bundle: Bundle, instruction: str, *, threads: int | None = None
) -> PromptPrefix:
    """Compute an instruction's prefix with the bundle's own prefix model.

    Args:
        bundle: A deployed bundle with a prefix model.
        instruction: The task as the user gave it.
        threads: CPU threads inside an operator; ONNX Runtime's choice if None.

    Raises:
        BundleError: The bundle has no prefix model.
        ObservationError: The instruction cannot be used, or is longer than the graphs' room.
        EngineError: The model failed, or gave values that are not finite.
    """
    prompts = bundle.manifest.prompts
    if prompts is None or not bundle.manifest.has_prefix_model:
        raise BundleError(
            f"{bundle.folder} has no prefix model, so no new instruction can be computed from it. "
            f"Export it with groot-int8 export --prefix-model, or give the checkpoint: groot-int8 "
            f"add-instruction --bundle {bundle.folder} --checkpoint CHECKPOINT TEXT"
        )
    graphs = DeployedGraphs(bundle, {})
    input_ids = graphs.prefix_ids(instruction)
    graphs.bank.check_length(input_ids)
    first = prompts.length - input_ids.size
    engine = OnnxRuntimeEngine(
        bundle.graph_path(PREFIX_GRAPH), threads=threads, keep_graph_as_written=True
    )
    try:
        tensors = engine.run(
            {"input_ids": input_ids[None], "first_position": np.array([first], np.int64)}
        )
    finally:
        engine.close()
    for name, array in tensors.items():
        if not np.isfinite(array).all():
            raise EngineError(
                f"the prefix model gave NaN or infinity in {name} for {instruction!r:.80}: export "
                "the bundle again"
            )
    return PromptPrefix(input_ids, bundle.manifest.checkpoint_sha256, first, tensors)


class PrefixProcess:
    """One computation in a process of its own.

    Lifecycle: the constructor starts it; `result` tells whether it is done; `close` ends it, done
    or not, and frees everything.
    """

    def __init__(self, bundle: Path, instruction: str, *, threads: int | None = None) -> None:
        """Start.

        Args:
            bundle: The bundle's folder, verified already.
            instruction: What to compute.
            threads: CPU threads inside an operator; ONNX Runtime's choice if None.
        """
        self._started_s = time.monotonic()
        self._files = contextlib.ExitStack()
        self._output = self._nameless_file()
        self._errors = self._nameless_file()
        words = [sys.executable, "-m", "groot_int8_ros.policy.prefix_model", str(bundle)]
        with tempfile.TemporaryFile() as text:
            # Not an argument: those end at a null byte.
            text.write(instruction.encode())
            text.seek(0)
            self._process = subprocess.Popen(
                [*words, str(threads or 0)], stdin=text, stdout=self._output, stderr=self._errors
            )

    def _nameless_file(self) -> IO[bytes]:
        # Whatever becomes of either process, nothing is left behind.
        return self._files.enter_context(tempfile.TemporaryFile())

    @property
    def elapsed_s(self) -> float:
        """Wall time since the start, in seconds."""
        return time.monotonic() - self._started_s

    def result(self) -> PromptPrefix | None:
        """Return the prefix, or None while it is being computed.

        Raises:
            EngineError: The process failed; the message ends with its reason.
        """
        code = self._process.poll()
        if code is None:
            return None
        if code == 0:
            self._output.seek(0)
            try:
                return read_prefix(self._output)
            except ValueError as error:
                raise EngineError(f"the prefix model's answer is damaged: {error}") from error
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        reason = lines[-1] if lines else f"it ended with {code} without a word"
        if code < 0:
            reason = f"it was killed by signal {-code}; the kernel does so where memory runs out"
        raise EngineError(f"the instruction's prefix could not be computed: {reason}")

    def close(self) -> None:
        """End the process if it still runs."""
        self._process.kill()
        self._process.wait()
        self._files.close()


def main(arguments: list[str]) -> int:
    """Read an instruction from stdin and write its prefix to stdout.

    Args:
        arguments: The bundle's folder, and the number of threads or 0.
    """
    folder, threads = arguments
    instruction = sys.stdin.buffer.read().decode()
    os.nice(_LOWEST_PRIORITY)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_KILL_FIRST)
    try:
        bundle = open_bundle(Path(folder), verify_hashes=False)
        prefix = compute_prefix(bundle, instruction, threads=int(threads) or None)
    except GrootError as error:
        sys.stderr.write(" ".join(str(error).split()))
        return _EXIT_USER_ERROR
    prefix.write(sys.stdout.buffer)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
