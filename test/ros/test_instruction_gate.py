"""Hazards of a new instruction: the old task answered meanwhile, or the wrong one in the end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("rclpy", reason="needs the ROS 2 Python packages")
pytest.importorskip("onnxruntime", reason="needs ONNX Runtime")

from groot_int8_ros.policy.bundle import open_bundle
from groot_int8_ros.policy.policy import Policy
from groot_int8_ros.policy.prefix_model import PrefixProcess, compute_prefix
from groot_int8_ros.policy.prompt_bank import PromptPrefix
from groot_int8_ros.ros.instruction_gate import InstructionGate

KNOWN = "pick up the cube"
NEW = "open the door"
NEWER = "close the door"


class Held:
    """A computation that is done when the test says so; what it gives is really computed."""

    started: list[Held]

    def __init__(self, bundle: Path, instruction: str) -> None:
        self.bundle = bundle
        self.instruction = instruction
        self.done = False
        self.closed = False
        self.elapsed_s = 0.0

    def result(self) -> PromptPrefix | None:
        if not self.done:
            return None
        return compute_prefix(open_bundle(self.bundle), self.instruction, threads=1)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def policy(small_deployed: Path) -> Iterator[Policy]:
    loaded = Policy.load(small_deployed, threads=1)
    yield loaded
    loaded.close()


class Bench:
    def __init__(self, policy: Policy) -> None:
        self.started: list[Held] = []
        self.now_s, self.flood = 0.0, False
        self.gate = InstructionGate(policy, lambda text: None, self._start, self._clock)

    def _clock(self) -> float:
        # Instructions that people give lie seconds apart.
        self.now_s += 0.001 if self.flood else 1.0
        return self.now_s

    def _start(self, bundle: Path, instruction: str) -> Held:
        self.started.append(Held(bundle, instruction))
        return self.started[-1]


def test_unknown_instruction_holds_until_its_prefix_is_there(policy: Policy) -> None:
    bench = Bench(policy)
    assert bench.gate.check(KNOWN).fault is None
    for _ in range(3):
        found = bench.gate.check(NEW)
        assert found.pending
        assert "is not in the bundle" in str(found.fault)
    assert [one.instruction for one in bench.started] == [NEW]
    bench.started[0].done = True
    assert bench.gate.check(NEW).fault is None
    assert bench.started[0].closed
    policy.check_instruction(NEW)
    # And back again, without another computation.
    assert bench.gate.check(KNOWN).fault is None
    assert bench.gate.check(NEW).fault is None
    assert len(bench.started) == 1


@pytest.mark.parametrize("second", [KNOWN, NEWER])
def test_second_instruction_meanwhile_wins(policy: Policy, second: str) -> None:
    bench = Bench(policy)
    bench.gate.check(NEW)
    found = bench.gate.check(second)
    assert bench.started[0].closed
    assert found.instruction == second
    assert (found.fault is None) == (second == KNOWN)
    # The first one's answer, had it come after all, is not asked for any more.
    bench.started[0].done = True
    assert bench.gate.check(second) == found
    assert len(bench.started) == (1 if second == KNOWN else 2)


def test_first_instruction_again_is_computed_again_after_it_was_overtaken(policy: Policy) -> None:
    bench = Bench(policy)
    for instruction in (NEW, NEWER, NEW):
        assert bench.gate.check(instruction).pending
    assert [one.instruction for one in bench.started] == [NEW, NEWER, NEW]
    assert [one.closed for one in bench.started] == [True, True, False]


def test_flood_of_unknown_instructions_starts_few_computations_and_ends_with_the_newest(
    policy: Policy,
) -> None:
    bench = Bench(policy)
    bench.flood = True
    for number in range(400):
        assert bench.gate.check(f"task {number}").pending
    # 400 ms: the first one at once, and none of those that were overtaken.
    assert [one.instruction for one in bench.started] == ["task 0"]
    assert bench.started[0].closed
    bench.flood = False
    for _ in range(2):
        assert bench.gate.check("task 399").pending
    assert [one.instruction for one in bench.started] == ["task 0", "task 399"]
    bench.started[1].done = True
    assert bench.gate.check("task 399").fault is None


def test_failed_computation_is_told_and_not_repeated_until_asked_anew(
    policy: Policy, tmp_path: Path
) -> None:
    started: list[PrefixProcess] = []

    def start(bundle: Path, instruction: str) -> PrefixProcess:
        started.append(PrefixProcess(tmp_path / "gone", instruction, threads=1))
        return started[-1]

    gate = InstructionGate(policy, lambda text: None, start)
    assert gate.check(NEW).pending
    started[0]._process.wait(60)
    for _ in range(2):
        found = gate.check(NEW)
        assert not found.pending
        assert "could not be computed: no such folder" in str(found.fault)
    assert len(started) == 1


def test_closing_ends_what_is_under_way(policy: Policy) -> None:
    bench = Bench(policy)
    bench.gate.check(NEW)
    bench.gate.close()
    assert bench.started[0].closed


def test_instruction_that_can_never_be_used_starts_nothing(policy: Policy) -> None:
    bench = Bench(policy)
    for text in ("", "...", " ".join(["word"] * 60)):
        found = bench.gate.check(text)
        assert found.fault
        assert not found.pending
    assert not bench.started
