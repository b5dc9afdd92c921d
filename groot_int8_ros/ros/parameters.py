"""Node parameters as frozen dataclasses.

Owns: every parameter's name, default, description and range, and the check of a change at run
time. Must not import the policy's engines. `config/policy.yaml` documents the same parameters for
users; a test keeps the two together.

Parameters of a bundle's cameras and joints have the bundle's keys in their names, so they are
declared when the bundle is known. Anything under those prefixes that the bundle does not have is
an error: a misspelt key would otherwise be ignored without a word.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar, get_args

from rcl_interfaces.msg import (
    FloatingPointRange,
    IntegerRange,
    ParameterDescriptor,
    SetParametersResult,
)
from rclpy.exceptions import InvalidTopicNameException, ParameterException
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.validate_topic_name import validate_topic_name

from groot_int8_ros.errors import ConfigurationError
from groot_int8_ros.policy.robot import RobotDescription
from groot_int8_ros.policy.types import CameraSpec, JointSpec, JointUnit
from groot_int8_ros.ros.topics import default_image_topic

JOINT_STATE_TYPE = "sensor_msgs/msg/JointState"
TRANSPORTS = ("raw", "compressed")
_UNITS = get_args(JointUnit)
# Parameters that rclpy declares for every node.
_RCLPY_NAMES = (
    *("use_sim_time", "start_type_description_service"),
    *("qos_overrides./clock.", "qos_overrides./parameter_events.", "qos_overrides./rosout."),
)


@dataclass(frozen=True)
class NodeParameters:
    """The parameters that do not depend on the bundle; `PARAMETERS` describes each.

    Attributes:
        bundle: Folder of the bundle.
        engine: Which engine runs the graphs.
        threads: CPU threads of the engine; 0 leaves the choice to it.
        seed: Seed of the noise.
        instruction: Task until a message replaces it.
        instruction_topic: Topic of `std_msgs/String` that replaces the instruction.
        joint_state_topic: Topic of the joint state.
        joint_state_type: Its message; `sensor_msgs/msg/JointState` or any other with `fields`.
        joint_state_fields: Of another message: lines `joint name = path.to[0].field`.
        chunk_topic: Topic on which chunks are published.
        committed_topic: Topic of what the executor will execute; empty for free inference.
        inference_rate_hz: Most inferences a second.
        max_observation_age_s: Oldest stamp that an observation may contain.
        max_observation_skew_s: Largest difference between two stamps of an observation.
        joint_state_max_age_s: As `max_observation_age_s`, of the joint state; 0 leaves it to that.
        joint_state_max_skew_s: As `max_observation_skew_s`, likewise.
        max_frozen_s: How long a camera's pixels may stay the same; 0 for ever.
        sensor_qos_reliability: `best_effort` or `reliable`.
        sensor_qos_depth: Queue of each sensor subscription.
        autostart: Whether the node configures and activates itself.
    """

    bundle: str
    engine: str
    threads: int
    seed: int
    instruction: str
    instruction_topic: str
    joint_state_topic: str
    joint_state_type: str
    joint_state_fields: Sequence[str]
    chunk_topic: str
    committed_topic: str
    inference_rate_hz: float
    max_observation_age_s: float
    max_observation_skew_s: float
    joint_state_max_age_s: float
    joint_state_max_skew_s: float
    max_frozen_s: float
    sensor_qos_reliability: str
    sensor_qos_depth: int
    autostart: bool

    @property
    def bundle_path(self) -> Path:
        """Folder of the bundle.

        Raises:
            ConfigurationError: The parameter is empty.
        """
        if not self.bundle:
            raise ConfigurationError(
                "parameter 'bundle' is empty; set it to the folder that `groot-int8 export` wrote"
            )
        return Path(self.bundle).expanduser()


@dataclass(frozen=True)
class CameraParameters:
    """Where a camera's frames come from.

    Attributes:
        key: The policy's name of the camera.
        topic: Topic of its images.
        transport: `raw` (`sensor_msgs/Image`) or `compressed` (`sensor_msgs/CompressedImage`).
        height: Frame height that the bundle was exported for.
        width: Frame width, likewise.
        max_age_s: As `NodeParameters.max_observation_age_s`, of this camera; 0 leaves it to that.
        max_skew_s: As `NodeParameters.max_observation_skew_s`, likewise.
    """

    key: str
    topic: str
    transport: str
    height: int
    width: int
    max_age_s: float = 0.0
    max_skew_s: float = 0.0


@dataclass(frozen=True)
class RobotParameters:
    """The bundle's robot description with the node's overrides.

    Attributes:
        cameras: In the bundle's order.
        state_joints: State key to its joints.
        action_joints: Action key to its joints.
    """

    cameras: tuple[CameraParameters, ...]
    state_joints: Mapping[str, tuple[JointSpec, ...]]
    action_joints: Mapping[str, tuple[JointSpec, ...]]


@dataclass(frozen=True)
class Declaration:
    """One parameter.

    Attributes:
        default: Also fixes the type.
        description: For `ros2 param describe`.
        low: Smallest number allowed.
        high: Largest number allowed.
        choices: All values allowed.
        is_topic: Whether the value must be a topic name.
        optional: Whether it may be empty instead.
        live: Whether it may change while the node is configured.
        stricter: Whether a change from one value to another only makes the node more careful:
            such a change is taken while it is configured, any other is refused.
        read_only: Whether it can only be set at start.
    """

    default: Any
    description: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    is_topic: bool = False
    optional: bool = False
    live: bool = False
    stricter: Callable[[Any, Any], bool] | None = None
    read_only: bool = False


PARAMETERS: Mapping[str, Declaration] = {
    "bundle": Declaration("", "Folder of the bundle that `groot-int8 export` wrote. Required."),
    "engine": Declaration("onnxruntime", "Engine that runs the bundle's graphs."),
    "threads": Declaration(
        0, "CPU threads inside the engine; 0 leaves the choice to it.", low=0, high=256
    ),
    "seed": Declaration(
        0,
        "Seed of the noise. A chunk depends on this, the observation and its stamp alone.",
        low=0,
        high=2**32 - 1,
        live=True,
    ),
    "instruction": Declaration(
        "",
        "Task in natural language. The newest of this parameter and the instruction topic counts; "
        "while it is empty the node holds.",
        live=True,
    ),
    "instruction_topic": Declaration(
        "instruction", "Topic of std_msgs/String that replaces the instruction.", is_topic=True
    ),
    "joint_state_topic": Declaration("joint_states", "Topic of the joint state.", is_topic=True),
    "joint_state_type": Declaration(
        JOINT_STATE_TYPE,
        "Message of the joint state; of any other than sensor_msgs/msg/JointState the fields are "
        "named by joint_state_fields.",
    ),
    "joint_state_fields": Declaration(
        [""], "Lines like 'left_hip = motor_state[0].q': where each joint's position stands."
    ),
    "chunk_topic": Declaration(
        "~/action_chunk",
        "Topic of trajectory_msgs/JointTrajectory on which action chunks are published.",
        is_topic=True,
    ),
    "committed_topic": Declaration(
        "chunk_executor/committed",
        "Topic of trajectory_msgs/JointTrajectory: what the executor will execute until the next "
        "chunk, which then begins with it; empty: every chunk is computed freely.",
        is_topic=True,
        optional=True,
    ),
    "inference_rate_hz": Declaration(
        5.0, "Most inferences a second.", low=0.01, high=200.0, live=True
    ),
    "max_observation_age_s": Declaration(
        0.5,
        "The node holds when a camera frame or joint state is older than this, in ROS time.",
        low=0.001,
        high=3600.0,
        live=True,
    ),
    "max_observation_skew_s": Declaration(
        0.1,
        "The node holds when the stamps of two inputs lie further apart than this.",
        low=0.0,
        high=3600.0,
        live=True,
    ),
    "joint_state.max_age_s": Declaration(
        0.0,
        "As max_observation_age_s, of the joint state alone; 0.0 leaves it to that.",
        low=0.0,
        high=3600.0,
    ),
    "joint_state.max_skew_s": Declaration(
        0.0,
        "As max_observation_skew_s, of the joint state alone; 0.0 leaves it to that.",
        low=0.0,
        high=3600.0,
    ),
    "max_frozen_s": Declaration(
        1.0,
        "The node holds when a camera's pixels have been the same for longer although its stamps "
        "advance; 0.0 switches the check off.",
        low=0.0,
        high=3600.0,
        live=True,
    ),
    "sensor_qos.reliability": Declaration(
        "best_effort",
        "Reliability of the camera and joint-state subscriptions.",
        choices=("best_effort", "reliable"),
    ),
    "sensor_qos.depth": Declaration(
        1,
        "Queue of each camera and joint-state subscription; only the newest message is used.",
        low=1,
        high=1000,
    ),
    "autostart": Declaration(
        False, "Whether the node configures and activates itself at start.", read_only=True
    ),
}

# Of each camera of the bundle, under `cameras.<key>`.
CAMERA_LIMITS: Mapping[str, Declaration] = {
    "max_age_s": Declaration(
        0.0,
        "As max_observation_age_s, of this camera; 0.0 leaves it to that.",
        low=0.0,
        high=3600.0,
    ),
    "max_skew_s": Declaration(
        0.0,
        "As max_observation_skew_s, of this camera; 0.0 leaves it to that.",
        low=0.0,
        high=3600.0,
    ),
}


class _Dataclass(Protocol):
    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]


P = TypeVar("P", bound=_Dataclass)


class ParameterSet(Generic[P]):
    """A node's parameters: declared, checked and kept up to date.

    The node must have been made with `automatically_declare_parameters_from_overrides`; that is
    how names that nobody declares can be found.

    Args:
        node: Whose parameters.
        is_configured: Tells whether a bundle is loaded; then only live parameters may change.
        changed: Called with the names of `declarations` that were set after the start.
        declarations: Every parameter that does not depend on the bundle.
        make: Makes the frozen dataclass from their values, with `_` for each dot of a name.

    Raises:
        ConfigurationError: A value has the wrong type or lies outside its range.
    """

    # Of the names that are declared when it is known what they are for, at configure.
    prefixes: ClassVar[tuple[str, ...]] = ("cameras.", "state_joints.", "action_joints.")

    def __init__(
        self,
        node: Node,
        is_configured: Callable[[], bool],
        changed: Callable[[Collection[str]], None],
        declarations: Mapping[str, Declaration],
        make: Callable[..., P],
    ) -> None:
        self._node = node
        self._is_configured = is_configured
        self._changed = changed
        self._declarations = declarations
        # What each name was last declared with: a value that differs was set by the user since.
        self._declared: dict[str, Any] = {}
        values = {}
        for name, declaration in declarations.items():
            values[name] = self._declare(name, declaration.default, _descriptor(declaration))
            fault = _fault(declaration, name, values[name])
            if fault:
                raise ConfigurationError(fault)
        self.current: P = make(**{_field(name): value for name, value in values.items()})
        node.add_on_set_parameters_callback(self._change)

    def declare_robot(self, robot: RobotDescription) -> RobotParameters:
        """Declare the parameters of a bundle's cameras and joints, and read them.

        Called again for another bundle, it takes that bundle's defaults and keeps what the user
        has set.

        Raises:
            ConfigurationError: A value is wrong, or names a camera or key that the bundle lacks.
        """
        parameters = RobotParameters(
            cameras=tuple(self._camera(camera) for camera in robot.cameras),
            state_joints=self._joint_groups("state_joints", robot.state_joints),
            action_joints=self._joint_groups("action_joints", robot.action_joints),
        )
        unknown = [name for name in self.strangers() if name.startswith(self.prefixes)]
        if unknown:
            known = [name for name in self._declared if name.startswith(self.prefixes)]
            raise ConfigurationError(
                f"parameter '{unknown[0]}' belongs to nothing in the bundle, which has "
                f"{', '.join(known)}; correct or remove it"
            )
        return parameters

    def _change(self, changes: list[Parameter[Any]]) -> SetParametersResult:
        configured = self._is_configured()
        updates = {}
        for change in changes:
            declaration = self._declarations.get(change.name)
            fixed = not declaration.live if declaration else change.name.startswith(self.prefixes)
            if configured and fixed and (reason := self._too_late(change, declaration)):
                return SetParametersResult(successful=False, reason=reason)
            if declaration:
                fault = _fault(declaration, change.name, change.value)
                if fault:
                    return SetParametersResult(successful=False, reason=fault)
                updates[_field(change.name)] = change.value
        self.current = dataclasses.replace(self.current, **updates)
        self._changed(updates.keys())
        return SetParametersResult(successful=True)

    def _too_late(self, change: Parameter[Any], declaration: Declaration | None) -> str | None:
        otherwise = "run the transitions deactivate and cleanup, set it, then configure"
        if declaration is None or declaration.stricter is None:
            return f"'{change.name}' takes effect when the node is configured: {otherwise}"
        now = getattr(self.current, _field(change.name))
        # A value of another type is for rclpy to refuse.
        if type(change.value) is not type(now) or declaration.stricter(now, change.value):
            return None
        return (
            f"'{change.name}' can only be made stricter than {now!r} while the node is "
            f"configured, not {change.value!r}; otherwise {otherwise}"
        )

    def _camera(self, camera: CameraSpec) -> CameraParameters:
        prefix = f"cameras.{camera.key}"
        transport = self._declare(
            f"{prefix}.transport",
            "raw",
            ParameterDescriptor(
                description="raw: sensor_msgs/Image; compressed: sensor_msgs/CompressedImage.",
                additional_constraints=f"One of {', '.join(TRANSPORTS)}.",
            ),
        )
        if transport not in TRANSPORTS:
            raise ConfigurationError(
                f"parameter '{prefix}.transport' must be one of {', '.join(TRANSPORTS)}, not "
                f"{transport!r}"
            )
        topic = self._declare(
            f"{prefix}.topic",
            default_image_topic(camera.key, transport),
            ParameterDescriptor(description=f"Topic of the images of camera {camera.key}."),
        )
        fault = _topic_fault(f"{prefix}.topic", topic)
        if fault:
            raise ConfigurationError(fault)
        limits = {
            name: self._declare(f"{prefix}.{name}", 0.0, _descriptor(declaration))
            for name, declaration in CAMERA_LIMITS.items()
        }
        return CameraParameters(
            camera.key, topic, transport, camera.height, camera.width, **limits
        )

    def _joints(self, prefix: str, joints: tuple[JointSpec, ...]) -> tuple[JointSpec, ...]:
        columns = {
            "names": ([joint.name for joint in joints], "Joint name of each dimension."),
            "units": (
                [joint.unit for joint in joints],
                f"Unit of the policy's value: {', '.join(_UNITS)}.",
            ),
            "signs": ([joint.sign for joint in joints], "1.0 or -1.0 for each dimension."),
            "offsets": (
                [joint.offset for joint in joints],
                "Added after sign and unit, in the policy's unit.",
            ),
        }
        values = {}
        for column, (default, description) in columns.items():
            name = f"{prefix}.{column}"
            value = list(
                self._declare(name, default, ParameterDescriptor(description=description))
            )
            if len(value) != len(joints):
                raise ConfigurationError(
                    f"parameter '{name}' has {len(value)} entries, but the bundle has "
                    f"{len(joints)} dimensions under this key; give one entry for each"
                )
            values[column] = value
        for column, allowed in (("units", _UNITS), ("signs", (1.0, -1.0))):
            bad = [value for value in values[column] if value not in allowed]
            if bad:
                raise ConfigurationError(
                    f"parameter '{prefix}.{column}' may hold {', '.join(map(str, allowed))}, not "
                    f"{bad[0]!r}"
                )
        names = values["names"]
        repeated = [name for name in dict.fromkeys(names) if names.count(name) > 1]
        if repeated or "" in names:
            raise ConfigurationError(
                f"parameter '{prefix}.names' "
                + (f"names {repeated[0]!r} twice" if repeated else "has an empty name")
                + "; each dimension needs a joint of its own"
            )
        if not all(map(math.isfinite, values["offsets"])):
            raise ConfigurationError(f"parameter '{prefix}.offsets' may hold finite numbers only")
        return tuple(
            JointSpec(name, unit, sign, offset)
            for name, unit, sign, offset in zip(
                names, values["units"], values["signs"], values["offsets"], strict=True
            )
        )

    def _joint_groups(
        self, prefix: str, groups: Mapping[str, tuple[JointSpec, ...]]
    ) -> dict[str, tuple[JointSpec, ...]]:
        return {key: self._joints(f"{prefix}.{key}", joints) for key, joints in groups.items()}

    def misnamed(self) -> list[str]:
        """Return the names that mean nothing to the node, whatever it is configured for."""
        return [name for name in self.strangers() if not name.startswith(self.prefixes)]

    def strangers(self) -> list[str]:
        """Return the names that were given to the node but are not declared, so far or at all."""
        # An empty prefix lists every parameter.
        return [
            name
            for name in sorted(self._node.get_parameters_by_prefix(""))
            if name not in self._declared and not name.startswith(_RCLPY_NAMES)
        ]

    @staticmethod
    def check_topic(name: str, topic: str) -> None:
        """Refuse a topic that is none.

        Raises:
            ConfigurationError: The parameter `name` does not hold a topic's name.
        """
        fault = _topic_fault(name, topic)
        if fault:
            raise ConfigurationError(fault)

    def _declare(self, name: str, default: Any, descriptor: ParameterDescriptor) -> Any:
        node = self._node
        kept = None
        if node.has_parameter(name):
            # Either a value from the command line or a file, which the declaration below takes
            # again and checks, or one of an earlier bundle.
            value = node.get_parameter(name).value
            if name in self._declared and value != self._declared[name]:
                kept = Parameter(name, value=value)
            node.undeclare_parameter(name)
        try:
            self._declared[name] = node.declare_parameter(name, default, descriptor).value
            if kept is None:
                return self._declared[name]
            result = node.set_parameters([kept])[0]
        except (ParameterException, TypeError, ValueError) as error:
            raise _explain(name, default, error) from error
        if not result.successful:
            raise ConfigurationError(f"parameter '{name}' is refused: {result.reason}")
        return kept.value


class Parameters(ParameterSet[NodeParameters]):
    """The policy node's; see `ParameterSet`."""

    def __init__(
        self,
        node: Node,
        is_configured: Callable[[], bool],
        changed: Callable[[Collection[str]], None],
    ) -> None:
        """Declare `PARAMETERS`; see `ParameterSet` for the arguments."""
        super().__init__(node, is_configured, changed, PARAMETERS, NodeParameters)


