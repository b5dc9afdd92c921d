"""The work of a PyTorch module, counted while it runs on tensors without values.

Owns: `count_stage`. It needs no weights and no memory for them: the module is built and run under
`FakeTensorMode`, at any size. It counts what `onnx_count` counts in the exported graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from offline_tools.cost.work import ATTENTION, NORM, SOFTMAX, GraphWork, Launch, kind_of
from offline_tools.export.deployed_stages import StageGraph
from offline_tools.export.graph import build_module

_aten = torch.ops.aten

# Operator -> where its two operands stand.
_PRODUCTS: dict[Any, tuple[int, int]] = {
    _aten.mm.default: (0, 1),
    _aten.bmm.default: (0, 1),
    _aten.addmm.default: (1, 2),
    _aten.baddbmm.default: (1, 2),
}
_OTHERS: dict[Any, str] = {
    _aten.native_layer_norm.default: NORM,
    _aten.mean.dim: NORM,
    _aten._softmax.default: SOFTMAX,
}


def count_stage(graph: StageGraph) -> GraphWork:
    """Count a graph's work for one observation.

    Args:
        graph: A graph without varying axes.

    Raises:
        RuntimeError: An operator hides products from the count.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        module = build_module(graph.spec).eval()
        inputs = []
        for name, value in graph.spec.inputs.items():
            if not all(isinstance(axis, int) for axis in value.shape):
                raise ValueError(f"{graph.name}: the input {name} has a varying axis")
            inputs.append(torch.zeros(value.shape, dtype=value.dtype))  # type: ignore[arg-type]
        constants = dict((*module.named_parameters(), *module.named_buffers()))
        counter = _Counter(constants, graph.spec.dtype.itemsize)
        with counter:
            module(*inputs)
    named = {launch.weight: launch.weight_bytes for launch in counter.launches}
    return GraphWork(
        graph.name, graph.runs, tuple(counter.launches), counter.read_bytes - sum(named.values())
    )


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes each product, norm and softmax; knows a weight by its storage."""

    def __init__(self, constants: Mapping[str, Tensor], size: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launches: list[Launch] = []
        self._size = size
        self._names = {_storage(tensor): name for name, tensor in constants.items()}
        self._sizes = {name: _bytes(tensor) for name, tensor in constants.items()}
        self._read: set[str] = set()

    @property
    def read_bytes(self) -> int:
        """Bytes of the constants that were read at all: an export leaves the others out."""
        return sum(self._sizes[name] for name in self._read)

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for argument in args:
            for tensor in argument if isinstance(argument, list | tuple) else (argument,):
                if isinstance(tensor, Tensor) and (name := self._names.get(_storage(tensor))):
                    self._read.add(name)
        if func in _PRODUCTS:
            first, second = (args[index] for index in _PRODUCTS[func])
            self._product(first, second, result)
        elif func in _OTHERS:
            output = result[0] if isinstance(result, tuple) else result
            moved = _bytes(args[0]) + _bytes(output)
            if _OTHERS[func] == SOFTMAX:
                # The exporter leaves out the casts around a softmax: engines read and write the
                # graph's type.
                moved = 2 * output.numel() * self._size
            self.launches.append(Launch(_OTHERS[func], 0, 0, moved))
        elif "attention" in str(func) or "convolution" in str(func):
            raise RuntimeError(f"{func} hides products from the count")
        return result

    def _product(self, first: Tensor, second: Tensor, result: Tensor) -> None:
        flops = 2 * math.prod(result.shape) * first.shape[-1]
        weight = self._names.get(_storage(second), "") or self._names.get(_storage(first), "")
        read = sum(
            _bytes(operand)
            for operand in (first, second)
            if not weight or self._names.get(_storage(operand)) != weight
        )
        kind, size = (kind_of(weight), self._sizes[weight]) if weight else (ATTENTION, 0)
        moved = read + _bytes(result)
        self.launches.append(Launch(kind, flops, size, moved, weight, input_bytes=read))


def _storage(tensor: Tensor) -> int:
    # Views share it, and a tensor without values has one as well.
    return int(tensor.untyped_storage()._cdata)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
