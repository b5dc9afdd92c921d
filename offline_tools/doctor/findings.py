"""One line for each thing that was looked at.

Owns: `Finding`, its text and its JSON, and the exit code of all together. Must not import ROS.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import Enum

from offline_tools.cli import EXIT_CHECK_FAILED, EXIT_USER_ERROR


class Level(str, Enum):
    """How bad a finding is.

    `FAULT` keeps the policy from running, or will; `WARNING` is to be known; `UNCHECKED` could not
    be looked at.
    """

    OK = "ok"
    WARNING = "warning"
    UNCHECKED = "unchecked"
    FAULT = "FAULT"


@dataclass(frozen=True)
class Finding:
    """What was found of one thing.

    Attributes:
        level: How bad it is.
        subject: What was looked at, such as `camera front`.
        message: What was seen.
        advice: What to do; empty where nothing is to be done.
    """

    level: Level
    subject: str
    message: str
    advice: str = ""

    def text(self) -> str:
        """Return the finding as one line."""
        advice = f" -> {self.advice}" if self.advice else ""
        return f"{self.level.value:9} {self.subject}: {self.message}{advice}".replace("\n", " ")


def exit_code(findings: Sequence[Finding]) -> int:
    """Return 0 if all is well, 1 if there is a fault, else 2 if something could not be checked."""
    levels = {finding.level for finding in findings}
    if Level.FAULT in levels:
        return EXIT_CHECK_FAILED
    return EXIT_USER_ERROR if Level.UNCHECKED in levels else 0


def as_json(findings: Sequence[Finding]) -> str:
    """Return all findings and the exit code as one JSON object."""
    rows = [asdict(finding) | {"level": finding.level.value} for finding in findings]
    return json.dumps({"exit_code": exit_code(findings), "findings": rows}, indent=2)
