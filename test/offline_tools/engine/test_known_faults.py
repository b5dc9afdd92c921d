"""Hazards of TensorRT 8.6: a wrong engine of an old bundle, a right graph that is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest

from groot_int8_ros.errors import EngineError
from groot_int8_ros.policy.bundle import open_bundle
from groot_int8_ros.policy.engines.cuda import Device
from offline_tools.engine import engines
from offline_tools.engine.builder import BuilderSettings
from offline_tools.engine.engines import BuildOptions, build_engines
from offline_tools.engine.known_faults import wrong_forms
from offline_tools.engine.library import Library

_DEVICE = Device("NVIDIA Test Board", "8.6", 8, 16 << 30, integrated=False)
_WIDTH, _HEADS, _TOKENS = 8, 2, 3


def _value(name: str, *shape: int) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))


class _Graph:
    """A graph of one input, built node by node."""

    def __init__(self, *shape: int) -> None:
        self.value = self.input = _value("x", *shape)
        self.nodes: list[ir.Node] = []

    def then(
        self, kind: str, *shape: int, others: tuple[ir.Value, ...] = (), **attributes: object
    ) -> _Graph:
        node = ir.node(kind, [self.value, *others], attributes or None, name=f"the/{kind}")  # type: ignore[arg-type]
        self.value = node.outputs[0]
        self.value.name = f"{kind}_{len(self.nodes)}"
        self.value.shape, self.value.type = ir.Shape(shape), ir.TensorType(ir.DataType.FLOAT)
        self.nodes.append(node)
        return self

    def model(self) -> ir.Model:
        graph = ir.Graph([self.input], [self.value], nodes=self.nodes, opset_imports={"": 17})
        return ir.Model(graph, ir_version=8)


def _product(*, bias: bool, scaled: bool = False) -> _Graph:
    graph = _Graph(1, _TOKENS, _WIDTH)
    shape = (1, _TOKENS, 3 * _WIDTH)
    graph.then("MatMul", *shape, others=(_value("weight", _WIDTH, 3 * _WIDTH),))
    if scaled:
        graph.then("Mul", *shape, others=(_value("row_max", 1, _TOKENS, 1),))
    return graph.then("Add", *shape, others=(_value("bias", 3 * _WIDTH),)) if bias else graph


def _five_axes(graph: _Graph) -> _Graph:
    target = (1, _TOKENS, 3, _HEADS, _WIDTH // _HEADS)
    return graph.then("Reshape", *target, others=(_value("shape", 5),))


@pytest.mark.parametrize("kind", ["Split", "Slice", "Gather"])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_split_of_a_product_on_five_axes_is_found(
    kind: str, scaled: bool, transposed: bool
) -> None:
    graph = _five_axes(_product(bias=True, scaled=scaled))
    if transposed:
        graph.then("Transpose", 3, 1, _HEADS, _TOKENS, _WIDTH // _HEADS)
    graph.then(kind, 1, 1, _HEADS, _TOKENS, _WIDTH // _HEADS)
    (found,) = wrong_forms(graph.model())
    assert found.startswith(f"the/{kind} ")


def test_five_axes_that_are_no_biased_product_or_not_split_are_left_alone() -> None:
    heads = (1, _TOKENS, 3, _HEADS, _WIDTH // _HEADS)
    right = [
        _five_axes(_product(bias=False)).then("Split", *heads),
        # Key-value heads that are repeated.
        _five_axes(_product(bias=True)).then("Expand", *heads),
        _product(bias=True).then("Split", 1, _TOKENS, _WIDTH),
        _five_axes(_Graph(1, _TOKENS, 3 * _WIDTH)).then("Split", *heads),
    ]
    assert not [found for graph in right for found in wrong_forms(graph.model())]


@pytest.mark.parametrize(
    ("axis", "between", "found"),
    [(3, "", 1), (-1, "", 1), (-1, "Cast", 1), (2, "", 0), (-1, "Mul", 0)],
)
def test_transposed_values_joined_along_their_last_axis_are_found(
    axis: int, between: str, found: int
) -> None:
    shape = (1, _HEADS, 4, _TOKENS)
    graph = _Graph(1, _HEADS, _TOKENS, 4).then("Transpose", *shape)
    if between == "Cast":
        graph.then("Cast", *shape)
    elif between == "Mul":
        graph.then("Mul", *shape, others=(_value("scale", 1),))
    graph.then("Concat", *shape, others=(_value("prefix", *shape),), axis=axis)
    forms = list(wrong_forms(graph.model()))
    assert len(forms) == found
    assert all(form.startswith("the/Concat ") for form in forms)


def _open_8_6(_name: str) -> Library:
    return Library("tensorrt", None, "8.6.1")


def _refuse(monkeypatch: pytest.MonkeyPatch, options: BuildOptions, message: str) -> None:
    monkeypatch.setattr(engines, "open_library", _open_8_6)
    with pytest.raises(EngineError, match=message):
        build_engines(options, lambda _: None, device=_DEVICE)


@pytest.mark.parametrize(
    "fixture",
    ["tiny_bundle", "deployed_bundle", "fp16_bundle", "fp16_deployed", "shipped_bundle"],
)
def test_no_graph_that_is_exported_has_a_wrong_form(
    request: pytest.FixtureRequest, fixture: str
) -> None:
    bundle = open_bundle(request.getfixturevalue(fixture), verify_hashes=False)
    for name in bundle.manifest.engine_graphs:
        assert not list(wrong_forms(ir.load(bundle.graph_path(name)))), name


@pytest.mark.parametrize("fixture", ["tiny_bundle", "fp16_deployed"])
def test_no_graph_that_is_quantised_has_a_wrong_form(
    request: pytest.FixtureRequest, int8_graph: Callable[..., Path], fixture: str, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(fixture)
    for name in ("backbone", "dit" if fixture == "tiny_bundle" else "action_head"):
        model = ir.load(int8_graph(name, tmp_path, folder))
        assert not list(wrong_forms(model)), name
        # That it can be judged at all: quantising kept the shapes.
        split = [node.inputs[0] for node in model.graph if node.op_type == "Split"]
        assert all(value is not None and value.shape is not None for value in split)


def test_old_bundle_is_refused_by_8_6_with_the_node_and_the_way_out(
    small_deployed: Path,
    reseal: Callable[[Path], None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    bundle = Path(shutil.copytree(small_deployed, tmp_path / "bundle"))
    path = open_bundle(bundle, verify_hashes=False).graph_path("action_head")
    model = ir.load(path)
    keys = next(value for value in model.graph.inputs if value.name == "prefix_text_keys")
    transpose = ir.node("Transpose", [keys], name="old/Transpose")
    transposed = transpose.outputs[0]
    join = ir.node("Concat", [transposed, transposed], {"axis": -1}, name="old/Concat")
    for name, node in (("keys_transposed", transpose), ("keys_joined", join)):
        value = node.outputs[0]
        value.name, value.type, value.shape = name, keys.type, keys.shape
        model.graph.append(node)
    ir.save(model, path)
    reseal(bundle)
    message = rf"old/Concat .*export the bundle again \(groot-int8 export .*{bundle} --force\)"
    _refuse(monkeypatch, BuildOptions(bundle), message)


def test_int8_reference_graphs_are_refused_at_level_0(
    int8_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = json.loads((int8_bundle / "manifest.json").read_text())
    assert content["family"] == "reference"
    options = BuildOptions(int8_bundle, graphs=("dit",), settings=BuilderSettings(level=0))
    _refuse(monkeypatch, options, "use --builder-level 1 or more")
