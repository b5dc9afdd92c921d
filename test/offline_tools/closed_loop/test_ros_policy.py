"""Hazards of the stepped node: an answer to another observation, a node that is not there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

pytest.importorskip("rclpy", reason="rclpy is not installed: no node can be run")

from groot_int8_ros.policy.types import Observation
from groot_int8_ros.ros.parameters import PARAMETERS
from groot_int8_ros.ros.recorder_parameters import RECORDER_PARAMETERS
from offline_tools.closed_loop.ros_policy import NodePolicy, NodeSilentError
from offline_tools.closed_loop.torch_policy import TorchPolicy
from offline_tools.simulation.environment import Tabletop
from offline_tools.simulation.robot import by_key, degrees, robot_description
from offline_tools.simulation.ros_messages import noisy
from offline_tools.simulation.tasks import TASKS


def test_the_parameter_file_sets_what_the_nodes_have(repository_root: Path) -> None:
    text = (repository_root / "config" / "simulated_arm_node.yaml").read_text(encoding="utf-8")
    content = yaml.safe_load(text)
    for node, known in (
        ("policy_node", PARAMETERS),
        ("calibration_recorder", RECORDER_PARAMETERS),
    ):
        given = content[f"/**/{node}"]["ros__parameters"]
        names = {
            f"{name}.{inner}" if inner else name
            for name, value in given.items()
            for inner in (value if isinstance(value, dict) else [""])
        }
        assert names - {"use_sim_time"} <= set(known)
        assert given["use_sim_time"] is True


def _observation(simulation: Tabletop, seed: int, stamp_ns: int) -> Observation:
    simulation.reset(seed)
    return Observation(
        images=simulation.frames(),
        state=by_key(degrees(simulation.joints_rad())),
        instruction=TASKS[seed].instruction,
        stamp_ns=stamp_ns,
    )


def test_without_a_node_the_loop_says_what_to_start(
    simulation: Tabletop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROS_DOMAIN_ID", "92")
    observation = _observation(simulation, 0, 10**9)
    with (
        NodePolicy(robot_description(), timeout_s=0.5) as silent,
        pytest.raises(NodeSilentError, match="use_sim_time"),
    ):
        silent.infer(observation)


@pytest.mark.slow
def test_the_shipped_policy_in_the_node_answers_as_pytorch_does(
    simulation: Tabletop,
    policy: TorchPolicy,
    shipped_bundle: Path,
    repository_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ROS_DOMAIN_ID", "93")
    parameters = repository_root / "config" / "simulated_arm_node.yaml"
    with (tmp_path / "node.log").open("wb") as log:
        node = subprocess.Popen(
            [
                *(sys.executable, "-m", "groot_int8_ros.policy_node", "--ros-args"),
                *("--params-file", str(parameters), "-p", f"bundle:={shipped_bundle}"),
            ],
            stdout=log,
            stderr=log,
            env=os.environ,
        )
    try:
        with NodePolicy(robot_description(), timeout_s=100.0) as live:
            for seed, stamp_ns in ((1, 10**9), (4, 5 * 10**9)):
                observation = _observation(simulation, seed, stamp_ns)
                answer = live.infer(observation)
                # The cameras' noise is the topic's; PyTorch has to see the same pictures.
                seen = Observation(
                    {key: noisy(frame, stamp_ns) for key, frame in observation.images.items()},
                    observation.state,
                    observation.instruction,
                    stamp_ns,
                )
                expected = policy.infer(seen)
                assert answer.stamp_ns == stamp_ns
                np.testing.assert_allclose(answer.time_from_start_s, expected.time_from_start_s)
                for key, values in expected.actions.items():
                    np.testing.assert_allclose(answer.actions[key], values, atol=0.01)
    finally:
        node.send_signal(signal.SIGINT)
        try:
            node.wait(30)
        finally:
            node.kill()
