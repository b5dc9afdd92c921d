"""The process that owns the commands: action chunks in, commands at control rate out.

Owns: topics, services, transitions and how the robot is stopped. No arithmetic: `control` judges
and moves, `ros` converts. Must not import the policy or an engine: whatever happens to the process
that runs the network, a crash, an out-of-memory or a hang, this one goes on and holds.

Nothing is commanded until the node is active and `~/enable` was called. Services (std_srvs/
Trigger): `~/enable`, `~/disable`, `~/estop` (latched), `~/reset_estop`.

Deactivate, cleanup, shutdown, an error, SIGINT and SIGTERM stop the robot first: commands slow
down within their limits, the last ones are holds, repeated until they were delivered.
Against SIGKILL there is no such end; `docs/operation.md` says what each controller does when
commands cease.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.duration import Duration
from rclpy.qos import QoSProfile, ReliabilityPolicy
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from groot_int8_ros.control.chunks import Refusal
from groot_int8_ros.control.command import Command
from groot_int8_ros.control.executor import NO_JOINTS, Executor
from groot_int8_ros.control.settings import Channel
from groot_int8_ros.errors import ObservationError
from groot_int8_ros.ros.diagnostics import status_array
from groot_int8_ros.ros.executor_diagnostics import (
    channel_statuses,
    executor_status,
    input_statuses,
    not_following,
)
from groot_int8_ros.ros.executor_messages import (
    CommandWriter,
    MeasuredPositions,
    chunk_of,
    commitment_message,
)
from groot_int8_ros.ros.executor_parameters import ExecutorParameterSet, OutputParameters
from groot_int8_ros.ros.managed_node import RELIABLE, ManagedNode, run_node

NODE_NAME = "chunk_executor"
# How often commitments are published, and so how old one may be when the policy begins.
_COMMITMENT_PERIOD_S = 0.05
# How long the node repeats its last hold until it was delivered, and how long it waits each time.
_DELIVERY_S = 2.0
_ACKNOWLEDGE_S = 0.05


class ChunkExecutorNode(ManagedNode):
    """Executes a policy's chunks; see the module.

    Raises:
        ConfigurationError: A parameter has the wrong type or lies outside its range.
    """

    def __init__(self, **options: Any) -> None:
        """Make the node, unconfigured.

        Args:
            options: Handed to `rclpy.node.Node`.
        """
        super().__init__(NODE_NAME, **options)
        self._control: Executor | None = None
        self._outputs: dict[str, OutputParameters] = {}
        self._writers: dict[str, tuple[CommandWriter, Any]] = {}
        self._command: Command | None = None
        self._timer: Any = None
        self._release_topics = contextlib.ExitStack()
        self._commitments: Any = None
        self._commitment_due_ns = 0
        # A stop that was asked for before there is an executor holds for the one to come.
        self._early_estop: str | None = None
        self._node_parameters = ExecutorParameterSet(
            self, lambda: self._control is not None, self._on_parameters
        )
        for name, action in (
            ("enable", self._enable),
            ("disable", self._disable),
            ("estop", self._estop),
            ("reset_estop", self._reset_estop),
        ):
            self.create_service(Trigger, f"~/{name}", _served(action))
        self._start(autostart=self._node_parameters.current.autostart)

    def close(self) -> None:
        """Stop the robot and free everything; safe to call twice and in any state."""
        self._deactivate()
        self._release()

    def _configure(self) -> None:
        for name in self._node_parameters.misnamed():
            self.get_logger().warning(f"parameter '{name}' is not one of this node's; ignored")
        parameters = self._node_parameters.current
        settings, self._outputs = self._node_parameters.settings()
        executor = Executor(settings)
        for channel in settings.channels:
            writer = CommandWriter(channel.joints, self._outputs[channel.name])
            publisher = self._publisher(writer.message_type, self._outputs[channel.name].topic)
            self._writers[channel.name] = (writer, publisher)
            for warning in _cautions(channel, self._outputs[channel.name]):
                self.get_logger().warning(f"channel '{channel.name}': {warning}")
        if settings.seam.kind == "rtc":
            self._commitments = self._publisher(JointTrajectory, parameters.committed_topic)
        reliability = {
            "best_effort": ReliabilityPolicy.BEST_EFFORT,
            "reliable": ReliabilityPolicy.RELIABLE,
        }[parameters.sensor_qos_reliability]
        sensor_qos = QoSProfile(depth=parameters.sensor_qos_depth, reliability=reliability)
        self._measured = MeasuredPositions(
            parameters.joint_state_type, parameters.joint_state_fields, executor.state_joints
        )
        self._subscribe(
            self._measured.message_type,
            parameters.joint_state_topic,
            self._on_joint_state,
            sensor_qos,
        )
        self._subscribe(JointTrajectory, parameters.chunk_topic, self._on_chunk, RELIABLE)
        if self._early_estop is not None:
            executor.estop(self._early_estop)
        self._control = executor

    def _activate(self) -> None:
        assert self._control is not None
        self._command = Command("off")
        self._timer = self.create_timer(
            self._control.settings.control_period_s, self._on_timer, clock=self._steady
        )

    def _deactivate(self) -> None:
        """Stop the robot: brake, hold, and wait until the holds were delivered."""
        timer, self._timer = self._timer, None
        if timer is None:
            return
        timer.cancel()
        self.destroy_timer(timer)
        executor = self._control
        assert executor is not None
        period_s = executor.settings.control_period_s
        end_s = time.monotonic() + self._node_parameters.current.stop_timeout_s
        executor.disable()
        # A latched stop goes on commanding; here its holds have to end, too.
        commanded, rests = executor.commanding, 0
        while executor.commanding and rests < executor.settings.final_holds:
            started_s = time.monotonic()
            if started_s > end_s:
                self.get_logger().error(
                    "the robot has not come to rest within stop_timeout_s and is stopped at once; "
                    "this machine is too slow for its control rate"
                )
                break
            rests = rests + 1 if self._step().resting else 0
            time.sleep(max(0.0, period_s - (time.monotonic() - started_s)))
        hold = executor.end()
        if commanded:
            self._deliver(hold)
        self._command = None

    def _cleanup(self) -> None:
        self._deactivate()
        self._release()

    def _release(self) -> None:
        if self._control is not None:
            self._early_estop = self._control.estop_reason
        self._control = None
        self._release_topics.close()
        self._writers.clear()
        self._outputs = {}
        self._commitments = None

    def _on_time_jump(self, _: object) -> None:
        if self._control is not None:
            self._control.on_clock_jump()
            self.get_logger().warning("ROS time jumped; chunks from before it are dropped")

    def _on_parameters(self, names: Collection[str]) -> None:
        if self._control is not None:
            # The parameter set lets only stricter values through.
            self._control.tighten(
                {name: getattr(self._node_parameters.current, name) for name in names}
            )

    def _on_timer(self) -> None:
        self._step()

    def _step(self) -> Command:
        executor = self._control
        assert executor is not None
        now_ns, steady_ns = self._now_ns(), time.monotonic_ns()
        before, command = self._command, executor.step(now_ns, steady_ns)
        self._publish(command)
        self._command = command
        if before is not None and before.mode != command.mode:
            self._tell(command)
        self._tell_of_strays(before, command)
        if self._commitments is not None and steady_ns >= self._commitment_due_ns:
            self._commitment_due_ns = steady_ns + round(_COMMITMENT_PERIOD_S * 1e9)
            commitment = executor.commitment(now_ns, margin_s=_COMMITMENT_PERIOD_S)
            if commitment is not None:
                self._commitments.publish(commitment_message(commitment))
        return command

    def _publish(self, command: Command) -> None:
        for channel in command.channels:
            writer, publisher = self._writers[channel.name]
            publisher.publish(writer.write(channel.values, self._now_ns()))

    def _tell(self, command: Command) -> None:
        hold = next((channel.hold for channel in command.channels if channel.hold), None)
        text = f"{command.mode}: {hold.message}" if hold else command.mode
        if command.mode in ("holding", "estop"):
            self.get_logger().warning(text)
        else:
            self.get_logger().info(text)

    def _tell_of_strays(self, before: Command | None, command: Command) -> None:
        known = {channel.name: channel.astray for channel in before.channels} if before else {}
        assert self._control is not None
        channels = {channel.name: channel for channel in self._control.settings.channels}
        for sent in command.channels:
            if set(sent.astray) - set(known.get(sent.name, ())):
                text = not_following(channels[sent.name], sent)
                self.get_logger().warning(f"channel '{sent.name}' {text}")

    def _deliver(self, hold: Command) -> None:
        """Repeat the last hold until every listener has acknowledged it.

        A reader notices that it missed a message only when another follows, so waiting alone would
        not bring a lost one back in time.
        """
        end_s = time.monotonic() + _DELIVERY_S
        while True:
            self._publish(hold)
            heard = [self._acknowledged(publisher) for _, publisher in self._writers.values()]
            if all(heard):
                return
            if time.monotonic() > end_s:
                self.get_logger().warning(
                    f"the last hold was not acknowledged by all within {_DELIVERY_S:g} s"
                )
                return

    def _acknowledged(self, publisher: Any) -> bool:
        try:
            return bool(
                publisher.wait_for_all_acked(Duration(nanoseconds=round(_ACKNOWLEDGE_S * 1e9)))
            )
        except Exception as error:
            # Not every middleware can tell, and the robot is at rest by now.
            self.get_logger().warning(f"whether the last hold arrived is not known: {error}")
            return True

    def _on_joint_state(self, message: Any) -> None:
        assert self._control is not None
        now_ns = self._now_ns()
        try:
            names, positions, stamp = self._measured.read(message, now_ns)
        except ObservationError as error:
            self._control.refuse_joint_state(Refusal(NO_JOINTS, str(error)))
            return
        self._control.on_joint_state(names, positions, stamp, now_ns, time.monotonic_ns())

    def _on_chunk(self, message: JointTrajectory) -> None:
        assert self._control is not None
        fault = self._control.chunk_fault
        refusal = self._control.on_chunk(chunk_of(message), self._now_ns(), time.monotonic_ns())
        # Once for each reason: a policy that sends nonsense sends it many times a second.
        if refusal and (fault is None or fault.reason != refusal.reason):
            self.get_logger().warning(f"chunk refused: {refusal.message}")

    def _enable(self) -> Refusal | str:
        if self._control is None or self._timer is None:
            return Refusal(
                "inactive", f"the node is {self._lifecycle}; configure and activate it first"
            )
        return self._control.enable(self._now_ns(), time.monotonic_ns()) or "enabled"

    def _disable(self) -> Refusal | str:
        if self._control is not None:
            self._control.disable()
        return "disabled: the robot comes to rest and is then not commanded any more"

    def _estop(self) -> Refusal | str:
        reason = "service ~/estop"
        self._early_estop = self._early_estop or reason
        if self._control is not None:
            self._control.estop(reason)
            if self._timer is not None:
                self._step()
        return "emergency stop; ~/reset_estop releases it"

    def _reset_estop(self) -> Refusal | str:
        self._early_estop = None
        if self._control is not None:
            self._control.reset_estop()
        return "released; commands stay off until ~/enable"

    def _publisher(self, kind: type[Any], topic: str) -> Any:
        publisher = self.create_publisher(kind, topic, RELIABLE)
        self._release_topics.callback(self.destroy_publisher, publisher)
        return publisher

    def _subscribe(
        self, kind: type[Any], topic: str, callback: Callable[[Any], None], qos: QoSProfile
    ) -> None:
        subscription = self.create_subscription(kind, topic, callback, qos)
        self._release_topics.callback(self.destroy_subscription, subscription)

    def _report(self) -> DiagnosticArray:
        executor, command = self._control, self._command
        statuses = [executor_status(self._lifecycle, self._failure, executor, command)]
        if executor is not None:
            steady_ns = time.monotonic_ns()
            statuses += input_statuses(executor, self._node_parameters.current, steady_ns)
            subscribers = {
                name: publisher.get_subscription_count()
                for name, (_, publisher) in self._writers.items()
            }
            statuses += channel_statuses(
                executor, command or Command("off"), self._outputs, subscribers, steady_ns
            )
        node_name = self.get_fully_qualified_name().lstrip("/")
        return status_array(node_name, self._now_ns(), statuses)


def _cautions(channel: Channel, output: OutputParameters) -> Iterator[str]:
    """Yield what a channel's configuration makes dangerous, though it may be meant."""
    if not np.isfinite(channel.limits.acceleration).all():
        yield "joints without an acceleration limit are stopped at once by a hold"
    if channel.interface == "position" and not (
        np.isfinite(channel.limits.lower).all() and np.isfinite(channel.limits.upper).all()
    ):
        yield "joints without position limits may be commanded anywhere"
    if channel.interface == "velocity" and output.kind == "float64_multi_array":
        yield (
            "a group controller keeps its last velocity for ever when this process is killed; "
            "let the hardware time out, or use a controller that does"
        )
    if output.kind == "message":
        yield (
            f"what the reader of {output.topic} does when this process is killed and commands "
            "cease is not known here; find it out before the robot moves"
        )


def _served(
    action: Callable[[], Refusal | str],
) -> Callable[[Trigger.Request, Trigger.Response], Trigger.Response]:
    def serve(_: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        answer = action()
        response.success = isinstance(answer, str)
        response.message = answer if isinstance(answer, str) else answer.message
        return response

    return serve


def main(args: list[str] | None = None) -> int:
    """Run the node until SIGINT or SIGTERM, and return the process's exit code.

    Args:
        args: Command line with ROS arguments; the process's own if None.
    """
    return run_node(ChunkExecutorNode, NODE_NAME, args)


if __name__ == "__main__":
    sys.exit(main())
