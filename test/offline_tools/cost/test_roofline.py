"""Hazards of a prediction: a fit that finds nothing, a trial that has seen the answer."""

from __future__ import annotations

from dataclasses import replace

import pytest

from groot_int8_ros.errors import ConfigurationError
from offline_tools.cost.devices import DEVICES, Device, find_device
from offline_tools.cost.prediction import PublishedModel, after_int8
from offline_tools.cost.published import (
    GGML,
    TENSORRT,
    int8_pairs,
    needs_stand_in,
    points_of,
    read_rows,
)
from offline_tools.cost.roofline import Efficiency, Fit, Point, factor, seconds, spread
from offline_tools.cost.work import GraphWork, Launch, as_int8

PLANTED = Efficiency(arithmetic=0.45, bandwidth=0.7, launch_s=5e-6)

# Much arithmetic on few bytes, the other way round, and many small kernels.
WORK = {
    "arithmetic": (Launch("a", 10**11, 10**6, 0, "w"),) * 20,
    "memory": (Launch("b", 10**7, 10**8, 10**6, "w"),) * 20,
    "launches": (Launch("c", 1000, 1000, 0),) * 2000,
    "mixture": (
        *(Launch("a", 3 * 10**10, 10**7, 0, "w"),) * 10,
        *(Launch("c", 10**5, 10**6, 0),) * 300,
    ),
}


def _planted(name: str, device: Device) -> Point:
    launches = WORK[name]
    return Point(name, device, launches, seconds(launches, device, PLANTED), device.name)


@pytest.fixture(scope="module")
def planted() -> list[Point]:
    devices = [find_device(name) for name in ("orin-nx-16gb", "agx-orin", "h100")]
    return [_planted(name, device) for device in devices for name in WORK]


def test_time_is_the_longer_of_arithmetic_and_memory_and_a_launch() -> None:
    device = Device("made up", fp16_flops=1e12, int8_ops=2e12, bytes_per_s=1e11)
    half = Efficiency(0.5, 0.5, 1e-6)
    arithmetic, memory = Launch("a", 10**9, 10**6, 0), Launch("b", 10**6, 10**8, 10**8)
    assert seconds([arithmetic], device, half) == pytest.approx(2e-3 + 1e-6)
    assert seconds([memory], device, half) == pytest.approx(4e-3 + 1e-6)
    assert seconds([arithmetic, memory], device, half) == pytest.approx(6e-3 + 2e-6)
    int8 = replace(arithmetic, is_int8=True)
    assert seconds([int8], device, half) == pytest.approx(1e-3 + 1e-6)


def test_fit_recovers_planted_efficiencies(planted: list[Point]) -> None:
    found = Fit(planted).efficiency
    # A step of the grid is 4 to 12 %.
    assert found.arithmetic == pytest.approx(PLANTED.arithmetic, rel=0.06)
    assert found.bandwidth == pytest.approx(PLANTED.bandwidth, rel=0.06)
    assert found.launch_s == pytest.approx(PLANTED.launch_s, rel=0.12)


def test_point_that_is_left_out_is_not_seen(planted: list[Point]) -> None:
    truth = planted[0].seconds
    # A measurement that is wrong by so much that a fit which saw it would follow it.
    points = [replace(planted[0], seconds=20 * truth), *planted[1:]]
    fit = Fit(points)
    results = fit.left_out()
    assert results[0].alone_s == pytest.approx(truth, rel=0.1)
    assert results[0].device_s == pytest.approx(truth, rel=0.1)
    # The others are predicted by fits that saw it, and are worse for it.
    others = [abs(r.alone_s / r.point.seconds - 1) for r in results[1:]]
    assert max(others) > 0.1
    # Without its device nothing is left of it.
    same_device = [r for r in results[1:] if r.point.group == points[0].group]
    for result in same_device:
        assert result.device_s == pytest.approx(result.point.seconds, rel=0.1)


def test_spread_grows_with_the_errors_on_unseen_devices(planted: list[Point]) -> None:
    good = spread(Fit(planted).left_out())
    assert 1.0 <= good < 1.1
    noisy = [
        replace(point, seconds=point.seconds * (1.5 if index % 2 else 0.7))
        for index, point in enumerate(planted)
    ]
    assert spread(Fit(noisy).left_out()) > 1.5


def test_factor_is_the_geometric_mean(planted: list[Point]) -> None:
    assert factor(planted[:2], lambda p: p.seconds / (2 if p is planted[0] else 8)) == (
        pytest.approx(4.0)
    )


def test_published_rows_become_the_measurements_they_are() -> None:
    rows = read_rows()
    points = points_of(rows)
    engines = {point.label.rsplit(": ", 1)[1]: point for point in points[TENSORRT][:4]}
    assert engines["backbone"].seconds == pytest.approx(0.235)
    # 410 - 33 - 235 ms where the head's own time is not given.
    assert engines["head, 4 steps"].seconds == pytest.approx(0.142)
    assert len({point.group for point in points[TENSORRT]}) == 6
    assert len(points[TENSORRT]) == 10
    assert len(points[GGML]) == 6
    pairs = [(a.text("total_ms"), b.text("total_ms")) for a, b in int8_pairs(rows)]
    assert pairs == [("150", "137"), ("75.8", "56.7"), ("84.9", "64.9")]


def test_no_published_row_is_dropped_without_a_word() -> None:
    model = PublishedModel()
    named = [row for row in model.rows if row.text("backbone_runtime")]
    reasons = [reason for _, reason in model.not_predicted()]
    assert reasons == ["no other engine shows what 4 bits save"] * 2
    others = len(model.int8_left_out()) + len(model.stand_ins()) + len(reasons)
    assert len(named) + others == len(model.rows) == 31


