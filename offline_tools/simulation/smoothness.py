"""How smoothly an arm moved.

Owns: the measures. Must not import MuJoCo or ROS.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from groot_int8_ros.policy.types import Float64Array


def jerk_rad_s3(measured_rad: Sequence[Float64Array], period_s: float) -> float:
    """Return the root mean square of the third derivative of joint angles.

    Args:
        measured_rad: Each float64, shape (J,), one a control period.
        period_s: The control period.
    """
    third = np.diff(np.asarray(measured_rad), n=3, axis=0) / period_s**3
    return float(np.sqrt(np.mean(third**2))) if len(third) else 0.0


def largest_step_rad(commands_rad: Sequence[Float64Array]) -> float:
    """Return the largest change of a joint's command from one control period to the next.

    Args:
        commands_rad: Each float64, shape (J,), one a control period.
    """
    steps = np.abs(np.diff(np.asarray(commands_rad), axis=0))
    return float(steps.max(initial=0.0))
