"""The picture of an open-loop evaluation: predicted against recorded targets over time.

Owns: the drawing. Must not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl

from groot_int8_ros.policy.files import atomic_file
from groot_int8_ros.policy.robot import RobotDescription
from groot_int8_ros.policy.types import Float64Array
from offline_tools.evaluate.open_loop import Trajectory

mpl.use("Agg")

from matplotlib import pyplot

_COLUMNS = 3


def draw_trajectory(
    path: Path,
    robot: RobotDescription,
    trajectory: Trajectory,
    predicted: Mapping[str, Mapping[str, Float64Array]],
) -> None:
    """Draw one panel a joint: recorded, each policy's joined chunks, and where they begin.

    Args:
        path: The PNG to write.
        robot: Names keys, joints and units.
        trajectory: The recording.
        predicted: Name of each policy to what `predicted_actions` gave.
    """
    panels = [
        (key, column, spec)
        for key, specs in robot.action_joints.items()
        for column, spec in enumerate(specs)
    ]
    rows = -(-len(panels) // _COLUMNS)
    figure, axes = pyplot.subplots(
        rows, _COLUMNS, figsize=(14, 2.6 * rows), sharex=True, squeeze=False, layout="constrained"
    )
    times_s = trajectory.episode.timestamps_s[: trajectory.frames]
    starts = list(trajectory.starts)
    for axis, (key, column, spec) in zip(axes.flat, panels, strict=False):
        recorded = trajectory.episode.action[key][: trajectory.frames, column]
        axis.plot(times_s, recorded, color="0.5", linewidth=2.5, label="recorded")
        for number, (name, lines) in enumerate(predicted.items()):
            # Policies that agree lie on top of each other: the later ones are dashed.
            style = "-" if number == 0 else (0, (4, 1 + number))
            axis.plot(times_s, lines[key][:, column], linewidth=1.2, linestyle=style, label=name)
        axis.plot(times_s[starts], recorded[starts], "o", color="0.3", markersize=3, label="asked")
        axis.set_title(f"{key}: {spec.name} ({spec.unit})", fontsize=9)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("episode time, s")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8)
    figure.suptitle(
        f"trajectory {trajectory.episode.index}: predicted against recorded actions, policy units"
    )
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=90, format="png")
    pyplot.close(figure)
