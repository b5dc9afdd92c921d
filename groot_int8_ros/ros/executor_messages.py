"""Messages of the chunk executor: chunks in, commands and commitments out.

Owns: their conversion. Must not import rclpy or the policy: it works on messages alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from builtin_interfaces.msg import Duration
from geometry_msgs.msg import Twist, TwistStamped
from std_msgs.msg import Float64MultiArray
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from groot_int8_ros.control.chunks import TimedChunk, shape_fault
from groot_int8_ros.control.commitment import Commitment
from groot_int8_ros.control.types import NANOSECONDS, Float64Array
from groot_int8_ros.errors import ObservationError
from groot_int8_ros.ros.executor_parameters import OutputParameters
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
    group controllers of ros2_control, `twist` and `twist_stamped` for a base.

    Args:
        joints: Names of the channel's joints.
        output: How its commands are published.
    """

    def __init__(self, joints: tuple[str, ...], output: OutputParameters) -> None:
        self._output = output
        self._joints = list(joints)
        self._after = _duration(round(output.point_time_s * NANOSECONDS))

    @property
    def message_type(self) -> type[Any]:
        """Type of the messages."""
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
