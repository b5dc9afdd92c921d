"""The curves of a training as a picture.

Owns: drawing `training.json`. Must not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def draw_curves(record: Mapping[str, Any], path: Path) -> None:
    """Draw losses over steps, and success where it was measured.

    Args:
        record: What `train` returned.
        path: The PNG to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps, velocity, places, _ = zip(*record["loss"], strict=True)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6))
    left.semilogy(steps, velocity, label="flow-matching loss")
    left.semilogy(steps, places, label="places (auxiliary)")
    left.set_xlabel("step")
    left.legend()
    for key, label in (("asked", "right instruction"), ("wrong", "wrong instruction")):
        right.plot(
            [one["step"] for one in record["evaluations"]],
            [one[key] for one in record["evaluations"]],
            marker="o",
            label=label,
        )
    right.set_xlabel("step")
    right.set_ylabel("success of the asked task")
    right.set_ylim(-0.03, 1.03)
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
