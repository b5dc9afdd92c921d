"""From a PyTorch module to an ONNX graph, without ever holding its weights.

Owns: tracing a module whose parameters have shapes but no values, the graph rewrites that every
exported graph goes through, and writing it with its external data. Must not know what the module
computes.

A 3-billion-parameter model does not fit twice into a small workstation. So the module is built
and traced under `FakeTensorMode`; each initializer then becomes a lazy tensor that reads its value
from the checkpoint while the external data file is being written, one tensor at a time.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxscript.optimizer
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.initialization import no_init_weights

from groot_int8_ros.errors import ExportError

# TensorRT 8.6 parses up to opset 17, later versions parse it as well.
OPSET = 17
# The first ONNX IR version that has opset 17; a newer one would shut out older runtimes.
IR_VERSION = 8
# What torch's exporter writes natively.
_TRACED_OPSET = 18

# Constants up to this many elements are folded: shapes, scalars and small tables, but no weights.
_FOLD_ELEMENTS = 1024

WeightSource = Callable[[str], torch.Tensor]


@dataclass(frozen=True)
class GraphInput:
    """One input of a graph to be traced.

    Attributes:
        shape: Length of each axis; a string names an axis whose length may vary.
        dtype: Element type.
    """

    shape: tuple[int | str, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class GraphSpec:
    """A graph to be traced.

    Attributes:
        build: Makes the module; called under `FakeTensorMode`.
        inputs: In the order of the module's `forward`.
        outputs: Names of what `forward` returns.
        dtype: Type of the weights, but for those that the module gives another type.
        storage: Type in which the file holds the matrices, where it is not the type in which they
            are used; see `store_matrices`.
    """

    build: Callable[[], nn.Module]
    inputs: Mapping[str, GraphInput]
    outputs: tuple[str, ...]
    dtype: torch.dtype
    storage: torch.dtype | None = None


def weight_bytes(spec: GraphSpec) -> int:
    """Return the number of bytes that a graph's weights will take."""
    return sum(
        parameter.numel()
        * (spec.storage if spec.storage and parameter.dim() > 1 else parameter.dtype).itemsize
        for parameter in build_empty(spec).parameters()
    )


def build_empty(spec: GraphSpec) -> nn.Module:
    """Return a graph's module with its parameters on the meta device: types without memory."""
    with torch.device("meta"):
        return build_module(spec).eval()


def build_module(spec: GraphSpec) -> nn.Module:
    """Build a graph's module with parameters of the graph's type, whose values do not exist yet.

    Call it under `FakeTensorMode` or on the meta device.
    """
    previous = torch.get_default_dtype()
    torch.set_default_dtype(spec.dtype)
    try:
        # The values don't exist yet; transformers would try to draw them.
        with no_init_weights():
            return spec.build()
    finally:
        torch.set_default_dtype(previous)


def trace(spec: GraphSpec, weights: WeightSource) -> ir.Model:
    """Trace a module into an ONNX model of `OPSET` with lazy weights.

    Args:
        spec: The graph.
        weights: Gives a parameter's or buffer's value by its name in the module.

    Returns:
        The model; its initializers are read from `weights` when they are written.

    Raises:
        ExportError: The module needs an operator that `OPSET` lacks.
    """
    with _quiet_exporter(), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        module = build_module(spec).eval()
        program = torch.onnx.export(
            module,
            tuple(_example(value) for value in spec.inputs.values()),
            dynamo=True,
            input_names=list(spec.inputs),
            output_names=list(spec.outputs),
            dynamic_shapes=_dynamic_shapes(spec.inputs),
            opset_version=_TRACED_OPSET,
            optimize=False,
            verbose=False,
        )
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    model: ir.Model = program.model
    names = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    _bind_weights(model, weights, names)
    # Before folding: the optimizer would transpose the weights itself and keep them in memory.
    transpose_weights_once(model)
    onnxscript.optimizer.optimize_ir(
        model, input_size_limit=_FOLD_ELEMENTS, output_size_limit=_FOLD_ELEMENTS
    )
    store_expanded_scalars(model)
    slice_whole_shapes(model)
    lower_opset(model)
    name_nodes(model)
    if spec.storage == torch.float16:
        store_matrices(model)
    _name_axes(model, spec)
    model.ir_version = IR_VERSION
    model.producer_name = "groot_int8_ros"
    return model


