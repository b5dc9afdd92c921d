"""Parameters of the chunk executor.

Owns: every parameter of `chunk_executor_node`, and how they become the executor's settings. Must
not import the policy's engines. `config/chunk_executor.yaml` documents them for users; a test
keeps the two together.

Parameters of a channel have the channel's name in theirs, so they are declared at configure, when
the names are known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np
from rcl_interfaces.msg import ParameterDescriptor
from rclpy.node import Node

from groot_int8_ros.control.gates import Range
from groot_int8_ros.control.latency import LatencySettings
from groot_int8_ros.control.limits import JointLimits, top_speed
from groot_int8_ros.control.seams import SEAM_KINDS, SeamKind, SeamSettings
from groot_int8_ros.control.settings import (
    FIRST_COMMANDS,
    INTERFACES,
    ON_OUTSIDE,
    Channel,
    ExecutorSettings,
    FirstCommand,
    OnOutside,
)
from groot_int8_ros.control.types import Float64Array
from groot_int8_ros.control.urdf import urdf_limits
from groot_int8_ros.errors import ConfigurationError
from groot_int8_ros.ros.field_map import parse_fields
from groot_int8_ros.ros.parameters import JOINT_STATE_TYPE, Declaration, ParameterSet

Output = Literal["joint_trajectory", "float64_multi_array", "twist", "twist_stamped", "message"]
OUTPUTS: tuple[Output, ...] = get_args(Output)
TWIST_AXES = ("linear.x", "linear.y", "linear.z", "angular.x", "angular.y", "angular.z")


def _lower(old: float, new: float) -> bool:
    return new <= old


def _refuses(old: str, new: str) -> bool:
    return new in (old, "refuse")


EXECUTOR_PARAMETERS: Mapping[str, Declaration] = {
    "channels": Declaration([""], "Names of the channels, each with its channel.<name>.* values."),
    "chunk_topic": Declaration(
        "policy_node/action_chunk",
        "Topic of trajectory_msgs/JointTrajectory with the policy's chunks.",
        is_topic=True,
    ),
    "joint_state_topic": Declaration(
        "joint_states", "Topic of the measured positions.", is_topic=True
    ),
    "joint_state_type": Declaration(
        JOINT_STATE_TYPE,
        "Message of the measured positions; of any other than sensor_msgs/msg/JointState the "
        "fields are named by joint_state_fields.",
    ),
    "joint_state_fields": Declaration(
        [""], "Lines like 'left_hip = motor_state[0].q': where each joint's position stands."
    ),
    "committed_topic": Declaration(
        "~/committed",
        "Topic of trajectory_msgs/JointTrajectory with what will be executed, for seam.kind rtc.",
        is_topic=True,
    ),
    "urdf": Declaration("", "URDF file whose position and velocity limits hold too."),
    "control_rate_hz": Declaration(50.0, "Commands a second.", low=1.0, high=1000.0),
    "seam.kind": Declaration(
        "linear_blend", "What is commanded where one chunk follows another.", choices=SEAM_KINDS
    ),
    "seam.blend_s": Declaration(0.2, "Time of a blend, seconds.", low=0.0, high=10.0),
    "seam.ensemble_decay": Declaration(
        0.01,
        "Decay of the ensemble's weights from a chunk to the next newer one.",
        low=-100.0,
        high=100.0,
    ),
    "seam.rtc_tolerance": Declaration(
        0.02,
        "Largest difference, in joint units, of a prefix that counts as kept.",
        low=0.0,
        high=1000.0,
    ),
    "latency.warm_up": Declaration(
        2, "First chunks that do not count as latencies.", low=0, high=1000
    ),
    "latency.window": Declaration(50, "Newest latencies that count.", low=1, high=10000),
    "latency.quantile": Declaration(
        0.9, "Part of the latencies that the estimate covers.", low=0.0, high=1.0
    ),
    "latency.outlier_factor": Declaration(
        3.0, "A latency counts as at most this many medians.", low=1.0, high=1000.0
    ),
    "chunk_timeout_s": Declaration(
        1.0,
        "A channel without a new chunk for longer holds.",
        low=0.01,
        high=3600.0,
        stricter=_lower,
    ),
    "joint_state_timeout_s": Declaration(
        0.2,
        "Without a new state of a joint for longer, everything holds.",
        low=0.001,
        high=60.0,
        stricter=_lower,
    ),
    "max_chunk_age_s": Declaration(
        2.0,
        "A chunk whose observation is older on arrival is refused.",
        low=0.01,
        high=3600.0,
        stricter=_lower,
    ),
    "max_chunk_ahead_s": Declaration(
        0.1,
        "A chunk or state stamped further in the future is refused.",
        low=0.0,
        high=60.0,
        stricter=_lower,
    ),
    "lead_s": Declaration(
        0.0, "How much earlier than due targets are commanded.", low=0.0, high=1.0
    ),
    "first_command": Declaration(
        "ramp",
        "What happens with a first command that is far away.",
        choices=FIRST_COMMANDS,
        stricter=_refuses,
    ),
    "ramp_fraction": Declaration(
        0.2, "Part of the top speed that a ramp uses.", low=0.001, high=1.0, stricter=_lower
    ),
    "on_outside": Declaration(
        "refuse",
        "What happens with chunks outside the statistics.",
        choices=ON_OUTSIDE,
        stricter=_refuses,
    ),
    "on_outside_state": Declaration(
        "refuse",
        "The same for measured poses; refuse holds.",
        choices=ON_OUTSIDE,
        stricter=_refuses,
    ),
    "statistics_margin": Declaration(
        0.1, "How far outside a value may lie, as a part of its range.", low=0.0, high=100.0
    ),
    "hold_together": Declaration(
        True, "Whether all channels hold when one does.", stricter=lambda old, new: new or not old
    ),
    "final_holds": Declaration(3, "Commands at rest before commanding ends.", low=1, high=1000),
    "stop_timeout_s": Declaration(
        2.0, "Longest that a stop at deactivate or at a signal may take.", low=0.1, high=60.0
    ),
    "sensor_qos.reliability": Declaration(
        "best_effort",
        "Reliability of the joint-state subscription.",
        choices=("best_effort", "reliable"),
    ),
    "sensor_qos.depth": Declaration(
        10, "Queue of the joint-state subscription.", low=1, high=1000
    ),
    "autostart": Declaration(
        False,
        "Whether the node configures and activates itself at start. It never enables itself.",
        read_only=True,
    ),
}

_INFINITE = [math.inf]
# Parameter of a channel -> default and description. Arrays have one value for each joint, or one
# for all of them.
CHANNEL_PARAMETERS: Mapping[str, tuple[Any, str]] = {
    "joints": ([""], "Joint names in the order of the command, as chunks and states have them."),
    "interface": ("position", f"What is commanded: {', '.join(INTERFACES)}."),
    "output": ("joint_trajectory", f"Message of the command: {', '.join(OUTPUTS)}."),
    "topic": ("", "Topic of the command. Required."),
    "axes": ([""], f"Field of the twist for each joint: {', '.join(TWIST_AXES)}."),
    "output_type": ("", "Message of output message, such as my_robot_msgs/msg/LowCmd."),
    "output_fields": (
        [""],
        "Of output message: lines like 'left_hip = motor_cmd[0].q', one for each joint.",
    ),
    "output_constants": (
        [""],
        "Of output message: lines like 'motor_cmd[0].kp = 60.0', what else stands in it.",
    ),
    "point_time_s": (
        0.0,
        "time_from_start of a JointTrajectory's point; 0.0 is the control period.",
    ),
    "lower": ([-math.inf], "Smallest command."),
    "upper": (_INFINITE, "Largest command."),
    "velocity": (_INFINITE, "Fastest change of a position; magnitude of a velocity."),
    "acceleration": (_INFINITE, "Fastest change of velocity."),
    "step": (_INFINITE, "Largest change between two commands."),
    "guard_distance": ([0.3], "Farthest first command from the measured pose at full speed."),
    "start_tolerance": ([0.05], "Distance that counts as standing at a limit or a command."),
    "tracking_tolerance": (
        [0.1],
        "Distance from all commands of the last second at which a joint counts as not following.",
    ),
    "statistics_low": ([-math.inf], "Smallest value of the training set."),
    "statistics_high": (_INFINITE, "Largest value of the training set."),
}


@dataclass(frozen=True)
class ExecutorParameters:
    """The parameters that no channel has; `EXECUTOR_PARAMETERS` describes each.

    Attributes:
        channels: Names of the channels.
        chunk_topic: Topic of the chunks.
        joint_state_topic: Topic of the joint states.
        joint_state_type: Their message.
        joint_state_fields: Of another message than JointState: `joint name = path.to[0].field`.
        committed_topic: Topic of what will be executed.
        urdf: URDF file, or empty.
        control_rate_hz: Commands a second.
        seam_kind: See `SeamSettings`.
        seam_blend_s: See `SeamSettings`.
        seam_ensemble_decay: See `SeamSettings`.
        seam_rtc_tolerance: See `SeamSettings`.
        latency_warm_up: See `LatencySettings`.
        latency_window: See `LatencySettings`.
        latency_quantile: See `LatencySettings`.
        latency_outlier_factor: See `LatencySettings`.
        chunk_timeout_s: See `ExecutorSettings`, as the following.
        joint_state_timeout_s: Likewise.
        max_chunk_age_s: Likewise.
        max_chunk_ahead_s: Likewise.
        lead_s: Likewise.
        first_command: Likewise.
        ramp_fraction: Likewise.
        on_outside: Likewise.
        on_outside_state: Likewise.
        statistics_margin: See `Range`.
        hold_together: See `ExecutorSettings`.
        final_holds: Likewise.
        stop_timeout_s: Longest that a stop may take, seconds.
        sensor_qos_reliability: `best_effort` or `reliable`.
        sensor_qos_depth: Queue of the joint-state subscription.
        autostart: Whether the node configures and activates itself.
    """

    channels: Sequence[str]
    chunk_topic: str
    joint_state_topic: str
    joint_state_type: str
    joint_state_fields: Sequence[str]
    committed_topic: str
    urdf: str
    control_rate_hz: float
    seam_kind: SeamKind
    seam_blend_s: float
    seam_ensemble_decay: float
    seam_rtc_tolerance: float
    latency_warm_up: int
    latency_window: int
    latency_quantile: float
    latency_outlier_factor: float
    chunk_timeout_s: float
    joint_state_timeout_s: float
    max_chunk_age_s: float
    max_chunk_ahead_s: float
    lead_s: float
    first_command: FirstCommand
    ramp_fraction: float
    on_outside: OnOutside
    on_outside_state: OnOutside
    statistics_margin: float
    hold_together: bool
    final_holds: int
    stop_timeout_s: float
    sensor_qos_reliability: str
    sensor_qos_depth: int
    autostart: bool


@dataclass(frozen=True)
class OutputParameters:
    """Where and how a channel's commands are published.

    Attributes:
        kind: Message type.
        topic: Topic.
        axes: Field of the twist for each joint; empty for other messages.
        point_time_s: `time_from_start` of a trajectory's point, seconds.
        type_name: Message class of `message`.
        fields: Of `message`: joint to path.
        constants: Of `message`: path to what stands there.
    """

    kind: Output
    topic: str
    axes: tuple[str, ...]
    point_time_s: float
    type_name: str = ""
    fields: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, str] = field(default_factory=dict)


class ExecutorParameterSet(ParameterSet[ExecutorParameters]):
    """The executor's; see `ParameterSet`."""

    prefixes: ClassVar[tuple[str, ...]] = ("channel.",)

    def __init__(
        self,
        node: Node,
        is_configured: Callable[[], bool],
        changed: Callable[[Collection[str]], None],
    ) -> None:
        """Declare `EXECUTOR_PARAMETERS`; see `ParameterSet` for the arguments."""
        super().__init__(node, is_configured, changed, EXECUTOR_PARAMETERS, ExecutorParameters)

    def settings(self) -> tuple[ExecutorSettings, dict[str, OutputParameters]]:
        """Declare the channels' parameters and return all of them as the executor takes them.

        Returns:
            The settings, and each channel's output.

        Raises:
            ConfigurationError: A value is missing, wrong or contradicts another.
        """
        current = self.current
        names = [name for name in current.channels if name]
        if not names:
            raise ConfigurationError(
                "parameter 'channels' is empty; name the groups of joints to command, and give "
                "each its channel.<name>.joints, topic and limits"
            )
        channels, outputs = [], {}
        for name in names:
            channel, outputs[name] = self._channel(name)
            channels.append(channel)
        unknown = [name for name in self.strangers() if name.startswith(self.prefixes)]
        if unknown:
            raise ConfigurationError(
                f"parameter '{unknown[0]}' belongs to no channel of 'channels' "
                f"({', '.join(names)}), or is misspelt; a channel has "
                f"{', '.join(CHANNEL_PARAMETERS)}"
            )
        topics = [output.topic for output in outputs.values()]
        repeated = [topic for topic in dict.fromkeys(topics) if topics.count(topic) > 1]
        if repeated:
            raise ConfigurationError(f"two channels command on the topic {repeated[0]}")
        self._check_stop(channels)
        settings = ExecutorSettings(
            channels=tuple(channels),
            control_period_s=1.0 / current.control_rate_hz,
            seam=SeamSettings(
                current.seam_kind,
                current.seam_blend_s,
                current.seam_ensemble_decay,
                current.seam_rtc_tolerance,
            ),
            latency=LatencySettings(
                current.latency_warm_up,
                current.latency_window,
                current.latency_quantile,
                current.latency_outlier_factor,
            ),
            chunk_timeout_s=current.chunk_timeout_s,
            joint_state_timeout_s=current.joint_state_timeout_s,
            max_chunk_age_s=current.max_chunk_age_s,
            max_chunk_ahead_s=current.max_chunk_ahead_s,
            lead_s=current.lead_s,
            first_command=current.first_command,
            ramp_fraction=current.ramp_fraction,
            on_outside=current.on_outside,
            on_outside_state=current.on_outside_state,
            hold_together=current.hold_together,
            final_holds=current.final_holds,
        )
        return settings, outputs

    def _check_stop(self, channels: Sequence[Channel]) -> None:
        """Refuse a time for stopping that is too short for the limits."""
        current, period_s = self.current, 1.0 / self.current.control_rate_hz
        for channel in channels:
            limits, speed = channel.limits, top_speed(channel.limits, period_s)
            slowing = limits.acceleration
            if channel.interface == "velocity":
                speed, slowing = limits.velocity, np.minimum(slowing, limits.step / period_s)
            braking_s = float((speed / slowing).max())
            needed_s = braking_s + (current.final_holds + 1) * period_s
            if needed_s > current.stop_timeout_s:
                raise ConfigurationError(
                    f"channel '{channel.name}' needs up to {needed_s:.2f} s to come to rest, more "
                    f"than 'stop_timeout_s' = {current.stop_timeout_s:g}; raise it, raise the "
                    "acceleration limit or lower the velocity limit"
                )

    def _channel(self, name: str) -> tuple[Channel, OutputParameters]:
        prefix = f"channel.{name}"
        values = {
            column: self._declare(
                f"{prefix}.{column}", default, ParameterDescriptor(description=description)
            )
            for column, (default, description) in CHANNEL_PARAMETERS.items()
        }
        joints = tuple(joint for joint in values["joints"] if joint)
        if not joints:
            raise ConfigurationError(
                f"parameter '{prefix}.joints' is empty; name the joints of channel '{name}'"
            )

        def column(of: str) -> Float64Array:
            given = list(values[of])
            if len(given) not in (1, len(joints)):
                raise ConfigurationError(
                    f"parameter '{prefix}.{of}' has {len(given)} values for {len(joints)} joints; "
                    "give one for each, or one for all"
                )
            array = np.array(given * (len(joints) if len(given) == 1 else 1), np.float64)
            if np.isnan(array).any():
                raise ConfigurationError(f"parameter '{prefix}.{of}' may hold numbers only")
            return array

        interface = values["interface"]
        if interface not in INTERFACES:
            raise ConfigurationError(
                f"parameter '{prefix}.interface' must be one of {', '.join(INTERFACES)}, not "
                f"{interface!r}"
            )
        limits = JointLimits(*(column(of) for of in _LIMITS))
        urdf = self.current.urdf
        if urdf and interface == "position":
            limits = limits.tightened(urdf_limits(Path(urdf).expanduser(), joints))
        unlimited = [
            joint
            for joint, speed in zip(joints, limits.velocity, strict=True)
            if not math.isfinite(speed)
        ]
        if unlimited:
            raise ConfigurationError(
                f"{', '.join(unlimited)} of channel '{name}' have no velocity limit; give "
                f"'{prefix}.velocity', or a 'urdf' that has one"
            )
        statistics = Range(
            column("statistics_low"), column("statistics_high"), self.current.statistics_margin
        )
        channel = Channel(
            name,
            joints,
            interface,
            limits,
            column("guard_distance"),
            column("start_tolerance"),
            statistics,
            column("tracking_tolerance"),
        )
        return channel, self._output(prefix, channel, values)

    def _output(
        self, prefix: str, channel: Channel, values: Mapping[str, Any]
    ) -> OutputParameters:
        kind, topic = values["output"], values["topic"]
        if kind not in OUTPUTS:
            raise ConfigurationError(
                f"parameter '{prefix}.output' must be one of {', '.join(OUTPUTS)}, not {kind!r}"
            )
        self.check_topic(f"{prefix}.topic", topic)
        is_twist = kind in ("twist", "twist_stamped")
        wanted = "velocity" if is_twist else {"joint_trajectory": "position"}.get(kind)
        if wanted and channel.interface != wanted:
            raise ConfigurationError(
                f"parameter '{prefix}.output' is {kind}, which commands a {wanted}, but "
                f"'{prefix}.interface' is {channel.interface}"
            )
        axes = tuple(axis for axis in values["axes"] if axis)
        if is_twist and (
            len(axes) != len(channel.joints)
            or len(set(axes)) != len(axes)
            or not set(axes) <= set(TWIST_AXES)
        ):
            raise ConfigurationError(
                f"parameter '{prefix}.axes' must name a different field of the twist for each of "
                f"{', '.join(channel.joints)}: {', '.join(TWIST_AXES)}"
            )
        point_time_s = values["point_time_s"]
        if not 0.0 <= point_time_s < math.inf:
            raise ConfigurationError(f"parameter '{prefix}.point_time_s' must be 0.0 or more")
        return OutputParameters(
            kind,
            topic,
            axes,
            point_time_s or 1.0 / self.current.control_rate_hz,
            values["output_type"],
            *_message_fields(prefix, channel, kind, values),
        )


def _message_fields(
    prefix: str, channel: Channel, kind: Output, values: Mapping[str, Any]
) -> tuple[dict[str, str], dict[str, str]]:
    """Return joint to path in the channel's order, and path to constant."""
    fields = parse_fields(values["output_fields"], f"{prefix}.output_fields")
    constants = parse_fields(values["output_constants"], f"{prefix}.output_constants")
    if kind != "message":
        given = [name for name in _OF_MESSAGES if any(values[name])]
        if given:
            raise ConfigurationError(
                f"parameter '{prefix}.{given[0]}' is for 'output: message', and "
                f"'{prefix}.output' is {kind}; leave it out, or correct the output"
            )
        return {}, {}
    if set(fields) != set(channel.joints):
        wrong = sorted(set(fields) ^ set(channel.joints))
        raise ConfigurationError(
            f"parameter '{prefix}.output_fields' must name one field for each joint of the "
            f"channel and no other; {', '.join(wrong)} is on one side only"
        )
    return {joint: fields[joint] for joint in channel.joints}, constants


_OF_MESSAGES = ("output_type", "output_fields", "output_constants")
_LIMITS = ("lower", "upper", "velocity", "acceleration", "step")
