"""Hazards of a build's process: memory that is not there, a crash, an interrupt."""

from __future__ import annotations

import os
import pickle
import signal
from pathlib import Path

import pytest

from groot_int8_ros.errors import BundleError, EngineError
from groot_int8_ros.policy.bundle import open_bundle
from groot_int8_ros.policy.engines.cuda import CudaError
from offline_tools.engine.child import ChildProcessBugError, run_in_child
from offline_tools.engine.memory import Forecast, forecast

_GIB = 1 << 30


# Graph's precision and MB, strongly typed or not, and the highest resident memory in GiB of the
# process that built it, on x86-64. The last is TensorRT-RTX, all others are 8.6.1 on an H100; the
# narrow graphs took 4.0 to 4.8 GiB, whatever their precision.
_RECORDED_PEAKS = [
    ("fp32", 587, False, 5.11),
    ("fp32", 491, False, 4.89),
    ("fp16", 295, False, 5.97),
    ("fp16", 2468, False, 26.61),
    ("fp16", 3103, False, 21.96),
    ("fp16", 2198, False, 20.14),
    ("fp16", 1890, False, 16.51),
    ("int8", 152, False, 8.40),
    ("int8", 144, False, 8.12),
    ("int8", 1244, False, 42.0),
    *((precision, mb, False, 4.8) for precision in ("fp32", "fp16", "int8") for mb in (10, 37)),
    ("fp16", 2200, True, 6.4),
]


def _of_size(folder: Path, size_bytes: int) -> Path:
    weights = folder / "graph.onnx.data"
    weights.write_bytes(b"0")
    os.truncate(weights, size_bytes)
    return weights


@pytest.mark.parametrize(("precision", "graph_mb", "strongly_typed", "peak_gib"), _RECORDED_PEAKS)
def test_forecast_is_not_below_a_recorded_peak_and_not_far_above_it(
    tmp_path: Path, precision: str, graph_mb: int, strongly_typed: bool, peak_gib: float
) -> None:
    expected = forecast(
        [_of_size(tmp_path, graph_mb * 1_000_000)],
        graph_precision=precision,
        precision=precision,
        strongly_typed=strongly_typed,
        float_pairs=precision == "int8",
        workspace_mb=None,
        shared=False,
    )
    assert 1.0 <= expected.host_bytes / (peak_gib * _GIB) <= 1.6


def test_forecast_counts_int8_weights_as_floats_where_they_are_handed_over_so(
    tmp_path: Path,
) -> None:
    weights = _of_size(tmp_path, 2 * _GIB)

    def of(float_pairs: bool) -> Forecast:
        return forecast(
            [weights],
            graph_precision="int8",
            precision="int8",
            strongly_typed=True,
            float_pairs=float_pairs,
            workspace_mb=256,
            shared=True,
        )

    plain, pairs = of(False), of(True)
    assert pairs.host_bytes - plain.host_bytes == 6 * _GIB
    assert plain.device_bytes == 2 * _GIB + 256 * (1 << 20)


@pytest.mark.parametrize(
    ("shared", "host", "device", "message"),
    [
        (True, 99 * _GIB, 11 * _GIB, "12.0 GiB of shared memory, and 11.0 GiB are free"),
        (False, 6 * _GIB, 99 * _GIB, "7.0 GiB of memory, and 6.0 GiB are free"),
        (False, 99 * _GIB, 4 * _GIB, "5.0 GiB of GPU memory, and 4.0 GiB are free"),
        (True, None, 13 * _GIB, ""),
        (False, None, 6 * _GIB, ""),
    ],
)
def test_build_that_will_not_fit_is_refused_before_it_starts(
    shared: bool, host: int | None, device: int, message: str
) -> None:
    expected = Forecast(7 * _GIB, 5 * _GIB, shared)
    if not message:
        expected.check(host, device, "building dit")
        return
    with pytest.raises(EngineError, match=message) as raised:
        expected.check(host, device, "building dit")
    assert "--low-memory" in str(raised.value)
    assert "--ignore-forecast" in str(raised.value)


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (signal.SIGSEGV, "building dit crashed inside the library .SIGSEGV.*--weight-form"),
        (signal.SIGKILL, "building dit was killed, as the kernel does when memory runs out"),
    ],
)
def test_death_of_the_builder_is_explained(number: signal.Signals, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        run_in_child(signal.raise_signal, int(number), what="building dit")


def test_errors_cross_the_process_as_what_they_are(tmp_path: Path) -> None:
    assert run_in_child(os.path.basename, "/a/b", what="naming") == "b"
    with pytest.raises(BundleError, match="is not a bundle"):
        run_in_child(open_bundle, tmp_path, what="building")
    with pytest.raises(ChildProcessBugError, match="TypeError"):
        run_in_child(os.path.basename, 5, what="building")


def test_error_of_cuda_survives_the_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(CudaError("cudaMalloc", "cudaErrorMemoryAllocation")))
    assert isinstance(error, CudaError)
    assert error.code == "cudaErrorMemoryAllocation"
    assert "the memory does not suffice" in str(error)
