"""One step of the pipeline, and when it is up to date.

Owns: `Step`, the state file that a step leaves, and running a subcommand. Must not import torch or
any step.

A step is up to date when what it was made from and what it made are both, by content, what they
were: `key` hashes its inputs, its options and this package's version, `output` what it wrote. So
neither file times nor a moved folder make it run again, and a damaged output does.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from groot_int8_ros import __version__
from groot_int8_ros.errors import GrootError
from groot_int8_ros.policy.files import atomic_file, read_json, sha256_of_file

STATE_FOLDER = ".pipeline"


@dataclass(frozen=True)
class StepState:
    """What a step left behind.

    Attributes:
        key: Hash of what it was made from.
        output: Hash of what it made; None while it runs, and where it was interrupted.
        seconds: How long it took; of the last time that it ended, where it was interrupted.
    """

    key: str
    output: str | None
    seconds: float | None


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        name: Its name; that of its subcommand, but for `subcommand`.
        options: Those that change what it makes.
        inputs: Hash of what it reads; raises `GrootError` or `OSError` if that is not there.
        output: Hash of what it wrote, likewise.
        arguments: Of the subcommand; given whether an interrupted run of the same key is there.
        finish: Called when it has ended well.
        rough_s: A guess of its duration for when there is no earlier one, seconds.
        left_out: Why it does not run at all here, or nothing.
        subcommand: Name of its subcommand where it is another one.
        is_verdict: Whether a failed check is a result to report, and not the end of the run.
    """

    name: str
    options: Sequence[str]
    inputs: Callable[[], str]
    output: Callable[[], str]
    arguments: Callable[[bool], Sequence[str]]
    rough_s: float
    finish: Callable[[], None] = lambda: None
    left_out: str = ""
    subcommand: str = ""
    is_verdict: bool = False

    def key(self) -> str:
        """Return the hash of what the step would be made from now."""
        return digest([__version__, self.name, *self.options, self.inputs()])

    def why_stale(self, state: StepState | None) -> str:
        """Return why the step has to run, or nothing if it is up to date."""
        if state is None:
            return "not made yet"
        if state.key != self.key():
            return "what it is made from has changed"
        if state.output is None:
            failed = "did not pass, or was " if self.is_verdict else ""
            return f"{failed}interrupted the last time"
        try:
            changed = self.output() != state.output
        except (GrootError, OSError) as error:
            return f"its output cannot be used: {error}"
        return "its output is not what it wrote" if changed else ""


class StepFailedError(GrootError):
    """A subcommand ended with another code than 0, after it had said why."""

    def __init__(self, name: str, code: int) -> None:
        super().__init__(f"`groot-int8 {name}` failed; see above")
        self.code = code


def run_subcommand(*arguments: str) -> None:
    """Run a subcommand of `groot-int8` in this process, showing its command line.

    Raises:
        StepFailedError: It ended with another code than 0.
        KeyboardInterrupt: A signal ended it.
    """
    # The table of subcommands imports no step, but it names this package.
    from offline_tools import cli

    start = time.perf_counter()
    print(f"$ groot-int8 {' '.join(arguments)}", flush=True)
    code = cli.main(arguments)
    if code >= cli.EXIT_SIGNALLED:
        raise KeyboardInterrupt
    if code != 0:
        raise StepFailedError(arguments[0], code)
    print(f"  {time.perf_counter() - start:.1f} s")


def read_state(folder: Path, name: str) -> StepState | None:
    """Return what a step left, or None if there is nothing that can be used."""
    try:
        content = read_json(folder / STATE_FOLDER / f"{name}.json")
        return StepState(content["key"], content["output"], content["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_state(folder: Path, name: str, state: StepState) -> None:
    """Note what a step left."""
    with atomic_file(folder / STATE_FOLDER / f"{name}.json") as temporary:
        temporary.write_text(json.dumps(asdict(state), indent=2) + "\n", encoding="utf-8")


def digest(texts: Iterable[str]) -> str:
    """Return the SHA-256 of texts, each apart from the next."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()


def digest_of_files(files: Iterable[Path], root: Path) -> str:
    """Return the SHA-256 over names and contents of files.

    Raises:
        OSError: A file cannot be read.
    """
    return digest(
        f"{path.relative_to(root).as_posix()} {sha256_of_file(path)}" for path in sorted(files)
    )
