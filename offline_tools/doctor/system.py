"""What can be seen of a running system over DDS, with nodes of its own that only listen.

Owns: finding the policy node and its parameters, listening to its inputs with its own reading
code, and asking publishers for their quality of service. Must not import torch or load an engine.
Nothing is published and nothing is changed; the services that are called only answer.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from lifecycle_msgs.srv import GetState
from rcl_interfaces.srv import GetParameters, ListParameters
from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.parameter import Parameter, parameter_value_to_python
from rclpy.qos import QoSCompatibility, qos_check_compatible
from rosgraph_msgs.msg import Clock

from groot_int8_ros.errors import GrootError
from groot_int8_ros.policy.robot import RobotDescription
from groot_int8_ros.ros.diagnostics import HARDWARE_ID
from groot_int8_ros.ros.observation_buffer import (
    Hold,
    StreamStatus,
    stamp_fault,
)
from groot_int8_ros.ros.observations import ObservationStreams
from groot_int8_ros.ros.parameters import NodeParameters, Parameters
from offline_tools.doctor.findings import Finding, Level

_ANSWER_S = 5.0
# A chunk is never made more often than frames come; a tenth is left to jitter.
_RATE_TOLERANCE = 0.9
_NANOSECONDS = 1e9
# Declared by rclpy itself; the values of others must not be given to our node.
_RCLPY_PREFIXES = ("qos_overrides.", "start_type_description_service")

T = TypeVar("T")


@dataclass(frozen=True)
class _Arrival:
    at_s: float
    stamp_ns: int
    now_ns: int


class System:
    """The running system; a context manager that ends its nodes.

    Args:
        node: Fully qualified name of the policy node.
        listen_s: How long to listen to the topics.
    """

    def __init__(self, node: str, listen_s: float) -> None:
        self._namespace, _, self._name = f"/{node.lstrip('/')}".rpartition("/")
        self._namespace = self._namespace or "/"
        self._listen_s = listen_s
        self._context = Context()
        rclpy.init(args=[], context=self._context)
        self._executor = SingleThreadedExecutor(context=self._context)
        self._nodes: list[Node] = []
        self._probe = self._node("groot_doctor")
        self._is_there = False
        self._state = "unknown"

    def __enter__(self) -> System:
        """Begin."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the nodes."""
        self._executor.shutdown()
        for node in self._nodes:
            node.destroy_node()
        rclpy.shutdown(context=self._context)

    @property
    def _full_name(self) -> str:
        return f"{self._namespace.rstrip('/')}/{self._name}"

    @property
    def is_loaded(self) -> bool:
        """Whether the policy node has loaded its bundle; known after `parameters`."""
        return self._state in {"inactive", "active"}

    def parameters(self) -> tuple[dict[str, Any], list[Finding]]:
        """Ask the policy node for its parameters.

        Returns:
            Those it has, empty where it is not there, and what was found.
        """
        names = self._probe.get_node_names_and_namespaces
        self._is_there = self._until(
            lambda: (self._name, self._namespace) in names(), self._listen_s
        )
        if not self._is_there:
            others = sorted(
                f"{namespace.rstrip('/')}/{name}"
                for name, namespace in names()
                if name != "groot_doctor"
            )
            return {}, [
                Finding(
                    Level.WARNING,
                    "policy node",
                    f"{self._full_name} is not running (nodes: {', '.join(others) or 'none'})",
                    "start it, give its name with --node, or compare ROS_DOMAIN_ID and "
                    "ROS_AUTOMATIC_DISCOVERY_RANGE",
                )
            ]
        listed = self._ask(ListParameters, "list_parameters", ListParameters.Request())
        if listed is None:
            return {}, [self._silent()]
        wanted = list(listed.result.names)
        values = self._ask(GetParameters, "get_parameters", GetParameters.Request(names=wanted))
        if values is None:
            return {}, [self._silent()]
        found = {
            name: parameter_value_to_python(value)
            for name, value in zip(wanted, values.values, strict=True)
        }
        return found, [
            Finding(Level.OK, "policy node", f"{self._full_name} runs and answers"),
            self._lifecycle(),
        ]

    def examine(
        self, values: Mapping[str, Any], robot: RobotDescription | None
    ) -> Iterator[Finding]:
        """Listen for a while and judge what was heard.

        Args:
            values: The policy node's parameters.
            robot: The bundle's, or None where it could not be read; then the inputs are unknown.
        """
        given = {
            name: value
            for name, value in values.items()
            if value is not None and not name.startswith(_RCLPY_PREFIXES)
        }
        node = self._node(
            "groot_doctor_ear",
            namespace=self._namespace,
            parameter_overrides=[Parameter(name, value=value) for name, value in given.items()],
            automatically_declare_parameters_from_overrides=True,
        )
        ear = Ear(node, bool(given.get("use_sim_time", False)))
        inputs = None
        if robot is None:
            yield Finding(
                Level.UNCHECKED, "inputs", "without a bundle nobody knows what they must be"
            )
        else:
            try:
                parameters = Parameters(node, lambda: False, lambda names: None)
                inputs = Inputs(node, robot, parameters)
                strangers = parameters.strangers()
            except GrootError as error:
                strangers = []
                yield Finding(Level.FAULT, "parameters", str(error))
            for name in strangers:
                yield Finding(
                    Level.WARNING, "parameters", f"'{name}' is not one of the node's", "correct it"
                )
        self._until(lambda: False, self._listen_s)
        yield from ear.clock_findings(self._listen_s)
        if inputs is not None:
            subscribed = self._subscribed_topics()
            yield from inputs.findings(self._name, subscribed)
            yield from self._together(inputs)
            yield self._chunks(node, str(given.get("chunk_topic", "~/action_chunk")))
        yield from ear.node_findings(self._full_name.lstrip("/"), self._is_there, self._listen_s)

    def _together(self, inputs: Inputs) -> Iterator[Finding]:
        """Judge the streams as one observation, if each is sound by itself."""
        if inputs.has_fault:
            return
        last: list[Hold] = []

        def assembled() -> bool:
            hold = inputs.assemble()
            last[:] = [hold] if hold else []
            return not hold

        if self._until(assembled, self._listen_s):
            yield Finding(Level.OK, "observation", "all inputs together make one")
        else:
            yield Finding(
                Level.FAULT,
                "observation",
                f"never complete: {last[0].reason}: {last[0].message}",
                "synchronise the drivers' clocks, or allow more with the parameter that is named",
            )

    def _chunks(self, node: Node, topic: str) -> Finding:
        topic = node.resolve_topic_name(topic.replace("~", self._full_name, 1))
        listeners = [info.node_name for info in node.get_subscriptions_info_by_topic(topic)]
        if listeners:
            return Finding(Level.OK, "action chunks", f"{', '.join(listeners)} listens to {topic}")
        return Finding(
            Level.WARNING,
            "action chunks",
            f"nobody listens to {topic}",
            "start chunk_executor_node, or set its parameter chunk_topic to this name",
        )

    def _subscribed_topics(self) -> set[str] | None:
        """What the policy node listens to, or None while it is not there or not configured."""
        if not self.is_loaded:
            return None
        topics = self._probe.get_subscriber_names_and_types_by_node(self._name, self._namespace)
        return {name for name, _ in topics}

    def _lifecycle(self) -> Finding:
        answer = self._ask(GetState, "get_state", GetState.Request())
        label = answer.current_state.label if answer is not None else "unknown"
        self._state = label
        if label == "active":
            return Finding(Level.OK, "policy node", "active")
        return Finding(
            Level.WARNING,
            "policy node",
            f"{label}: it publishes nothing",
            f"ros2 lifecycle set {self._full_name} configure, then activate (or autostart: true)",
        )

    def _silent(self) -> Finding:
        return Finding(
            Level.FAULT,
            "policy node",
            f"{self._full_name} is there but has not answered a service for {_ANSWER_S:g} s",
            "it may be loading (see its log and /diagnostics); otherwise it hangs: restart it",
        )

    def _ask(self, kind: Any, service: str, request: Any) -> Any:
        client: Any = self._probe.create_client(kind, f"{self._full_name}/{service}")
        # The answer to a first request is lost where the server has not discovered the client
        # yet, so the question, which changes nothing, is asked again.
        futures: list[Any] = []
        end_s = time.monotonic() + _ANSWER_S
        while time.monotonic() < end_s:
            if client.service_is_ready():
                futures.append(client.call_async(request))
            self._until(lambda: any(future.done() for future in futures), 1.0)
            done = [future for future in futures if future.done()]
            if done:
                return done[0].result()
        return None

    def _node(self, name: str, **options: Any) -> Node:
        node = Node(name, context=self._context, **options)
        self._nodes.append(node)
        self._executor.add_node(node)
        return node

    def _until(self, met: Callable[[], bool], seconds: float) -> bool:
        end_s = time.monotonic() + seconds
        while not met():
            left_s = end_s - time.monotonic()
            if left_s <= 0:
                return False
            self._executor.spin_once(timeout_sec=min(left_s, 0.1))
        return True


