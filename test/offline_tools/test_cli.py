"""Hazards of the command line: a traceback instead of a message, a wrong exit code, a slow start.

The steps have tests of their own; these show what they share.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest

from groot_int8_ros import __version__
from groot_int8_ros.errors import BagError, GrootError
from offline_tools import cli
from offline_tools.cli import SUBCOMMANDS, main


def _run(repository_root: Path, *words: str, code: str = "") -> subprocess.CompletedProcess[str]:
    program = ["-c", code, *words] if code else ["-m", "offline_tools.cli", *words]
    return subprocess.run(
        [sys.executable, *program],
        cwd=repository_root,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_overview_names_every_step(repository_root: Path) -> None:
    done = _run(repository_root, "--help")
    assert done.returncode == 0
    for name, (_, text) in SUBCOMMANDS.items():
        assert f"  {name} " in done.stdout
        assert text in done.stdout


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.strip() == __version__


def test_bare_command_shows_the_overview_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("usage: groot-int8")
    assert all(f"  {name} " in shown.err for name in SUBCOMMANDS)


@pytest.mark.parametrize("words", [["exprot"], ["--bundle", "b"]])
def test_unknown_or_missing_step_is_a_usage_error(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert "usage: groot-int8" in capsys.readouterr().err


def test_wrong_option_of_a_step_is_that_steps_usage_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["build-check", "--bundel", "b"])
    assert caught.value.code == 2
    assert "usage: groot-int8 build-check" in capsys.readouterr().err


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_every_step_explains_its_options(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: groot-int8 {name}")


@pytest.mark.parametrize("missing", ["torch", "onnx_ir"])
def test_package_that_is_not_installed_is_named(repository_root: Path, missing: str) -> None:
    code = (
        f"import sys; sys.modules[{missing!r}] = None; from offline_tools.cli import main; "
        "sys.exit(main(['export', '--checkpoint', 'c', '--bundle', 'b']))"
    )
    done = _run(repository_root, code=code)
    assert done.returncode == 2
    assert f"needs the Python package '{missing}', which is not installed" in done.stderr
    assert "Traceback" not in done.stderr


_WHAT_A_STEP_LOADS = """
import argparse, importlib, json, sys
from offline_tools.cli import SUBCOMMANDS
before = sorted(sys.modules)
module = importlib.import_module(SUBCOMMANDS[sys.argv[1]][0])
module.configure(argparse.ArgumentParser())
heavy = {"torch", "transformers", "onnx", "onnxscript", "rclpy", "tensorrt_rtx"}
top = lambda names: sorted({name.split(".")[0] for name in names} & heavy)
print(json.dumps([top(before), top(sys.modules)]))
"""


@pytest.mark.parametrize("name", ["build-check", "play-bag", "episode-to-bag", "make-dataset"])
def test_steps_for_robots_and_recordings_start_without_torch(
    repository_root: Path, name: str
) -> None:
    done = _run(repository_root, name, code=_WHAT_A_STEP_LOADS)
    assert done.returncode == 0, done.stderr
    before, after = json.loads(done.stdout)
    assert before == []
    assert not set(after) & {"torch", "transformers", "onnx", "onnxscript"}


class _Step:
    """Stands in a module's place and ends as it is told."""

    def __init__(self, ending: BaseException | int) -> None:
        self.ending = ending

    def configure(self, parser: object) -> None:
        del parser

    def run(self, args: object) -> int:
        del args
        if isinstance(self.ending, BaseException):
            raise self.ending
        return self.ending


