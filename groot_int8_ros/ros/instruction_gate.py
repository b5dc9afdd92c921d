"""Whether the instruction in force can be answered, not at all, or not yet.

Owns: the check of an instruction and the computation of a missing prefix in the background. Must
not import rclpy.

Lifecycle: used from one thread, the inference worker's. While a prefix is being computed the
policy goes without a task: the old instruction is never answered in its place. A new instruction
ends the computation of the one before, whether it is known or not. Where unknown instructions come
one upon another, the newest waits a moment: a flood of them must not become one of processes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from groot_int8_ros.errors import GrootError, ObservationError, UnknownInstructionError
from groot_int8_ros.policy.policy import Policy
from groot_int8_ros.policy.prefix_model import PrefixProcess
from groot_int8_ros.policy.prompt_bank import PromptPrefix
from groot_int8_ros.ros.diagnostics import InstructionCheck

# From the start of one computation to the next. A prefix takes seconds.
_START_PERIOD_S = 0.5


class Computation(Protocol):
    """A prefix that is being computed; see `PrefixProcess`."""

    @property
    def elapsed_s(self) -> float:
        """Wall time since the start, in seconds."""

    def result(self) -> PromptPrefix | None:
        """Return the prefix, None while it is being computed, or raise `EngineError`."""

    def close(self) -> None:
        """End it."""


class InstructionGate:
    """Checks instructions, and has the prefix of an unknown one computed.

    Args:
        policy: Used from the caller's thread.
        tell: Called with what a person may want to know in the log.
        start: Starts a computation for a bundle's folder and an instruction.
        clock: Steady time in seconds.
    """

    def __init__(
        self,
        policy: Policy,
        tell: Callable[[str], object],
        start: Callable[[Path, str], Computation] = PrefixProcess,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._policy = policy
        self._tell = tell
        self._start = start
        self._clock = clock
        self._started_s = -math.inf
        self._check = InstructionCheck(None)
        self._computation: Computation | None = None

    def check(self, instruction: str) -> InstructionCheck:
        """Return what there is to say of the instruction in force, which may change with time."""
        if self._check.instruction != instruction:
            self.close()
            self._check = self._judge(instruction)
        elif self._computation is not None:
            self._check = self._wait(instruction, self._computation)
        elif self._check.pending:
            self._check = self._begin(instruction)
        return self._check

    def close(self) -> None:
        """End a computation under way; what was computed stays with the policy."""
        if self._computation is not None:
            self._computation.close()
            self._computation = None
            self._check = InstructionCheck(None)

    def _judge(self, instruction: str) -> InstructionCheck:
        try:
            self._policy.check_instruction(instruction)
        except UnknownInstructionError as error:
            if not self._policy.manifest.has_prefix_model:
                return InstructionCheck(instruction, str(error))
            return self._begin(instruction)
        except ObservationError as error:
            return InstructionCheck(instruction, str(error))
        return InstructionCheck(instruction)

    def _begin(self, instruction: str) -> InstructionCheck:
        if self._clock() - self._started_s < _START_PERIOD_S:
            return InstructionCheck(
                instruction,
                "its prefix is not in the bundle and will be computed on the CPU, unless another "
                "instruction comes as quickly as this one did",
                pending=True,
            )
        self._started_s = self._clock()
        self._computation = self._start(self._policy.folder, instruction)
        self._tell(f"the prefix of {instruction!r:.200} is being computed on the CPU")
        return self._wait(instruction, self._computation)

    def _wait(self, instruction: str, computation: Computation) -> InstructionCheck:
        try:
            prefix = computation.result()
            if prefix is None:
                return InstructionCheck(
                    instruction,
                    "its prefix is not in the bundle and has been computed on the CPU for "
                    f"{computation.elapsed_s:.0f} s; until it is there nothing is done "
                    "(groot-int8 add-instruction puts it into the bundle for good)",
                    pending=True,
                )
            self._policy.add_prefix(prefix)
        except GrootError as error:
            self.close()
            return InstructionCheck(instruction, str(error))
        self._tell(
            f"the prefix of {instruction!r:.200} is there after {computation.elapsed_s:.1f} s"
        )
        self.close()
        return InstructionCheck(instruction)