def _field(name: str) -> str:
    return name.replace(".", "_")


def _fault(declaration: Declaration, name: str, value: Any) -> str | None:
    if declaration.choices and value not in declaration.choices:
        return f"parameter '{name}' must be one of {', '.join(declaration.choices)}, not {value!r}"
    if not declaration.is_topic or (declaration.optional and value == ""):
        return None
    return _topic_fault(name, value)


def _topic_fault(name: str, topic: str) -> str | None:
    try:
        validate_topic_name(topic)
    except InvalidTopicNameException as error:
        return f"parameter '{name}' is not a topic name: {error}"
    return None


def _descriptor(declaration: Declaration) -> ParameterDescriptor:
    descriptor = ParameterDescriptor(
        description=declaration.description, read_only=declaration.read_only
    )
    if declaration.choices:
        descriptor.additional_constraints = f"One of {', '.join(declaration.choices)}."
    if declaration.low is not None and declaration.high is not None:
        if isinstance(declaration.default, int):
            descriptor.integer_range = [
                IntegerRange(
                    from_value=int(declaration.low), to_value=int(declaration.high), step=1
                )
            ]
        else:
            descriptor.floating_point_range = [
                FloatingPointRange(from_value=declaration.low, to_value=declaration.high)
            ]
    return descriptor


def _explain(name: str, default: Any, error: Exception) -> ConfigurationError:
    sample = default[:1] if isinstance(default, list) else default
    return ConfigurationError(
        f"parameter '{name}' is refused: {error} It is written like {sample!r}: 1 is an integer, "
        "1.0 is not, and text that looks like a number needs quotes. Correct it and start the "
        "node again."
    )