@pytest.mark.parametrize(
    ("ending", "code", "message"),
    [
        (0, 0, ""),
        (1, 1, ""),
        (GrootError("no disk"), 2, "groot-int8: no disk\n"),
        (BagError("no bag"), 2, "groot-int8: no bag\n"),
        (
            PermissionError(errno.EACCES, "Permission denied", "/checkpoint/config.json"),
            2,
            "groot-int8: /checkpoint/config.json: Permission denied. Check that it is there, its "
            "permissions and the disk, then run the command again.\n",
        ),
        (KeyboardInterrupt(), 130, "groot-int8: interrupted; nothing half-written was kept.\n"),
        (
            ModuleNotFoundError("No module named 'rclpy.x'", name="rclpy.x"),
            2,
            "groot-int8: this step needs the Python package 'rclpy.x', which is not installed; "
            "README.md, 'Install', lists what each step needs.\n",
        ),
    ],
)
def test_how_a_step_ends_is_the_exit_code(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    ending: BaseException | int,
    code: int,
    message: str,
) -> None:
    monkeypatch.setitem(sys.modules, "a_step", _Step(ending))  # type: ignore[arg-type]
    monkeypatch.setitem(cli.SUBCOMMANDS, "step", ("a_step", "a step"))
    assert main(["step"]) == code
    assert capsys.readouterr().err == message


_PRINTING_STEP = """
import sys, types
from offline_tools import cli
step = types.ModuleType("a_step")
step.configure = lambda parser: None
def run(args):
    for number in range(int(sys.argv[1])):
        print(number)
    return 0
step.run = run
sys.modules["a_step"] = step
cli.SUBCOMMANDS["step"] = ("a_step", "a step")
sys.exit(cli.main(sys.argv[2:]))
"""


# One line stays in the buffer until the end; a million are more than any pipe holds.
@pytest.mark.parametrize("lines", [1, 1_000_000])
def test_reader_that_has_gone_away_ends_the_command_quietly(
    repository_root: Path, lines: int
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", _PRINTING_STEP, str(lines), "step"],
        cwd=repository_root,
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        timeout=120,
    )
    os.close(writer)
    assert done.returncode == 128 + signal.SIGPIPE
    assert done.stderr == ""


@pytest.mark.parametrize(
    "ending",
    [
        ValueError("a bug"),
        OSError("an error that names no file"),
        ModuleNotFoundError("No module", name="offline_tools.misspelt"),
        ModuleNotFoundError("No module", name="groot_int8_ros.misspelt"),
    ],
)
def test_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, ending: Exception) -> None:
    monkeypatch.setitem(sys.modules, "a_step", _Step(ending))  # type: ignore[arg-type]
    monkeypatch.setitem(cli.SUBCOMMANDS, "step", ("a_step", "a step"))
    with pytest.raises(type(ending)):
        main(["step"])


class _TerminatedStep(_Step):
    def run(self, args: object) -> int:
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("the signal was lost")


def test_sigterm_unwinds_the_step_and_its_handler_is_taken_back(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "a_step", _TerminatedStep(0))  # type: ignore[arg-type]
    monkeypatch.setitem(cli.SUBCOMMANDS, "step", ("a_step", "a step"))
    before = signal.getsignal(signal.SIGTERM)
    assert main(["step"]) == 143
    assert capsys.readouterr().err == "groot-int8: terminated; nothing half-written was kept.\n"
    assert signal.getsignal(signal.SIGTERM) is before


class _DroppingStep(_Step):
    """Gets its signal where Python swallows what is raised: in a weak reference's callback."""

    def run(self, args: object) -> int:
        thing = threading.Event()
        _ = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGTERM))
        del thing
        time.sleep(30)
        raise AssertionError("the signal was lost")


def test_signal_that_python_swallows_is_not_lost(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "a_step", _DroppingStep(0))  # type: ignore[arg-type]
    monkeypatch.setitem(cli.SUBCOMMANDS, "step", ("a_step", "a step"))
    before = sys.unraisablehook
    assert main(["step"]) == 143
    assert capsys.readouterr().err == "groot-int8: terminated; nothing half-written was kept.\n"
    assert sys.unraisablehook is before


def test_step_runs_in_a_thread_where_signals_cannot_be_handled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "a_step", _Step(1))  # type: ignore[arg-type]
    monkeypatch.setitem(cli.SUBCOMMANDS, "step", ("a_step", "a step"))
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(main(["step"])))
    thread.start()
    thread.join(timeout=60)
    assert codes == [1]
