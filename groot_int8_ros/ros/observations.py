"""From topics to observations: the path that the policy node and every recorder share.

Owns: the subscriptions of cameras and joint state, and the conversion of what they brought. Must
not import the policy's engines. The callbacks store the newest message and do nothing else; the
conversion happens in `read`, in the thread that asks for an observation.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from rclpy.node import Node
from rclpy.qos import HistoryPolicy, QoSProfile, ReliabilityPolicy
from rclpy.wait_for_message import wait_for_message
from sensor_msgs.msg import CompressedImage, Image, JointState

from groot_int8_ros.errors import FrozenImageError, ObservationError
from groot_int8_ros.policy.types import Float32Array, JointSpec, Observation, UInt8Array
from groot_int8_ros.ros.field_map import FieldStateReader, message_class, parse_joint_fields
from groot_int8_ros.ros.frozen_images import FrozenImageWatch
from groot_int8_ros.ros.images import load_bridge, rgb_from_compressed_image, rgb_from_image
from groot_int8_ros.ros.joints import JointStateReader, stamp_ns
from groot_int8_ros.ros.observation_buffer import (
    ObservationBuffer,
    Snapshot,
    Stream,
    StreamStatus,
)
from groot_int8_ros.ros.parameters import CameraParameters, NodeParameters

JOINT_STATE = "joint_state"

# Time for a new subscription to be found and to get a frame, all cameras together.
_FIRST_FRAMES_S = 1.0


def camera_stream_name(key: str) -> str:
    """Return the name of a camera's stream."""
    return f"camera {key}"


def _message_type(camera: CameraParameters) -> type[Any]:
    kinds: dict[str, type[Any]] = {"raw": Image, "compressed": CompressedImage}
    return kinds[camera.transport]


def _state_reader(
    parameters: NodeParameters,
    state_joints: Mapping[str, Sequence[JointSpec]],
    kind: type[Any],
    topic: str,
) -> JointStateReader | FieldStateReader:
    by_name = kind is JointState
    fields = parse_joint_fields(
        parameters.joint_state_fields, parameters.joint_state_type, found_by_name=by_name
    )
    if by_name:
        return JointStateReader(state_joints, topic)
    return FieldStateReader(state_joints, kind, fields, topic)


def _ros_name(kind: type[Any]) -> str:
    # sensor_msgs.msg._image -> sensor_msgs/msg/Image
    return "/".join([*kind.__module__.split(".")[:2], kind.__name__])


