"""What a person sees while TensorRT builds: a silent build of minutes looks like a hang.

Owns: the bar through TensorRT's own progress monitor, and the heartbeat for a TensorRT without one
or an output that is no terminal. Must not import torch.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

HEARTBEAT_S = 30.0


def make_progress_monitor(trt: Any, label: str) -> Any:
    """Make a `trt.IProgressMonitor` that draws the outermost phase as a bar with an ETA.

    Args:
        trt: A TensorRT module that has progress monitors.
        label: What is being built.

    Returns:
        The monitor, with `steps_done` (over all phases) and `close`.
    """

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps_done = 0
            self._bars: dict[str, Any] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            # Inner phases come and go by the hundred; the outermost alone has a steady ETA.
            if parent_phase is None:
                self._bars[phase_name] = tqdm(
                    total=num_steps, desc=label, unit="step", file=sys.stderr, leave=False
                )

        def step_complete(self, phase_name: str, step: int) -> bool:
            self.steps_done += 1
            if phase_name in self._bars:
                bar = self._bars[phase_name]
                bar.update(step + 1 - bar.n)
            return True

        def phase_finish(self, phase_name: str) -> None:
            if phase_name in self._bars:
                self._bars.pop(phase_name).close()

        def close(self) -> None:
            while self._bars:
                self._bars.popitem()[1].close()

    return Monitor()


@contextmanager
def heartbeat(label: str, every_s: float = HEARTBEAT_S) -> Iterator[None]:
    """Say on stderr, every so often, that the block still runs and for how long it has."""
    done = threading.Event()
    start = time.monotonic()

    def beat() -> None:
        while not done.wait(every_s):
            print(
                f"{label}: still building after {time.monotonic() - start:.0f} s",
                file=sys.stderr,
                flush=True,
            )

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
