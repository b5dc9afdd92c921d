"""From topics to observations: the path that the policy node and every recorder share.

Owns: the subscriptions of cameras and joint state, and the conversion of what they brought. Must
not import the policy's engines. The callbacks store the newest message and do nothing else; the
conversion happens in `read`, in the thread that asks for an observation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from rclpy.node import Node
from rclpy.qos import HistoryPolicy, QoSProfile, ReliabilityPolicy
from rclpy.wait_for_message import wait_for_message
from sensor_msgs.msg import CompressedImage, Image, JointState

from groot_int8_ros.errors import ObservationError
from groot_int8_ros.policy.types import Float32Array, JointSpec, Observation, UInt8Array
from groot_int8_ros.ros.images import load_bridge, rgb_from_compressed_image, rgb_from_image
from groot_int8_ros.ros.joints import JointStateReader, stamp_ns
from groot_int8_ros.ros.observation_buffer import ObservationBuffer, Snapshot, Stream
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


class ObservationStreams:
    """Subscribes to the policy's inputs and reads observations from them.

    Args:
        node: Where the subscriptions are made; `close` removes them.
        cameras: Topic and transport of each camera.
        state_joints: State key to its joints.
        parameters: Joint-state topic and quality of service.
        seen: Called with stream name, message and stamp of everything that arrives, in the
            executor's thread.

    Raises:
        ConfigurationError: No converter for images can be imported.
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
        self.bridge_name, self._bridge = load_bridge()
        self._qos = QoSProfile(
            history=HistoryPolicy.KEEP_LAST,
            depth=parameters.sensor_qos_depth,
            reliability=(
                ReliabilityPolicy.RELIABLE
                if parameters.sensor_qos_reliability == "reliable"
                else ReliabilityPolicy.BEST_EFFORT
            ),
        )
        inputs: list[tuple[str, Any, str, bool]] = [
            (
                camera_stream_name(camera.key),
                _message_type(camera),
                camera.topic,
                True,
            )
            for camera in cameras
        ]
        inputs.append((JOINT_STATE, JointState, parameters.joint_state_topic, False))
        self._subscriptions = [
            node.create_subscription(kind, topic, partial(self._store, name), self._qos)
            for name, kind, topic, _ in inputs
        ]
        self.buffer = ObservationBuffer(
            [
                Stream(name, subscription.topic_name, is_camera)
                for (name, _, _, is_camera), subscription in zip(
                    inputs, self._subscriptions, strict=True
                )
            ]
        )
        self._topics = {stream.name: stream.topic for stream in self.buffer.streams}
        self._joint_states = JointStateReader(state_joints, self._topics[JOINT_STATE])

    def read(self, snapshot: Snapshot, instruction: str) -> Observation:
        """Convert a snapshot. Call it from one thread only.

        Args:
            snapshot: From `buffer.assemble`.
            instruction: Goes into the observation as it is.

        Raises:
            ObservationError: A message cannot be used; it names topic and reason.
        """
        return Observation(
            images={camera.key: self._frame(camera, snapshot) for camera in self._cameras},
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
            if came:
                try:
                    self._rgb(camera, message)
                except ObservationError as error:
                    faults.append(str(error))
        return faults

    def close(self) -> None:
        """Remove the subscriptions."""
        for subscription in self._subscriptions:
            self._node.destroy_subscription(subscription)
        self._subscriptions.clear()

    def _store(self, name: str, message: Any) -> None:
        stamp = stamp_ns(message.header)
        self._seen(name, message, stamp)
        self.buffer.store(name, message, stamp)

    def _frame(self, camera: CameraParameters, snapshot: Snapshot) -> UInt8Array:
        name = camera_stream_name(camera.key)
        return self._rgb(camera, snapshot.samples[name].message)

    def _rgb(self, camera: CameraParameters, message: Any) -> UInt8Array:
        topic, size = self._topics[camera_stream_name(camera.key)], (camera.height, camera.width)
        if camera.transport == "compressed":
            return rgb_from_compressed_image(message, topic, size)
        return rgb_from_image(message, topic, size, self._bridge)
