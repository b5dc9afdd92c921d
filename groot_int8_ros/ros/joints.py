"""Joint states to the policy's state, action chunks to joint trajectories and back.

Owns: the pairing of joint names with state and action dimensions. Must not import rclpy: it works
on messages alone, so a bag reader uses it too. The arithmetic of units, signs and offsets is
`groot_int8_ros.policy.robot`'s, the same for the robot and for recorded data.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from builtin_interfaces.msg import Duration, Time
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from groot_int8_ros.errors import ConfigurationError, EngineError, ObservationError
from groot_int8_ros.policy.robot import joint_to_policy, policy_to_joint
from groot_int8_ros.policy.types import ActionChunk, Float32Array, JointSpec

_NANOSECONDS = 1_000_000_000


def time_message(stamp_ns: int) -> Time:
    """Return nanoseconds as `builtin_interfaces/Time`."""
    return Time(sec=stamp_ns // _NANOSECONDS, nanosec=stamp_ns % _NANOSECONDS)


def stamp_ns(header: Any) -> int:
    """Return a header's stamp in nanoseconds."""
    return int(header.stamp.sec) * _NANOSECONDS + int(header.stamp.nanosec)


class JointStateReader:
    """Reads the policy's state from `sensor_msgs/JointState` by joint name.

    Drivers keep their order of names from message to message, so where each joint stands is
    looked up once and again only when the order changes. Not for use from several threads.

    Args:
        state_joints: State key to its joints, in the order of the key's dimensions.
        topic: Named in errors.
    """

    def __init__(self, state_joints: Mapping[str, Sequence[JointSpec]], topic: str) -> None:
        self._joints = {key: tuple(joints) for key, joints in state_joints.items()}
        self._topic = topic
        self._names: list[str] = []
        self._indices: dict[str, list[int]] = {}

    def read(self, message: Any) -> dict[str, Float32Array]:
        """Return the state, key by key, in the checkpoint's units.

        Args:
            message: A `sensor_msgs/JointState`, its joints in any order; joints that the policy
                does not use are ignored.

        Returns:
            State key to float32, shape (D,).

        Raises:
            ObservationError: A joint is missing, named twice, without a position or not finite.
        """
        names = message.name
        if not self._indices or names != self._names:
            self._index(list(names))
        positions = np.asarray(message.position, np.float64)
        if positions.size != len(names):
            raise ObservationError(
                f"joint state on {self._topic}: {len(names)} names but {positions.size} positions"
                f"{_list(': without one are', list(names)[positions.size :])}; the driver has to "
                "publish a position for each joint."
            )
        state = {}
        for key, indices in self._indices.items():
            joints = self._joints[key]
            with np.errstate(over="ignore"):
                values = joint_to_policy(joints, positions[indices].tolist()).astype(np.float32)
            bad = [joints[i].name for i in np.flatnonzero(~np.isfinite(values))]
            if bad:
                raise ObservationError(
                    f"joint state on {self._topic}: the position of {', '.join(bad)} is not a "
                    "finite number; the policy is not run on it. Check the joint's encoder and "
                    "driver."
                )
            state[key] = values
        return state

    def _index(self, names: list[str]) -> None:
        repeated = [name for name, count in Counter(names).items() if count > 1]
        if repeated:
            raise ObservationError(
                f"joint state on {self._topic}: named more than once: {', '.join(repeated)}; two "
                "sources may be merged wrongly."
            )
        place = {name: index for index, name in enumerate(names)}
        missing = list(
            dict.fromkeys(
                joint.name
                for joints in self._joints.values()
                for joint in joints
                if joint.name not in place
            )
        )
        if missing:
            raise ObservationError(
                f"joint state on {self._topic}: missing {', '.join(missing)}; the message has "
                f"{', '.join(names) or 'no names'}. Map the names with the parameters "
                "state_joints.<key>.names, or publish all joints in one message."
            )
        self._indices = {
            key: [place[joint.name] for joint in joints] for key, joints in self._joints.items()
        }
        self._names = names


