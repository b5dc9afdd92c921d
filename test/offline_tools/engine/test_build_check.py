"""Hazards of a graph that no TensorRT takes: an operator it lacks, types it does not mix."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from groot_int8_ros.errors import EngineError
from groot_int8_ros.policy.bundle import GraphRecord, open_bundle
from groot_int8_ros.policy.engines import TensorSpec
from groot_int8_ros.policy.families import LARGE_GRAPHS, engine_graphs
from offline_tools.cli import main
from offline_tools.engine.rtx import check_build

needs_tensorrt_rtx = pytest.mark.skipif(
    subprocess.run(
        [sys.executable, "-c", "import tensorrt_rtx"], capture_output=True, check=False
    ).returncode
    != 0,
    reason="TensorRT-RTX cannot be imported: pip install tensorrt-rtx-cu13 (Linux x86-64)",
)


@needs_tensorrt_rtx
@pytest.mark.parametrize(
    ("fixture", "precision"),
    [
        ("tiny_bundle", "fp32"),
        ("fp16_bundle", "fp16"),
        # With a prefix model, which is no engine and must not be tried.
        ("deployed_bundle", "fp32"),
        ("fp16_deployed", "fp16"),
    ],
)
def test_every_exported_graph_is_parsed_and_built(
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
    fixture: str,
    precision: str,
) -> None:
    bundle: Path = request.getfixturevalue(fixture)
    assert main(["build-check", "--bundle", str(bundle)]) == 0
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()[1:]}
    family = open_bundle(bundle, verify_hashes=False).manifest.family
    assert set(rows) == set(engine_graphs(family))
    for graph in LARGE_GRAPHS[family]:
        assert rows[graph][1] == precision
        # A graph that was folded away would pass as well.
        assert int(rows[graph][2]) > 200


@needs_tensorrt_rtx
def test_graphs_of_the_shipped_policy_are_parsed_and_built(
    repository_root: Path,
    write_int8: Callable[[Path, Path, Sequence[str]], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("torch", reason="exporting needs torch")
    from offline_tools.export.bundle_writer import ExportOptions, write_bundle
    from offline_tools.training.shipped import POLICY_FOLDER

    options = ExportOptions(
        checkpoint=POLICY_FOLDER,
        bundle=tmp_path / "fp16",
        robot=repository_root / "config" / "simulated_arm.yaml",
        instructions=("pick up the red cube",),
    )
    write_bundle(options, report=lambda _: None)
    graphs = ("backbone", "action_head")
    write_int8(tmp_path / "int8", options.bundle, graphs)
    for precision in ("fp16", "int8"):
        assert main(["build-check", "--bundle", str(tmp_path / precision)]) == 0
        lines = capsys.readouterr().out.splitlines()[1:]
        assert [line.split()[:2] for line in lines] == [[name, precision] for name in graphs]


def test_graph_that_no_engine_runs_cannot_be_asked_for(
    small_deployed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build-check", "--bundle", str(small_deployed), "--graph", "prefix"]) == 2
    assert "the bundle's engines are of backbone, action_head" in capsys.readouterr().err


@needs_tensorrt_rtx
def test_one_graph_can_be_checked_alone(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["build-check", "--bundle", str(tiny_bundle), "--graph", "action_decoder"]
    assert main(words) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "graph",
        "action_decoder",
    ]


def _write(path: Path, nodes: list[onnx.NodeProto], dtype: int) -> GraphRecord:
    weight = np.eye(4, dtype=np.float16 if dtype == TensorProto.FLOAT16 else np.float32)
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
        [numpy_helper.from_array(weight, "w")],
    )
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("unknown.domain", 1)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=8), path)
    spec = TensorSpec("float32", ("batch", 4))
    return GraphRecord(file=path.name, precision="fp32", inputs={"x": spec}, outputs={"y": spec})


@needs_tensorrt_rtx
def test_a_plain_graph_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "plain.onnx"
    record = _write(path, [helper.make_node("MatMul", ["x", "w"], ["y"])], TensorProto.FLOAT)
    result = check_build(path, record, {"batch": 4})
    assert result.layers > 0
    assert result.engine_bytes > 0


@needs_tensorrt_rtx
@pytest.mark.parametrize(
    ("node", "dtype", "message"),
    [
        (
            helper.make_node("Invented", ["x", "w"], ["y"], domain="unknown.domain"),
            TensorProto.FLOAT,
            r"tensorrt_rtx [\d.]+ cannot parse .*refused.onnx: .*Invented",
        ),
        (
            helper.make_node("MatMul", ["x", "w"], ["y"]),
            TensorProto.FLOAT16,
            r"tensorrt_rtx [\d.]+ cannot (parse|build) .*refused.onnx: .+",
        ),
    ],
)
def test_operator_or_mixture_of_types_that_it_lacks_is_refused(
    tmp_path: Path, node: onnx.NodeProto, dtype: int, message: str
) -> None:
    path = tmp_path / "refused.onnx"
    record = _write(path, [node], dtype)
    with pytest.raises(EngineError, match=message):
        check_build(path, record, {"batch": 4})


def test_library_that_is_missing_is_named_with_the_way_to_get_it(
    tiny_bundle: Path, repository_root: Path
) -> None:
    code = (
        "import sys; sys.modules['tensorrt_rtx'] = None; from offline_tools.cli import main; "
        f"sys.exit(main(['build-check', '--bundle', {str(tiny_bundle)!r}]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=repository_root,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 2
    assert "tensorrt_rtx is not installed: pip install tensorrt-rtx-cu13" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["build", "build-check"])
def test_folder_that_is_no_bundle_is_refused_whatever_is_installed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert main([command, "--bundle", str(tmp_path)]) == 2
    assert "is not a bundle" in capsys.readouterr().err
