"""What a float graph's layers see on the calibration set.

Owns: running the graph with its layers' inputs as further outputs, and what is kept of them. Must
not import torch.

Kept of each input: a histogram of its magnitudes, the largest magnitude of each channel, and a
few rows drawn at random, on which schemes are compared layer by layer. Nothing grows with the
number of samples. The graph runs as it is written, with its weights mapped from their file, and in
as many passes as it takes to hold no more than `max_pass_bytes` of activations at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from groot_int8_ros.errors import QuantizationError
from groot_int8_ros.policy.engines.onnxruntime_engine import session_options
from groot_int8_ros.policy.quantization import LayerScheme
from groot_int8_ros.policy.types import Float32Array, Float64Array
from offline_tools.quantize.arithmetic import SMALLEST_ROW_MAX
from offline_tools.quantize.histogram import MagnitudeHistogram
from offline_tools.quantize.layers import Layer, find_layers, load_graph
from offline_tools.quantize.ranges import INT8_MAX, static_range

# Graph name -> its feeds, batch 1, from the first one on at every call.
Feeds = Callable[[str], Iterator[Mapping[str, NDArray[Any]]]]

DEFAULT_ROWS = 128
DEFAULT_PASS_BYTES = 1 << 30


@dataclass(frozen=True)
class InputStatistics:
    """What one activation looked like over the calibration set.

    Attributes:
        layers: The layers that read it.
        histogram: Of all its magnitudes.
        channel_max: Largest magnitude of each channel, float32 (K,).
        channel_level: Mean magnitude of each channel in rows scaled to a root mean square of 1,
            float32 (K,). One massive token cannot dominate it.
        rows: Rows drawn at random from all samples, float32 (R, K).
    """

    layers: tuple[str, ...]
    histogram: MagnitudeHistogram
    channel_max: Float32Array
    channel_level: Float32Array
    rows: Float32Array

    def static_scale(
        self, scheme: LayerScheme, factors: Float32Array | None, percentile: float
    ) -> float:
        """Return the step of int8 under a `static` scheme.

        Args:
            scheme: With a range method that looks at samples.
            factors: What migration divides the channels by, float32 (K,), or None.
            percentile: Of the range method of that name.
        """
        if factors is not None:
            # Migration takes the range method `max`: `LayerScheme` allows no other.
            return (float((self.channel_max / factors).max()) or 1.0) / INT8_MAX
        assert scheme.range_method is not None
        return static_range(self.histogram, scheme.range_method, percentile) / INT8_MAX


def migration_sizes(uses: Sequence[InputStatistics], scheme: LayerScheme) -> Float32Array:
    """Return the channels' sizes that a scheme's migration starts from.

    Under one scale a tensor the largest values matter. Under a scale a row each row counts alike,
    and a massive token must not set the factor of its channel for all others.

    Args:
        uses: The input at each use of the weight, which has one factor a channel for all of them.
        scheme: With a migration.
    """
    sizes: Float32Array = (
        np.mean([use.channel_level for use in uses], axis=0, dtype=np.float32)
        if scheme.activation == "row"
        else np.max([use.channel_max for use in uses], axis=0)
    )
    return sizes


@dataclass(frozen=True)
class GraphStatistics:
    """The inputs of one graph's layers.

    Attributes:
        inputs: Activation name to its statistics.
        samples: Feeds that the graph was run on.
    """

    inputs: Mapping[str, InputStatistics]
    samples: int

    def of(self, activations: Sequence[str]) -> tuple[InputStatistics, ...] | None:
        """Return the statistics of a layer's inputs; None if one of them was not looked at."""
        found = [self.inputs.get(name) for name in activations]
        return tuple(one for one in found if one is not None) if all(found) else None


