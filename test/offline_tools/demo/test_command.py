"""The demonstration is the first thing that a newcomer runs: it must work, and be able to fail."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import offline_tools.simulation  # noqa: F401  (how MuJoCo draws is set before it is imported)
from offline_tools.demo.live_loop import LoopRun
from offline_tools.demo.page import Page, checks

for _library in ("rclpy", "mujoco"):
    pytest.importorskip(_library, reason=f"the robot and its nodes need {_library}")

DEADLINE_S = 600.0


def start_demo(*arguments: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "offline_tools.cli", "demo", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )


def run_demo(*arguments: str | Path) -> tuple[int, str]:
    with start_demo(*arguments) as demo:
        text, _ = demo.communicate(timeout=DEADLINE_S)
        return demo.returncode, text


def _has_ended(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"


@pytest.mark.slow
def test_the_demo_goes_on_after_ctrl_c_and_shows_int8_beside_float(tmp_path: Path) -> None:
    output, pids = tmp_path / "demo", []
    with start_demo("--output", output, "--episodes", "1") as demo:
        assert demo.stdout is not None
        seen: list[str] = []
        for line in demo.stdout:
            seen.append(line)
            if line.startswith("policy_node "):
                pids = [int(word) for word in re.findall(r"\d+", line)]
                demo.send_signal(signal.SIGINT)
        assert demo.wait(DEADLINE_S) == 130, "".join(seen)
    assert len(pids) == 3
    end = time.monotonic() + 60.0
    while not all(map(_has_ended, pids)):
        assert time.monotonic() < end, "processes were left behind"
        time.sleep(0.1)
    assert not (output / "report.html").exists()

    code, text = run_demo("--output", output, "--episodes", "1")
    assert code == 0, text
    assert "going on with the run that was interrupted" in text
    assert "quantize: up to date" in text
    assert text.rstrip().endswith("PASS")
    rows = (re.split(r"  +", line.rstrip()) for line in text.split("== 4/4")[1].splitlines())
    table = {cells[0]: cells[1:] for cells in rows if len(cells) == 3}
    sizes = [float(cell.removesuffix(" MB")) for cell in table["bundle"]]
    assert sizes[1] < sizes[0]
    for graph in ("backbone", "action_head"):
        counts = table[f"INT8 layers of {graph}, by the audit of the ONNX"]
        assert int(counts[0]) == 0 < int(counts[1].split()[0])
    for joints in ("single_arm", "gripper"):
        error = float(table[f"largest error of {joints}, degrees"][1].split()[0])
        assert 0.0 < error < 3.0
    assert table["success"] == ["1 of 1", "1 of 1"]
    assert all(float(cell.split(" / ")[0]) > 0.0 for cell in table["action_head"])
    page = (output / "report.html").read_text(encoding="utf-8")
    assert page.count('src="data:image/png;base64,') == 2
    assert not re.search(r'(src|href)="(?!data:)', page), "the page needs another file"
    assert 'class="PASS">PASS<' in page
    # A run that came to its end is not gone on with.
    assert json.loads((output / ".groot-int8-demo").read_text())["finished"]


def test_the_demo_refuses_a_folder_that_is_not_its_own(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    code, text = run_demo("--output", tmp_path)
    assert code == 2
    assert "exists and is not an output of `groot-int8 demo`" in text
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def _run(successes: int, count: int = 10) -> LoopRun:
    episodes = [{"success": number < successes} for number in range(count)]
    return LoopRun(episodes, {}, {}, 0.0)


@pytest.mark.parametrize(
    ("changes", "successes", "failing"),
    [
        ({}, 10, None),
        ({}, 7, "int8: 7 of 10"),
        ({"verified": False}, 10, "the float graphs"),
        ({"audit": {"dit": {"INT8": 4, "UNKNOWN": 1, "FLOAT": 2}}}, 10, "4 of 5 layers"),
        ({"audit": {"dit": {"INT8": 0}}, "schemes": {"dit": {}}}, 10, "0 of 0 layers"),
    ],
)
def test_what_goes_wrong_fails_the_demo(
    changes: dict[str, Any], successes: int, failing: str | None
) -> None:
    found = {
        "verified": True,
        "schemes": {"dit": {"row": 3, "static": 2}},
        "audit": {"dit": {"INT8": 5, "FLOAT": 2}},
    } | changes
    judged = checks(found, {"float": _run(10), "int8": _run(successes)})
    wrong = [check.text for check in judged if not check.passed]
    assert [text[: len(failing)] for text in wrong] == [failing] if failing else not wrong
    page = Page(judged, [], [], [])
    assert page.passed is (failing is None)
    assert ('class="FAIL">FAIL<' in page.html()) is (failing is not None)
