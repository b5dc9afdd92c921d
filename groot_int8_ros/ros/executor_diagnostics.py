"""What the chunk executor tells on `/diagnostics`.

Owns: one status for the executor, the joint states, the chunks and each channel. Must not import
the policy's engines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diagnostic_msgs.msg import DiagnosticStatus

from groot_int8_ros.control.command import ChannelCommand, Command
from groot_int8_ros.control.executor import Executor
from groot_int8_ros.control.settings import Channel
from groot_int8_ros.ros.diagnostics import ERROR, OK, STALE, WARN, status_message
from groot_int8_ros.ros.executor_parameters import ExecutorParameters, OutputParameters

# What the executor does -> level and text.
_MODES = {
    "off": (OK, "commands are disabled; call ~/enable"),
    "stopping": (WARN, "stopping"),
    "holding": (WARN, "holding"),
    "ramping": (WARN, "ramping slowly to a first command that is far away"),
    "running": (OK, "running"),
}


def executor_status(
    lifecycle: str, failure: str | None, executor: Executor | None, command: Command | None
) -> DiagnosticStatus:
    """Return what the executor does, and what it has counted."""
    values: dict[str, Any] = {"lifecycle": lifecycle}
    if executor is not None:
        counters = executor.counters
        values |= {
            "enabled": executor.enabled,
            "emergency stop": executor.estop_reason or "released",
            "emergency stops": counters.estops,
            "steps": counters.steps,
            "deadline misses": counters.deadline_misses,
            "underruns": counters.underruns,
            "clock jumps": counters.clock_jumps,
        }
        values |= _counted("refused", counters.refusals)
        values |= _counted("holds", counters.holds)
        values |= _counted("clamps", counters.clamps)
        values |= _counted("not following", counters.astray)
    if failure:
        return status_message("executor", ERROR, failure, values)
    if executor is not None and executor.estop_reason is not None:
        message = f"emergency stop: {executor.estop_reason}; call ~/reset_estop"
        return status_message("executor", ERROR, message, values)
    if command is None:
        return status_message("executor", STALE, f"{lifecycle}: no commands", values)
    level, message = _MODES[command.mode]
    return status_message("executor", level, message, values)


def input_statuses(
    executor: Executor, parameters: ExecutorParameters, steady_ns: int
) -> list[DiagnosticStatus]:
    """Return the state of the joint states and of the chunks."""
    hold = executor.state_hold(steady_ns)
    values = {"topic": parameters.joint_state_topic, "joints": ", ".join(executor.state_joints)}
    states = status_message(
        "joint states",
        ERROR if hold else OK,
        f"{hold.reason}: {hold.message}" if hold else "fresh",
        values,
    )
    counters, expected_s = executor.counters, executor.latency.expected_s()
    values = {
        "topic": parameters.chunk_topic,
        "chunks": str(counters.chunks),
        "late chunks": str(counters.late_chunks),
        "rows skipped, newest": str(counters.rows_skipped_last),
        "expected latency ms": "unknown" if expected_s is None else f"{expected_s * 1e3:.1f}",
        "seam": parameters.seam_kind,
        "seam jump, newest": f"{counters.seam_jump_last:.4g}",
        "seam jump, largest": f"{counters.seam_jump_max:.4g}",
        "prefixes not kept": str(counters.prefix_mismatches),
    }
    fault = executor.chunk_fault
    if fault:
        message = f"the newest was refused: {fault.reason}: {fault.message}"
        chunks = status_message("chunks", ERROR, message, values)
    elif not counters.chunks:
        chunks = status_message("chunks", STALE, "none has come yet", values)
    else:
        chunks = status_message("chunks", OK, "accepted", values)
    return [states, chunks]


def channel_statuses(
    executor: Executor,
    command: Command,
    outputs: Mapping[str, OutputParameters],
    subscribers: Mapping[str, int],
    steady_ns: int,
) -> Sequence[DiagnosticStatus]:
    """Return what each channel is commanded, and why it holds where it does."""
    commands = {channel.name: channel for channel in command.channels}
    statuses = []
    for channel in executor.settings.channels:
        silence_s = executor.chunk_silence_s(channel.name, steady_ns)
        values = {
            "topic": outputs[channel.name].topic,
            "message": outputs[channel.name].kind,
            "interface": channel.interface,
            "listeners": subscribers[channel.name],
            "seconds since last chunk": "never" if silence_s is None else f"{silence_s:.3f}",
        }
        name = f"channel {channel.name}"
        sent = commands.get(channel.name)
        if sent is None:
            statuses.append(status_message(name, STALE, "not commanded", values))
            continue
        values |= {
            joint: f"{value:.5g}" for joint, value in zip(channel.joints, sent.values, strict=True)
        }
        values |= {
            f"tracking error: {joint}": f"{error:.4g}"
            for joint, error in zip(channel.joints, sent.tracking_error, strict=True)
            if channel.interface == "position"
        }
        if sent.hold:
            level = ERROR if command.mode in ("holding", "estop") else WARN
            message = f"holding: {sent.hold.reason}: {sent.hold.message}"
        elif not subscribers[channel.name]:
            level, message = ERROR, f"nobody listens on {outputs[channel.name].topic}"
        elif sent.astray:
            level, message = WARN, not_following(channel, sent)
        else:
            level, message = OK, "ramping" if sent.ramping else "running"
        statuses.append(status_message(name, level, message, values))
    return statuses


def not_following(channel: Channel, sent: ChannelCommand) -> str:
    """Return which joints of a channel do not go where they are told."""
    errors = dict(zip(channel.joints, sent.tracking_error, strict=True))
    far = ", ".join(f"{joint} (by {errors[joint]:.3g})" for joint in sent.astray)
    return (
        f"does not follow its commands: {far}. Is the controller active, is something in the way, "
        "or is another sender commanding?"
    )


def _counted(what: str, counts: Mapping[str, int]) -> dict[str, int]:
    return {f"{what}: {reason}": count for reason, count in sorted(counts.items())}
