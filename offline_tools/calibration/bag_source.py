"""Observations of a rosbag2, assembled as the nodes assemble them, without a node.

Owns: `BagSource` and `BagInputs`. Must not import rclpy or torch; the buffer, the image and the
joint conversion are the nodes' own. They need the Python packages of the ROS messages.

A bag has no moment at which a policy would have looked, so an observation is taken as soon as
every camera has a frame that was not used, or before such a frame would be lost. The clock is the
newest stamp of the messages themselves: a bag recorded in simulation time, or across a jump of
the clock, is judged by its own times.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from groot_int8_ros.capture.selection import Candidate, candidate
from groot_int8_ros.errors import BagError, ConfigurationError, ObservationError
from groot_int8_ros.policy.policy import Policy
from groot_int8_ros.policy.types import JointSpec, Observation, UInt8Array
from groot_int8_ros.ros.images import load_bridge, rgb_from_compressed_image, rgb_from_image
from groot_int8_ros.ros.joints import JointStateReader, stamp_ns
from groot_int8_ros.ros.observation_buffer import Hold, ObservationBuffer, Snapshot, Stream
from groot_int8_ros.ros.topics import default_image_topic
from offline_tools.bags import messages
from offline_tools.bags.reading import Bag, open_bag
from offline_tools.calibration.run import Recorded, Skipped
from offline_tools.parameter_file import read_parameter_file

_JOINT_STATE = "joint_state"
_TRANSPORTS = ("raw", "compressed")


@dataclass(frozen=True)
class BagInputs:
    """What to read from a bag; the nodes' parameters of the same names.

    Attributes:
        values: Parameter name to value, of those that were given.
        instruction: Used until a message on the instruction topic replaces it.
    """

    values: Mapping[str, Any]
    instruction: str = ""

    @classmethod
    def read(cls, path: Path | None, instruction: str | None) -> BagInputs:
        """Take the parameters from a node's YAML file.

        Args:
            path: As given to the node with `--params-file`, or None for the defaults.
            instruction: Replaces the file's, if not None.

        Raises:
            ConfigurationError: The file is no parameter file.
        """
        values: dict[str, Any] = {}
        if path is not None:
            values = read_parameter_file(path)
        text = str(values.get("instruction", "")) if instruction is None else instruction
        return cls(values, text)

    def topic(self, name: str, default: str) -> str:
        """Return a topic's absolute name."""
        topic = str(self.values.get(name, default))
        return topic if topic.startswith("/") else f"/{topic}"

    def joints(self, key: str, joints: tuple[JointSpec, ...]) -> tuple[JointSpec, ...]:
        """Return a state key's joints with the file's names, units, signs and offsets.

        Raises:
            ConfigurationError: A list has another length than the key.
        """
        for column, field in (
            ("names", "name"),
            ("units", "unit"),
            ("signs", "sign"),
            ("offsets", "offset"),
        ):
            name = f"state_joints.{key}.{column}"
            given = self.values.get(name)
            if given is None:
                continue
            if not isinstance(given, list) or len(given) != len(joints):
                raise ConfigurationError(
                    f"parameter '{name}' must be a list of {len(joints)}, one for each dimension"
                )
            changed = zip(joints, given, strict=True)
            joints = tuple(replace(joint, **{field: value}) for joint, value in changed)
        return joints

    def limits(self, prefix: str) -> tuple[float | None, float | None, str]:
        """Return a stream's own age, its own skew and the prefix of the two parameters."""
        age_s, skew_s = (
            float(self.values.get(f"{prefix}.{name}", 0.0)) or None
            for name in ("max_age_s", "max_skew_s")
        )
        return age_s, skew_s, prefix


