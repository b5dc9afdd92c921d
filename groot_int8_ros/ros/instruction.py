"""The instruction topic.

Owns: both subscriptions of it, and which of their messages count. Must not import the policy.
"""

from __future__ import annotations

from collections.abc import Callable

from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from std_msgs.msg import String

try:
    from rclpy.event_handler import SubscriptionEventCallbacks
except ImportError:  # Humble
    from rclpy.qos_event import SubscriptionEventCallbacks


class InstructionTopic:
    """Hears every new instruction, and the one that was there before.

    A volatile subscription hears every publisher, but nothing that was sent before it was there.
    A transient-local one is given the last message of publishers that keep theirs (bags, and
    `ros2 topic pub` when it is told to), but hears no others. So there are both.

    Args:
        node: Where the subscriptions are made; `close` removes them.
        topic: Of `std_msgs/String`.
        changed: Called with each instruction, in the executor's thread.
    """

    def __init__(self, node: Node, topic: str, changed: Callable[[str], None]) -> None:
        self._node = node
        self._changed = changed
        self._kept: str | None = None
        self._subscriptions = [
            node.create_subscription(
                String,
                topic,
                callback,
                QoSProfile(
                    depth=depth, reliability=ReliabilityPolicy.RELIABLE, durability=durability
                ),
                # That a publisher keeps nothing is expected here, not a mistake to warn about.
                event_callbacks=SubscriptionEventCallbacks(use_default_callbacks=False),
            )
            for callback, depth, durability in (
                (self._on_kept, 1, DurabilityPolicy.TRANSIENT_LOCAL),
                (self._on_new, 10, DurabilityPolicy.VOLATILE),
            )
        ]

    def close(self) -> None:
        """Remove the subscriptions."""
        for subscription in self._subscriptions:
            self._node.destroy_subscription(subscription)
        self._subscriptions.clear()

    def _on_new(self, message: String) -> None:
        self._changed(message.data)

    def _on_kept(self, message: String) -> None:
        # DDS gives a kept message again when the network was lost for a while. By then a
        # parameter or another publisher may have replaced it, and the old task must not return.
        if message.data != self._kept:
            self._kept = message.data
            self._changed(message.data)