class Ear:
    """Listens to /clock and /diagnostics.

    Args:
        node: Where the subscriptions are made.
        use_sim_time: Whether the policy node lives in simulated time.
    """

    def __init__(self, node: Node, use_sim_time: bool) -> None:
        self._node = node
        self._use_sim_time = use_sim_time
        self._clocks_ns: list[int] = []
        self._messages: dict[str, int] = defaultdict(int)
        self._statuses: dict[str, dict[str, DiagnosticStatus]] = defaultdict(dict)
        node.create_subscription(Clock, "/clock", self._on_clock, 10)
        node.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 100)

    def _on_clock(self, message: Clock) -> None:
        self._clocks_ns.append(message.clock.sec * 1_000_000_000 + message.clock.nanosec)

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        told = set()
        for status in message.status:
            if status.hardware_id == HARDWARE_ID:
                node, _, subject = status.name.partition(": ")
                self._statuses[node][subject] = status
                told.add(node)
        for node in told:
            self._messages[node] += 1

    def clock_findings(self, listened_s: float) -> Iterator[Finding]:
        """Judge /clock against `use_sim_time`."""
        publishers = [i.node_name for i in self._node.get_publishers_info_by_topic("/clock")]
        if not self._use_sim_time:
            if publishers:
                yield Finding(
                    Level.WARNING,
                    "clock",
                    f"use_sim_time is false, but {', '.join(publishers)} publishes /clock",
                    "set use_sim_time to true for a bag or a simulator, or stop that publisher",
                )
            else:
                yield Finding(Level.OK, "clock", "system time, and nobody publishes /clock")
        elif not self._clocks_ns:
            yield Finding(
                Level.FAULT,
                "clock",
                f"use_sim_time is true, but nothing came on /clock in {listened_s:g} s",
                "play the bag with --clock, start the simulator, or set use_sim_time to false",
            )
        elif len(set(self._clocks_ns)) == 1:
            yield Finding(
                Level.FAULT, "clock", "/clock stands still", "go on with the bag or simulation"
            )
        else:
            yield Finding(Level.OK, "clock", f"/clock runs, {len(self._clocks_ns)} messages")

    def node_findings(
        self, policy_node: str, is_there: bool, listened_s: float
    ) -> Iterator[Finding]:
        """Judge what our nodes tell of themselves."""
        if is_there and policy_node not in self._messages:
            yield Finding(
                Level.FAULT,
                f"heartbeat of {policy_node}",
                f"nothing came on /diagnostics in {listened_s:g} s, and once a second is due",
                "the node hangs, or another middleware or domain is between: see its log",
            )
        for node, count in sorted(self._messages.items()):
            yield Finding(
                Level.OK, f"heartbeat of {node}", f"{count} messages in {listened_s:g} s"
            )
            for subject, status in self._statuses[node].items():
                if status.level == DiagnosticStatus.OK:
                    continue
                level = Level.FAULT if status.level == DiagnosticStatus.ERROR else Level.WARNING
                yield Finding(level, f"{node} says of {subject}", status.message)


