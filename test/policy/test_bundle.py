"""Hazards of a bundle: incomplete, changed on disk, of another schema, or contradicting itself."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from groot_int8_ros.errors import BundleError, EngineError, GrootError, ProcessorError
from groot_int8_ros.policy.bundle import open_bundle
from groot_int8_ros.policy.engines import load_engine
from groot_int8_ros.policy.policy import Policy

from ..int8_record import quantization_record

Json = Any
Reseal = Callable[[Path], None]

_EXPORT_AGAIN = r"Export it again: groot-int8 export --checkpoint CHECKPOINT --bundle "


def _edit(bundle: Path, change: Callable[[Json], None]) -> None:
    path = bundle / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_exported_bundle_opens_and_its_manifest_survives_a_round_trip(
    tiny_bundle: Path, bundle_copy: Path
) -> None:
    bundle = open_bundle(tiny_bundle)
    (bundle_copy / "manifest.json").write_text(bundle.manifest.to_json())
    assert open_bundle(bundle_copy).manifest == bundle.manifest


def test_manifest_lists_every_file_but_itself(tiny_bundle: Path) -> None:
    on_disk = {
        path.relative_to(tiny_bundle).as_posix()
        for path in tiny_bundle.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }
    assert set(open_bundle(tiny_bundle).manifest.files) == on_disk


def test_bundle_can_be_moved_and_read_only_reports_may_change(bundle_copy: Path) -> None:
    moved = bundle_copy.rename(bundle_copy.with_name("moved"))
    (moved / "reports").mkdir()
    (moved / "reports" / "verify.json").write_text("{}")
    assert open_bundle(moved).graph_path("dit").is_file()


def _flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


_DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "manifest cut short": (
        lambda b: (b / "manifest.json").write_text((b / "manifest.json").read_text()[:500]),
        "manifest.json cannot be read",
    ),
    "manifest not text": (
        lambda b: (b / "manifest.json").write_bytes(b"\xff\xfe\x00"),
        "manifest.json cannot be read",
    ),
    "manifest nested without end": (
        lambda b: (b / "manifest.json").write_text("[" * 100_000),
        "manifest.json cannot be read",
    ),
    "manifest a list": (
        lambda b: (b / "manifest.json").write_text("[]"),
        "has schema version None, and groot_int8_ros .* reads 2",
    ),
    "older schema": (
        lambda b: _edit(b, lambda m: m.update(schema_version=1)),
        "has schema version 1, and groot_int8_ros .* reads 2",
    ),
    "tokenizer missing": (
        lambda b: (b / "tokenizer.json").unlink(),
        "the bundle lacks .*tokenizer.json",
    ),
    "weights missing": (
        lambda b: (b / "onnx" / "dit_model.onnx.data").unlink(),
        r"the bundle lacks .*dit_model\.onnx\.data",
    ),
    "weights cut short": (
        lambda b: os.truncate(b / "onnx" / "dit_model.onnx.data", 1000),
        r"dit_model\.onnx\.data has 1000 bytes instead of \d+",
    ),
    "one bit of the weights": (
        lambda b: _flip_a_byte(b / "onnx" / "dit_model.onnx.data"),
        r"dit_model\.onnx\.data is not the file that was exported \(SHA-256 differs\)",
    ),
    "statistics edited": (
        lambda b: _flip_a_byte(b / "statistics.json"),
        r"statistics\.json is not the file that was exported",
    ),
    "file outside": (
        lambda b: _edit(b, lambda m: m["files"].update({"../x": {"sha256": "", "bytes": 1}})),
        r"the file name '\.\./x' leads out of the bundle",
    ),
    "absolute file": (
        lambda b: _edit(
            b, lambda m: m["files"].update({"/etc/passwd": {"sha256": "", "bytes": 1}})
        ),
        "the file name '/etc/passwd' leads out of the bundle",
    ),
    "impossible file name": (
        lambda b: _edit(b, lambda m: m["files"].update({"x" * 300: {"sha256": "", "bytes": 1}})),
        "cannot be read|the bundle lacks",
    ),
    "file name with a null byte": (
        lambda b: _edit(b, lambda m: m["files"].update({"a\0b": {"sha256": "", "bytes": 1}})),
        "the bundle lacks",
    ),
    "no list of files": (
        lambda b: _edit(b, lambda m: m.pop("files")),
        "manifest.json is damaged: it has no field files",
    ),
    "a graph missing": (
        lambda b: _edit(b, lambda m: m["graphs"].pop("dit")),
        "manifest.json is damaged: it lists no graph 'dit'",
    ),
    "a graph that no hash guards": (
        lambda b: _edit(b, lambda m: m["files"].pop("onnx/dit_model.onnx")),
        "the graph 'dit' lies in onnx/dit_model.onnx, which is not listed",
    ),
    "a tokenizer that no hash guards": (
        lambda b: _edit(b, lambda m: m["files"].pop("tokenizer.json")),
        "it does not list tokenizer.json",
    ),
    "statistics that no hash guards": (
        lambda b: _edit(b, lambda m: m["files"].pop("statistics.json")),
        "it does not list statistics.json",
    ),
    "no denoising steps": (
        lambda b: _edit(b, lambda m: m.update(denoising_steps=0)),
        "denoising_steps must be a whole number of at least 1, not 0",
    ),
    "horizon true": (
        lambda b: _edit(b, lambda m: m.update(action_horizon=True)),
        "action_horizon must be a whole number of at least 1, not true",
    ),
    "embodiment a number": (
        lambda b: _edit(b, lambda m: m.update(embodiment=10)),
        "manifest.json is damaged: embodiment must be a text, not 10",
    ),
    "size a text": (
        lambda b: _edit(b, lambda m: m["files"]["tokenizer.json"].update(bytes="many")),
        r'files\.tokenizer\.json\.bytes must be a whole number of at least 1, not "many"',
    ),
    "hash missing": (
        lambda b: _edit(b, lambda m: m["files"]["tokenizer.json"].pop("sha256")),
        r"manifest\.json is damaged: it has no field files\.tokenizer\.json\.sha256",
    ),
    "graph a list": (
        lambda b: _edit(b, lambda m: m["graphs"].update(dit=[])),
        r"graphs\.dit must be a JSON object, not \[\]",
    ),
    "shape null": (
        lambda b: _edit(b, lambda m: m["graphs"]["dit"]["inputs"]["vl_embs"].update(shape=None)),
        r"graphs\.dit\.inputs\.vl_embs\.shape must be a list of lengths and axis names, not null",
    ),
    "graph's output null": (
        lambda b: _edit(b, lambda m: m["graphs"]["dit"]["outputs"].update(output=None)),
        r"graphs\.dit\.outputs\.output must be a JSON object, not null",
    ),
    "notes a number": (
        lambda b: _edit(b, lambda m: m.update(notes=3)),
        "notes must be a list of texts, not 3",
    ),
    "joint sign": (
        lambda b: _edit(b, lambda m: m["robot"]["state_joints"]["single_arm"][0].update(sign=3)),
        r"manifest.json is damaged: .*robot: state_joints\.single_arm\[0\]\.sign must be 1 or -1",
    ),
    "another camera": (
        lambda b: _edit(b, lambda m: m["robot"]["cameras"].pop("wrist")),
        "cameras and joints .* do not fit the processor files'",
    ),
    "a joint too few": (
        lambda b: _edit(b, lambda m: m["robot"]["action_joints"]["single_arm"].pop()),
        "cameras and joints .* do not fit the processor files'",
    ),
}


@pytest.mark.parametrize("damage", _DAMAGES)
def test_damaged_bundle_is_refused_with_the_reason_and_the_way_out(
    bundle_copy: Path, damage: str
) -> None:
    harm, message = _DAMAGES[damage]
    harm(bundle_copy)
    with pytest.raises(BundleError, match=message) as caught:
        open_bundle(bundle_copy)
    assert str(caught.value).endswith(f"--bundle {bundle_copy} --force")


def _say_int8(manifest: Json) -> None:
    record = quantization_record(["blocks.0"])
    manifest["graphs"]["dit"].update(precision="int8", quantization=record)


@pytest.mark.parametrize(
    "damage",
    [
        "older schema",
        "weights cut short",
        "statistics edited",
        "a graph missing",
        "another camera",
    ],
)
def test_damaged_int8_bundle_brings_no_advice_to_put_a_float_one_in_its_place(
    bundle_copy: Path, damage: str
) -> None:
    _edit(bundle_copy, _say_int8)
    assert open_bundle(bundle_copy).manifest.is_quantized
    harm, message = _DAMAGES[damage]
    if damage == "a graph missing":
        harm, message = lambda b: _edit(b, lambda m: m["graphs"].pop("backbone")), "no graph"
    harm(bundle_copy)
    with pytest.raises(BundleError, match=message) as caught:
        open_bundle(bundle_copy)
    assert "groot-int8 quantize --bundle FLOAT_BUNDLE" in str(caught.value)
    assert "--force" not in str(caught.value)


def _make_a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("no folder")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (shutil.rmtree, "no such folder: "),
        (_make_a_file, "not a folder: "),
        (lambda b: (b / "manifest.json").unlink(), "is not a bundle: it has no manifest.json"),
    ],
)
def test_path_that_leads_to_no_bundle_brings_no_advice_to_overwrite_it(
    bundle_copy: Path, harm: Callable[[Path], object], message: str
) -> None:
    harm(bundle_copy)
    with pytest.raises(BundleError, match=message) as caught:
        open_bundle(bundle_copy)
    assert str(bundle_copy) in str(caught.value)
    assert "--force" not in str(caught.value)
    assert "--checkpoint" not in str(caught.value)


def test_sizes_alone_are_compared_where_hashing_is_switched_off(bundle_copy: Path) -> None:
    weights = bundle_copy / "onnx" / "dit_model.onnx.data"
    _flip_a_byte(weights)
    open_bundle(bundle_copy, verify_hashes=False)
    with weights.open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(BundleError, match=r"dit_model\.onnx\.data has \d+ bytes instead of"):
        open_bundle(bundle_copy, verify_hashes=False)


def test_unknown_embodiment_is_refused(bundle_copy: Path) -> None:
    _edit(bundle_copy, lambda m: m.update(embodiment="gr1"))
    with pytest.raises(ProcessorError, match="gr1"):
        open_bundle(bundle_copy)


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def scratch_bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("mutated") / "bundle"))


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_mutation_of_the_manifest_is_read_or_refused_and_never_crashes(
    data: st.DataObject, tiny_bundle: Path, scratch_bundle: Path
) -> None:
    content = copy.deepcopy(json.loads((tiny_bundle / "manifest.json").read_text()))
    node: Json = content
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(node[key], (dict, list)) or not node[key] or data.draw(st.booleans()):
            if isinstance(node, dict) and data.draw(st.booleans()):
                del node[key]
            else:
                node[key] = data.draw(_VALUES)
            break
        node = node[key]
    (scratch_bundle / "manifest.json").write_text(json.dumps(content))
    try:
        opened = open_bundle(scratch_bundle, verify_hashes=False)
    except (BundleError, ProcessorError):
        return
    assert json.loads(opened.manifest.to_json())["files"] == content["files"]


def test_graph_with_other_inputs_under_a_right_hash_is_refused_before_it_runs(
    bundle_copy: Path, reseal: Reseal
) -> None:
    folder = bundle_copy / "onnx"
    shutil.copyfile(folder / "action_decoder.onnx", folder / "conditioner.onnx")
    reseal(bundle_copy)
    with pytest.raises(
        BundleError,
        match=r"conditioner\.onnx: the inputs are \{dit_output: float32.*but the manifest says "
        r"\{hidden_states: float32.*" + _EXPORT_AGAIN,
    ):
        Policy.load(bundle_copy)


@pytest.mark.parametrize(
    ("change", "direction"),
    [
        (lambda g: g["inputs"]["actions"].update(dtype="float16"), "inputs"),
        (lambda g: g["inputs"]["actions"].update(shape=["batch", 50, 29]), "inputs"),
        (lambda g: g["inputs"]["actions"].update(shape=[1, 16, 29]), "inputs"),
        (lambda g: g["inputs"].update(more=g["inputs"]["actions"]), "inputs"),
        (lambda g: g["outputs"]["sa_embs"].update(dtype="float16"), "outputs"),
        (lambda g: g["outputs"].update(renamed=g["outputs"].pop("sa_embs")), "outputs"),
    ],
)
def test_graph_that_contradicts_its_record_is_refused(
    bundle_copy: Path, change: Callable[[Json], None], direction: str
) -> None:
    _edit(bundle_copy, lambda m: change(m["graphs"]["action_encoder"]))
    bundle = open_bundle(bundle_copy)
    engine = load_engine("onnxruntime", bundle.graph_path("action_encoder"), threads=1)
    with pytest.raises(BundleError, match=f"action_encoder.onnx: the {direction} are"):
        bundle.check_engine("action_encoder", engine)


def test_names_of_varying_axes_are_no_contract(bundle_copy: Path) -> None:
    _edit(
        bundle_copy,
        lambda m: m["graphs"]["action_encoder"]["inputs"]["timestep"].update(shape=["other"]),
    )
    bundle = open_bundle(bundle_copy)
    engine = load_engine("onnxruntime", bundle.graph_path("action_encoder"), threads=1)
    bundle.check_engine("action_encoder", engine)


@pytest.mark.parametrize("name", ["conditioner.onnx", "conditioner.onnx.data"])
def test_graph_that_cannot_be_loaded_is_an_engine_error(
    bundle_copy: Path, reseal: Reseal, name: str
) -> None:
    (bundle_copy / "onnx" / name).write_bytes(b"not what it was")
    reseal(bundle_copy)
    with pytest.raises(EngineError, match=r"ONNX Runtime cannot load .*conditioner\.onnx"):
        Policy.load(bundle_copy)


def test_progress_goes_from_nothing_to_the_whole_bundle_and_may_end_the_work(
    tiny_bundle: Path,
) -> None:
    told: list[str] = []
    open_bundle(tiny_bundle, progress=told.append)
    shares = [re.search(r"bundle, (.*) of (.*) MB", text) for text in told]
    done = [float(share[1]) for share in shares if share]
    assert len(done) == len(told) >= len(open_bundle(tiny_bundle).manifest.files)
    assert done == sorted(done)
    assert shares[-1] is not None
    assert shares[-1][1] == shares[-1][2]

    def give_up(text: str) -> None:
        raise GrootError(text)

    with pytest.raises(GrootError, match=r"^verifying the bundle"):
        Policy.load(tiny_bundle, progress=give_up)


def test_graphs_that_an_engine_replaces_are_not_read_and_all_else_is(small_copy: Path) -> None:
    manifest = open_bundle(small_copy).manifest
    _flip_a_byte(small_copy / manifest.files_of("backbone")[-1])
    with pytest.raises(BundleError, match="SHA-256 differs"):
        Policy.load(small_copy)
    told: list[str] = []
    open_bundle(small_copy, verify_engine_graphs=False, progress=told.append)
    share = re.search(r"bundle, (.*) of (.*) MB", told[-1])
    assert share is not None
    assert share[1] == share[2]
    # The bundle is taken, and the engine is what is missing.
    with pytest.raises(EngineError, match="TensorRT"):
        Policy.load(small_copy, engine="tensorrt")
    # No engine is made of the prefix model: the CPU runs it.
    _flip_a_byte(small_copy / manifest.files_of("prefix")[-1])
    with pytest.raises(BundleError, match="SHA-256 differs"):
        Policy.load(small_copy, engine="tensorrt")
