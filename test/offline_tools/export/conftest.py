"""A process that exports on demand, and small views of a bundle's graphs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the export needs torch")
pytest.importorskip("transformers", reason="the export needs transformers")

_DEADLINE_S = 240.0
# A signal can get lost in one of the callbacks in which Python swallows exceptions.
_SIGNAL_AGAIN_S = 30.0


class Exporter:
    """Starts `groot-int8` commands one after the other; see `exporter.py`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._ready = False

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the exporting process died"
        return line.strip()

    def run(
        self,
        arguments: list[str],
        log: Path,
        *,
        number: signal.Signals | None = None,
        when: str = "",
        delay_s: float = 0.0,
        first_graph: str | None = None,
        file_limit_bytes: int | None = None,
    ) -> int:
        """Run a command and return its exit code, negative for the signal that killed it.

        Args:
            arguments: Of `groot-int8`.
            log: File for its output.
            number: Signal to send to it, if any.
            when: The signal is sent after this text stands in the output ...
            delay_s: ... and this time has passed.
            first_graph: Graph that is exported before the others.
            file_limit_bytes: No file may grow beyond this.
        """
        if not self._ready:
            assert self._answer() == "ready"
            self._ready = True
        log.touch()
        request = {
            "arguments": arguments,
            "log": str(log),
            "first_graph": first_graph,
            "file_limit_bytes": file_limit_bytes,
        }
        assert self._process.stdin is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        child = int(self._answer())
        if number is not None:
            self._interrupt(child, log, number, when, delay_s)
        return int(self._answer())

    @staticmethod
    def _interrupt(
        child: int, log: Path, number: signal.Signals, when: str, delay_s: float
    ) -> None:
        deadline = time.monotonic() + _DEADLINE_S
        while when not in log.read_text() and _alive(child):
            assert time.monotonic() < deadline, f"no {when!r} in: {log.read_text()}"
            time.sleep(0.01)
        time.sleep(delay_s)
        next_signal = time.monotonic()
        while _alive(child):
            assert time.monotonic() < deadline, f"{number.name} did not end the export"
            if time.monotonic() >= next_signal:
                os.kill(child, number)
                next_signal += _SIGNAL_AGAIN_S
            time.sleep(0.01)


def _alive(child: int) -> bool:
    try:
        state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


# Made for every test of the folder, so that it imports torch while the first ones run.
@pytest.fixture(scope="package", autouse=True)
def exporter(repository_root: Path) -> Iterator[Exporter]:
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("exporter.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(repository_root), "OMP_NUM_THREADS": "1"},
    )
    try:
        yield Exporter(process)
    finally:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        process.stdout.close()
        process.wait(timeout=60)