class _Collector:
    """Takes an activation one sample at a time."""

    def __init__(self, layers: Sequence[Layer], rows: int, seed: int) -> None:
        self._layers = tuple(layer.name for layer in layers)
        self._histogram = MagnitudeHistogram()
        self._channel_max: Float32Array = np.zeros(layers[0].in_channels, np.float32)
        self._level_sum: Float64Array = np.zeros(layers[0].in_channels)
        self._row_count = 0
        self._rows: Float32Array = np.empty((0, layers[0].in_channels), np.float32)
        self._keys = np.empty(0)
        self._wanted_rows = rows
        self._random = np.random.RandomState(seed)

    def add(self, value: NDArray[Any]) -> None:
        rows = value.reshape(-1, value.shape[-1]).astype(np.float32, copy=False)
        self._histogram.add(rows)
        magnitudes = np.abs(rows)
        np.maximum(self._channel_max, magnitudes.max(axis=0), out=self._channel_max)
        sizes = np.linalg.norm(rows, axis=1, keepdims=True) / np.sqrt(np.float32(rows.shape[1]))
        magnitudes /= np.maximum(sizes, SMALLEST_ROW_MAX)
        self._level_sum += magnitudes.sum(axis=0, dtype=np.float64)
        self._row_count += len(rows)
        # The rows with the smallest of as many random keys are a uniform draw, however many come.
        keys = self._random.random_sample(len(rows))
        all_keys = np.concatenate([self._keys, keys])
        kept = np.sort(np.argsort(all_keys, kind="stable")[: self._wanted_rows])
        before = len(self._keys)
        self._rows = np.concatenate(
            [self._rows[kept[kept < before]], rows[kept[kept >= before] - before]]
        )
        self._keys = all_keys[kept]

    def result(self) -> InputStatistics:
        return InputStatistics(
            layers=self._layers,
            histogram=self._histogram,
            channel_max=self._channel_max,
            channel_level=(self._level_sum / max(self._row_count, 1)).astype(np.float32),
            rows=self._rows,
        )


