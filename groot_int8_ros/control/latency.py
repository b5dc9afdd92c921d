"""How long the policy takes from an observation to its chunk.

Owns: `LatencyEstimate`. Must not import ROS or the policy. The chunk on hand says by itself which
of its rows are past; the estimate says how many rows of the *next* one will be, which is what
real-time chunking must commit to before that one is computed.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from groot_int8_ros.errors import ConfigurationError


@dataclass(frozen=True)
class LatencySettings:
    """How latencies are judged.

    Attributes:
        warm_up: First chunks of a policy that are left out: they hold the warm-up's latency.
        window: Newest chunks that count.
        quantile: Which part of them the estimate covers, 0 to 1.
        outlier_factor: A latency counts as at most this many medians of the window.

    Raises:
        ConfigurationError: A value lies outside its range.
    """

    warm_up: int = 2
    window: int = 50
    quantile: float = 0.9
    outlier_factor: float = 3.0

    def __post_init__(self) -> None:
        if self.warm_up < 0 or self.window < 1:
            raise ConfigurationError("latency: warm_up must be at least 0 and window at least 1")
        if not (0.0 <= self.quantile <= 1.0 and self.outlier_factor >= 1.0):
            raise ConfigurationError(
                "latency: quantile must lie in 0 to 1, and outlier_factor be at least 1"
            )


class LatencyEstimate:
    """Measured latencies, without the warm-up and with outliers bounded.

    One slow answer, such as a swapped-out page or a thermal dip, must not make the executor commit
    to a second of the past; a policy that has become slow must.

    Args:
        settings: How they are judged.
    """

    def __init__(self, settings: LatencySettings) -> None:
        self._settings = settings
        self._values: deque[float] = deque(maxlen=settings.window)
        self._left_out = 0

    def restart(self) -> None:
        """Forget everything: the policy begins anew, with a warm-up of its own."""
        self._values.clear()
        self._left_out = 0

    def add(self, latency_s: float) -> None:
        """Take a measured latency; one that is not finite or negative is ignored."""
        if not np.isfinite(latency_s) or latency_s < 0.0:
            return
        if self._left_out < self._settings.warm_up:
            self._left_out += 1
            return
        self._values.append(float(latency_s))

    @property
    def count(self) -> int:
        """Latencies in the window."""
        return len(self._values)

    def expected_s(self) -> float | None:
        """Return what the next answer is expected to take, or None where nothing is known."""
        if not self._values:
            return None
        values = np.array(self._values)
        bounded = np.minimum(values, self._settings.outlier_factor * float(np.median(values)))
        return float(np.quantile(bounded, self._settings.quantile))