def test_engine_of_unknown_sizes_is_predicted_and_not_fitted() -> None:
    model = PublishedModel()
    found = model.stand_ins()
    assert [was for _, was, _ in found] == [75.8, 84.9, 150.9, 80.4, 27.9]
    one, two, full, thor, h100 = (predicted for _, _, predicted in found)
    assert h100 < thor < one < two
    # The same work on the same device; one source tells 9 ms around its engines.
    assert full == pytest.approx(one + 9.0)
    # A published time that is wrong changes neither its own prediction nor the fit.
    rows = [
        replace(row, values={**row.values, "total_ms": "1000"}) if needs_stand_in(row) else row
        for row in model.rows
    ]
    again = PublishedModel(rows)
    assert again.efficiency == model.efficiency
    assert [predicted for _, _, predicted in again.stand_ins()] == [x for _, _, x in found]


def test_int8_engine_is_predicted_from_its_float_one_and_the_other_pairs() -> None:
    # 40 % could be saved; the others saved a half and all of what they could.
    assert after_int8(100.0, 0.4, [0.5, 1.0]) == pytest.approx(100 * (1 - 0.75 * 0.4))
    assert after_int8(100.0, 0.4, []) == 100.0
    model = PublishedModel()
    rows = list(model.rows)
    place = rows.index(model.pairs[1][1])
    rows[place] = replace(rows[place], values={**rows[place].values, "total_ms": "40"})
    before, after = model.int8_left_out(), PublishedModel(rows).int8_left_out()
    assert [round(was, 1) for _, was, _ in before] == [137.0, 56.7, 64.9]
    # What a pair's own INT8 engine took is not seen; the others are predicted faster for it.
    assert after[1][2] == before[1][2]
    assert after[0][2] < before[0][2]
    assert after[2][2] < before[2][2]
    # From the float engine's 150 ms, by the two shares of N1.7.
    one, two = list(model.savings.values())[1:]
    own = (1 - 137 / 150) / model.savings[before[0][0]]
    assert before[0][2] == pytest.approx(150 * (1 - own * (one + two) / 2))


def test_interval_of_int8_reaches_from_all_to_least_of_what_it_saves() -> None:
    model = PublishedModel()
    assert all(0 < share < 1 for share in model.savings.values())
    device = find_device("orin-nx-16gb")
    graph = GraphWork("graph", 1, (Launch("DiT MLP", 10**11, 10**8, 10**6, "w"),) * 10, 0)
    half, int8 = model.predict([graph], device), model.predict([as_int8(graph)], device)
    assert half.middle_s == pytest.approx(half.best_s)
    assert half.high_s / half.middle_s == pytest.approx(model.spread)
    assert int8.low_s * model.spread == pytest.approx(int8.best_s)
    assert int8.best_s < int8.middle_s < half.middle_s
    assert int8.high_s / model.spread > int8.middle_s


def test_times_of_the_kinds_add_up_to_the_graph_that_is_partly_int8() -> None:
    model, device = PublishedModel(), find_device("orin-nx-16gb")
    # The arithmetic of 1e11 operations, the memory of 1e8 bytes, twice each.
    graph = as_int8(
        GraphWork(
            "graph",
            2,
            (
                Launch("DiT MLP", 10**11, 10**6, 0, "a"),
                Launch("norms", 0, 0, 10**8),
                Launch("encoders, decoder", 10**7, 10**8, 0, "b"),
            ),
            0,
        )
    )
    kinds = model.kinds(graph, device)
    assert list(kinds) == ["DiT MLP", "norms", "encoders, decoder"]
    assert sum(kinds.values()) == pytest.approx(model.predict([graph], device).middle_s)
    one = model.efficiency
    memory = 1e8 / (one.bandwidth * device.bytes_per_s) + one.launch_s
    assert kinds["norms"] == pytest.approx(2 * memory)
    assert kinds["encoders, decoder"] == pytest.approx(2 * memory)
    # Of the half of its time that INT8 could save, the pairs saved their mean.
    half = 1e11 / (one.arithmetic * device.fp16_flops)
    saved = sum(model.savings.values()) / len(model.savings) * half / 2
    assert kinds["DiT MLP"] == pytest.approx(2 * (half + one.launch_s - saved))


def test_devices_and_modes_are_found_by_name() -> None:
    fast, slow = find_device("orin-nx-16gb"), find_device("orin-nx-16gb", "25W")
    assert fast.fp16_flops == pytest.approx(19.2e12, rel=0.01)
    assert slow.fp16_flops / fast.fp16_flops == pytest.approx(408 / 1173)
    lean, leaner = find_device("orin-nx-16gb", "15W"), find_device("orin-nx-16gb", "10W")
    assert lean.fp16_flops / fast.fp16_flops == pytest.approx(612 / 1173 / 2)
    assert leaner.fp16_flops == lean.fp16_flops
    assert leaner.bytes_per_s / lean.bytes_per_s == pytest.approx(2133 / 3200, rel=0.001)
    assert all(d.int8_ops > d.fp16_flops for modes in DEVICES.values() for d in modes.values())
    with pytest.raises(ConfigurationError, match="no device 'orin'; known are orin-nx-16gb"):
        find_device("orin")
    with pytest.raises(ConfigurationError, match="has no mode '7W'; known are 40W"):
        find_device("orin-nx-16gb", "7W")
