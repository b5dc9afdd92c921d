"""Hazards of an engine: an input of another shape or kind, a run that fails, use after close."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from groot_int8_ros.errors import EngineError
from groot_int8_ros.policy.engines import ENGINE_KINDS, Engine, TensorSpec, load_engine
from groot_int8_ros.policy.engines.base import is_unchanged
from groot_int8_ros.policy.engines.onnxruntime_engine import OnnxRuntimeEngine


@pytest.fixture(scope="module")
def decoder(tiny_bundle: Path) -> Engine:
    return load_engine("onnxruntime", tiny_bundle / "onnx" / "action_decoder.onnx", threads=1)


def _feed(engine: Engine, batch: int = 1) -> dict[str, NDArray[Any]]:
    shape = [
        axis if isinstance(axis, int) else batch for axis in engine.inputs["dit_output"].shape
    ]
    return {"dit_output": np.random.RandomState(0).standard_normal(shape).astype(np.float32)}


def test_fixed_axes_bind_and_varying_ones_do_not() -> None:
    spec = TensorSpec("float32", ("batch", 3))
    assert spec.accepts(np.zeros((7, 3), np.float32))
    assert not spec.accepts(np.zeros((7, 3), np.float64))
    assert not spec.accepts(np.zeros((7, 4), np.float32))
    assert not spec.accepts(np.zeros(3, np.float32))
    assert spec.describe() == "float32[batch, 3]"
    assert spec.varies
    assert not TensorSpec("float32", (1, 3)).varies


@given(st.lists(st.integers(1, 5), max_size=4), st.lists(st.integers(1, 5), max_size=4))
def test_a_fixed_shape_fits_itself_alone(want: list[int], have: list[int]) -> None:
    assert TensorSpec("int64", tuple(want)).fits(tuple(have)) == (want == have)


def test_unknown_kind_is_refused_with_the_known_ones(tiny_bundle: Path) -> None:
    with pytest.raises(EngineError, match=f"unknown engine 'cuda'.*{ENGINE_KINDS[0]}"):
        load_engine("cuda", tiny_bundle / "onnx" / "action_decoder.onnx")


@pytest.mark.parametrize("content", [None, b"", b"no graph"])
def test_file_that_is_no_graph_is_refused_by_name(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "graph.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(EngineError, match=r"cannot load .*graph\.onnx"):
        load_engine("onnxruntime", path)


def test_floating_inputs_are_cast_to_the_graphs_type(decoder: Engine) -> None:
    feed = _feed(decoder)
    wide = {"dit_output": feed["dit_output"].astype(np.float64)}
    np.testing.assert_array_equal(decoder.run(wide)["velocity"], decoder.run(feed)["velocity"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: {}, r"takes \['dit_output'\], but was given \[\]"),
        (lambda f: {**f, "more": f["dit_output"]}, r"but was given \['dit_output', 'more'\]"),
        (
            lambda f: {"dit_output": f["dit_output"][:, :-1]},
            r"input dit_output must be float32\[batch, 17, 64\], not float32\[1, 16, 64\]",
        ),
        (lambda f: {"dit_output": f["dit_output"][0]}, r"not float32\[17, 64\]"),
        (lambda f: {"dit_output": f["dit_output"].astype(np.int64)}, r"not int64\[1, 17, 64\]"),
    ],
)
def test_wrong_feed_is_refused_with_what_is_wanted_and_found(
    decoder: Engine, change: Any, message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        decoder.run(change(_feed(decoder)))


def test_a_run_that_fails_is_an_engine_error_and_the_engine_stays_usable(
    tiny_bundle: Path,
) -> None:
    path = tiny_bundle / "onnx" / "backbone_model.onnx"
    engine = load_engine("onnxruntime", path, threads=1)
    height, width = engine.inputs["pixel_values"].shape[2:]
    feed: dict[str, NDArray[Any]] = {
        # No embedding has this number.
        "input_ids": np.full((1, 4), 10**6, np.int64),
        "attention_mask": np.ones((1, 4), np.int64),
        "pixel_values": np.zeros((1, 3, int(height), int(width)), np.float32),
    }
    with pytest.raises(EngineError, match=r"backbone_model\.onnx failed"):
        engine.run(feed)
    feed["input_ids"] = np.full((1, 4), 65, np.int64)
    assert np.isfinite(engine.run(feed)["hidden_states"]).all()


def test_running_after_close_is_a_bug_and_says_so(tiny_bundle: Path) -> None:
    engine = load_engine("onnxruntime", tiny_bundle / "onnx" / "action_decoder.onnx", threads=1)
    feed = _feed(engine)
    engine.close()
    engine.close()
    with pytest.raises(RuntimeError, match=r"action_decoder\.onnx was closed"):
        engine.run(feed)


def test_a_graph_kept_as_written_computes_the_same(tiny_bundle: Path, decoder: Engine) -> None:
    path = tiny_bundle / "onnx" / "action_decoder.onnx"
    plain = OnnxRuntimeEngine(path, threads=1, keep_graph_as_written=True)
    feed = _feed(decoder, batch=3)
    np.testing.assert_allclose(
        plain.run(feed)["velocity"], decoder.run(feed)["velocity"], atol=1e-5
    )


def test_only_an_array_that_cannot_have_changed_counts_as_unchanged() -> None:
    constant = np.zeros(3, np.float32)
    constant.flags.writeable = False
    assert is_unchanged(constant, constant)
    equal = constant.copy()
    equal.flags.writeable = False
    assert not is_unchanged(equal, constant)
    assert not is_unchanged(constant, None)
    written = np.zeros(3, np.float32)
    assert not is_unchanged(written, written)
    # Read-only, but its owner may write into it.
    view = written[:]
    view.flags.writeable = False
    assert not is_unchanged(view, view)