class TrajectoryWriter:
    """Turns action chunks into `trajectory_msgs/JointTrajectory`.

    Args:
        action_joints: Action key to its joints, in the order of the key's dimensions.

    Raises:
        ConfigurationError: Two dimensions would command the same joint.
    """

    def __init__(self, action_joints: Mapping[str, Sequence[JointSpec]]) -> None:
        self._joints = {key: tuple(joints) for key, joints in action_joints.items()}
        self.joint_names = [joint.name for joints in self._joints.values() for joint in joints]
        repeated = [name for name, count in Counter(self.joint_names).items() if count > 1]
        if repeated:
            raise ConfigurationError(
                f"the action keys {', '.join(self._joints)} command more than once: "
                f"{', '.join(repeated)}; give each dimension a joint of its own with the "
                "parameters action_joints.<key>.names."
            )

    def write(self, chunk: ActionChunk) -> JointTrajectory:
        """Return a chunk as a trajectory in the units of `JointState`.

        Args:
            chunk: Its `stamp_ns` becomes the header's stamp, its `time_from_start_s` the points'
                times.

        Raises:
            EngineError: A target is not a finite number.
        """
        positions = np.concatenate(
            [
                policy_to_joint(joints, chunk.actions[key].astype(np.float64))
                for key, joints in self._joints.items()
            ],
            axis=1,
        )
        finite = np.isfinite(positions).all(axis=0)
        if not finite.all():
            bad = [name for name, good in zip(self.joint_names, finite, strict=True) if not good]
            raise EngineError(
                f"the policy's targets for {', '.join(bad)} are not finite numbers; nothing is "
                "published. Run `groot-int8 verify` on the bundle."
            )
        trajectory = JointTrajectory(joint_names=list(self.joint_names))
        trajectory.header.stamp = time_message(chunk.stamp_ns)
        trajectory.points = [
            JointTrajectoryPoint(positions=row, time_from_start=_duration(seconds))
            for row, seconds in zip(
                positions.tolist(), chunk.time_from_start_s.tolist(), strict=True
            )
        ]
        return trajectory


class TrajectoryReader:
    """Turns published trajectories back into action chunks: the inverse of `TrajectoryWriter`.

    Args:
        action_joints: Action key to its joints, in the order of the key's dimensions.
        topic: Named in errors.
    """

    def __init__(self, action_joints: Mapping[str, Sequence[JointSpec]], topic: str) -> None:
        self._joints = {key: tuple(joints) for key, joints in action_joints.items()}
        self._topic = topic

    def read(self, message: Any) -> dict[str, Float32Array]:
        """Return the targets, key by key, in the checkpoint's units.

        Args:
            message: A `trajectory_msgs/JointTrajectory`, its joints in any order.

        Returns:
            Action key to float32, shape (steps, D).

        Raises:
            ObservationError: A joint is missing, or a point lacks positions.
        """
        place = {name: index for index, name in enumerate(message.joint_names)}
        missing = [
            joint.name
            for joints in self._joints.values()
            for joint in joints
            if joint.name not in place
        ]
        widths = {len(point.positions) for point in message.points}
        if missing or widths != {len(message.joint_names)}:
            raise ObservationError(
                f"chunk on {self._topic}: "
                + (f"missing {', '.join(missing)}" if missing else "points without positions")
                + ". It comes from a policy node with another bundle or other joint names."
            )
        positions = np.array([point.positions for point in message.points], np.float64)
        return {
            key: np.stack(
                [
                    joint_to_policy(joints, row[[place[joint.name] for joint in joints]].tolist())
                    for row in positions
                ]
            ).astype(np.float32)
            for key, joints in self._joints.items()
        }


def _duration(seconds: float) -> Duration:
    nanoseconds = round(seconds * _NANOSECONDS)
    return Duration(sec=nanoseconds // _NANOSECONDS, nanosec=nanoseconds % _NANOSECONDS)


def _list(introduction: str, names: Sequence[str]) -> str:
    return f"{introduction} {', '.join(names)}" if names else ""
