"""What `groot-int8 verify-engines` found, as it lies in the bundle: may these engines be run?

Owns: the file's place and content, and the refusal of engines that failed. Must not import torch
or TensorRT.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from groot_int8_ros.errors import EngineError
from groot_int8_ros.policy.engines.tensorrt_manifest import rebuild_command
from groot_int8_ros.policy.files import atomic_file

ENGINE_REPORT = "reports/verify_engines.json"


@dataclass(frozen=True)
class EngineReport:
    """How far a bundle's engines were from its graphs.

    Attributes:
        engines: Hash of each engine that was compared, by graph.
        device: Device and TensorRT that it was done on, for a person.
        source: What the observations were.
        samples: How many.
        relative_l2: Of `action_pred`, the worst observation; None if it was not finite.
        max_error: The largest that was allowed.
        passed: Whether it held.
    """

    engines: Mapping[str, str]
    device: str
    source: str
    samples: int
    relative_l2: float | None
    max_error: float
    passed: bool

    def write(self, bundle: Path) -> None:
        """Write the report into a bundle.

        Raises:
            OutputError: It cannot be written.
        """
        with atomic_file(bundle / ENGINE_REPORT) as path:
            path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def read_engine_report(bundle: Path) -> EngineReport | None:
    """Return a bundle's report, or None if there is none that can be read."""
    try:
        content = json.loads((bundle / ENGINE_REPORT).read_text(encoding="utf-8"))
        return EngineReport(**content)
    except (OSError, ValueError, TypeError):
        return None


def refuse_failed_engines(bundle: Path, engines: Mapping[str, str]) -> None:
    """Refuse engines that were compared with their graphs and did not answer like them.

    Args:
        bundle: The bundle's folder.
        engines: Hash of each of its engines, by graph.

    Raises:
        EngineError: The bundle's report is of these engines, and says so.
    """
    report = read_engine_report(bundle)
    if report is None or report.passed or report.engines != engines:
        return
    error = (
        "not finite"
        if report.relative_l2 is None
        else f"{report.relative_l2:.2g} off those of their graphs (relative L2; "
        f"{report.max_error:g} was allowed)"
    )
    raise EngineError(
        f"the engines of {bundle} are wrong: groot-int8 verify-engines found their actions "
        f"{error}. Build them again and compare: {rebuild_command(bundle)}; groot-int8 "
        f"verify-engines --bundle {bundle}. To load them all the same, for an investigation, "
        f"remove {bundle / ENGINE_REPORT}"
    )
