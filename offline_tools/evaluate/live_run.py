"""Running the policy node on a bag, in a process of its own, and collecting what it publishes.

Owns: the order in which they start and end. Must not import torch.
Nothing is short-circuited: camera frames and joint states reach the node through DDS as they
would on a robot.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from offline_tools.evaluate.node_processes import (
    LiveChunk,
    chunk_recorder,
    isolated_ros,
    node_process,
)

# A recorded frame can be sent again, so a busy machine need not lose it; and what comes late must
# not count as stale, since it is the recording that is judged, not this machine.
PLAYBACK_PARAMETERS: Mapping[str, Any] = {
    "sensor_qos.reliability": "reliable",
    "sensor_qos.depth": 5,
    "max_observation_age_s": 2.0,
    "max_observation_skew_s": 0.5,
}

# After the player's end the node may still be busy with its last observation.
_SETTLE_S = 2.0


@dataclass(frozen=True)
class LiveRun:
    """What one run gave.

    Attributes:
        chunks: In the order of their arrival.
        statuses: The last diagnostic status of each name: (level, message).
    """

    chunks: tuple[LiveChunk, ...]
    statuses: Mapping[str, tuple[int, str]]


def run_live(
    bag: Path, parameters: Mapping[str, Any], folder: Path, *, rate: float = 1.0
) -> LiveRun:
    """Start the node, play a bag to it and collect its chunks.

    Args:
        bag: rosbag2 with the topics that the parameters name.
        parameters: The node's parameters; `PLAYBACK_PARAMETERS`, `use_sim_time` and `autostart`
            are added.
        folder: Where `parameters.yaml` and both processes' logs go.
        rate: Speed of the bag.

    Raises:
        LiveRunError: A process did not start, failed, or did not stop; the message names its log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        **PLAYBACK_PARAMETERS,
        **parameters,
        "use_sim_time": True,
        "autostart": True,
    }
    parameter_file = folder / "parameters.yaml"
    parameter_file.write_text(
        yaml.safe_dump({"/**": {"ros__parameters": settings}}), encoding="utf-8"
    )
    node_command = ["-m", "groot_int8_ros.policy_node", "--ros-args", "--params-file"]
    play_command = ["-m", "offline_tools.cli", "play-bag", str(bag), "--clock"]
    play_command += ["--rate", str(rate), "--wait-for-subscribers", "20"]
    with isolated_ros(), chunk_recorder() as recorder:
        with node_process(
            [*node_command, str(parameter_file)], folder / "policy_node.log"
        ) as node:
            recorder.wait_until_active(node)
            with node_process(play_command, folder / "play_bag.log") as player:
                while player.poll() is None:
                    recorder.spin(0.1)
                    node.check_running()
                if player.poll() != 0:
                    raise player.failure(f"ended with exit code {player.poll()}")
            recorder.spin(_SETTLE_S)
            node.stop()
        return LiveRun(chunks=recorder.chunks(), statuses=recorder.statuses)
