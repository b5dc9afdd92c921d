"""A build in a process of its own, so that its memory is given back and its crash is survived.

Owns: starting that process and what it means when it dies. Must not import torch or TensorRT.
TensorRT 8.6 ends the process on some graphs it does not like, and what a build allocated returns
to the system only with its process: on a board of 16 GB the second graph would not fit beside it.
"""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from groot_int8_ros.errors import EngineError, GrootError

Result = TypeVar("Result")


class ChildProcessBugError(Exception):
    """The child raised what no user can mend; the message holds its traceback."""


def run_in_child(
    function: Callable[..., Result],
    *arguments: Any,
    what: str,
    if_killed: str = "build with --low-memory",
    if_crashed: str = "Try the other --weight-form, or another TensorRT, and report the graph",
) -> Result:
    """Call a function in a new process and return its result.

    Args:
        function: A function of a module, which the new process imports.
        *arguments: Its arguments; they and the result are pickled.
        what: What it does, for the message if the process dies.
        if_killed: What else helps when memory ran out.
        if_crashed: What helps when the library crashed.

    Raises:
        GrootError: What the function raised as such.
        EngineError: The process died: killed for memory, or crashed.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(sender, function, arguments), daemon=True)
    process.start()
    sender.close()
    try:
        kind, value = receiver.recv()
    except EOFError:
        process.join()
        raise EngineError(_explain_death(process.exitcode, what, if_killed, if_crashed)) from None
    finally:
        # An interrupt of ours must not leave a builder behind that holds the GPU for minutes.
        if process.is_alive():
            process.join(timeout=5)
        if process.is_alive():
            process.terminate()
            process.join()
        receiver.close()
    if kind == "error":
        raise value
    if kind == "bug":
        raise ChildProcessBugError(f"{what}:\n{value}")
    result: Result = value
    return result


def _call(sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    # The parent decides what an interrupt from the terminal means, and then ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        sender.send(("result", function(*arguments)))
    except GrootError as error:
        sender.send(("error", error))
    except BaseException:
        sender.send(("bug", traceback.format_exc()))


def _explain_death(exitcode: int | None, what: str, if_killed: str, if_crashed: str) -> str:
    if exitcode is None or exitcode >= 0:
        return f"{what} ended without a result (exit code {exitcode})"
    name = signal.Signals(-exitcode).name
    if name == "SIGKILL":
        return (
            f"{what} was killed, as the kernel does when memory runs out. Stop what else runs, "
            f"or {if_killed}"
        )
    return f"{what} crashed inside the library ({name}). {if_crashed}"
