"""Other tools' static quantisation of the same graphs, to be measured against.

Owns: calling ONNX Runtime's own `quantize_static` and NVIDIA's ModelOpt with settings under which
they can be compared: the same layers (products with a constant weight), symmetric int8 on both
sides, one scale an output channel for weights, outputs and residuals left in float, the same
samples. Must not import our own quantiser.

Two precautions, both learnt from wrong results: each tool works on a copy of the graph, because
ModelOpt writes into the file that it is given; and ModelOpt runs in a process of its own, because
it replaces parts of ONNX Runtime's quantisation, which then fails for the rest of the process.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import multiprocessing
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)

from groot_int8_ros.errors import ConfigurationError, QuantizationError
from offline_tools.compare_quantization.samples import Feeds

ORT_METHODS = {
    "max": CalibrationMethod.MinMax,
    "entropy": CalibrationMethod.Entropy,
    "percentile": CalibrationMethod.Percentile,
}
MODELOPT_METHODS = ("max", "entropy")

# Their histograms put the samples of a tensor into one array.
ORT_METHODS_OF_ONE_LENGTH = frozenset({"entropy", "percentile"})

# What `modelopt.onnx` imports. Its own extra `onnx` asks for an ONNX Runtime with CUDA besides,
# which the CPU does without.
_MODELOPT_MODULES = ("modelopt", "onnx_graphsurgeon", "onnxslim", "lief", "pynvml")

_LARGEST_IN_ONE_FILE_BYTES = 1 << 30


class _Reader(CalibrationDataReader):  # type: ignore[misc]  # the library is untyped
    """Hands out feeds one by one; both tools take this class."""

    def __init__(self, feeds: Feeds) -> None:
        self._feeds = feeds
        self._rest: Iterator[dict[str, Any]] = iter(feeds)

    def get_next(self) -> dict[str, Any] | None:
        return next(self._rest, None)

    def get_first(self) -> dict[str, Any]:
        """Return the first feed again; ModelOpt runs the graph once before it calibrates."""
        self.rewind()
        return self._feeds[0]

    def rewind(self) -> None:
        self._rest = iter(self._feeds)


def missing_modelopt_modules() -> tuple[str, ...]:
    """Return what has to be installed before ModelOpt can run; empty if it can."""
    return tuple(name for name in _MODELOPT_MODULES if importlib.util.find_spec(name) is None)


def quantize_with_onnxruntime(
    graph: Path, target: Path, feeds: Feeds, layers: Sequence[str], method: str
) -> None:
    """Write ONNX Runtime's static quantisation of a graph.

    Args:
        graph: The float graph; its external data lie beside it.
        target: The graph to write.
        feeds: The calibration samples.
        layers: Names of the nodes to quantise.
        method: A key of `ORT_METHODS`.

    Raises:
        QuantizationError: The method takes samples of one length only, and these are not.
    """
    if method in ORT_METHODS_OF_ONE_LENGTH and not _same_shapes(feeds):
        raise QuantizationError(
            f"ONNX Runtime's {method} calibration fails on samples of different lengths, and the "
            "dataset's instructions have several: give a dataset with one instruction"
        )
    large = _size(graph) > _LARGEST_IN_ONE_FILE_BYTES
    with _copied(graph) as copy, _quiet():
        quantize_static(
            str(copy),
            str(target),
            _Reader(feeds),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["MatMul", "Gemm"],
            nodes_to_quantize=list(layers),
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=ORT_METHODS[method],
            use_external_data_format=large,
            extra_options={
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                "MatMulConstBOnly": True,
                "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"],
            },
        )


def quantize_with_modelopt(
    graph: Path, target: Path, feeds: Feeds, layers: Sequence[str], method: str
) -> None:
    """Write ModelOpt's quantisation of a graph; arguments as for ONNX Runtime.

    Raises:
        ConfigurationError: ModelOpt or something it needs is not installed.
    """
    missing = missing_modelopt_modules()
    if missing:
        raise ConfigurationError(
            f"ModelOpt cannot run: {', '.join(missing)} missing. Install the extra: "
            "pip install 'groot_int8_ros[compare]'"
        )
    large = _size(graph) > _LARGEST_IN_ONE_FILE_BYTES
    context = multiprocessing.get_context("spawn")
    with _copied(graph) as copy, ProcessPoolExecutor(1, mp_context=context) as process:
        process.submit(_run_modelopt, copy, target, feeds, list(layers), method, large).result()


def _run_modelopt(
    graph: Path, target: Path, feeds: Feeds, layers: list[str], method: str, large: bool
) -> None:
    with _quiet():
        from modelopt.onnx import quantization

        quantization.quantize(
            str(graph),
            quantize_mode="int8",
            calibration_data_reader=_Reader(feeds),
            calibration_method=method,
            calibration_eps=["cpu"],
            op_types_to_quantize=["MatMul", "Gemm"],
            nodes_to_quantize=layers,
            # Without it the products inside attention are quantised as well.
            disable_mha_qdq=True,
            high_precision_dtype="fp32",
            use_external_data_format=large,
            output_path=str(target),
            log_level="ERROR",
        )


@contextlib.contextmanager
def _copied(graph: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="groot-int8-") as folder:
        for path in graph.parent.glob(f"{graph.name}*"):
            shutil.copyfile(path, Path(folder) / path.name)
        yield Path(folder) / graph.name


def _same_shapes(feeds: Feeds) -> bool:
    return len({tuple((k, v.shape) for k, v in sorted(feed.items())) for feed in feeds}) == 1


def _size(graph: Path) -> int:
    return sum(path.stat().st_size for path in graph.parent.glob(f"{graph.name}*"))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the tools' progress bars and advice out of the table."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
