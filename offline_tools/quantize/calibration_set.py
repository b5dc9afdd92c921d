"""How a capture store is used: some samples make the scales, others judge the result.

Owns: the split. Must not import torch. Judging on the samples that made the scales would flatter
every static scheme, so a quarter of the set is held out from everything but the last measurement.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from groot_int8_ros.capture.sample import CaptureSample
from groot_int8_ros.capture.store import CaptureStore
from groot_int8_ros.errors import QuantizationError
from groot_int8_ros.policy.bundle import Bundle

Feed = Mapping[str, NDArray[Any]]

# The least with which something can be held out.
SMALLEST_SET = 2
# Below this a static range is a guess; TensorRT's and the first public N1.6 port's calibrations
# use some hundred.
ADVISED_SET = 32

# Every fourth sample is held out.
_HELD_OUT_EVERY = 4


@dataclass(frozen=True)
class Split:
    """Positions of the samples in the store.

    Attributes:
        fit: Those that make scales and guide the search.
        held_out: Those that judge.
    """

    fit: tuple[int, ...]
    held_out: tuple[int, ...]


class CalibrationSet:
    """A capture store, split."""

    def __init__(self, store: CaptureStore, bundle: Bundle) -> None:
        """Split a store.

        Args:
            store: The samples.
            bundle: Whose graphs they feed.

        Raises:
            CaptureError: The samples are of another bundle or another family of graphs.
            QuantizationError: It holds fewer than `SMALLEST_SET` samples.
        """
        store.check_graphs(bundle.manifest)
        count = len(store)
        if count < SMALLEST_SET:
            raise QuantizationError(
                f"{store.folder} holds {count} sample(s), and quantisation needs at least "
                f"{SMALLEST_SET}: one to make scales from and one to judge the result on. Record "
                f"more; {ADVISED_SET} or more are advised."
            )
        held_out = tuple(range(_HELD_OUT_EVERY - 1, count, _HELD_OUT_EVERY)) or (count - 1,)
        self.store = store
        self._bundle = bundle
        self.split = Split(tuple(i for i in range(count) if i not in held_out), held_out)

    @property
    def is_small(self) -> bool:
        """Whether there are fewer samples than advised."""
        return len(self.store) < ADVISED_SET

    def fit_feeds(self, graph: str) -> Callable[[], Iterator[Feed]]:
        """Return the inputs of a graph over the samples that make scales.

        Args:
            graph: One of the family's large graphs.

        Raises:
            CaptureError: The store lacks these inputs.
        """
        feeds = self.store.feeds(graph, self._bundle)
        per_sample = len(feeds) // len(self.store)
        chosen = set(self.split.fit)

        def read() -> Iterator[Feed]:
            return (feed for i, feed in enumerate(feeds) if i // per_sample in chosen)

        return read

    def samples(self, positions: tuple[int, ...], at_most: int) -> list[CaptureSample]:
        """Read samples, evenly spread over the positions if there are more than `at_most`."""
        wanted = set(spread(positions, at_most))
        return [one for i, one in enumerate(self.store.samples()) if i in wanted]


def spread(positions: tuple[int, ...], at_most: int) -> tuple[int, ...]:
    """Return at most so many of the positions, evenly spread from the first to the last."""
    if len(positions) <= at_most:
        return positions
    chosen = np.linspace(0, len(positions) - 1, at_most).round().astype(int)
    return tuple(positions[i] for i in dict.fromkeys(chosen.tolist()))
