"""What both families of graphs have in common: three stages, and how a graph is run.

Owns: `PolicyGraphs`, the observer of runs, and committed rows as the network takes them. Must not
import ROS or torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from groot_int8_ros.policy.engines import Engine, Tensors
from groot_int8_ros.policy.postprocess import encode_actions
from groot_int8_ros.policy.preprocess import Preprocessor
from groot_int8_ros.policy.processor import Processor
from groot_int8_ros.policy.types import (
    BoolArray,
    CommittedActions,
    Float32Array,
    Observation,
)

# Called with a graph's name and its inputs before each run.
GraphObserver = Callable[[str, Tensors], None]


@dataclass(frozen=True, eq=False)
class CommittedRows:
    """Committed actions as the network takes them.

    Attributes:
        actions: Normalised actions, float32 (1, H, max_action_dim); rows that are not committed
            are zero.
        mask: Which rows are committed, bool (1, H).
    """

    actions: Float32Array
    mask: BoolArray

    @classmethod
    def encoded(
        cls,
        processor: Processor,
        horizon: int,
        committed: CommittedActions,
        state: Mapping[str, ArrayLike],
    ) -> CommittedRows:
        """Return committed actions as the network takes them.

        Args:
            processor: The embodiment's conventions.
            horizon: Action tokens of the network, H.
            committed: In physical units.
            state: Raw state of the observation that is to be answered.

        Raises:
            ObservationError: They do not fit the policy.
        """
        actions = np.zeros((1, horizon, processor.max_action_dim), np.float32)
        mask = np.zeros((1, horizon), np.bool_)
        # Before the rows are used as places: it refuses those that are none.
        encoded = encode_actions(processor, committed, state)
        rows = list(committed.rows)
        actions[0, rows] = encoded
        mask[0, rows] = True
        return cls(actions, mask)


Inputs = TypeVar("Inputs")
Features = TypeVar("Features")


class PolicyGraphs(Generic[Inputs, Features]):
    """Runs the graphs of one family: `preprocess`, then `features`, then `actions`.

    The three stages are apart so that each can be timed, compared and fed on its own. Engines are
    looked up when they run: a stage whose engines were not given cannot be run, the others can.

    Attributes:
        observer: Told of every run; None where nobody asks.
    """

    def __init__(self, engines: Mapping[str, Engine], preprocess: Preprocessor) -> None:
        """Take the engines by graph name, and the observation chain."""
        self._engines = engines
        self._preprocess = preprocess
        self.observer: GraphObserver | None = None

    def check_instruction(self, instruction: str) -> None:
        """Raise `ObservationError` if an instruction cannot be used."""
        raise NotImplementedError

    def release_tokenizer(self) -> None:
        """Free the tokenizer until an instruction comes that is new; see `PromptTokenizer`."""
        self._preprocess.release_tokenizer()

    def preprocess(self, observation: Observation) -> Inputs:
        """Return what the stages need of an observation.

        Raises:
            ObservationError: The observation cannot be used.
        """
        raise NotImplementedError

    def features(self, inputs: Inputs) -> Features:
        """Run the backbone.

        Raises:
            EngineError: The graph failed.
        """
        raise NotImplementedError

    def actions(
        self,
        inputs: Inputs,
        features: Features,
        noise: Float32Array,
        committed: CommittedRows | None = None,
    ) -> Float32Array:
        """Integrate the flow from noise to normalised actions with Euler steps.

        In step k of N, at t = k / N, a committed row is (1 - t) noise + t committed before the
        network sees it, which is where the flow of training has it, and at the end it is what was
        committed.

        Args:
            inputs: What `preprocess` gave.
            features: What `features` gave.
            noise: float32 (H, max_action_dim).
            committed: Rows that are fixed, or None.

        Returns:
            Normalised actions, float32 (H, max_action_dim).

        Raises:
            EngineError: A graph failed.
        """
        raise NotImplementedError

    def _run(self, name: str, feeds: Tensors) -> dict[str, NDArray[Any]]:
        if self.observer is not None:
            self.observer(name, feeds)
        return self._engines[name].run(feeds)
