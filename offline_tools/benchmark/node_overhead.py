"""What the node itself costs: the road from message to message without the engines.

Owns: the measured process. Must not import torch. The node, its callbacks, its worker and the
policy's own arithmetic are the real ones; only the engines are replaced, by ones that wait and
answer zeros, so that what is left over is the road. It never commands a robot: it runs in a ROS
domain of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rclpy
from numpy.typing import NDArray
from rclpy.executors import SingleThreadedExecutor
from rclpy.parameter import Parameter
from std_msgs.msg import String

from groot_int8_ros.errors import EngineError
from groot_int8_ros.policy.bundle import GraphRecord, open_bundle
from groot_int8_ros.policy.engines import Engine, Tensors, TensorSpec
from groot_int8_ros.policy.engines.base import checked_feeds
from groot_int8_ros.policy.policy import Policy
from groot_int8_ros.policy_node import PolicyNode
from groot_int8_ros.ros.parameters import NodeParameters
from offline_tools.benchmark.memory import process_memory

# From the arrival of a frame to the engine's input.
_INPUT_STAGES = ("wait", "read", "preprocess")
_FIRST_CHUNK_WITHIN_S = 30.0


class _Pause:
    """An engine that waits instead of computing."""

    def __init__(self, record: GraphRecord, pause_s: float) -> None:
        self._record = record
        self._pause_s = pause_s
        self._answer = {
            name: np.zeros([axis if isinstance(axis, int) else 1 for axis in s.shape], s.dtype)
            for name, s in record.outputs.items()
        }

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        return self._record.inputs

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        return self._record.outputs

    @property
    def remarks(self) -> Sequence[str]:
        return ()

    def run(self, feeds: Tensors) -> dict[str, NDArray[Any]]:
        checked_feeds(self._record.file, self.inputs, feeds)
        time.sleep(self._pause_s)
        return self._answer

    def close(self) -> None:
        pass


class _NodeWithoutEngines(PolicyNode):
    def __init__(self, pause_s: float, **options: Any) -> None:
        self._pause_s = pause_s
        self.timings_s: list[Mapping[str, float]] = []
        super().__init__(**options)

    def _load_policy(self, parameters: NodeParameters) -> Policy:
        bundle = open_bundle(parameters.bundle_path)
        names = bundle.manifest.engine_graphs
        pause_s = self._pause_s / len(names)
        engines: dict[str, Engine] = {
            name: _Pause(bundle.manifest.graphs[name], pause_s) for name in names
        }
        return Policy(bundle, engines)

    def collect(self, message: String) -> None:
        self.timings_s.append(json.loads(message.data)["timings_s"])


def main(argv: list[str] | None = None) -> int:
    """Run the node and print its figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--warmup-seconds", type=float, default=3.0)
    parser.add_argument("--pause-ms", type=float, required=True)
    args = parser.parse_args(argv)
    prompts = open_bundle(args.bundle, verify_hashes=False).manifest.prompts
    known = [one.text for one in prompts.instructions] if prompts is not None else []
    settings = {
        "bundle": str(args.bundle),
        "instruction": known[0] if known else "do it",
        "inference_rate_hz": 200.0,
        "sensor_qos.reliability": "reliable",
    }
    rclpy.init()
    node = _NodeWithoutEngines(
        args.pause_ms / 1e3,
        parameter_overrides=[Parameter(name, value=value) for name, value in settings.items()],
    )
    try:
        figures = _measure(node, args)
    finally:
        node.close()
        node.destroy_node()
        rclpy.shutdown()
    print(json.dumps(figures))
    return 0


def _measure(node: _NodeWithoutEngines, args: argparse.Namespace) -> dict[str, Any]:
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    listener = rclpy.create_node("benchmark_listener")
    listener.create_subscription(String, "/policy_node/chunk_info", node.collect, 100)
    executor.add_node(listener)
    node.trigger_configure()
    node.trigger_activate()

    def spin(seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            executor.spin_once(timeout_sec=0.05)

    # A busy machine takes its time to find the cameras; what is measured begins after that.
    give_up_s = time.monotonic() + _FIRST_CHUNK_WITHIN_S
    while not node.timings_s and time.monotonic() < give_up_s:
        spin(0.1)
    spin(args.warmup_seconds)
    assert node._streams is not None
    node.timings_s.clear()
    before = {status.stream.name: status.count for status in node._streams.buffer.status()}
    wall, process, callbacks = time.monotonic(), time.process_time(), time.thread_time()
    spin(args.seconds)
    wall = time.monotonic() - wall
    process = time.process_time() - process
    callbacks = time.thread_time() - callbacks
    received = {
        status.stream.name: status.count - before[status.stream.name]
        for status in node._streams.buffer.status()
    }
    executor.shutdown()
    listener.destroy_node()
    if not node.timings_s:
        raise EngineError(f"the node published nothing; messages received: {received}")
    road_ms = [1e3 * sum(one[stage] for stage in _INPUT_STAGES) for one in node.timings_s]
    return {
        "seconds": wall,
        "chunks": len(road_ms),
        "received": received,
        "callbacks_core_share": callbacks / wall,
        "process_core_share": process / wall,
        "arrival_to_engine_ms": {
            "median": float(np.median(road_ms)),
            "p99": float(np.percentile(road_ms, 99)),
            "max": float(np.max(road_ms)),
        },
        "stages_median_ms": {
            stage: 1e3 * float(np.median([one[stage] for one in node.timings_s]))
            for stage in (*_INPUT_STAGES, "postprocess")
        },
        "resident_bytes": process_memory("VmRSS"),
    }


if __name__ == "__main__":
    sys.exit(main())
