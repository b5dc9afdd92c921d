"""Hazards of the audit command: a bundle that claims to be INT8, engines that are not its own.

What it concludes from an engine's inspection is shown in `test_inspector`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest

from groot_int8_ros.policy.bundle import open_bundle
from groot_int8_ros.policy.engines.cuda import Device
from groot_int8_ros.policy.engines.tensorrt_manifest import EngineManifest
from groot_int8_ros.policy.quantization import LayerScheme
from offline_tools.cli import main
from offline_tools.engine.audit_command import count_products
from offline_tools.quantize.arithmetic import rotation_block
from offline_tools.quantize.graph_audit import audit_graph, fewest_launches
from offline_tools.quantize.layers import find_layers, groups, load_graph
from offline_tools.quantize.qdq import quantize_graph

_RECORDED = Path(__file__).parent / "recorded"


def _make_one_layer_float(graph: Path) -> str:
    """Multiply one layer's codes as they are, as a tool that drops a Q/DQ pair would."""
    model = ir.load(graph)
    for node in model.graph:
        source = node.inputs[0].producer() if node.inputs and node.inputs[0] else None
        if node.op_type == "MatMul" and source and source.op_type == "DequantizeLinear":
            quantise = source.inputs[0].producer() if source.inputs[0] else None
            assert quantise is not None
            node.replace_input_with(0, quantise.inputs[0])
            ir.save(model, graph, external_data=f"{graph.name}.data")
            return str(node.name).removesuffix("/MatMul")
    raise AssertionError("no INT8 layer")


def test_graph_that_keeps_its_promise_passes(
    int8_bundle: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    report = tmp_path / "audit.json"
    assert main(["audit", "--bundle", str(int8_bundle), "--json", str(report)]) == 0
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("dit:")]
    layers = len(open_bundle(int8_bundle).manifest.graphs["dit"].quantization.layers)  # type: ignore[union-attr]
    assert f"{layers} of {layers} that should be are INT8" in line
    assert {entry["verdict"] for entry in json.loads(report.read_text())["dit"]} == {"INT8"}


