"""What the executor is told beforehand.

Owns: `Channel` and `ExecutorSettings`, and what makes them impossible. Must not import ROS or the
policy.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np

from groot_int8_ros.control.gates import Range
from groot_int8_ros.control.latency import LatencySettings
from groot_int8_ros.control.limits import JointLimits
from groot_int8_ros.control.seams import SeamSettings
from groot_int8_ros.control.types import Float64Array
from groot_int8_ros.errors import ConfigurationError

Interface = Literal["position", "velocity"]
INTERFACES: tuple[Interface, ...] = get_args(Interface)
FirstCommand = Literal["ramp", "refuse"]
FIRST_COMMANDS: tuple[FirstCommand, ...] = get_args(FirstCommand)
OnOutside = Literal["refuse", "ignore"]
ON_OUTSIDE: tuple[OnOutside, ...] = get_args(OnOutside)


@dataclass(frozen=True)
class Channel:
    """Joints that are commanded together.

    Attributes:
        name: In diagnostics.
        joints: Their names in chunks and joint states, in the order of the command.
        interface: Whether commands are positions or velocities.
        limits: Of the commands.
        guard_distance: Farthest that a first position command may be from the measured pose,
            float64, shape (J,).
        start_tolerance: How far outside its limits a joint may stand, and how far from the last
            command, for the command to start there, float64, shape (J,).
        statistics: What the policy's training set held.
        tracking_tolerance: Distance from the commands of the last second at which a position joint
            counts as not following, float64, shape (J,); None where that is not judged.

    Raises:
        ConfigurationError: Joints and arrays do not go together.
    """

    name: str
    joints: tuple[str, ...]
    interface: Interface
    limits: JointLimits
    guard_distance: Float64Array
    start_tolerance: Float64Array
    statistics: Range | None = None
    tracking_tolerance: Float64Array | None = None

    def __post_init__(self) -> None:
        where = f"channel '{self.name}'"
        if not self.joints or len(set(self.joints)) != len(self.joints):
            raise ConfigurationError(f"{where} needs joints, each named once")
        if self.interface not in INTERFACES:
            raise ConfigurationError(
                f"{where}: interface '{self.interface}' is none of {', '.join(INTERFACES)}"
            )
        arrays = {
            "limits": self.limits.lower,
            "guard_distance": self.guard_distance,
            "start_tolerance": self.start_tolerance,
        }
        if self.tracking_tolerance is not None:
            arrays["tracking_tolerance"] = self.tracking_tolerance
        for name, array in arrays.items():
            if array.shape != (len(self.joints),):
                raise ConfigurationError(
                    f"{where}: {name} has shape {array.shape} for {len(self.joints)} joints"
                )
        if not ((self.guard_distance > 0.0).all() and (self.start_tolerance >= 0.0).all()):
            raise ConfigurationError(
                f"{where}: guard_distance must be above 0 and start_tolerance at least 0"
            )
        if self.tracking_tolerance is not None and not (self.tracking_tolerance > 0.0).all():
            raise ConfigurationError(f"{where}: tracking_tolerance must be above 0")
        zero_allowed = (self.limits.lower <= 0.0) & (self.limits.upper >= 0.0)
        if self.interface == "velocity" and not zero_allowed.all():
            raise ConfigurationError(
                f"{where}: the limits of a velocity must contain 0, or it could not be stopped"
            )


@dataclass(frozen=True)
class ExecutorSettings:
    """Everything that `Executor` can be told beforehand.

    Attributes:
        channels: What is commanded.
        control_period_s: Time between two commands, seconds.
        seam: How chunks follow each other.
        latency: How the policy's latency is judged.
        chunk_timeout_s: A channel without a new chunk for longer holds.
        joint_state_timeout_s: Without a new state of one of its joints for longer, all hold.
        max_chunk_age_s: A chunk whose observation is older on arrival is refused.
        max_chunk_ahead_s: A chunk or joint state stamped further in the future is refused.
        lead_s: How much earlier than due a target is commanded, to make up for the delay of the
            controllers behind.
        first_command: What happens with a first command that is far from the measured pose:
            `ramp` goes there slowly, `refuse` holds.
        ramp_fraction: Part of the top speed that a ramp uses.
        on_outside: What happens with a chunk that lies outside the statistics.
        on_outside_state: The same for joint states: `refuse` holds.
        hold_together: Whether all channels hold when one does.
        final_holds: Commands at rest before commanding ends.

    Raises:
        ConfigurationError: A value lies outside its range, or two channels share a joint.
    """

    channels: tuple[Channel, ...]
    control_period_s: float = 0.02
    seam: SeamSettings = field(default_factory=SeamSettings)
    latency: LatencySettings = field(default_factory=LatencySettings)
    chunk_timeout_s: float = 1.0
    joint_state_timeout_s: float = 0.2
    max_chunk_age_s: float = 2.0
    max_chunk_ahead_s: float = 0.1
    lead_s: float = 0.0
    first_command: FirstCommand = "ramp"
    ramp_fraction: float = 0.2
    on_outside: OnOutside = "refuse"
    on_outside_state: OnOutside = "refuse"
    hold_together: bool = True
    final_holds: int = 3

    def __post_init__(self) -> None:
        for name in (
            "control_period_s",
            "chunk_timeout_s",
            "joint_state_timeout_s",
            "max_chunk_age_s",
            "ramp_fraction",
        ):
            if not 0.0 < getattr(self, name) < np.inf:
                raise ConfigurationError(f"{name} must be a finite number above 0")
        for name in ("max_chunk_ahead_s", "lead_s"):
            if not 0.0 <= getattr(self, name) < np.inf:
                raise ConfigurationError(f"{name} must be a finite number, 0 or more")
        if self.ramp_fraction > 1.0 or self.final_holds < 1:
            raise ConfigurationError("ramp_fraction must be at most 1, and final_holds at least 1")
        for name, choices in (
            ("first_command", FIRST_COMMANDS),
            ("on_outside", ON_OUTSIDE),
            ("on_outside_state", ON_OUTSIDE),
        ):
            if getattr(self, name) not in choices:
                raise ConfigurationError(f"{name} must be one of {', '.join(choices)}")
        if not self.channels:
            raise ConfigurationError("there is no channel to command")
        owners: dict[str, str] = {}
        for channel in self.channels:
            for joint in channel.joints:
                other = owners.setdefault(joint, channel.name)
                if other != channel.name:
                    raise ConfigurationError(
                        f"the channels '{other}' and '{channel.name}' both command {joint}"
                    )
        names = [channel.name for channel in self.channels]
        if len(set(names)) != len(names):
            raise ConfigurationError("two channels have the same name")
