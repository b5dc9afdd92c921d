"""Records calibration samples on the robot, beside the policy node or without one.

Owns: topics, services, transitions and which observations are offered. No arithmetic: messages are
converted in `ros`, chosen and stored in `capture`. Must not import torch. A second model does not
fit into the robot's memory, so what happens inside a policy node is computed offline from what is
recorded here (`groot-int8 calibrate --complete`).

With `with_chunks`, the node listens to a policy node's chunks and to `~/chunk_info` beside them,
finds the very messages that each chunk was made from, and stores observation, noise (drawn again
from seed and stamp), committed rows and chunk. Without, it assembles observations as the policy
node does, at `inference_rate_hz`, and draws the noise from its own `seed`; there is no chunk then,
unless `run_policy` makes the recorder run the bundle's policy itself (where no policy node does,
as in teleoperation): its samples hold the chunk and all inputs of the large graphs, and nothing
has to be completed.

Configure reads the bundle's manifest and makes the store; activate records; deactivate writes
what is held and stops; cleanup, shutdown, SIGINT and SIGTERM finish the store. Services
(std_srvs/Trigger): `~/pause`, `~/resume`, `~/finish`.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from std_msgs.msg import String
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from groot_int8_ros.capture.inference import run_on
from groot_int8_ros.capture.sample import CaptureSample
from groot_int8_ros.capture.store import LIVE, CaptureMeta, CaptureWriter
from groot_int8_ros.errors import GrootError
from groot_int8_ros.policy.bundle import open_bundle
from groot_int8_ros.policy.policy import Policy
from groot_int8_ros.policy.preprocess import Preprocessor, PromptTokenizer
from groot_int8_ros.policy.types import Observation
from groot_int8_ros.ros.chunk_pairing import ChunkPairing, Paired
from groot_int8_ros.ros.diagnostics import (
    ERROR,
    OK,
    STALE,
    WARN,
    status_array,
    status_message,
    stream_status,
)
from groot_int8_ros.ros.instruction import InstructionTopic
from groot_int8_ros.ros.joints import TrajectoryReader, stamp_ns
from groot_int8_ros.ros.managed_node import RELIABLE, ManagedNode, run_node
from groot_int8_ros.ros.observation_buffer import LONGEST_GATHERING_S, USED, Hold
from groot_int8_ros.ros.observations import ObservationStreams
from groot_int8_ros.ros.recorder_parameters import RecorderParameterSet
from groot_int8_ros.ros.recording import Conversions, Recording, RecordingWorker

NODE_NAME = "calibration_recorder"
_MIB = 1 << 20


class CalibrationRecorderNode(ManagedNode):
    """Records one store of calibration samples; see the module.

    Raises:
        ConfigurationError: A parameter has the wrong type or lies outside its range.
    """

    def __init__(self, **options: Any) -> None:
        """Make the node, unconfigured.

        Args:
            options: Handed to `rclpy.node.Node`.
        """
        super().__init__(NODE_NAME, **options)
        self._streams: ObservationStreams | None = None
        self._pairing: ChunkPairing | None = None
        self._recording: Recording | None = None
        self._policy: Policy | None = None
        self._worker: RecordingWorker | None = None
        self._release_topics = contextlib.ExitStack()
        self._configured = False
        self._hold: Hold | None = None
        self._version = 0
        self._due_s = 0.0
        self._node_parameters = RecorderParameterSet(
            self, lambda: self._configured, self._on_parameters
        )
        self._instruction = self._node_parameters.current.instruction
        for name, action in (
            ("pause", self._pause),
            ("resume", self._resume),
            ("finish", self._finish),
        ):
            self.create_service(Trigger, f"~/{name}", self._served(action))
        self._start(autostart=self._node_parameters.current.autostart)

    def close(self) -> None:
        """Finish the store and free everything; safe to call twice and in any state."""
        self._stop_worker()
        self._release()

    def _configure(self) -> None:
        for name in self._node_parameters.misnamed():
            self.get_logger().warning(f"parameter '{name}' is not one of this node's; ignored")
        parameters = self._node_parameters.current
        parameters.check()
        output = parameters.output_path
        # The graphs are not run, so their hashes do not matter here.
        bundle = open_bundle(parameters.bundle_path, verify_hashes=False)
        manifest = bundle.manifest
        robot = self._node_parameters.declare_robot(manifest.robot)
        preprocess = Preprocessor(
            bundle.processor,
            PromptTokenizer.from_file(bundle.tokenizer_path),
            manifest.robot.cameras,
        )
        self._streams = ObservationStreams(
            self, robot.cameras, robot.state_joints, parameters, self._seen
        )
        self._release_topics.callback(self._streams.close)
        chunk_topic = parameters.policy_topic(parameters.chunk_topic)
        chunks = TrajectoryReader(robot.action_joints, chunk_topic)
        seed = None
        if parameters.with_chunks:
            self._pairing = ChunkPairing(
                self._streams.buffer.streams, parameters.history_mib * _MIB
            )
            self._subscribe(JointTrajectory, chunk_topic, self._on_chunk)
            info_topic = parameters.policy_topic("~/chunk_info")
            self._subscribe(String, info_topic, self._on_chunk_info)
        else:
            seed = parameters.seed
        self._instruction = parameters.instruction
        if not parameters.with_chunks:
            instructions = InstructionTopic(
                self, parameters.instruction_topic, self._on_instruction
            )
            self._release_topics.callback(instructions.close)
        run, engine = None, ""
        if parameters.run_policy:
            engine = parameters.engine
            self._policy = self._beside(
                lambda: Policy.load(
                    parameters.bundle_path,
                    engine=engine,
                    threads=parameters.threads or None,
                    progress=self._note_progress,
                )
            )
            run = partial(_run_on, self._policy)
        writer = CaptureWriter(
            output,
            CaptureMeta.of_bundle(manifest, LIVE, seed=seed, engine=engine),
            samples_per_shard=parameters.samples_per_shard,
            go_on="call ~/resume",
        )
        self._recording = Recording(
            writer,
            parameters.samples,
            Conversions(
                read_state=self._streams.read_state,
                read=self._streams.read,
                read_chunk=chunks.read,
                check_instruction=preprocess.check_instruction,
                processor=bundle.processor,
                noise_shape=(manifest.action_horizon, bundle.processor.max_action_dim),
                run=run,
            ),
        )
        self._configured = True

    def _activate(self) -> None:
        assert self._recording is not None
        following = self._pairing.next if self._pairing is not None else self._next_observation
        self._worker = RecordingWorker(following, self._recording, self.get_logger())
        self._worker.start()

    def _deactivate(self) -> None:
        self._stop_worker()
        if self._recording is None:
            return
        try:
            self._recording.flush()
        except GrootError as error:
            # The node has stopped all the same; what is held is written again at the next chance.
            self.get_logger().error(str(error))

    def _cleanup(self) -> None:
        self._stop_worker()
        self._release()

    def _stop_worker(self) -> None:
        if self._worker is not None:
            self._worker.stop()
            self._worker = None
        if self._pairing is not None:
            self._pairing.clear()

    def _release(self) -> None:
        self._configured = False
        self._release_topics.close()
        if self._recording is not None:
            lost = self._pairing.lost if self._pairing is not None else 0
            counts = f"{self._recording.report().unusable} unusable, {lost} chunks without frames"
            try:
                self.get_logger().info(f"{self._recording.finish()}; {counts}")
            except GrootError as error:
                self.get_logger().error(f"{error} ({counts})")
        self._streams = self._pairing = self._recording = None
        if self._policy is not None:
            self._policy.close()
            self._policy = None
        self._hold = None

    def _subscribe(self, kind: type[Any], topic: str, callback: Callable[[Any], None]) -> None:
        subscription = self.create_subscription(kind, topic, callback, RELIABLE)
        self._release_topics.callback(self.destroy_subscription, subscription)

    def _next_observation(self, timeout_s: float) -> Paired | None:
        """Assemble an observation as the policy node does, at the wanted rate at most."""
        streams = self._streams
        assert streams is not None
        end_s = time.monotonic() + timeout_s
        self._version = streams.buffer.wait(self._version, timeout_s)
        wait_s = self._due_s - time.monotonic()
        if wait_s > 0.0:
            time.sleep(min(wait_s, max(0.0, end_s - time.monotonic())))
            if self._due_s > time.monotonic():
                return None
        streams.buffer.wait_for_others(LONGEST_GATHERING_S)
        parameters = self._node_parameters.current
        found = streams.buffer.assemble(
            self._now_ns(), parameters.max_observation_age_s, parameters.max_observation_skew_s
        )
        if isinstance(found, Hold):
            # Between two frames there is nothing to complain about.
            self._hold = None if found.reason == USED else found
            return None
        self._hold = None
        streams.buffer.mark_used(found)
        self._due_s = time.monotonic() + 1.0 / parameters.inference_rate_hz
        return Paired(found, None, parameters.seed, self._instruction)

    @property
    def _listening(self) -> ChunkPairing | None:
        """The pairing while the node is active: else nobody takes from it what it collects."""
        return self._pairing if self._worker is not None else None

    def _seen(self, name: str, message: Any, stamp: int) -> None:
        if pairing := self._listening:
            pairing.seen(name, message, stamp)

    def _on_chunk(self, message: JointTrajectory) -> None:
        if pairing := self._listening:
            pairing.on_chunk(stamp_ns(message.header), message)

    def _on_chunk_info(self, message: String) -> None:
        if not (pairing := self._listening):
            return
        try:
            info = json.loads(message.data)
        except ValueError:
            info = message.data
        pairing.on_info(info)

    def _on_instruction(self, instruction: str) -> None:
        self._instruction = instruction

    def _on_parameters(self, names: Collection[str]) -> None:
        if "instruction" in names:
            self._instruction = self._node_parameters.current.instruction
        if self._streams is not None:
            self._streams.max_frozen_s = self._node_parameters.current.max_frozen_s

    def _on_time_jump(self, _: object) -> None:
        if self._streams is not None:
            self._streams.buffer.clear()
        if self._pairing is not None:
            self._pairing.clear()

    def _served(
        self, action: Callable[[Recording], str]
    ) -> Callable[[Trigger.Request, Trigger.Response], Trigger.Response]:
        def serve(_: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
            if self._recording is None:
                response.message = f"the node is {self._lifecycle}: configure and activate it"
                return response
            try:
                response.message, response.success = action(self._recording), True
            except GrootError as error:
                response.message = str(error)
            self._publish_diagnostics()
            return response

        return serve

    def _pause(self, recording: Recording) -> str:
        recording.pause()
        return "paused"

    def _resume(self, recording: Recording) -> str:
        recording.resume()
        return "recording" if self._worker is not None else "will record when the node is active"

    def _finish(self, recording: Recording) -> str:
        return recording.finish()

    def _report(self) -> DiagnosticArray:
        now_ns = self._now_ns()
        streams = self._streams.status() if self._streams else []
        max_age_s = self._node_parameters.current.max_observation_age_s
        return status_array(
            self.get_fully_qualified_name().lstrip("/"),
            now_ns,
            [self._recorder(), *(stream_status(one, now_ns, max_age_s) for one in streams)],
        )

    def _recorder(self) -> DiagnosticStatus:
        values: dict[str, Any] = {
            "lifecycle": self._doing,
            "output": self._node_parameters.current.output,
        }
        if self._recording is None or self._failure:
            level = ERROR if self._failure else STALE
            return status_message("recorder", level, self._failure or self._doing, values)
        report = self._recording.report()
        values |= {
            "kept": report.kept,
            "offered": report.offered,
            "unusable": report.unusable,
            "newest unusable": report.fault,
        }
        level, message = OK, "recording"
        if report.failure:
            level, message = ERROR, f"stopped: {report.failure}"
        elif report.finished:
            message = "finished"
        elif self._worker is None:
            level, message = STALE, self._lifecycle
        elif report.paused:
            level, message = WARN, "paused"
        elif self._hold is not None:
            level, message = WARN, f"holding: {self._hold.reason}: {self._hold.message}"
        elif self._pairing is not None and self._pairing.foreign:
            level, message = ERROR, self._pairing.foreign
        elif not report.offered:
            level, message = WARN, "no observation yet"
            if self._pairing is not None:
                policy = self._node_parameters.current.policy_node
                message += f": no chunk of {policy} could be paired with its frames"
        if self._pairing is not None:
            values["chunks without their frames"] = self._pairing.lost
        return status_message("recorder", level, message, values)


def _run_on(policy: Policy, observation: Observation, source: str, seed: int) -> CaptureSample:
    return run_on(policy, observation, source, seed=seed, keep_images=True)


def main(args: list[str] | None = None) -> int:
    """Run the node until SIGINT or SIGTERM, and return the process's exit code.

    Args:
        args: Command line with ROS arguments; the process's own if None.
    """
    return run_node(CalibrationRecorderNode, NODE_NAME, args)


if __name__ == "__main__":
    sys.exit(main())
