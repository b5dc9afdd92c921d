"""What every node of this package does alike: transitions, diagnostics, time jumps, signals.

Owns: `ManagedNode` and `run_node`. Must not import the policy: what a node does in its transitions
is the node's own business.

A transition that fails says why in the log and on `/diagnostics` and leaves the node where it
was, ready to be tried again. rclpy runs transitions inside callbacks, so the executor's thread is
not free before one ends: what takes long goes through `_beside`, which does it in another thread
and keeps `/diagnostics` going meanwhile. SIGINT and SIGTERM end the node through its `close`,
before the ROS context goes, and end such work at its next report of progress.

`~/heartbeat` comes once a second with `/diagnostics`, as a `std_msgs/Header` whose `frame_id` is
what the node is doing. It stays away when the executor's thread or what the node watches hangs.
"""

from __future__ import annotations

import signal
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any, TypeVar

import rclpy
import rclpy.logging
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.clock import Clock, ClockType, JumpThreshold  # type: ignore[attr-defined]
from rclpy.duration import Duration
from rclpy.executors import SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.signals import SignalHandlerOptions
from std_msgs.msg import Header

from groot_int8_ros.errors import GrootError
from groot_int8_ros.ros.joints import time_message
from groot_int8_ros.ros.observation_buffer import BACKWARD_JUMP_S

DIAGNOSTICS_PERIOD_S = 1.0
# How long a signal may wait before the executor's thread looks at it.
_SIGNAL_CHECK_S = 0.1

RELIABLE = QoSProfile(
    depth=10, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.VOLATILE
)


T = TypeVar("T")


class InterruptedTransitionError(GrootError):
    """A signal came while a transition was under way."""


