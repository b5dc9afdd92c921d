"""The demonstration's picture: predicted against recorded joints.

Owns: the drawing. Must not import torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np

from groot_int8_ros.policy.files import atomic_file
from groot_int8_ros.policy.policy import Policy
from offline_tools.dataset.lerobot import Episode
from offline_tools.evaluate.recompute import Recomputed

mpl.use("Agg")

from matplotlib import pyplot

_DRAWN_CHUNKS = 12


def draw_chunks(
    path: Path, policy: Policy, episode: Episode, results: Sequence[Recomputed]
) -> None:
    """Draw recorded actions as lines and published chunks on top of them, one panel a joint.

    Args:
        path: The PNG to write.
        policy: Names keys and joints.
        episode: The recording.
        results: The chunks; some of them, evenly spread, are drawn.
    """
    panels = [
        (key, column, joint.name)
        for key, joints in policy.robot.action_joints.items()
        for column, joint in enumerate(joints)
    ]
    rows = -(-len(panels) // 3)
    figure, axes = pyplot.subplots(
        rows, 3, figsize=(14, 2.6 * rows), sharex=True, squeeze=False, layout="constrained"
    )
    step = max(1, len(results) // _DRAWN_CHUNKS)
    for axis, (key, column, name) in zip(axes.flat, panels, strict=False):
        axis.plot(
            episode.timestamps_s, episode.action[key][:, column], color="0.5", label="recorded"
        )
        for number, result in enumerate(results[::step]):
            times = episode.timestamps_s[result.frame] + result.chunk.time_from_start_s
            axis.plot(
                times,
                result.chunk.actions[key][:, column],
                color="tab:orange",
                linewidth=1,
                label="predicted chunk" if number == 0 else None,
            )
        axis.set_title(f"{key}: {name}", fontsize=9)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("episode time, s")
    axes.flat[0].legend(fontsize=8)
    figure.suptitle(
        "Action chunks published by policy_node, against the recorded actions (policy units)"
    )
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=90, format="png")
    pyplot.close(figure)


def mean_error(policy: Policy, episode: Episode, results: Sequence[Recomputed]) -> float:
    """Return the mean absolute difference of predicted and recorded actions, in policy units."""
    errors = []
    for result in results:
        rows = result.frame + np.array(policy.processor.delta_indices)
        inside = rows < len(episode)
        for key in policy.robot.action_joints:
            predicted = result.chunk.actions[key][inside]
            errors.append(np.abs(predicted - episode.action[key][rows[inside]]).ravel())
    return float(np.concatenate(errors).mean())