def collect(
    graph: Path,
    feeds: Callable[[], Iterator[Mapping[str, NDArray[Any]]]],
    layers: Sequence[Layer] | None = None,
    *,
    rows: int = DEFAULT_ROWS,
    seed: int = 0,
    threads: int | None = None,
    max_pass_bytes: int = DEFAULT_PASS_BYTES,
) -> GraphStatistics:
    """Run a float graph over the calibration set and describe its layers' inputs.

    Args:
        graph: The `.onnx` file.
        feeds: Gives the calibration set anew at every call; names and dtypes of the graph's
            inputs, batch 1.
        layers: Those whose inputs are wanted; all if None.
        rows: Rows to keep of each input, over all uses of a layer.
        seed: Seed of the draw.
        threads: CPU threads inside an operator; ONNX Runtime's choice if None.
        max_pass_bytes: Activations that may be held at once.

    Raises:
        QuantizationError: The calibration set is empty, does not fit the graph or holds a value
            that is not finite; or the graph itself gives one.
    """
    wanted: dict[str, list[Layer]] = {}
    for layer in find_layers(load_graph(graph)) if layers is None else layers:
        for name in dict.fromkeys(layer.inputs):
            wanted.setdefault(name, []).append(layer)
    collectors = {
        name: _Collector(found, -(-rows // max(len(one.inputs) for one in found)), seed)
        for name, found in wanted.items()
    }
    first = next(iter(feeds()), None)
    if first is None:
        raise QuantizationError(
            f"the calibration set holds no sample for {graph.name}: record one first "
            "(groot-int8 calibrate)"
        )
    samples = 0
    for names in _passes(graph, wanted, first, max_pass_bytes):
        session = _session(graph, names, threads)
        samples = 0
        for feed in feeds():
            values = _run(session, graph, names, feed, samples)
            for name, value in zip(names, values, strict=True):
                if not np.isfinite(value).all():
                    raise QuantizationError(
                        f"{graph.name}: the input {name} of {wanted[name][0].name} is not finite "
                        f"for calibration sample {samples}, though the sample itself is: the "
                        "float graph overflows. Export with --precision fp32."
                    )
                collectors[name].add(value)
            samples += 1
        del session
    return GraphStatistics(
        inputs={name: collector.result() for name, collector in collectors.items()},
        samples=samples,
    )


def _passes(
    graph: Path,
    wanted: Mapping[str, Sequence[Layer]],
    feed: Mapping[str, NDArray[Any]],
    max_pass_bytes: int,
) -> list[list[str]]:
    """Split the inputs so that each pass holds a bounded number of bytes."""
    model = load_graph(graph)
    lengths: dict[str, int] = {}
    for value in model.graph.inputs:
        if value.name is not None and value.name in feed and value.shape is not None:
            lengths.update(
                (str(axis), length)
                for axis, length in zip(value.shape, feed[value.name].shape, strict=False)
                if not isinstance(axis, int)
            )
    values = {v.name: v for node in model.graph for v in node.inputs if v is not None}
    passes: list[list[str]] = [[]]
    held = 0
    for name in wanted:
        shape = values[name].shape
        dtype = values[name].dtype
        if shape is None or dtype is None:
            raise RuntimeError(f"{graph.name}: the activation {name} has no type or shape")
        # An axis that is named by an expression is taken as long as the longest of the inputs'.
        longest = max(lengths.values(), default=1)
        size = int(dtype.itemsize) * int(
            np.prod([a if isinstance(a, int) else lengths.get(str(a), longest) for a in shape])
        )
        if passes[-1] and held + size > max_pass_bytes:
            passes.append([])
            held = 0
        passes[-1].append(name)
        held += size
    return [names for names in passes if names]


def _session(graph: Path, names: Sequence[str], threads: int | None) -> ort.InferenceSession:
    model = onnx.load(str(graph), load_external_data=False)
    known = {value.name for value in (*model.graph.input, *model.graph.output)}
    for name in names:
        if name not in known:
            model.graph.output.append(onnx.ValueInfoProto(name=name))
    # Fusing would remove the very tensors that are asked for.
    options = session_options(threads=threads, keep_graph_as_written=True)
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(graph.parent.absolute())
    )
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _run(
    session: ort.InferenceSession,
    graph: Path,
    names: Sequence[str],
    feed: Mapping[str, NDArray[Any]],
    index: int,
) -> list[NDArray[Any]]:
    for name, array in feed.items():
        if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
            raise QuantizationError(
                f"calibration sample {index}: {name} holds NaN or infinity. Remove the sample, or "
                "record the calibration set again."
            )
    types = {node.name: node.type for node in session.get_inputs()}
    _check_fit(session, graph, feed, index)
    cast = {
        name: array.astype(
            np.float16 if types.get(name) == "tensor(float16)" else np.float32, copy=False
        )
        if np.issubdtype(array.dtype, np.floating)
        else array
        for name, array in feed.items()
    }
    # A layer that reads a graph input: it is no output, but it is at hand.
    outputs = [name for name in names if name not in types]
    try:
        values = dict(zip(outputs, session.run(outputs, cast) if outputs else [], strict=True))
    except Exception as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise _misfit(graph, index, reason) from error
    return [values[name] if name in values else cast[name] for name in names]


def _check_fit(
    session: ort.InferenceSession, graph: Path, feed: Mapping[str, NDArray[Any]], index: int
) -> None:
    inputs = {node.name: node.shape for node in session.get_inputs()}
    if set(inputs) != set(feed):
        raise _misfit(graph, index, f"it has {sorted(feed)} and the graph takes {sorted(inputs)}")
    for name, shape in inputs.items():
        found = feed[name].shape
        if len(found) != len(shape) or any(
            isinstance(axis, int) and axis != length
            for axis, length in zip(shape, found, strict=True)
        ):
            raise _misfit(graph, index, f"{name} has the shape {found}, not {tuple(shape)}")


def _misfit(graph: Path, index: int, reason: str) -> QuantizationError:
    return QuantizationError(
        f"calibration sample {index} does not fit {graph.name}: {reason}. The set must come from "
        "this bundle's checkpoint, cameras and robot; record it again."
    )
