"""Messages of the chunk executor: chunks in, commands and commitments out.

Owns: their conversion, and that of the measured positions. Must not import rclpy or the policy: it
works on messages alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from builtin_interfaces.msg import Duration
from geometry_msgs.msg import Twist, TwistStamped
from sensor_msgs.msg import JointState
from std_msgs.msg import Float64MultiArray
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from groot_int8_ros.control.chunks import TimedChunk, shape_fault
from groot_int8_ros.control.commitment import Commitment
from groot_int8_ros.control.types import NANOSECONDS, Float64Array
from groot_int8_ros.errors import ObservationError
from groot_int8_ros.ros.executor_parameters import OutputParameters
from groot_int8_ros.ros.field_map import (
    FieldMap,
    FieldWriter,
    message_class,
    parse_joint_fields,
    require_fields,
)
from groot_int8_ros.ros.joints import stamp_ns, time_message


def chunk_of(message: Any) -> TimedChunk:
    """Return a `trajectory_msgs/JointTrajectory` as a chunk, whatever is in it.

    Rows of different or wrong lengths give targets without columns, which the executor refuses.
    """
    stamp = stamp_ns(message.header)
    due_ns = np.array(
        [
            stamp + point.time_from_start.sec * NANOSECONDS + point.time_from_start.nanosec
            for point in message.points
        ],
        np.int64,
    )
    names = tuple(message.joint_names)
    if all(len(point.positions) == len(names) for point in message.points):
        targets = np.array([point.positions for point in message.points], np.float64)
        targets = targets.reshape(len(due_ns), len(names))
    else:
        targets = np.empty((len(due_ns), 0))
    return TimedChunk(stamp, names, due_ns, targets)


class MeasuredPositions:
    """Reads measured positions from the message that the robot publishes them in.

    Args:
        type_name: The message, `sensor_msgs/msg/JointState` or any other.
        lines: Of any other: where each joint's position stands, as `field_map.parse_fields` takes
            it.
        joints: Those whose position is needed.

    Raises:
        ConfigurationError: The fields do not fit the message, or a joint has none.
    """

    def __init__(self, type_name: str, lines: Sequence[str], joints: Sequence[str]) -> None:
        self.message_type = message_class(type_name)
        self._map: FieldMap | None = None
        by_name = self.message_type is JointState
        fields = parse_joint_fields(lines, type_name, found_by_name=by_name)
        if not by_name:
            require_fields(fields, joints)
            self._map = FieldMap(self.message_type, fields)

    def read(self, message: Any, now_ns: int) -> tuple[Sequence[str], Sequence[float], int]:
        """Return the joints' names, their positions and the stamp in nanoseconds.

        Args:
            message: Of `message_type`.
            now_ns: ROS time, the stamp of a message without a header.

        Raises:
            ObservationError: The message is shorter than the field map.
        """
        stamp = stamp_ns(message.header) if hasattr(message, "header") else now_ns
        if self._map is None:
            return message.name, message.position, stamp
        return self._map.names, self._map.read(message).tolist(), stamp


def commitment_message(commitment: Commitment) -> JointTrajectory:
    """Return a commitment as it is published.

    The stamp is the first row's time, since a `time_from_start` cannot be negative; the last row's
    time is the one until which the executor has committed itself.
    """
    first_ns = int(commitment.due_ns[0])
    message = JointTrajectory(joint_names=list(commitment.joint_names))
    message.header.stamp = time_message(first_ns)
    message.points = [
        JointTrajectoryPoint(positions=row, time_from_start=_duration(int(due) - first_ns))
        for row, due in zip(commitment.targets.tolist(), commitment.due_ns, strict=True)
    ]
    return message


def commitment_of(message: Any) -> Commitment:
    """Return a published commitment.

    Raises:
        ObservationError: The message is malformed.
    """
    chunk = chunk_of(message)
    if (fault := shape_fault(chunk)) is not None:
        raise ObservationError(fault.message)
    return Commitment(chunk.stamp_ns, chunk.joint_names, chunk.due_ns, chunk.targets)


class CommandWriter:
    """Writes one channel's commands as the messages that its controller takes.

    `joint_trajectory` is a single point for a joint_trajectory_controller, without a stamp, so
    that it begins when it arrives and never lies in the past; positions only, so that the
    controller stays at them when nothing follows. `float64_multi_array` is for the forward and
    group controllers of ros2_control, `twist` and `twist_stamped` for a base. `message` is any
    other message, by its fields; a `header` in it gets the time of the command.

    Args:
        joints: Names of the channel's joints.
        output: How its commands are published.

    Raises:
        ConfigurationError: The fields do not fit the message, or it is not installed.
    """

    def __init__(self, joints: tuple[str, ...], output: OutputParameters) -> None:
        self._output = output
        self._joints = list(joints)
        self._after = _duration(round(output.point_time_s * NANOSECONDS))
        self._fields: FieldWriter | None = None
        if output.kind == "message":
            self._kind = message_class(output.type_name)
            self._fields = FieldWriter(
                self._kind, output.fields, output.constants, "output_fields"
            )

    @property
    def message_type(self) -> type[Any]:
        """Type of the messages."""
        if self._fields is not None:
            return self._kind
        kinds: dict[str, type[Any]] = {
            "joint_trajectory": JointTrajectory,
            "float64_multi_array": Float64MultiArray,
            "twist": Twist,
            "twist_stamped": TwistStamped,
        }
        return kinds[self._output.kind]

    def write(self, values: Float64Array, now_ns: int) -> Any:
        """Return the message for a command.

        Args:
            values: float64, shape (J,).
            now_ns: ROS time, for messages with a stamp.
        """
        if self._fields is not None:
            message = self._fields.write(values)
            if hasattr(message, "header"):
                message.header.stamp = time_message(now_ns)
            return message
        if self._output.kind == "joint_trajectory":
            point = JointTrajectoryPoint(positions=values.tolist(), time_from_start=self._after)
            return JointTrajectory(joint_names=self._joints, points=[point])
        if self._output.kind == "float64_multi_array":
            return Float64MultiArray(data=values.tolist())
        twist = Twist()
        for axis, value in zip(self._output.axes, values.tolist(), strict=True):
            part, _, field = axis.partition(".")
            setattr(getattr(twist, part), field, value)
        if self._output.kind == "twist":
            return twist
        stamped = TwistStamped(twist=twist)
        stamped.header.stamp = time_message(now_ns)
        return stamped


def _duration(nanoseconds: int) -> Duration:
    return Duration(sec=nanoseconds // NANOSECONDS, nanosec=nanoseconds % NANOSECONDS)
