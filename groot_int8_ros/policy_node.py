"""The policy as a lifecycle node: camera and joint-state topics in, action chunks out.

Owns: topics, transitions, signals and what happens in which thread. No arithmetic: messages are
converted in `ros`, the policy runs in `policy`. Must not import torch.

Threads. The executor's thread runs the callbacks, which store the newest message and nothing
else, the transitions and the diagnostics. The inference worker's thread alone runs the policy and
publishes chunks.

A chunk's `header.stamp` is the newest camera stamp of its observation and is unique: an
observation is used once. `~/chunk_info` carries, for each chunk, a JSON object with the stamps of
all messages it was made from, the seed, the instruction in force, the committed rows and the
timings, so that the chunk can be computed again from a recording. Its fields:

    number         chunks before this one since the node was activated
    stamp_ns       the chunk's stamp
    published_ns   ROS time of publication
    seed           of the noise
    instruction    as it was given
    streams        stream name -> {topic, stamp_ns} of the message used
    committed      null, or what the executor had committed itself to and the chunk begins with:
                   {rows, actions}, the rows' numbers and action key -> those rows in the policy's
                   units
    timings_s      stage -> wall time: wait, read, preprocess, backbone, action_head, postprocess,
                   total; `wait` is from the arrival of the newest message to the start of `read`
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Collection
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray
from rclpy.qos import QoSProfile, ReliabilityPolicy
from std_msgs.msg import String
from trajectory_msgs.msg import JointTrajectory

from groot_int8_ros.errors import EngineError
from groot_int8_ros.policy.policy import Policy
from groot_int8_ros.policy.reference_graphs import ReferenceGraphs
from groot_int8_ros.policy.types import ActionChunk, CommittedActions
from groot_int8_ros.ros.committed_rows import CommittedReader
from groot_int8_ros.ros.diagnostics import (
    InferenceRecord,
    NodeReport,
    diagnostic_array,
)
from groot_int8_ros.ros.inference_worker import Host, InferenceWorker
from groot_int8_ros.ros.instruction import InstructionTopic
from groot_int8_ros.ros.joints import TrajectoryWriter
from groot_int8_ros.ros.managed_node import RELIABLE, ManagedNode, run_node
from groot_int8_ros.ros.observation_buffer import Snapshot
from groot_int8_ros.ros.observations import ObservationStreams
from groot_int8_ros.ros.parameters import NodeParameters, Parameters

# An inference that takes longer than this is reported as hung; it is still never published.
STOP_TIMEOUT_S = 10.0

# What the executor had committed itself to before is of no use.
_NEWEST_RELIABLE = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE)


class PolicyNode(ManagedNode):
    """Runs one bundle's policy.

    Configure loads and verifies the bundle and subscribes; activate warms the policy up and starts
    inference; deactivate stops publishing; cleanup frees everything.

    Raises:
        ConfigurationError: A parameter has the wrong type or lies outside its range.
    """

    def __init__(self, **options: Any) -> None:
        """Make the node, unconfigured.

        Args:
            options: Handed to `rclpy.node.Node`.
        """
        super().__init__("policy_node", **options)
        self._policy: Policy | None = None
        self._streams: ObservationStreams | None = None
        self._writer: TrajectoryWriter | None = None
        self._commitments: CommittedReader | None = None
        self._commitment: JointTrajectory | None = None
        self._worker: InferenceWorker | None = None
        self._record = InferenceRecord()
        self._release_topics = contextlib.ExitStack()
        self._configured = False
        self._engine_facts: dict[str, str] = {}

        self._node_parameters = Parameters(self, lambda: self._configured, self._on_parameters)
        self._instruction = self._node_parameters.current.instruction

        self._start(autostart=self._node_parameters.current.autostart)

    def close(self) -> None:
        """Stop publishing and free everything; safe to call twice and in any state."""
        self._deactivate()
        if self._worker is None:
            self._release()

    def _configure(self) -> None:
        for name in self._node_parameters.misnamed():
            self.get_logger().warning(f"parameter '{name}' is not one of this node's; ignored")
        parameters = self._node_parameters.current
        folder = parameters.bundle_path
        self.get_logger().info(f"loading bundle {folder} with {parameters.engine}")
        policy = self._beside(lambda: self._load_policy(parameters))
        self._policy = policy
        if isinstance(policy.graphs, ReferenceGraphs):
            self.get_logger().warning(policy.graphs.describe_cost())
        for remark in policy.remarks:
            self.get_logger().warning(remark)
        robot = self._node_parameters.declare_robot(policy.robot)
        self._writer = TrajectoryWriter(robot.action_joints)
        self._streams = ObservationStreams(self, robot.cameras, robot.state_joints, parameters)
        self._release_topics.callback(self._streams.close)
        self._chunks = self._publisher(JointTrajectory, parameters.chunk_topic)
        self._chunk_info = self._publisher(String, "~/chunk_info")
        self._instruction = parameters.instruction
        instructions = InstructionTopic(self, parameters.instruction_topic, self._on_instruction)
        self._release_topics.callback(instructions.close)
        self._commitments = CommittedReader(robot.action_joints, policy.time_from_start_s)
        if parameters.committed_topic:
            subscription = self.create_subscription(
                JointTrajectory, parameters.committed_topic, self._on_commitment, _NEWEST_RELIABLE
            )
            self._release_topics.callback(self.destroy_subscription, subscription)
        self._engine_facts = {
            "bundle": str(folder),
            "checkpoint sha256": policy.manifest.checkpoint_sha256,
            "exporter version": policy.manifest.exporter_version,
            "embodiment": policy.manifest.embodiment,
            "graphs": policy.manifest.family,
            "instructions": "; ".join(policy.instructions) or "any",
            "denoising steps": str(policy.manifest.denoising_steps),
            "engine": parameters.engine,
            "image converter": self._streams.bridge_name,
        }
        for fault in self._streams.unusable_frames():
            self.get_logger().error(fault)
        self._configured = True

    def _load_policy(self, parameters: NodeParameters) -> Policy:
        return Policy.load(
            parameters.bundle_path,
            engine=parameters.engine,
            threads=parameters.threads or None,
            progress=self._note_progress,
        )

    def _activate(self) -> None:
        if self._worker is not None and self._worker.stop(0.0):
            self._worker = None
        if self._worker is not None:
            raise EngineError(
                "the inference of the last activation has not returned yet, so the engine is "
                "still in use. Try again, or restart the node if it never returns."
            )
        policy, streams = self._policy, self._streams
        assert policy is not None
        assert streams is not None
        self._record = InferenceRecord()
        worker = InferenceWorker(
            policy,
            streams.buffer,
            Host(
                parameters=lambda: self._node_parameters.current,
                instruction=lambda: self._instruction,
                now_ns=self._now_ns,
                read=streams.read,
                committed=self._committed,
                publish=self._publish_chunk,
            ),
            self._record,
            self.get_logger(),
        )
        self._beside(worker.start)
        self._worker = worker

    def _deactivate(self) -> None:
        if self._worker is None:
            return
        if self._worker.stop(STOP_TIMEOUT_S):
            self._worker = None
        else:
            self.get_logger().error(
                f"the inference under way has not returned within {STOP_TIMEOUT_S:g} s; nothing "
                "more is published, but the engine stays in use"
            )

    def _cleanup(self) -> None:
        self._deactivate()
        if self._worker is not None:
            raise EngineError("the engine is still in use by an inference that does not return")
        self._release()

    def _release(self) -> None:
        self._configured = False
        self._release_topics.close()
        self._streams = None
        self._writer = None
        self._commitments = self._commitment = None
        self._engine_facts = {}
        if self._policy is not None:
            self._policy.close()
            self._policy = None

    def _publisher(self, kind: type[Any], topic: str) -> Any:
        publisher = self.create_publisher(kind, topic, RELIABLE)
        self._release_topics.callback(self.destroy_publisher, publisher)
        return publisher

    def _on_instruction(self, instruction: str) -> None:
        self._instruction = instruction

    def _on_commitment(self, message: JointTrajectory) -> None:
        self._commitment = message

    def _committed(self, observation_ns: int) -> CommittedActions | None:
        message, reader = self._commitment, self._commitments
        return reader.read(message, observation_ns) if reader and message else None

    def _on_parameters(self, names: Collection[str]) -> None:
        if "instruction" in names:
            self._instruction = self._node_parameters.current.instruction
        if self._streams is not None:
            self._streams.max_frozen_s = self._node_parameters.current.max_frozen_s

    def _on_time_jump(self, _: object) -> None:
        self._commitment = None
        if self._streams is not None:
            self._streams.buffer.clear()
            self.get_logger().info(
                "ROS time jumped; frames and joint states before it are dropped"
            )

    def _publish_chunk(
        self, chunk: ActionChunk, snapshot: Snapshot, instruction: str, number: int
    ) -> None:
        assert self._writer is not None
        assert self._streams is not None
        info = {
            "number": number,
            "stamp_ns": chunk.stamp_ns,
            "published_ns": self._now_ns(),
            "seed": chunk.seed,
            "instruction": instruction,
            "streams": {
                stream.name: {
                    "topic": stream.topic,
                    "stamp_ns": snapshot.samples[stream.name].stamp_ns,
                }
                for stream in self._streams.buffer.streams
            },
            "committed": chunk.committed.to_dict() if chunk.committed else None,
            "timings_s": dict(chunk.timings_s),
        }
        self._chunks.publish(self._writer.write(chunk))
        self._chunk_info.publish(String(data=json.dumps(info)))

    def _is_hung(self) -> bool:
        return self._record.report().is_hung

    def _report(self) -> DiagnosticArray:
        return diagnostic_array(
            NodeReport(
                node_name=self.get_fully_qualified_name().lstrip("/"),
                now_ns=self._now_ns(),
                lifecycle=self._doing,
                failure=self._failure,
                engine=self._engine_facts,
                streams=self._streams.status() if self._streams else [],
                max_age_s=self._node_parameters.current.max_observation_age_s,
                instruction=self._instruction,
                committed_topic=self._node_parameters.current.committed_topic,
                inference=self._record.report(),
            )
        )


def main(args: list[str] | None = None) -> int:
    """Run the node until SIGINT or SIGTERM, and return the process's exit code.

    Args:
        args: Command line with ROS arguments; the process's own if None.
    """
    return run_node(PolicyNode, "policy_node", args)


if __name__ == "__main__":
    sys.exit(main())
