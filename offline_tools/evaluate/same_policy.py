"""Whether two bundles are forms of one policy, so that they can be compared.

Owns: that check alone. Must not import torch, ROS or what reads recordings: the benchmark asks it
on a robot.
"""

from __future__ import annotations

from groot_int8_ros.errors import BundleError
from groot_int8_ros.policy.bundle import TOKENIZER_FILE, Bundle


def refuse_other_policy(reference: Bundle, other: Bundle) -> None:
    """Raise `BundleError` unless two bundles are forms of the same policy.

    They get the same observations, and their answers are compared row by row and decoded with
    one bundle's conventions. So beside the checkpoint (weights and statistics) what is around it
    has to be the same: embodiment, robot, number of action tokens and tokenizer.
    """
    a, b = reference.manifest, other.manifest
    pairs: list[tuple[str, object, object]] = [
        ("checkpoint", a.checkpoint_sha256, b.checkpoint_sha256),
        ("embodiment", a.embodiment, b.embodiment),
        ("action horizon", a.action_horizon, b.action_horizon),
        ("robot description", a.robot, b.robot),
        (TOKENIZER_FILE, a.files.get(TOKENIZER_FILE), b.files.get(TOKENIZER_FILE)),
    ]
    for what, first, second in pairs:
        if first != second:
            raise BundleError(
                f"{other.folder} has another {what} than {reference.folder}; one run compares "
                "forms of one policy, such as float and INT8: evaluate these two in runs of their "
                "own"
            )