class ManagedNode(LifecycleNode):
    """A lifecycle node whose transitions are told and undone; see the module.

    A subclass implements the five methods of the second group below, calls `_transition` from
    rclpy's `on_...` callbacks, and ends its constructor with `_start`.
    """

    def __init__(self, name: str, **options: Any) -> None:
        """Make the node, unconfigured.

        Args:
            name: The node's name.
            options: Handed to `rclpy.node.Node`.
        """
        super().__init__(name, automatically_declare_parameters_from_overrides=True, **options)
        self._lifecycle = "unconfigured"
        self._failure: str | None = None
        self._progress = ""
        # Set by `run_node` on a signal.
        self.interrupted = threading.Event()

    def _start(self, *, autostart: bool) -> None:
        """Begin diagnostics, watch for time jumps, and configure and activate if asked to."""
        self._heartbeat = self.create_publisher(Header, "~/heartbeat", RELIABLE)
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", RELIABLE)
        # With use_sim_time and no /clock, a timer on the node's own clock would never fire.
        self._steady = Clock(clock_type=ClockType.STEADY_TIME)
        self._diagnostics_timer = self.create_timer(
            DIAGNOSTICS_PERIOD_S, self._publish_diagnostics, clock=self._steady
        )
        self._jump_handle = self.get_clock().create_jump_callback(
            JumpThreshold(
                min_forward=None,
                min_backward=Duration(nanoseconds=-int(BACKWARD_JUMP_S * 1e9)),
                on_clock_change=True,
            ),
            post_callback=self._on_time_jump,
        )
        self._autostart_timer = None
        if autostart:
            self._autostart_timer = self.create_timer(0.0, self._autostart, clock=self._steady)

    def _configure(self) -> None:
        """Acquire everything."""
        raise NotImplementedError

    def _activate(self) -> None:
        """Begin to work."""
        raise NotImplementedError

    def _deactivate(self) -> None:
        """Stop working; called in any state."""
        raise NotImplementedError

    def _cleanup(self) -> None:
        """Stop working and free everything, or raise."""
        raise NotImplementedError

    def _release(self) -> None:
        """Free everything; called in any state."""
        raise NotImplementedError

    def _report(self) -> DiagnosticArray:
        """Return the node's diagnostics."""
        raise NotImplementedError

    def _on_time_jump(self, _: object) -> None:
        """React to ROS time having jumped back."""
        raise NotImplementedError

    def close(self) -> None:
        """Stop working and free everything; safe to call twice and in any state."""
        raise NotImplementedError

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Acquire what the node needs."""
        return self._transition("configuring", "inactive", state, self._configure, self._release)

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Begin to work."""
        return self._transition("activating", "active", state, self._activate)

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stop working."""
        return self._transition("deactivating", "inactive", state, self._deactivate)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Free everything."""
        return self._transition("cleaning up", "unconfigured", state, self._cleanup)

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stop and free everything, from any state."""
        return self._transition("shutting down", "finalized", state, self.close)

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stop and free everything, so that configure can be tried again."""
        return self._transition("recovering", "unconfigured", state, self.close)

    def _transition(
        self,
        doing: str,
        done: str,
        state: LifecycleState,
        action: Callable[[], None],
        undo: Callable[[], None] = lambda: None,
    ) -> TransitionCallbackReturn:
        # rclpy swallows what a transition raises, so it is told here, and the node goes back to
        # where it was.
        self._lifecycle, self._failure = doing, None
        self._publish_diagnostics()
        try:
            action()
        except Exception as error:
            undo()
            self._lifecycle = state.label
            self._failure = f"{doing} failed: {error}"
            reason = str(error) if isinstance(error, GrootError) else traceback.format_exc()
            self.get_logger().error(f"{doing} failed, the node stays {state.label}: {reason}")
            result = TransitionCallbackReturn.FAILURE
        else:
            self._lifecycle = done
            self.get_logger().info(f"{doing}: done, the node is {done}")
            result = TransitionCallbackReturn.SUCCESS
        self._publish_diagnostics()
        return result

    def _beside(self, work: Callable[[], T]) -> T:
        """Do `work` in a thread of its own, publish diagnostics meanwhile, and return its result.

        Args:
            work: Must not use the node but for `_note_progress`.
        """
        done: Future[T] = Future()

        def run() -> None:
            try:
                done.set_result(work())
            except BaseException as error:
                done.set_exception(error)

        # Not a pool's thread: the interpreter would wait for that at its end.
        threading.Thread(target=run, name="beside", daemon=True).start()
        while not wait([done], DIAGNOSTICS_PERIOD_S).done:
            self._publish_diagnostics()
        self._progress = ""
        return done.result()

    def _note_progress(self, progress: str) -> None:
        """Note what a transition is doing; may be called from any thread.

        Raises:
            InterruptedTransitionError: A signal has come; the work is to be given up.
        """
        self._progress = progress
        if self.interrupted.is_set():
            raise InterruptedTransitionError(f"a signal came while {progress}")

    @property
    def _doing(self) -> str:
        """The lifecycle state, or the transition and how far it is."""
        return f"{self._lifecycle}: {self._progress}" if self._progress else self._lifecycle

    def _is_hung(self) -> bool:
        """Whether something that the node watches has not returned for too long."""
        return False

    def _now_ns(self) -> int:
        return int(self.get_clock().now().nanoseconds)

    def _publish_diagnostics(self) -> None:
        self._diagnostics.publish(self._report())
        if not self._is_hung():
            self._heartbeat.publish(
                Header(stamp=time_message(self._now_ns()), frame_id=self._lifecycle)
            )

    def _autostart(self) -> None:
        assert self._autostart_timer is not None
        self._autostart_timer.cancel()
        # Someone may have been faster through the lifecycle services.
        if self._lifecycle == "unconfigured":
            self.trigger_configure()
        if self._lifecycle == "inactive":
            self.trigger_activate()


def run_node(make: Callable[[], ManagedNode], name: str, args: list[str] | None) -> int:
    """Run a node until SIGINT or SIGTERM, and return the process's exit code.

    Args:
        make: Makes the node.
        name: The node's name, for the log where it cannot be made.
        args: Command line with ROS arguments; the process's own if None.
    """
    # rclpy's own handlers invalidate the context at once: the node could say no more. Ours only
    # leave a note, and the node is closed first.
    rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
    stopping = threading.Event()
    nodes: list[ManagedNode] = []

    def stop(*_: object) -> None:
        stopping.set()
        for made in nodes:
            made.interrupted.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        node = make()
        nodes.append(node)
    except GrootError as error:
        rclpy.logging.get_logger(name).fatal(str(error))
        rclpy.shutdown()
        return 2
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    try:
        while not stopping.is_set():
            executor.spin_once(timeout_sec=_SIGNAL_CHECK_S)
    finally:
        node.close()
        executor.shutdown()
        node.destroy_node()
        rclpy.shutdown()
    return 0