def save(model: ir.Model, path: Path) -> None:
    """Write a model and its external data, streaming the weights.

    Args:
        model: What `trace` returned.
        path: The `.onnx` file; the data go to `<path>.data`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ir.save(model, path, external_data=f"{path.name}.data", size_threshold_bytes=1024)


def transpose_weights_once(model: ir.Model) -> None:
    """Replace `Transpose(weight)` by a weight that is stored transposed.

    PyTorch keeps a linear layer's weight as (out, in) and transposes it at every call. Stored as
    (in, out) it is a plain `MatMul` operand, which quantisation and TensorRT expect.
    """
    graph = model.graph
    for node in list(graph):
        if node.op_type != "Transpose":
            continue
        weight = node.inputs[0]
        if weight is None or not weight.is_initializer() or weight.const_value is None:
            continue
        permutation = list(node.attributes["perm"].as_ints())
        stored = weight.const_value
        shape = [_length(stored.shape[axis]) for axis in permutation]
        name = f"{weight.name}.transposed"
        if permutation != [1, 0]:
            name += "".join(f"_{axis}" for axis in permutation)
        if name not in graph.initializers:
            graph.register_initializer(
                ir.Value(
                    name=name,
                    type=ir.TensorType(stored.dtype),
                    shape=ir.Shape(shape),
                    const_value=_transposed(stored, permutation, name, shape),
                )
            )
        _replace(node, graph.initializers[name])
    _drop_unused_initializers(graph)


def store_expanded_scalars(model: ir.Model) -> None:
    """Replace `Expand` of a constant scalar by the constant that it makes.

    A normalisation without a learned gain gets its gain of ones like this. Narrow ones are folded
    before, up to `_FOLD_ELEMENTS`; wide ones would be computed in every run.
    """
    graph = model.graph
    for node in list(graph):
        source, result = node.inputs[0] if node.inputs else None, node.outputs[0]
        if node.op_type != "Expand" or source is None:
            continue
        if result.shape is None or not result.shape.is_static():
            continue
        scalar = ir.convenience.get_const_tensor(source)
        if scalar is None or scalar.size != 1:
            continue
        filled = np.full(result.shape.numpy(), scalar.numpy().item(), scalar.dtype.numpy())
        name = f"{result.name}.expanded"
        constant = ir.Value(
            name=name,
            type=ir.TensorType(scalar.dtype),
            shape=result.shape,
            const_value=ir.tensor(filled, name=name),
        )
        graph.register_initializer(constant)
        _replace(node, constant)
    _drop_unused_initializers(graph)


def slice_whole_shapes(model: ir.Model) -> None:
    """Replace `Shape` with a start and an end by a slice of the whole shape.

    Opset 15 gave `Shape` these attributes, and the parser of TensorRT 8.6 ignores them without a
    word: it takes the whole shape for the part, and crashes later. (Seen with 8.6.1.)
    """
    graph = model.graph
    for node in list(graph):
        if node.op_type != "Shape" or not {"start", "end"} & set(node.attributes):
            continue
        bounds = [
            node.attributes[name].as_int() if name in node.attributes else default
            for name, default in (("start", 0), ("end", 2**31 - 1))
        ]
        whole = ir.node("Shape", inputs=[node.inputs[0]])
        part = ir.node("Slice", inputs=[whole.outputs[0], *_constants(graph, *bounds)])
        part.outputs[0].type = node.outputs[0].type
        part.outputs[0].shape = node.outputs[0].shape
        graph.insert_before(node, [whole, part])
        _replace(node, part.outputs[0])


def lower_opset(model: ir.Model) -> None:
    """Rewrite the few operators whose signature changed after `OPSET`.

    Raises:
        ExportError: An operator is newer and no rewrite is known for it.
    """
    for node in model.graph.all_nodes():
        if node.domain not in ("", "ai.onnx"):
            raise ExportError(f"the graph uses {node.domain}.{node.op_type}, which is not ONNX")
        traced = onnx.defs.get_schema(node.op_type, _TRACED_OPSET).since_version
        if traced <= OPSET:
            continue
        if node.op_type.startswith("Reduce"):
            _reduction_axes_to_attribute(node)
        elif node.op_type == "Split":
            node.attributes.pop("num_outputs", None)
        else:
            raise ExportError(
                f"the graph needs {node.op_type} of opset {traced}, and TensorRT 8.6 reads {OPSET}"
            )
    _drop_unused_initializers(model.graph)
    model.opset_imports.clear()
    model.opset_imports[""] = OPSET


def name_nodes(model: ir.Model) -> None:
    """Name each matrix product after the layer whose weight it uses.

    The names are how quantisation and audit speak of layers, so they must not depend on the
    tracer's counters: `backbone.language_model.model.layers.0.mlp.down_proj` names its node. A
    layer that is used again gets a number behind its name, as names must be unique.
    """
    uses: Counter[str] = Counter()
    for node in model.graph:
        if node.op_type not in ("MatMul", "Gemm") or node.inputs[1] is None:
            continue
        weight = node.inputs[1]
        if weight.is_initializer() and weight.name is not None:
            layer = weight.name.removesuffix(".transposed").removesuffix(".weight")
            name = f"{layer}/{node.op_type}"
            node.name = f"{name}_{uses[name]}" if uses[name] else name
            uses[name] += 1


def store_matrices(model: ir.Model) -> None:
    """Store float32 matrices as float16 and cast each just before its use.

    The file has half the size and the arithmetic stays float32. A table that is looked up is cast
    behind the look-up, row by row.
    """
    graph = model.graph
    for name, value in list(graph.initializers.items()):
        stored = value.const_value
        if value.dtype != ir.DataType.FLOAT or stored is None or len(stored.shape) < 2:
            continue
        shape = [_length(axis) for axis in stored.shape]
        half = ir.Value(
            name=f"{name}.float16",
            type=ir.TensorType(ir.DataType.FLOAT16),
            shape=ir.Shape(shape),
            const_value=_halved(stored, f"{name}.float16", shape),
        )
        graph.register_initializer(half)
        for node, index in list(value.uses()):
            if node.op_type == "Gather":
                node.replace_input_with(index, half)
                _cast_output(graph, node)
            else:
                cast = _cast_node(half)
                graph.insert_before(node, cast)
                node.replace_input_with(index, cast.outputs[0])
    _drop_unused_initializers(graph)


def _cast_node(value: ir.Value) -> ir.Node:
    node = ir.node("Cast", inputs=[value], attributes={"to": ir.DataType.FLOAT.value})
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    node.outputs[0].shape = value.shape
    return node


def _cast_output(graph: ir.Graph, node: ir.Node) -> None:
    output = node.outputs[0]
    cast = _cast_node(output)
    graph.insert_after(node, cast)
    output.type = ir.TensorType(ir.DataType.FLOAT16)
    for user, index in list(output.uses()):
        if user is not cast:
            user.replace_input_with(index, cast.outputs[0])


def _halved(stored: ir.TensorProtocol, name: str, shape: Sequence[int]) -> ir.LazyTensor:
    def read() -> ir.TensorProtocol:
        whole = torch.from_numpy(stored.numpy())
        return ir.tensor(_cast(whole, ir.DataType.FLOAT16, name).numpy(), name=name)

    return ir.LazyTensor(
        read, dtype=ir.DataType.FLOAT16, shape=ir.Shape(shape), name=name, cache=False
    )


def _example(value: GraphInput) -> torch.Tensor:
    # Distinct lengths for varying axes, none of them 0 or 1, which the tracer would specialise on.
    shape = [axis if isinstance(axis, int) else _EXAMPLE_LENGTHS[axis] for axis in value.shape]
    return torch.zeros(shape, dtype=value.dtype)


# Varying axes by name, with the length that the tracer sees. An observation has `images` frames
# for each batch entry; the tracer is not told so, and the graph does not depend on it.
_EXAMPLE_LENGTHS = {"batch": 2, "sequence": 40, "images": 6, "tokens": 9}


def _dynamic_shapes(
    inputs: Mapping[str, GraphInput],
) -> list[dict[int, torch.export.Dim]] | None:
    if all(isinstance(axis, int) for value in inputs.values() for axis in value.shape):
        # A `forward` with a varying number of inputs can be traced then.
        return None
    dimensions: dict[str, torch.export.Dim] = {}
    shapes = []
    for value in inputs.values():
        axes = {}
        for index, axis in enumerate(value.shape):
            if isinstance(axis, str):
                axes[index] = dimensions.setdefault(axis, torch.export.Dim(axis, min=1, max=65536))
        shapes.append(axes)
    return shapes


def _bind_weights(model: ir.Model, weights: WeightSource, names: set[str]) -> None:
    for name, value in model.graph.initializers.items():
        if name in names:
            value.const_value = _lazy(name, value, weights)


def _lazy(name: str, value: ir.Value, weights: WeightSource) -> ir.LazyTensor:
    dtype, shape = value.dtype, value.shape
    if dtype is None or shape is None:
        raise RuntimeError(f"the traced initializer {name} has no type or shape")

    def read() -> ir.TensorProtocol:
        tensor = weights(name)
        if list(tensor.shape) != [_length(axis) for axis in shape]:
            raise RuntimeError(f"{name}: traced as {shape}, read as {tuple(tensor.shape)}")
        return ir.tensor(_cast(tensor, dtype, name).contiguous().numpy(), name=name)

    return ir.LazyTensor(read, dtype=dtype, shape=shape, name=name, cache=False)


def _cast(tensor: torch.Tensor, dtype: ir.DataType, name: str) -> torch.Tensor:
    target = {ir.DataType.FLOAT: torch.float32, ir.DataType.FLOAT16: torch.float16}.get(dtype)
    if target is None:
        return tensor
    cast = tensor.to(target)
    if not torch.isfinite(cast).all():
        raise ExportError(
            f"the weight {name} has values that {dtype.name.lower()} cannot hold; export with "
            "--precision fp32"
            if torch.isfinite(tensor).all()
            else f"the weight {name} holds NaN or infinity: the checkpoint is damaged"
        )
    return cast


def _transposed(
    stored: ir.TensorProtocol, permutation: Sequence[int], name: str, shape: Sequence[int]
) -> ir.LazyTensor:
    return ir.LazyTensor(
        lambda: ir.tensor(stored.numpy().transpose(permutation).copy(), name=name),
        dtype=stored.dtype,
        shape=ir.Shape(shape),
        name=name,
        cache=False,
    )


def _constants(graph: ir.Graph, *numbers: int) -> list[ir.Value]:
    """Return int64 initializers of shape (1,), one for each number."""
    values = []
    for number in numbers:
        name = f"constant_{number}"
        if name not in graph.initializers:
            tensor = ir.tensor([number], dtype=ir.DataType.INT64, name=name)
            graph.register_initializer(
                ir.Value(
                    name=name,
                    type=ir.TensorType(ir.DataType.INT64),
                    shape=ir.Shape([1]),
                    const_value=tensor,
                )
            )
        values.append(graph.initializers[name])
    return values


def _replace(node: ir.Node, value: ir.Value) -> None:
    node.outputs[0].replace_all_uses_with(value)
    graph = node.graph
    if graph is None:
        raise RuntimeError(f"{node.name} is in no graph")
    graph.remove(node, safe=True)


def _reduction_axes_to_attribute(node: ir.Node) -> None:
    axes = node.inputs[1] if len(node.inputs) > 1 else None
    if axes is None:
        return
    if axes.const_value is None:
        raise ExportError(f"{node.op_type} has axes that are computed at run time")
    node.attributes["axes"] = ir.AttrInt64s("axes", axes.const_value.numpy().tolist())
    node.attributes.pop("noop_with_empty_axes", None)
    node.resize_inputs(1)


def _drop_unused_initializers(graph: ir.Graph) -> None:
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]


def _length(axis: object) -> int:
    if not isinstance(axis, int):
        raise RuntimeError(f"a weight has an axis of unknown length: {axis}")
    return axis


def _name_axes(model: ir.Model, spec: GraphSpec) -> None:
    for value, declared in zip(model.graph.inputs, spec.inputs.values(), strict=True):
        value.shape = ir.Shape(declared.shape)


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    # The exporter logs about torchvision, which is not used, and warns about its own internals.
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
