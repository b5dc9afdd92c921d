"""What the calibration set shows of a graph, and which sets are refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from groot_int8_ros.errors import QuantizationError
from offline_tools.quantize.statistics import collect

Feeds = Callable[[], Iterator[Mapping[str, NDArray[Any]]]]


def _graph(two_products: Callable[..., Path]) -> Path:
    random = np.random.RandomState(0)
    weights = [random.standard_normal((4, n)).astype(np.float32) for n in (3, 2)]
    return two_products(*weights, np.zeros(2, np.float32))


def test_maxima_are_exact_and_the_rows_are_those_of_the_samples(
    two_products: Callable[..., Path],
) -> None:
    samples = [np.random.RandomState(i).standard_normal((6, 4)).astype("f4") for i in range(5)]
    found = collect(_graph(two_products), lambda: ({"x": x} for x in samples), rows=7)
    seen = found.inputs["x"]
    everything = np.concatenate(samples)
    assert found.samples == 5
    assert seen.layers == ("first", "second")
    assert np.array_equal(seen.channel_max, np.abs(everything).max(axis=0))
    levels = np.abs(everything) / np.sqrt(np.mean(everything**2, axis=1, keepdims=True))
    assert seen.channel_level == pytest.approx(levels.mean(axis=0), rel=1e-5)
    assert seen.histogram.total == everything.size
    assert len(seen.rows) == 7
    assert {tuple(row) for row in seen.rows} <= {tuple(row) for row in everything}


def test_the_rows_are_drawn_from_all_samples_and_by_the_seed(
    two_products: Callable[..., Path],
) -> None:
    graph = _graph(two_products)

    def feeds() -> Iterator[Mapping[str, NDArray[Any]]]:
        return ({"x": np.full((10, 4), i, np.float32)} for i in range(50))

    first = collect(graph, feeds, rows=40, seed=3).inputs["x"].rows
    again = collect(graph, feeds, rows=40, seed=3).inputs["x"].rows
    other = collect(graph, feeds, rows=40, seed=4).inputs["x"].rows
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert len({row[0] for row in first}) > 20


def test_many_passes_give_what_one_pass_gives(tiny_bundle: Path, dit_feeds: Feeds) -> None:
    graph = tiny_bundle / "onnx" / "dit_model.onnx"
    one = collect(graph, dit_feeds)
    many = collect(graph, dit_feeds, max_pass_bytes=1)
    assert list(one.inputs) == list(many.inputs)
    for name, seen in one.inputs.items():
        assert np.array_equal(seen.channel_max, many.inputs[name].channel_max)
        assert np.array_equal(seen.rows, many.inputs[name].rows)


def test_an_empty_set_is_refused(two_products: Callable[..., Path]) -> None:
    with pytest.raises(QuantizationError, match="holds no sample"):
        collect(_graph(two_products), lambda: iter(()))


def test_a_sample_with_nan_is_named(two_products: Callable[..., Path]) -> None:
    good, bad = np.ones((2, 4), np.float32), np.full((2, 4), np.nan, np.float32)
    with pytest.raises(QuantizationError, match=r"sample 1: x holds NaN"):
        collect(_graph(two_products), lambda: iter([{"x": good}, {"x": bad}]))


def test_a_sample_of_another_checkpoint_is_named(two_products: Callable[..., Path]) -> None:
    with pytest.raises(QuantizationError, match=r"sample 0 does not fit graph.onnx"):
        collect(_graph(two_products), lambda: iter([{"x": np.ones((2, 5), np.float32)}]))


def test_a_float_graph_that_overflows_is_told_apart_from_a_bad_sample(
    two_products: Callable[..., Path],
) -> None:
    # The layer's input is the cast sample: 1e6 is finite as float32 and infinite as float16.
    weights = [np.ones((4, n), np.float16) for n in (3, 2)]
    graph = two_products(*weights, np.zeros(2, np.float16))
    with (
        pytest.raises(QuantizationError, match="overflows"),
        np.errstate(over="ignore"),
    ):
        collect(graph, lambda: iter([{"x": np.full((2, 4), 1e6, np.float32)}]))