class Inputs:
    """Listens to the policy's inputs with the node's own reading code.

    Args:
        node: Has the policy node's parameters, namespace and clock.
        robot: The bundle's.
        parameters: Of that node.

    Raises:
        GrootError: A parameter does not fit the bundle.
    """

    def __init__(self, node: Node, robot: RobotDescription, parameters: Parameters) -> None:
        self._node = node
        self._parameters: NodeParameters = parameters.current
        described = parameters.declare_robot(robot)
        self._arrivals: dict[str, list[_Arrival]] = defaultdict(list)
        self._newest: dict[str, Any] = {}
        # Best effort hears every publisher; whether the node would is judged by itself.
        hearing = dataclasses.replace(self._parameters, sensor_qos_reliability="best_effort")
        self._streams = ObservationStreams(
            node, described.cameras, described.state_joints, hearing, self._seen
        )
        self._wanted_qos = ObservationStreams.qos_of(self._parameters)
        self.has_fault = False

    def _seen(self, name: str, message: Any, stamp: int) -> None:
        self._arrivals[name].append(_Arrival(time.monotonic(), stamp, self._now_ns()))
        self._newest[name] = message

    def _now_ns(self) -> int:
        return int(self._node.get_clock().now().nanoseconds)

    def assemble(self) -> Hold | None:
        """Return why the newest messages make no observation, or None if they do."""
        found = self._streams.buffer.assemble(
            self._now_ns(),
            self._parameters.max_observation_age_s,
            self._parameters.max_observation_skew_s,
        )
        return found if isinstance(found, Hold) else None

    def findings(self, policy_node: str, subscribed: set[str] | None) -> Iterator[Finding]:
        """Judge every stream.

        Args:
            policy_node: Its name, to find its subscriptions among others.
            subscribed: Topics that it listens to, or None if that is unknown.
        """
        for status in self._streams.status():
            found = list(self._stream(status, policy_node, subscribed))
            self.has_fault |= any(finding.level is Level.FAULT for finding in found)
            yield from found

    def _stream(
        self, status: StreamStatus, policy_node: str, subscribed: set[str] | None
    ) -> Iterator[Finding]:
        stream = status.stream
        kind = self._streams.message_type_name(stream.name)
        publishers = self._node.get_publishers_info_by_topic(stream.topic)
        setting = f"{stream.limits}.topic" if stream.is_camera else "joint_state_topic"
        if not publishers:
            others = sorted(
                name
                for name, types in self._node.get_topic_names_and_types()
                if kind in types and self._node.count_publishers(name)
            )
            yield Finding(
                Level.FAULT,
                stream.name,
                f"nobody publishes {stream.topic}",
                f"start its driver, or set {setting}"
                + (f"; {kind} is published on {', '.join(others)}" if others else ""),
            )
            return
        wrong = sorted({info.topic_type for info in publishers} - {kind})
        if wrong:
            transport = f", or set {stream.limits}.transport" if stream.is_camera else ""
            yield Finding(
                Level.FAULT,
                stream.name,
                f"{stream.topic} carries {', '.join(wrong)}, and the node expects {kind}",
                f"set {setting} to the right topic{transport}",
            )
            return
        if len(publishers) > 1:
            yield Finding(
                Level.WARNING,
                stream.name,
                f"{len(publishers)} publishers on {stream.topic}: "
                + ", ".join(info.node_name for info in publishers),
                "stop all but one: their messages would alternate",
            )
        yield from self._quality(stream.name, stream.topic, publishers, policy_node)
        if subscribed is not None and stream.topic not in subscribed:
            yield Finding(
                Level.WARNING,
                stream.name,
                f"{policy_node} does not listen to {stream.topic}",
                f"where its topic was remapped, set {setting} instead",
            )
        yield from self._content(status)

    def _quality(
        self, name: str, topic: str, publishers: Sequence[Any], policy_node: str
    ) -> Iterator[Finding]:
        ours = [
            info.qos_profile
            for info in self._node.get_subscriptions_info_by_topic(topic)
            if info.node_name == policy_node
        ]
        for publisher in publishers:
            for wanted in ours or [self._wanted_qos]:
                compatible, reason = qos_check_compatible(publisher.qos_profile, wanted)
                if compatible == QoSCompatibility.ERROR:
                    yield Finding(
                        Level.FAULT,
                        name,
                        f"{publisher.node_name} and the node cannot connect on {topic}: {reason}",
                        "set sensor_qos.reliability to best_effort, or the driver to reliable",
                    )

    def _content(self, status: StreamStatus) -> Iterator[Finding]:
        stream, arrivals = status.stream, self._arrivals[status.stream.name]
        if not arrivals:
            yield Finding(
                Level.FAULT,
                stream.name,
                f"{stream.topic} has a publisher but nothing came",
                "see the driver's log; large images need FASTDDS_BUILTIN_TRANSPORTS as "
                "config/policy.yaml says, on both sides",
            )
            return
        newest = arrivals[-1]
        # At the arrival, so that a slow stream is not blamed for the moment it was looked at.
        fault = stamp_fault(
            stream, newest.stamp_ns, newest.now_ns, self._parameters.max_observation_age_s
        )
        if fault:
            advice = {
                "unstamped": "have the driver fill header.stamp",
                "ahead": "compare use_sim_time and the machines' clocks (chrony)",
                "stale": "compare use_sim_time and the machines' clocks (chrony), or find the "
                "delay in the driver",
            }.get(fault.reason, "")
            yield Finding(Level.FAULT, stream.name, f"{fault.reason}: {fault.message}", advice)
        if status.mistake:
            yield Finding(
                Level.WARNING,
                stream.name,
                status.mistake,
                f"look at both pictures; if so, set {stream.limits}.topic of both",
            )
        wrong = self._streams.fault(stream.name, self._newest[stream.name])
        if wrong:
            yield Finding(Level.FAULT, stream.name, wrong)
        if fault or wrong:
            return
        rate_hz = _rate_hz([arrival.at_s for arrival in arrivals])
        age_s = statistics.median(
            (arrival.now_ns - arrival.stamp_ns) / _NANOSECONDS for arrival in arrivals
        )
        text = (
            f"{stream.topic}: {rate_hz:.1f} Hz, {age_s * 1e3:.0f} ms old on arrival, as the "
            "bundle wants it"
        )
        wanted_hz = self._parameters.inference_rate_hz
        if stream.is_camera and rate_hz < _RATE_TOLERANCE * wanted_hz:
            yield Finding(
                Level.WARNING,
                stream.name,
                f"{text}; slower than inference_rate_hz = {wanted_hz:g}",
                "raise the camera's rate, find where frames are lost (see "
                "FASTDDS_BUILTIN_TRANSPORTS in config/policy.yaml), or lower inference_rate_hz",
            )
        else:
            yield Finding(Level.OK, stream.name, text)


def _rate_hz(times_s: Sequence[float]) -> float:
    if len(times_s) < 2:
        return 0.0
    return (len(times_s) - 1) / max(times_s[-1] - times_s[0], 1e-9)
