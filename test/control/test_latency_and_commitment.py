"""What the next chunk is told: a latency that a warm-up poisons, a promise that is not kept."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pytest

from groot_int8_ros.control.commitment import Commitment
from groot_int8_ros.control.latency import LatencyEstimate, LatencySettings
from groot_int8_ros.control.seams import SeamSettings
from groot_int8_ros.control.types import NANOSECONDS
from groot_int8_ros.errors import ConfigurationError

if TYPE_CHECKING:
    from test.control.conftest import Bench, MakeBench


def estimate(*latencies: float, **settings: float) -> LatencyEstimate:
    made = LatencyEstimate(LatencySettings(**settings))  # type: ignore[arg-type]
    for latency in latencies:
        made.add(latency)
    return made


def test_the_warm_up_is_left_out() -> None:
    assert estimate(5.0, 3.0, warm_up=2).expected_s() is None
    assert estimate(5.0, 3.0, *[0.2] * 5, warm_up=2).expected_s() == pytest.approx(0.2)
    restarted = estimate(5.0, 3.0, 0.2, warm_up=2)
    restarted.restart()
    restarted.add(4.0)
    assert restarted.expected_s() is None


def test_one_slow_answer_is_bounded_and_a_slow_policy_is_believed() -> None:
    once = estimate(*[0.2] * 9, 5.0, warm_up=0, quantile=1.0)
    assert once.expected_s() == pytest.approx(0.6)
    slow = estimate(*[0.2] * 10, *[0.9] * 30, warm_up=0)
    assert slow.expected_s() == pytest.approx(0.9)


def test_what_is_no_latency_is_ignored() -> None:
    assert estimate(math.nan, -1.0, math.inf, 0.1, warm_up=0).expected_s() == pytest.approx(0.1)


@pytest.mark.parametrize(
    "settings", [{"warm_up": -1}, {"window": 0}, {"quantile": 1.5}, {"outlier_factor": 0.5}]
)
def test_impossible_latency_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(settings))):
        LatencySettings(**settings)  # type: ignore[arg-type]


def wave(t: float) -> float:
    return 0.3 * (1.0 - math.cos(2.0 * t))


def rtc_bench(make_bench: MakeBench) -> Bench:
    bench = make_bench(seam=SeamSettings("rtc"), latency=LatencySettings(warm_up=0))
    bench.enable()
    bench.run(wave, 1.5)
    return bench


def test_a_commitment_is_what_is_executed_then(make_bench: MakeBench) -> None:
    bench = rtc_bench(make_bench)
    commitment = bench.executor.commitment(bench.now_ns)
    assert commitment is not None
    assert commitment.joint_names == bench.joints
    # 0.1 s of latency and a control period ahead, a second back.
    assert (commitment.due_ns[-1] - bench.now_ns) / NANOSECONDS == pytest.approx(0.12)
    assert (bench.now_ns - commitment.due_ns[0]) / NANOSECONDS >= 1.0
    bench.step(6)
    done = bench.values()[-6:]
    promised, mask = commitment.on_rows(
        bench.now_ns - 20_000_000 * np.arange(5, -1, -1, dtype=np.int64)
    )
    assert mask.all()
    np.testing.assert_allclose(promised[:, :2], done, atol=2e-3)


def test_a_chunk_that_keeps_its_prefix_is_taken_without_a_jump(make_bench: MakeBench) -> None:
    bench = rtc_bench(make_bench)
    assert bench.executor.counters.prefix_mismatches == 0
    bench.chunk(lambda t: wave(t) + 0.2)
    assert bench.executor.counters.prefix_mismatches == 1


def test_nothing_is_promised_while_nothing_is_executed(make_bench: MakeBench) -> None:
    bench = make_bench(seam=SeamSettings("rtc"))
    assert bench.executor.commitment(bench.now_ns) is None
    bench = rtc_bench(make_bench)
    bench.executor.estop("button")
    bench.step()
    assert bench.executor.commitment(bench.now_ns) is None


def test_committed_rows_are_a_prefix_of_the_chunk_to_come() -> None:
    made_ns, row_ns = 10 * NANOSECONDS, 50_000_000
    due_ns = made_ns + row_ns * np.arange(-4, 3, dtype=np.int64)
    commitment = Commitment(made_ns, ("a",), due_ns, np.linspace(-4.0, 2.0, 7)[:, None])
    # The observation is older than the commitment, and its rows lie between the commitment's.
    targets, mask = commitment.on_rows(made_ns + row_ns * np.arange(-3, 5) + row_ns // 2)
    assert mask.tolist() == [True] * 5 + [False] * 3
    np.testing.assert_allclose(targets[:5, 0], np.arange(-2.5, 2.0))
    assert not targets[5:].any()
    # Rows from before the commitment's history: nothing is known of how the chunk begins.
    _, mask = commitment.on_rows(made_ns + row_ns * np.arange(-6, 5))
    assert not mask.any()