class BagSource:
    """The observations of a bag, numbered through."""

    def __init__(self, path: Path, policy: Policy, inputs: BagInputs) -> None:
        """Open a bag and see that it has what the policy needs.

        Raises:
            BagError: There is no bag, it is damaged, or a topic is missing.
            ConfigurationError: A parameter does not fit the bundle.
        """
        self._path = path
        self._policy = policy
        self._inputs = inputs
        self.name = f"bag {path.name}"
        self._bridge = load_bridge()[1]
        with open_bag(path) as bag:
            self._cameras = {
                camera.key: self._image_topic(bag, camera.key) for camera in policy.robot.cameras
            }
            self._joint_topic = inputs.topic("joint_state_topic", "joint_states")
            bag.select([*self._cameras.values(), self._joint_topic])
            self._types = {name: topic.type_name for name, topic in bag.topics.items()}
        self._instruction_topic = inputs.topic("instruction_topic", "instruction")
        self._check_types()
        self._sizes = {
            camera.key: (camera.height, camera.width) for camera in policy.robot.cameras
        }
        self._first_camera_topic = next(iter(self._cameras.values()))
        self._joint_states = JointStateReader(
            {key: inputs.joints(key, joints) for key, joints in policy.robot.state_joints.items()},
            self._joint_topic,
        )
        self.streams = (
            *(
                Stream(key, topic, True, *inputs.limits(f"cameras.{key}"))
                for key, topic in self._cameras.items()
            ),
            Stream(_JOINT_STATE, self._joint_topic, False, *inputs.limits("joint_state")),
        )
        # The defaults are the nodes', config/policy.yaml.
        self.max_age_s = float(inputs.values.get("max_observation_age_s", 0.5))
        self.max_skew_s = float(inputs.values.get("max_observation_skew_s", 0.1))

    def candidates(self, skipped: Skipped) -> Iterator[tuple[int, Candidate]]:
        """Yield the number and the features of every usable observation."""
        number = -1
        holds: dict[str, str] = {}
        for number, (snapshot, instruction) in enumerate(self._snapshots(holds)):
            try:
                self._policy.check_instruction(instruction)
                observation = self._observation(snapshot, instruction, {})
                yield number, candidate(self._policy.processor, observation)
            except ObservationError as error:
                skipped.note(self._text(snapshot), error)
        if number < 0:
            for reason, message in holds.items():
                skipped.note(self._path.name, ObservationError(f"{reason}: {message}"))

    def observations(self, chosen: frozenset[int]) -> Iterator[Recorded]:
        """Yield the chosen observations; their images are converted when they are read."""
        left = len(chosen)
        for number, (snapshot, instruction) in enumerate(self._snapshots({})):
            if number not in chosen:
                continue
            yield Recorded(
                source=self._text(snapshot),
                stamp_ns=snapshot.stamp_ns,
                read=partial(self._read, snapshot, instruction),
            )
            left -= 1
            if not left:
                return

    def _read(self, snapshot: Snapshot, instruction: str) -> Observation:
        images = {key: self._frame(key, snapshot.samples[key].message) for key in self._cameras}
        return self._observation(snapshot, instruction, images)

    def _observation(
        self, snapshot: Snapshot, instruction: str, images: dict[str, UInt8Array]
    ) -> Observation:
        return Observation(
            images=images,
            state=self._joint_states.read(snapshot.samples[_JOINT_STATE].message),
            instruction=instruction,
            stamp_ns=snapshot.stamp_ns,
        )

    def _text(self, snapshot: Snapshot) -> str:
        return f"{self._path.name} {self._first_camera_topic} {snapshot.stamp_ns}"

    def _snapshots(self, holds: dict[str, str]) -> Iterator[tuple[Snapshot, str]]:
        """Yield every observation's messages with the instruction in force.

        Args:
            holds: Filled with the reasons for which there was none at some time, and one example.
        """
        assembly = _Assembly(self, holds)
        streams: dict[str, list[str]] = {self._joint_topic: [_JOINT_STATE]}
        for key, topic in self._cameras.items():
            streams.setdefault(topic, []).append(key)
        topics = set(streams)
        instruction, previous_ns = self._inputs.instruction, None
        if self._instruction_topic in self._types:
            topics.add(self._instruction_topic)
        with open_bag(self._path) as bag:
            for topic, recorded_ns, data in bag.messages(topics):
                # Messages of one recording time belong together, in whatever order they stand.
                if recorded_ns != previous_ns and (found := assembly.complete()):
                    yield found, instruction
                previous_ns = recorded_ns
                message = self._deserialized(topic, data)
                if topic == self._instruction_topic:
                    instruction = message.data
                    continue
                for name in streams[topic]:
                    if found := assembly.before(name):
                        yield found, instruction
                    assembly.store(name, message)
            if found := assembly.complete() or assembly.last():
                yield found, instruction

    def _deserialized(self, topic: str, data: bytes) -> Any:
        try:
            return messages.TYPESTORE.deserialize_cdr(data, self._types[topic])
        except Exception as error:  # rosbags raises whatever the bytes make NumPy or struct raise
            raise BagError(
                f"{self._path}: a message on {topic} is no {self._types[topic]} "
                f"({type(error).__name__}: {error}); it is damaged: copy or record it again."
            ) from error

    def _frame(self, key: str, message: Any) -> UInt8Array:
        topic, camera = self._cameras[key], self._sizes[key]
        if self._types[topic] == messages.COMPRESSED_IMAGE_TYPE:
            return rgb_from_compressed_image(message, topic, camera)
        return rgb_from_image(message, topic, camera, self._bridge)

    def _image_topic(self, bag: Bag, key: str) -> str:
        given = self._inputs.values.get(f"cameras.{key}.topic")
        if given is not None:
            return self._inputs.topic(f"cameras.{key}.topic", "")
        transport = str(self._inputs.values.get(f"cameras.{key}.transport", "raw"))
        names = [f"/{default_image_topic(key, kind)}" for kind in (transport, *_TRANSPORTS)]
        return next((name for name in names if name in bag.topics), names[0])

    def _check_types(self) -> None:
        image_types = (messages.IMAGE_TYPE, messages.COMPRESSED_IMAGE_TYPE)
        wanted: list[tuple[str, tuple[str, ...]]] = [
            *((topic, image_types) for topic in self._cameras.values()),
            (self._joint_topic, (messages.JOINT_STATE_TYPE,)),
        ]
        if self._instruction_topic in self._types:
            wanted.append((self._instruction_topic, (messages.STRING_TYPE,)))
        for topic, types in wanted:
            if self._types[topic] not in types:
                raise BagError(
                    f"{self._path}: {topic} holds {self._types[topic]}, not {' or '.join(types)}. "
                    "Name the right topics in --params-file."
                )


