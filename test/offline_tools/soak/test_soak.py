"""Hazards of a soak: that it calls good what lost a chunk, grew or fell behind."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from offline_tools.evaluate.node_processes import LiveRunError, node_process
from offline_tools.soak.command import folder_of_logs
from offline_tools.soak.ledger import Ledger, read_ledger, since
from offline_tools.soak.report import JUDGED_S, Outcome, faults
from offline_tools.soak.samples import Sample, read_sample, series

DEADLINE_S = 300.0
STOPPED_S = 5.0


def _samples(grow: float = 0.0, threads: int = 0, files: int = 0) -> list[Sample]:
    """Readings of half an hour whose memory grows by bytes a second, from the warm-up on."""
    return [
        Sample(
            time_s=1000.0 + second,
            resident_bytes=round(10_000_000 + grow * second + 1e5 * (second % 20)),
            threads=7 + (threads if second > 1000 else 0),
            files=9 + (files if second > 1000 else 0),
            processor_s=0.25 * second,
        )
        for second in range(0, 1800, 10)
    ]


def _outcome() -> Outcome:
    counts = Ledger(published=30, accepted=28, refused={"too old": 2}, steps=500)
    return Outcome(
        samples={"policy_node": _samples()},
        warm_up_s=300.0,
        begin=Ledger(published=3, accepted=3),
        end=counts,
        final=counts,
        worst_second=(2, 50),
        exit_codes={"policy_node": 0},
    )


def test_a_good_run_is_good() -> None:
    assert not list(faults(_outcome(), 10.0))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        # Of 20 MB in an hour.
        ({"samples": {"n": _samples(grow=20e6 / 3600)}}, r"memory of n grows by (19|20)\.\d MB/h"),
        ({"samples": {"n": _samples(threads=1)}}, "n has 8 threads, 7 after warm-up"),
        ({"samples": {"n": _samples(files=1)}}, "n has 10 open files, 9 after"),
        ({"final": Ledger(31, 28, {"too old": 2})}, "1 chunks lost: 31 published, 28 accepted"),
        # Counted twice is as wrong as not at all.
        ({"final": Ledger(29, 28, {"too old": 2})}, "-1 chunks lost"),
        ({"final": Ledger(3, 3)}, "no chunk"),
        ({"worst_second": (11, 50)}, "11 of 50 deadlines"),
        ({"exit_codes": {"policy_node": -9}}, "exit code -9"),
    ],
)
def test_each_fault_is_found(change: dict[str, object], words: str) -> None:
    (fault,) = faults(dataclasses.replace(_outcome(), **change), 10.0)  # type: ignore[arg-type]
    assert re.search(words, fault)


def test_a_short_run_is_not_judged_by_its_slope() -> None:
    short = _samples(grow=1e4)[: int(JUDGED_S / 10)]
    outcome = dataclasses.replace(_outcome(), samples={"n": short}, warm_up_s=10.0)
    assert series(short).growth_bytes_per_h > 3e7
    assert not list(faults(outcome, 10.0))


def test_counts_are_those_of_the_diagnostics() -> None:
    found = read_ledger(
        {
            "policy_node: inference": {"chunks": "5", "holds: stale": "2", "state": "running"},
            "chunk_executor: chunks": {"chunks": "3"},
            "chunk_executor: executor": {
                "steps": "100",
                "deadline misses": "1",
                "refused: chunk: too old": "2",
                "refused: joint state: no stamp": "4",
                "holds: arm: no rows left": "6",
            },
        }
    )
    assert found == Ledger(5, 3, {"too old": 2}, 100, 1, {"arm: no rows left": 6}, {"stale": 2})
    assert found.lost == 0
    assert since({"a": 3, "b": 1, "c": 2}, {"a": 1, "b": 1}) == {"a": 2, "c": 2}


def test_a_process_is_read_from_outside() -> None:
    code = "import threading, time; b = bytearray(50 << 20); f = open('/dev/null'); "
    code += "threading.Thread(target=time.sleep, args=(60,)).start(); print('.', flush=True)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        found = read_sample(process.pid, 1.0)
        process.kill()
    assert found.resident_bytes > 50 << 20
    assert found.threads == 2
    assert found.files >= 4
    assert 0.0 < found.processor_s < 60.0


def test_the_log_that_an_error_names_is_there_and_others_go() -> None:
    with (  # noqa: PT012
        pytest.raises(LiveRunError) as found,
        folder_of_logs() as folder,
        node_process(["-c", "print('why')"], folder / "policy_node.log") as process,
    ):
        process.wait(DEADLINE_S)
        process.check_running()
    (log,) = re.findall(r"\S+policy_node\.log", str(found.value))
    assert Path(log).read_text() == "why\n"
    shutil.rmtree(folder)
    with folder_of_logs() as folder:
        pass
    assert not folder.exists()


def test_chunks_that_an_executor_never_heard_are_found_lost(small_deployed: Path) -> None:
    pytest.importorskip("rclpy", reason="needs the ROS 2 Python packages")
    command = [sys.executable, "-m", "offline_tools.cli", "soak", "--bundle", str(small_deployed)]
    command += ["--minutes", "0.1", "--inference-rate-hz", "30"]
    with subprocess.Popen(
        command,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"ROS_DOMAIN_ID": str(1 + os.getpid() % 100)},
    ) as soak:
        try:
            assert soak.stdout is not None
            assert "measuring" in soak.stdout.readline()
            # Longer than its queue of ten lasts.
            executor = _child(soak.pid, "chunk_executor_node")
            os.kill(executor, signal.SIGSTOP)
            time.sleep(STOPPED_S)
            os.kill(executor, signal.SIGCONT)
            said, _ = soak.communicate(timeout=DEADLINE_S)
        finally:
            soak.kill()
    assert soak.returncode == 1, said
    assert re.search(r"NOT OK: [1-9]\d* chunks lost: \d+ published", said), said


def _child(parent: int, word: str) -> int:
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    (found,) = (
        child for child in map(int, children) if word in Path(f"/proc/{child}/cmdline").read_text()
    )
    return found