class ObservationStreams:
    """Subscribes to the policy's inputs and reads observations from them.

    Args:
        node: Where the subscriptions are made; `close` removes them.
        cameras: Topic and transport of each camera.
        state_joints: State key to its joints.
        parameters: Joint-state topic, its limits, and quality of service.
        seen: Called with stream name, message and stamp of everything that arrives, in the
            executor's thread.

    Attributes:
        max_frozen_s: `NodeParameters.max_frozen_s`; the node sets it when the parameter changes.

    Raises:
        ConfigurationError: No converter for images can be imported, or the fields of the joint
            state do not fit its message.
    """

    def __init__(
        self,
        node: Node,
        cameras: Sequence[CameraParameters],
        state_joints: Mapping[str, Sequence[JointSpec]],
        parameters: NodeParameters,
        seen: Callable[[str, Any, int], None] = lambda name, message, stamp: None,
    ) -> None:
        self._node = node
        self._seen = seen
        self._cameras = tuple(cameras)
        self.max_frozen_s = parameters.max_frozen_s
        self._camera_of = {camera_stream_name(camera.key): camera for camera in cameras}
        self._watches = {name: FrozenImageWatch() for name in self._camera_of}
        self._frame_ids = dict.fromkeys(self._camera_of, "")
        self.bridge_name, self._bridge = load_bridge()
        self._qos = self.qos_of(parameters)
        inputs = [
            (
                Stream(
                    camera_stream_name(camera.key),
                    camera.topic,
                    True,
                    # 0 in a parameter stands for the limit of all.
                    camera.max_age_s or None,
                    camera.max_skew_s or None,
                    f"cameras.{camera.key}",
                ),
                _message_type(camera),
            )
            for camera in cameras
        ]
        joint_state = Stream(
            JOINT_STATE,
            parameters.joint_state_topic,
            False,
            parameters.joint_state_max_age_s or None,
            parameters.joint_state_max_skew_s or None,
            "joint_state",
        )
        joint_state_class = message_class(parameters.joint_state_type)
        inputs.append((joint_state, joint_state_class))
        # Before anything is subscribed to: what follows may refuse the parameters.
        self._joint_states = _state_reader(
            parameters,
            state_joints,
            joint_state_class,
            node.resolve_topic_name(parameters.joint_state_topic),
        )
        self._subscriptions = [
            node.create_subscription(
                kind, stream.topic, partial(self._store, stream.name), self._qos
            )
            for stream, kind in inputs
        ]
        self.buffer = ObservationBuffer(
            [
                dataclasses.replace(stream, topic=subscription.topic_name)
                for (stream, _), subscription in zip(inputs, self._subscriptions, strict=True)
            ]
        )
        self._type_names = {stream.name: _ros_name(kind) for stream, kind in inputs}
        self._topics = {stream.name: stream.topic for stream in self.buffer.streams}

    @staticmethod
    def qos_of(parameters: NodeParameters) -> QoSProfile:
        """Return the quality of service that the parameters ask for."""
        return QoSProfile(
            history=HistoryPolicy.KEEP_LAST,
            depth=parameters.sensor_qos_depth,
            reliability=(
                ReliabilityPolicy.RELIABLE
                if parameters.sensor_qos_reliability == "reliable"
                else ReliabilityPolicy.BEST_EFFORT
            ),
        )

    def message_type_name(self, name: str) -> str:
        """Return the type of a stream's messages as the ROS graph has it."""
        return self._type_names[name]

    def fault(self, name: str, message: Any) -> str | None:
        """Say why one message of a stream cannot be used, or None if it can.

        Unlike `read`, this looks at the message alone. Call it from the thread that reads.
        """
        try:
            if name == JOINT_STATE:
                self._joint_states.read(message)
            else:
                self._rgb(self._camera_of[name], message)
        except ObservationError as error:
            return str(error)
        return None

    def read(self, snapshot: Snapshot, instruction: str) -> Observation:
        """Convert a snapshot. Call it from one thread only.

        Args:
            snapshot: From `buffer.assemble`.
            instruction: Goes into the observation as it is.

        Raises:
            FrozenImageError: A camera shows the same pixels for longer than `max_frozen_s`.
            ObservationError: A message cannot be used; it names topic and reason.
        """
        images = {camera.key: self._frame(camera, snapshot) for camera in self._cameras}
        frozen = [name for name in self._watches if self._is_frozen(name)]
        if frozen:
            raise FrozenImageError(
                "; ".join(
                    f"{name} ({self._topics[name]}) shows the same pixels for "
                    f"{self._watches[name].same_pixels_s:.3f} s although its stamps advance"
                    for name in frozen
                )
                + f", longer than max_frozen_s = {self.max_frozen_s:g}: check the camera and its "
                "driver; for pictures that may really stand still set max_frozen_s to 0.0"
            )
        return Observation(
            images=images,
            state=self.read_state(snapshot),
            instruction=instruction,
            stamp_ns=snapshot.stamp_ns,
        )

    def read_state(self, snapshot: Snapshot) -> dict[str, Float32Array]:
        """Convert a snapshot's joint state alone, as `read` does.

        Raises:
            ObservationError: The message cannot be used; the error names topic and reason.
        """
        return self._joint_states.read(snapshot.samples[JOINT_STATE].message)

    def unusable_frames(self) -> list[str]:
        """Say which cameras send frames that the policy cannot use, of another size for example.

        Only what can be seen now is judged: cameras whose publisher is known already and sends a
        frame within a moment. The others are judged when they are used.
        """
        faults = []
        end_s = time.monotonic() + _FIRST_FRAMES_S
        for camera in self._cameras:
            left_s = end_s - time.monotonic()
            topic = self._topics[camera_stream_name(camera.key)]
            if left_s <= 0 or not self._node.count_publishers(topic):
                continue
            came, message = wait_for_message(
                _message_type(camera),
                self._node,
                camera.topic,
                qos_profile=self._qos,
                time_to_wait=left_s,
            )
            if came and (fault := self.fault(camera_stream_name(camera.key), message)):
                faults.append(fault)
        return faults

    def status(self) -> list[StreamStatus]:
        """Return what is known of each stream; may be called from any thread."""
        return [
            dataclasses.replace(
                status,
                same_pixels_s=self._watches[status.stream.name].same_pixels_s,
                is_frozen=self._is_frozen(status.stream.name),
                frame_id=self._frame_ids[status.stream.name],
                looks_like=self._looks_like(status.stream.name),
            )
            if status.stream.is_camera
            else status
            for status in self.buffer.status()
        ]

    def close(self) -> None:
        """Remove the subscriptions."""
        for subscription in self._subscriptions:
            self._node.destroy_subscription(subscription)
        self._subscriptions.clear()

    def _store(self, name: str, message: Any) -> None:
        # A message of another type may have no header: then its arrival has to do.
        if hasattr(message, "header"):
            stamp = stamp_ns(message.header)
        else:
            stamp = int(self._node.get_clock().now().nanoseconds)
        if name in self._frame_ids:
            self._frame_ids[name] = message.header.frame_id
        self._seen(name, message, stamp)
        self.buffer.store(name, message, stamp)

    def _frame(self, camera: CameraParameters, snapshot: Snapshot) -> UInt8Array:
        name = camera_stream_name(camera.key)
        sample = snapshot.samples[name]
        rgb = self._rgb(camera, sample.message)
        self._watches[name].see(rgb, sample.stamp_ns)
        return rgb

    def _looks_like(self, name: str) -> str:
        """Return the other camera that a stream's frame_id is named after, or nothing."""
        frame, own = self._frame_ids[name].lower(), self._camera_of[name].key
        others = [camera.key for camera in self._cameras if camera.key.lower() in frame]
        return others[0] if others and own not in others else ""

    def _is_frozen(self, name: str) -> bool:
        return 0.0 < self.max_frozen_s < self._watches[name].same_pixels_s

    def _rgb(self, camera: CameraParameters, message: Any) -> UInt8Array:
        topic, size = self._topics[camera_stream_name(camera.key)], (camera.height, camera.width)
        if camera.transport == "compressed":
            return rgb_from_compressed_image(message, topic, size)
        return rgb_from_image(message, topic, size, self._bridge)