def test_layer_that_lost_its_qdq_fails_by_name(
    int8_bundle: Path, reseal: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    layer = _make_one_layer_float(int8_bundle / "onnx" / "dit_model.onnx")
    reseal(int8_bundle)
    assert main(["audit", "--bundle", str(int8_bundle)]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  !")]
    assert len(failed) == 1
    assert layer in failed[0]
    assert "FLOAT" in failed[0]


@pytest.fixture
def recorded_engine(int8_bundle: Path) -> Path:
    """An engine of that DiT whose recorded inspection names none of its layers but one."""
    folder = int8_bundle / "engines" / "8.6.1-test-sm90"
    folder.mkdir(parents=True)
    engine = folder / "dit_model.engine"
    engine.write_bytes(b"plan")
    bundle = open_bundle(int8_bundle, verify_hashes=False)
    manifest = EngineManifest(
        graph="onnx/dit_model.onnx",
        graph_sha256={
            name: sha256
            for name, (sha256, _) in bundle.manifest.files.items()
            if name.startswith("onnx/dit_model.onnx")
        },
        engine_sha256=hashlib.sha256(b"plan").hexdigest(),
        engine_bytes=4,
        device_memory_bytes=0,
        precision="int8",
        quantization="qdq",
        layer_precision={},
        calibration={},
        library="tensorrt",
        library_version="8.6.1",
        device=Device("Test", "9.0", 1, 1, integrated=False),
        inputs={},
        outputs={},
        build_options=("--graph", "dit"),
        build_flags=(),
        seconds=0.0,
        peak_memory_bytes=0,
    )
    engine.with_suffix(".json").write_text(manifest.to_json())
    inspection = json.loads((_RECORDED / "qdq_dit.json").read_text())["inspection"]
    (folder / "dit_model.layers.json").write_text(json.dumps(inspection))
    return engine


def test_engine_that_does_not_say_it_is_int8_fails(
    int8_bundle: Path, recorded_engine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["audit", "--bundle", str(int8_bundle), "--engines", str(recorded_engine.parent)]
    assert main(words) == 1
    out = capsys.readouterr().out
    assert "which the inspector does not open" in out
    assert f"--engine {recorded_engine} --kernels kernels.csv" in out


@pytest.fixture
def rotations(int8_bundle: Path, tiny_bundle: Path, reseal: Callable[[Path], None]) -> int:
    """How many rotations the DiT has, which is INT8 in every layer and rotated where it can be."""
    source = tiny_bundle / "onnx" / "dit_model.onnx"
    layers = find_layers(load_graph(source))
    plan = {
        layer.name: LayerScheme("row", rotation=rotation_block(layer.in_channels))
        for layer in layers
    }
    quantize_graph(source, int8_bundle / "onnx" / "dit_model.onnx", plan, None)
    path = int8_bundle / "manifest.json"
    content = json.loads(path.read_text())
    content["graphs"]["dit"]["quantization"]["layers"] = {
        name: scheme.to_dict() for name, scheme in plan.items()
    }
    path.write_text(json.dumps(content))
    reseal(int8_bundle)
    return sum(plan[sharing[0].name].rotation is not None for sharing in groups(layers).values())


def test_rotations_do_not_count_as_layers_of_the_model(
    int8_bundle: Path, rotations: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rotations > 0
    report = tmp_path / "audit.json"
    assert main(["audit", "--bundle", str(int8_bundle), "--json", str(report)]) == 0
    layers = len(open_bundle(int8_bundle).manifest.graphs["dit"].quantization.layers)  # type: ignore[union-attr]
    assert (
        f"dit: {layers} layers: {layers} INT8, 0 FLOAT, 0 UNKNOWN; {layers} of {layers} that "
        "should be are INT8"
    ) in capsys.readouterr().out.splitlines()
    # This is what the pipeline's report counts.
    assert len(json.loads(report.read_text())["dit"]) == layers


def test_rotations_count_among_the_floating_products_that_a_run_launches(
    int8_bundle: Path,
    tiny_bundle: Path,
    rotations: int,
    recorded_engine: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = tiny_bundle / "onnx" / "dit_model.onnx"
    layers = {layer.layer: layer.products for layer in audit_graph(source, None)}
    launches = fewest_launches(int8_bundle / "onnx" / "dit_model.onnx", layers)
    attention = count_products(source) - sum(layers.values())
    kernels = tmp_path / "kernels.txt"

    def audited(floating: int) -> tuple[int, str]:
        kernels.write_text(
            "sm80_xmma_gemm_i8f32_i8i32_f32_tn_n\n" * launches
            + "sm80_xmma_gemm_f32f32_f32f32_f32_tn_n\n" * floating
        )
        words = ["audit", "--bundle", str(int8_bundle), "--engine", str(recorded_engine)]
        return main([*words, "--kernels", str(kernels)]), capsys.readouterr().out

    code, out = audited(attention + rotations)
    assert code == 0
    assert f"dit_model: {len(layers)} layers: {len(layers)} INT8" in out
    assert audited(attention)[0] == 1
    assert audited(attention + rotations + 1)[0] == 1


def _promise(bundle: Path, graph: str, reseal: Callable[[Path], None]) -> None:
    """Let the manifest say that a graph's layers are INT8, as it says of the DiT's."""
    path = bundle / "manifest.json"
    content = json.loads(path.read_text())
    layers = audit_graph(open_bundle(bundle, verify_hashes=False).graph_path(graph), None)
    content["graphs"][graph]["precision"] = "int8"
    content["graphs"][graph]["quantization"] = {
        **content["graphs"]["dit"]["quantization"],
        "layers": {layer.layer: {"activation": "row"} for layer in layers},
    }
    path.write_text(json.dumps(content))
    reseal(bundle)


def _inspected_as_int8(bundle: Path, engine: Path) -> None:
    """Write the inspection of an engine whose every layer of the DiT is an INT8 product."""
    layers = [
        {
            "Name": f"{layer.layer}/MatMul",
            "LayerType": "gemm",
            "Inputs": [{"Name": "x", "Format/Datatype": "Int8"}],
            "Outputs": [{"Name": "y", "Format/Datatype": "Half"}],
            "TacticName": "sm80_xmma_gemm_i8f32_i8i32_f32_tn_n",
            "Metadata": f"[ONNX Layer: {layer.layer}/MatMul]",
        }
        for layer in audit_graph(bundle / "onnx" / "dit_model.onnx", None)
    ]
    engine.with_name("dit_model.layers.json").write_text(json.dumps({"Layers": layers}))


@pytest.mark.parametrize("promised", [True, False])
def test_large_graph_without_an_engine_is_no_pass_where_it_should_be_int8(
    int8_bundle: Path,
    recorded_engine: Path,
    reseal: Callable[[Path], None],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    promised: bool,
) -> None:
    if promised:
        _promise(int8_bundle, "backbone", reseal)
    _inspected_as_int8(int8_bundle, recorded_engine)
    words = ["audit", "--bundle", str(int8_bundle), "--engines", str(recorded_engine.parent)]
    report = tmp_path / "audit.json"
    assert main([*words, "--json", str(report)]) == int(promised)
    assert "backbone_model.engine is missing. Build it: groot-int8" in capsys.readouterr().out
    verdicts = json.loads(report.read_text())
    assert list(verdicts) == ["dit_model", "backbone_model"]
    assert {layer["verdict"] for layer in verdicts["dit_model"]} == {"INT8"}
    assert {layer["verdict"] for layer in verdicts["backbone_model"]} == {"UNKNOWN"}
    assert {layer["evidence"] for layer in verdicts["backbone_model"]} == {
        "the graph has no engine here"
    }


def test_several_folders_are_audited_each(
    int8_bundle: Path, recorded_engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(recorded_engine.parent, int8_bundle / "engines" / "10.3.0-test-sm87")
    _inspected_as_int8(int8_bundle, recorded_engine)
    report = tmp_path / "audit.json"
    folders = [str(recorded_engine.parent), str(other)]
    words = ["audit", "--bundle", str(int8_bundle), "--json", str(report), "--engines", *folders]
    assert main(words) == 1
    verdicts = json.loads(report.read_text())
    assert {layer["verdict"] for layer in verdicts[f"{folders[0]}/dit_model"]} == {"INT8"}
    assert "INT8" not in {layer["verdict"] for layer in verdicts[f"{folders[1]}/dit_model"]}
    shutil.rmtree(other)
    assert main(words) == 2
    assert f"{other} holds no engine" in capsys.readouterr().err


def test_options_of_engines_are_refused_without_one(
    int8_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for option in ("--time", "--run-once"):
        assert main(["audit", "--bundle", str(int8_bundle), option]) == 2
        assert option in capsys.readouterr().err


def test_kernels_of_a_run_decide(int8_bundle: Path, recorded_engine: Path, tmp_path: Path) -> None:
    kernels = tmp_path / "kernels.txt"
    words = ["audit", "--bundle", str(int8_bundle), "--engine", str(recorded_engine)]
    graph = int8_bundle / "onnx" / "dit_model.onnx"
    layers = {layer.layer: layer.products for layer in audit_graph(graph, None)}
    launches = fewest_launches(graph, layers)
    # Queries, keys and values of an attention are three products of one tensor.
    assert 1 < launches < sum(layers.values())
    others = count_products(graph) - sum(layers.values())

    def audited(int8: int, floating: int) -> int:
        kernels.write_text(
            "sm80_xmma_gemm_i8f32_i8i32_f32_tn_n\n" * int8
            + "sm80_xmma_gemm_f16f16_f16f32_f32_tn_n\n" * floating
        )
        return main([*words, "--kernels", str(kernels)])

    assert audited(launches, others) == 0
    assert audited(launches - 1, others) == 1
    assert audited(launches, others + 1) == 1
    assert audited(0, others) == 1


def test_calibrated_engine_is_told_plainly_how_little_is_int8(
    int8_bundle: Path, recorded_engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = recorded_engine.with_suffix(".json")
    manifest.write_text(manifest.read_text().replace('"qdq"', '"calibrator"'))
    kernels = tmp_path / "kernels.txt"
    kernels.write_text("sm80_xmma_gemm_f16f16_f16f32_f32_tn_n\n" * 9)
    words = ["audit", "--bundle", str(int8_bundle), "--engine", str(recorded_engine)]
    assert main([*words, "--kernels", str(kernels)]) == 1
    out = capsys.readouterr().out
    layers = len(open_bundle(int8_bundle).manifest.graphs["dit"].quantization.layers)  # type: ignore[union-attr]
    assert f"calibrator was asked for INT8. Known to be INT8: 0 of {layers} layers" in out
    assert "use groot-int8 quantize" in out


def test_layers_of_the_engine_are_listed_with_what_was_fused(
    int8_bundle: Path, recorded_engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["audit", "--bundle", str(int8_bundle), "--engine", str(recorded_engine), "--all"]
    report = tmp_path / "audit.json"
    assert main([*words, "--json", str(report)]) == 1
    lines = capsys.readouterr().out.splitlines()
    listed = [number for number, line in enumerate(lines) if " Constant " in line]
    assert "UNKNOWN" in lines[listed[0]]
    assert lines[listed[0] + 1].split() == [
        "fused:",
        "exp,",
        "(Unnamed",
        "Layer*",
        "10)",
        "[Shuffle]",
    ]
    assert all(entry["fused"] == [] for entry in json.loads(report.read_text())["dit_model"])


@pytest.mark.parametrize("damage", ["engine", "graph", "layers", "empty"])
def test_engine_that_is_not_the_bundles_own_is_refused(
    int8_bundle: Path,
    recorded_engine: Path,
    reseal: Callable[[Path], None],
    capsys: pytest.CaptureFixture[str],
    damage: str,
) -> None:
    if damage == "engine":
        recorded_engine.write_bytes(b"plam")
    elif damage == "graph":
        _make_one_layer_float(int8_bundle / "onnx" / "dit_model.onnx")
        reseal(int8_bundle)
    elif damage == "layers":
        recorded_engine.with_name("dit_model.layers.json").unlink()
    else:
        recorded_engine.unlink()
    words = ["audit", "--bundle", str(int8_bundle), "--engines", str(recorded_engine.parent)]
    assert main(words) == 2
    message = {
        "engine": "is not the engine that its manifest speaks of",
        "graph": "was built from another onnx/dit_model.onnx",
        "layers": "nobody asked TensorRT about this engine",
        "empty": "holds no engine",
    }[damage]
    assert message in capsys.readouterr().err
