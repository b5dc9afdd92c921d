"""What `groot-int8 verify-engines` found, as it lies in the bundle: may these engines be run?

Owns: the file's place and content, and the refusal of engines that failed. Must not import torch
or TensorRT before it is asked which engines are here.

`bundle/reports/verify_engines/<folder of the engines>.json`: one for each TensorRT and device, for
a bundle may serve several. It names the engines by their hash, so it ends with them.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from groot_int8_ros.errors import EngineError
from groot_int8_ros.policy.engines.cuda import Cuda
from groot_int8_ros.policy.engines.tensorrt_manifest import (
    EngineManifest,
    engine_folder,
    find_engine,
    read_engine_manifest,
    rebuild_command,
)
from groot_int8_ros.policy.files import atomic_file, read_json

if TYPE_CHECKING:
    from groot_int8_ros.policy.bundle import Bundle

_REPORTS = "reports/verify_engines"


@dataclass(frozen=True)
class EnginesHere:
    """A bundle's engines for the TensorRT and the device that are here.

    Attributes:
        folder: Where they lie.
        device: TensorRT and device, for a person.
        manifests: What stands beside each, by graph.
    """

    folder: Path
    device: str
    manifests: Mapping[str, EngineManifest]

    @property
    def hashes(self) -> dict[str, str]:
        """Hash of each engine, by graph."""
        return {name: manifest.engine_sha256 for name, manifest in self.manifests.items()}

    def rebuild_commands(self, bundle: Path) -> str:
        """Return what builds them all again with their own options.

        One command line, or one for each where their options differ.

        Args:
            bundle: The bundle's folder.
        """
        # Each begins with `--graph NAME`.
        options = [manifest.build_options for manifest in self.manifests.values()]
        shared = {own[2:] for own in options}
        return "; ".join(
            rebuild_command(bundle, own) for own in (shared if len(shared) == 1 else options)
        )


@dataclass(frozen=True)
class EngineReport:
    """How far a bundle's engines were from its graphs.

    Attributes:
        engines: Hash of each engine that was compared, by graph.
        device: TensorRT and device that it was done on, for a person.
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

    @property
    def error(self) -> str:
        """What the error was, as the end of a sentence about the engines' actions."""
        if self.relative_l2 is None:
            return "not finite"
        return (
            f"{100 * self.relative_l2:.2g} % off those of their graphs "
            f"({100 * self.max_error:g} % is allowed)"
        )

    def write(self, path: Path) -> None:
        """Write the report.

        Raises:
            OutputError: It cannot be written.
        """
        with atomic_file(path) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def report_path(bundle: Path, engines: Path) -> Path:
    """Return where the report on a folder of engines lies.

    Args:
        bundle: The bundle's folder.
        engines: The folder inside it that holds the engines.
    """
    return bundle / _REPORTS / f"{engines.name}.json"


def read_engine_report(path: Path) -> EngineReport | None:
    """Return a report, or None if there is none or it is damaged.

    Args:
        path: Where `report_path` says that it lies.

    Raises:
        EngineError: There is one, and it cannot be read: it may say that the engines are wrong.
    """
    try:
        content = read_json(path)
        report = EngineReport(**content)
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError):
        return None
    except OSError as error:
        reports, bundle = path.parents[1], path.parents[2]
        raise EngineError(
            f"{path} cannot be read ({error.strerror}), so nobody knows whether groot-int8 "
            "verify-engines found the engines wrong. Let the user who runs them read it, as the "
            f"one who wrote it: {shlex.join(['chmod', '-R', 'a+rX', str(reports)])}; or compare "
            f"again: {_verify_command(bundle)}"
        ) from error
    numbers = [content["max_error"]]
    if content["relative_l2"] is not None:
        numbers.append(content["relative_l2"])
    whole = (
        isinstance(content["engines"], dict)
        and isinstance(content["passed"], bool)
        and all(isinstance(one, float | int) for one in numbers)
    )
    return report if whole else None


def engines_here(bundle: Bundle) -> EnginesHere:
    """Return a bundle's engines for the TensorRT and the device that are here.

    Raises:
        EngineError: There is no TensorRT or GPU here, or an engine is missing.
    """
    from groot_int8_ros.policy.engines.tensorrt_engine import import_tensorrt

    version, device = str(import_tensorrt().__version__), Cuda().device()
    folder = engine_folder(bundle.folder, version, device)
    manifests = {}
    for name in bundle.manifest.engine_graphs:
        path = find_engine(bundle.folder, bundle.graph_path(name), version, device)
        manifests[name] = read_engine_manifest(path.with_suffix(".json"), bundle.folder)
    return EnginesHere(folder, f"TensorRT {version}, {device.describe()}", manifests)


def advice(bundle: Path, here: EnginesHere) -> str:
    """Return what to do about engines that are wrong."""
    return (
        "Do not run them. Deployed graphs in FP16 and INT8 were right where others were not "
        f"(docs/engines.md); build again and compare: {here.rebuild_commands(bundle)}; "
        f"{_verify_command(bundle)}"
    )


def refuse_failed_engines(bundle: Bundle) -> None:
    """Refuse engines that were compared with their graphs and did not answer like them.

    Raises:
        EngineError: The bundle's report is of the engines that are here, and says so; or it
            cannot be read.
    """
    try:
        here = engines_here(bundle)
    except EngineError:
        return  # whoever loads them says what is missing
    path = report_path(bundle.folder, here.folder)
    report = read_engine_report(path)
    if report is None or report.passed or report.engines != here.hashes:
        return
    raise EngineError(
        f"the engines of {bundle.folder} are wrong: groot-int8 verify-engines found their actions "
        f"{report.error}. {advice(bundle.folder, here)}. To load them all the same, "
        f"for an investigation, remove {path}"
    )


def _verify_command(bundle: Path) -> str:
    return shlex.join(["groot-int8", "verify-engines", "--bundle", str(bundle)])
