"""A chunk that reaches a subscriber must be the one that the policy computes for those frames.

Real processes, real DDS, real frames: the recorded robot episodes go through bag, player, node and
trajectory message, and are compared with `Policy.infer` on frames read from the dataset itself.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from groot_int8_ros.policy.policy import Policy
from offline_tools.bags.dds import TRANSPORTS_VARIABLE
from offline_tools.bags.episode_to_bag import BagOptions, convert_episode
from offline_tools.dataset.lerobot import Episode, LeRobotDataset
from offline_tools.evaluate.live_run import LiveRun, run_live
from offline_tools.evaluate.node_processes import LiveRunError
from offline_tools.evaluate.recompute import frame_index, recompute, stamps_ns

pytest.importorskip("rclpy", reason="rclpy is not installed: no node can be run")

# 3 s of the episode, slowed down so that a busy machine of two cores loses no frames for long.
FRAMES = 90
RATE = 0.5
ENOUGH_CHUNKS = 5


@dataclass(frozen=True)
class Played:
    """What the node made of an episode."""

    episode: Episode
    fps: float
    bundle: Path
    live: LiveRun


@pytest.fixture(scope="module", params=[0, 1, 2])
def played(
    request: pytest.FixtureRequest,
    g1_dataset_dir: Path,
    g1_policy: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Played:
    bundle, folder = g1_policy / "float", tmp_path_factory.mktemp("played")
    convert_episode(g1_dataset_dir, request.param, folder / "bag", BagOptions(max_frames=FRAMES))
    parameters = {"bundle": str(bundle), "inference_rate_hz": 4.0}
    with pytest.MonkeyPatch.context() as patch:
        # The frames are large: they travel as a user's do.
        patch.delenv(TRANSPORTS_VARIABLE, raising=False)
        live = run_live(folder / "bag", parameters, folder / "run", rate=RATE)
    dataset = LeRobotDataset.open(g1_dataset_dir)
    return Played(dataset.episode(request.param), dataset.fps, bundle, live)


@pytest.mark.slow
def test_chunks_from_real_robot_episodes_equal_the_policy_on_the_same_frames(
    played: Played,
) -> None:
    chunks = played.live.chunks
    assert len(chunks) >= ENOUGH_CHUNKS, played.live.statuses

    policy = Policy.load(played.bundle)
    names = [joint.name for joints in policy.robot.action_joints.values() for joint in joints]
    assert len(names) == 26
    results = recompute(policy, played.episode, BagOptions().start_time_ns, chunks)
    for result in results:
        assert list(result.published.joint_names) == names
        assert result.max_error <= 1e-5
        np.testing.assert_allclose(
            result.published.time_from_start_s, np.arange(16) / played.fps, atol=1e-9
        )
        camera = result.published.info["streams"]["camera cam_high"]
        assert result.published.stamp_ns == camera["stamp_ns"]


@pytest.mark.slow
def test_the_comparison_notices_a_chunk_of_other_frames(played: Played) -> None:
    # The control of the test above: frames of a third of a second earlier must be noticed.
    chunk = played.live.chunks[-1]
    start = BagOptions().start_time_ns
    info = json.loads(json.dumps(chunk.info))
    camera = info["streams"]["camera cam_high"]
    row = frame_index(played.episode, start)[camera["stamp_ns"]]
    camera["stamp_ns"] = int(stamps_ns(played.episode, start)[row - 10])
    policy = Policy.load(played.bundle)
    (result,) = recompute(policy, played.episode, start, [replace(chunk, info=info)])
    assert result.max_error > 1e-5


def test_a_node_that_cannot_start_is_reported_with_its_reason_and_log(tmp_path: Path) -> None:
    before = dict(os.environ)
    with pytest.raises(LiveRunError, match=r"configuring failed: .*no_bundle.*policy_node\.log"):
        run_live(tmp_path / "no_bag", {"bundle": str(tmp_path / "no_bundle")}, tmp_path / "run")
    assert dict(os.environ) == before
