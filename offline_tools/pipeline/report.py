"""The pipeline's one page: what was made, what it costs, and what to look at.

Owns: gathering what the steps wrote, and how it reads. Must not compute anything of its own.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from groot_int8_ros import __version__
from groot_int8_ros.policy.bundle import Manifest, open_bundle
from groot_int8_ros.policy.engines.engine_report import read_engine_report
from groot_int8_ros.policy.files import atomic_file

REPORT_FILES = ("report.json", "report.md")


def write_report(
    folder: Path,
    *,
    float_bundle: Path,
    int8_bundle: Path,
    captures: Path,
    audit: Path,
    audit_of_engines: Path | None,
    answers_of_engines: Path | None,
    seconds: Mapping[str, float | None],
    left_out: Mapping[str, str],
) -> str:
    """Write `report.json` and `report.md`, and return the page.

    Args:
        folder: Where they go.
        float_bundle: The float bundle, verified.
        int8_bundle: The INT8 bundle made from it.
        captures: The calibration set.
        audit: What `groot-int8 audit --json` wrote of the graphs.
        audit_of_engines: The same of the engines; None where none were built.
        answers_of_engines: What `groot-int8 verify-engines` wrote of them; None as above.
        seconds: Step to its duration, where it is known.
        left_out: Step to why it was left out.
    """
    float_manifest = open_bundle(float_bundle, verify_hashes=False).manifest
    int8_manifest = open_bundle(int8_bundle, verify_hashes=False).manifest
    verified = _load(float_bundle / "reports" / "verify.json")
    of_engines = read_engine_report(answers_of_engines) if answers_of_engines else None
    coverage = _load(captures / "coverage.json")
    content = {
        "version": __version__,
        "checkpoint_sha256": int8_manifest.checkpoint_sha256,
        "bytes": {"float": _size(float_manifest), "int8": _size(int8_manifest)},
        "schemes": _schemes(int8_manifest),
        "errors": _errors(int8_manifest),
        "audit": _verdicts(_load(audit)),
        "engine_audit": {} if audit_of_engines is None else _proven(_load(audit_of_engines)),
        "verified": verified["passed"],
        "engines_verified": None if of_engines is None else asdict(of_engines),
        "calibration": {key: coverage[key] for key in ("samples", "offered", "thin")},
        "engines": sorted(path.name for path in (int8_bundle / "engines").glob("*/*.engine")),
        "left_out": dict(left_out),
        "seconds": dict(seconds),
    }
    page = _page(content)
    for name, text in zip(REPORT_FILES, (json.dumps(content, indent=2) + "\n", page), strict=True):
        with atomic_file(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return page


def _page(content: Mapping[str, Any]) -> str:
    size = content["bytes"]
    lines = [
        "# From checkpoint to INT8",
        "",
        "| | float | INT8 |",
        "|---|---|---|",
        f"| bundle | {size['float'] / 1e6:.1f} MB | {size['int8'] / 1e6:.1f} MB "
        f"({size['int8'] / size['float']:.2f} x) |",
    ]
    lines += [
        f"| INT8 layers of {graph}, by the audit of the ONNX | 0 | {found['INT8']} of "
        f"{sum(found.values())} |"
        for graph, found in content["audit"].items()
    ]
    lines += [
        f"| layers of {engine} known to be INT8, by the audit of its engine | | "
        f"{found['int8']} of {found['asked']} that should be |"
        for engine, found in content["engine_audit"].items()
    ]
    of_engines = content["engines_verified"]
    if of_engines is not None:
        error = of_engines["relative_l2"]
        shown = "not finite" if error is None else f"{100 * error:.3f} %"
        verdict = "" if of_engines["passed"] else ": **too far, do not run them**"
        lines += [
            "| relative L2 of the actions, engines against the same graphs on ONNX Runtime | | "
            f"{shown}{verdict} |"
        ]
    errors = content["errors"]
    lines += [
        f"| relative L2 of the actions | 0 | {100 * errors['relative_l2']:.3f} % |",
        f"| cosine of the actions | 1 | {errors['cosine']:.6f} |",
        f"| jerk | 1 x | {errors['jerk_ratio']:.4f} x |",
    ]
    lines += [
        f"| {key.removeprefix('max_error/')}: largest error, joint units | 0 | {value:.4g} (p99 "
        f"{errors[key.replace('max_', 'p99_', 1)]:.4g}) |"
        for key, value in errors.items()
        if key.startswith("max_error/")
    ]
    calibration = content["calibration"]
    lines += [
        "",
        "Actions: INT8 against float, on held-out calibration samples. The float graphs compute "
        "what the checkpoint does: " + ("yes." if content["verified"] else "**no**."),
        "",
        "| scheme | layers |",
        "|---|---|",
        *(f"| {graph}: {name} | {n} |" for graph, s in content["schemes"].items()
          for name, n in s.items()),
        "",
        f"Calibrated on {calibration['samples']} of {calibration['offered']} observations.",
        *(f"- THIN: {text}" for text in calibration["thin"]),
        "",
        *(f"Engine: {name}" for name in content["engines"]),
        *(f"Not known of {engine}: {found['unknown']} layers that should be INT8. "
          "`groot-int8 audit --engine` prints the commands that look into them."
          for engine, found in content["engine_audit"].items() if found["unknown"]),
        *(f"Left out, {name}: {why}" for name, why in content["left_out"].items()),
        "",
        "| step | seconds |",
        "|---|---|",
        *(f"| {name} | {value:.1f} |" for name, value in content["seconds"].items()
          if value is not None),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _size(manifest: Manifest) -> int:
    return sum(size for _, size in manifest.files.values())


def _schemes(manifest: Manifest) -> dict[str, dict[str, int]]:
    return {
        name: dict(Counter(scheme.name for scheme in graph.quantization.layers.values()))
        for name, graph in manifest.graphs.items()
        if graph.quantization is not None
    }


def _errors(manifest: Manifest) -> dict[str, float]:
    # Every quantised graph's record holds the errors of the whole bundle.
    for graph in manifest.graphs.values():
        if graph.quantization is not None:
            return dict(graph.quantization.errors)
    raise RuntimeError("a bundle without a quantised graph")


def _verdicts(audit: Mapping[str, Any]) -> dict[str, Counter[str]]:
    return {
        graph: Counter(layer["verdict"] for layer in layers)
        for graph, layers in audit.items()
        if any(layer["wanted"] == "INT8" for layer in layers)
    }


def _proven(audit: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    asked = {
        engine: [layer["verdict"] for layer in layers if layer["wanted"] == "INT8"]
        for engine, layers in audit.items()
    }
    return {
        engine: {
            "int8": verdicts.count("INT8"),
            "asked": len(verdicts),
            "unknown": verdicts.count("UNKNOWN"),
        }
        for engine, verdicts in asked.items()
        if verdicts
    }


def _load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
