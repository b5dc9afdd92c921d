"""Policy node, executor and simulated robot as three processes: some episodes over DDS.

Owns: the order in which they start and end, and what is kept of a run. Must not import torch.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from offline_tools.evaluate.node_processes import (
    ChunkRecorder,
    NodeProcess,
    chunk_recorder,
    isolated_ros,
    node_process,
)
from offline_tools.simulation.config_files import NODES, STEPPED_NODES, config_file

# After the last episode chunks may still be on their way.
_SETTLE_S = 1.0


@dataclass(frozen=True)
class LoopRun:
    """What one bundle's episodes gave.

    Attributes:
        episodes: Results as `groot-int8 simulate --output` writes them.
        timings_s: Stage of an inference to its duration in every inference, seconds.
        peak_bytes: Node to the largest resident memory of its process.
        wall_s: From the first episode's begin to the last one's end.
    """

    episodes: Sequence[Mapping[str, Any]]
    timings_s: Mapping[str, Sequence[float]]
    peak_bytes: Mapping[str, int]
    wall_s: float

    @property
    def successes(self) -> int:
        """Number of episodes whose task was fulfilled."""
        return sum(bool(episode["success"]) for episode in self.episodes)

    def to_json(self) -> str:
        """Return all of it as JSON, for `from_json`."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> LoopRun:
        """Read what `to_json` wrote."""
        return cls(**json.loads(text))


def run_loop(
    bundle: Path, folder: Path, *, episodes: int, report: Callable[[str], None] = print
) -> LoopRun:
    """Start the three, let the robot do its episodes with a stepped clock, and end them.

    Args:
        bundle: What the policy node runs.
        folder: For `results.jsonl`, `film.png` and the processes' logs.
        episodes: How many; their seeds begin with 0.
        report: Called with a line of progress at a time.

    Raises:
        LiveRunError: A process failed; the message names its log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    results, film = folder / "results.jsonl", folder / "film.png"
    for old in (results, film):
        old.unlink(missing_ok=True)
    parameters = [
        word
        for name in (NODES, STEPPED_NODES)
        for word in ("--params-file", str(config_file(name)))
    ]
    policy_words = ["-m", "groot_int8_ros.policy_node", "--ros-args", *parameters]
    executor_words = ["-m", "groot_int8_ros.chunk_executor_node", "--ros-args", *parameters]
    robot_words = ["-m", "offline_tools.cli", "simulate", "--stepped", "--enable"]
    robot_words += ["--episodes", str(episodes), "--output", str(results), "--film", str(film)]
    with contextlib.ExitStack() as running:
        running.enter_context(isolated_ros())
        recorder = running.enter_context(chunk_recorder())

        def start(words: Sequence[str], name: str) -> NodeProcess:
            return running.enter_context(node_process(words, folder / f"{name}.log"))

        executor = start(executor_words, "chunk_executor")
        policy = start([*policy_words, "-p", f"bundle:={bundle.resolve()}"], "policy_node")
        recorder.wait_until_active(policy)
        robot = start(robot_words, "simulated_robot")
        report(
            f"policy_node {policy.pid}, chunk_executor {executor.pid} and the robot {robot.pid}"
        )
        _watch(robot, (policy, executor), recorder, results, report)
        recorder.spin(_SETTLE_S)
        peaks = {"policy_node": policy.peak_memory(), "chunk_executor": executor.peak_memory()}
        for node in (executor, policy):
            node.stop()
        stages: dict[str, list[float]] = {}
        for chunk in recorder.chunks():
            for stage, seconds in chunk.info["timings_s"].items():
                stages.setdefault(stage, []).append(seconds)
    done = _finished(results)
    return LoopRun(done, stages, peaks, sum(episode["wall_s"] for episode in done))


def _watch(
    robot: NodeProcess,
    nodes: Sequence[NodeProcess],
    recorder: ChunkRecorder,
    results: Path,
    report: Callable[[str], None],
) -> None:
    """Receive and report until the robot's process has ended."""
    told = 0
    while True:
        code = robot.poll()
        recorder.spin(0.1)
        for episode in _finished(results)[told:]:
            told += 1
            how = "done" if episode["success"] else "NOT done"
            report(
                f"  episode {episode['seed']}: put the {episode['task']['cube']} cube on the "
                f"{episode['task']['plate']} plate: {how} after {episode['time_s']:.1f} s "
                f"({episode['wall_s']:.0f} s of real time)"
            )
        if code is not None:
            break
        for node in nodes:
            node.check_running()
    if code != 0:
        raise robot.failure(f"ended with exit code {code}")


def _finished(results: Path) -> list[dict[str, Any]]:
    if not results.exists():
        return []
    whole, _, _ = results.read_text(encoding="utf-8").rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]