class _Assembly:
    """The nodes' buffer, filled from a bag."""

    def __init__(self, source: BagSource, holds: dict[str, str]) -> None:
        self._limits = source.max_age_s, source.max_skew_s
        self._holds = holds
        self._buffer = ObservationBuffer(source.streams)
        self._cameras = {stream.name for stream in source.streams if stream.is_camera}
        # Cameras whose stored frame is in no observation yet.
        self._unused: set[str] = set()
        self._now_ns = 0
        self._epoch = 0

    def store(self, name: str, message: Any) -> None:
        stamp = stamp_ns(message.header)
        self._buffer.store(name, message, stamp)
        if self._buffer.epoch != self._epoch:
            self._epoch, self._now_ns = self._buffer.epoch, 0
            self._unused.clear()
        self._now_ns = max(self._now_ns, stamp)
        if name in self._cameras:
            self._unused.add(name)

    def before(self, name: str) -> Snapshot | None:
        """Return what would be lost if a message replaced the stored one."""
        return self._assembled() if name in self._unused else None

    def complete(self) -> Snapshot | None:
        """Return an observation if every camera has a new frame."""
        return self._assembled() if self._unused == self._cameras else None

    def last(self) -> Snapshot | None:
        """Return what is left at the end."""
        return self._assembled() if self._unused else None

    def _assembled(self) -> Snapshot | None:
        found = self._buffer.assemble(self._now_ns, *self._limits)
        if isinstance(found, Hold):
            self._holds.setdefault(found.reason, found.message)
            return None
        self._buffer.mark_used(found)
        self._unused.clear()
        return found
