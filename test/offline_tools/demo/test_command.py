"""The demonstration is the first thing that a newcomer runs: it must work, and be able to fail."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from offline_tools.bags.dds import TRANSPORTS_VARIABLE

pytest.importorskip("rclpy", reason="rclpy is not installed: no node can be run")


def run_demo(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    # Its frames are large: over plain UDP they crowd out everything else, the instruction too.
    environment = {k: v for k, v in os.environ.items() if k != TRANSPORTS_VARIABLE}
    return subprocess.run(
        [sys.executable, "-m", "offline_tools.cli", "demo", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=600,
        env={**environment, "PYTHONUNBUFFERED": "1"},
        check=False,
    )


@pytest.mark.slow
def test_the_demo_runs_the_whole_road_and_leaves_its_picture(tmp_path: Path) -> None:
    output = tmp_path / "demo"
    done = run_demo("--output", output, "--frames", "120", "--rate", "0.7")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = (re.split(r"  +", line.strip()) for line in done.stdout.split("5/5")[1].splitlines())
    table = {cells[0]: cells[1:] for cells in rows if len(cells) == 3}
    sizes = [float(cell.removesuffix(" MB")) for cell in table["bundle"]]
    assert sizes[1] < sizes[0]
    counts = [int(cell.split()[0]) for cell in table["INT8 layers, by the audit of the ONNX"]]
    assert counts[0] == 0 < counts[1]
    assert 0.0 < float(table["actions off the float bundle's, relative L2"][1].split()[0]) < 1.0
    for joints in ("single_arm", "gripper"):
        off = table[f"largest, {joints} (joint units)"]
        assert off[0] == "-"
        assert float(off[1]) > 0.0
    # On a busy machine most frames come late, and late frames are not used.
    assert all(int(cell.split(",")[0]) >= 2 for cell in table["chunks published"])
    assert "latency, action_head, median / p95 ms" in table
    report = (output / "bundles" / "report" / "report.md").read_text()
    assert "by the audit of the ONNX" in report
    assert (output / "predicted_vs_recorded.png").read_bytes().startswith(b"\x89PNG")


def test_the_demo_refuses_a_folder_that_is_not_its_own(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    done = run_demo("--output", tmp_path)
    assert done.returncode == 2
    assert "exists and is not an output of `groot-int8 demo`" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
