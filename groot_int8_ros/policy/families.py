"""The two families of graphs: which graphs a bundle of each has, and what goes in and out.

Owns: names, files and the tensor contract of the deployed graphs. Must not import an engine, ROS
or torch: exporter, bundle, quantisation and robot share this one table.

`reference` graphs have the tensor contracts that the community uses for GR00T N1.6, for
verification and for users with their own runtime. `deployed` graphs are what the robot runs:
whatever is constant for a robot and an instruction was computed once, beforehand. With N cameras,
H the action horizon, A `max_action_dim`, P the bank's prefix length, L live tokens, D the language
model's width, G its layers with K key-value heads of width h, and B text blocks of the DiT with n
heads of width d:

    backbone     image_<camera> uint8 (height, width, 3) for each camera
                 prefix_keys, prefix_values (G, K, P, h); prefix_mask bool (P,)
                 -> features (1, L, D)
    action_head  features (1, L, D)
                 prefix_text_keys, prefix_text_values (B, n, P, d); prefix_mask bool (P,)
                 state float32 (1, max_state_dim); noise float32 (1, H, A)
                 committed_actions float32 (1, H, A); committed_mask bool (1, H)
                 -> action_pred float32 (1, H, A)
    prefix       (optional, run by ONNX Runtime on the CPU, never an engine)
                 input_ids int64 (1, tokens); first_position int64 (1,)
                 -> prefix_keys, prefix_values, prefix_text_keys, prefix_text_values, each with
                 `tokens` in the place of P, float32

Tensors without a type here have the graph's own floating type.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from groot_int8_ros.policy.engines.base import TensorSpec
from groot_int8_ros.policy.types import CameraSpec

REFERENCE = "reference"
DEPLOYED = "deployed"

# Computes the prefix of a new instruction on the CPU and never becomes an engine; a deployed
# bundle may lack it.
PREFIX_GRAPH = "prefix"

# Family to its graphs in the order in which they run, each with the file that holds it. They are
# loaded in this order too, and it matters: while an engine is loaded, its mapped file may be in
# memory beside its weights, so the largest, the backbone, comes when nothing else is there yet.
GRAPH_FILES: Mapping[str, Mapping[str, str]] = {
    REFERENCE: {
        "backbone": "backbone_model.onnx",
        "conditioner": "conditioner.onnx",
        "action_encoder": "action_encoder.onnx",
        "dit": "dit_model.onnx",
        "action_decoder": "action_decoder.onnx",
    },
    DEPLOYED: {
        "backbone": "backbone.onnx",
        "action_head": "action_head.onnx",
        PREFIX_GRAPH: "prefix.onnx",
    },
}
FAMILIES = tuple(GRAPH_FILES)

# Where weights and time go: the graphs that can be INT8 and whose inputs are captured, in the
# order in which they run. The first makes features, the second actions.
LARGE_GRAPHS: Mapping[str, tuple[str, ...]] = {
    REFERENCE: ("backbone", "dit"),
    DEPLOYED: ("backbone", "action_head"),
}

PREFIX_MASK = "prefix_mask"
LANGUAGE_PREFIX = ("prefix_keys", "prefix_values")
TEXT_PREFIX = ("prefix_text_keys", "prefix_text_values")
# The axis of the tokens in the four prefix tensors.
TOKEN_AXIS = 2


def engine_graphs(family: str) -> tuple[str, ...]:
    """Return the graphs of a family that an engine runs, in the order of the runs."""
    return tuple(name for name in GRAPH_FILES[family] if name != PREFIX_GRAPH)


def image_input(camera: str) -> str:
    """Return the name of a camera's input."""
    return f"image_{camera}"


class GraphSpecs(Protocol):
    """What the contract needs of a graph's record."""

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """Specs by input name."""

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        """Specs by output name."""


def deployed_fault(
    graphs: Mapping[str, GraphSpecs],
    cameras: Sequence[CameraSpec],
    *,
    prefix_length: int,
    action_shape: tuple[int, int],
    state_dim: int,
) -> str | None:
    """Return what is wrong with the inputs and outputs of deployed graphs, or None.

    Args:
        graphs: Records of `backbone` and `action_head`, and of `prefix` where there is one.
        cameras: The robot's cameras, in the processor's order.
        prefix_length: Room for the instruction's prefix in tokens.
        action_shape: Horizon and width of the normalised actions.
        state_dim: Width of the normalised state.
    """
    return next(
        _faults(graphs, cameras, prefix_length, action_shape, state_dim),
        None,
    )


def _faults(
    graphs: Mapping[str, GraphSpecs],
    cameras: Sequence[CameraSpec],
    prefix_length: int,
    action_shape: tuple[int, int],
    state_dim: int,
) -> Iterator[str]:
    backbone, head = graphs["backbone"], graphs["action_head"]
    actions = (1, *action_shape)
    mask = TensorSpec("bool", (prefix_length,))
    images = {
        image_input(camera.key): TensorSpec("uint8", (camera.height, camera.width, 3))
        for camera in cameras
    }
    fixed = {
        "backbone": {**images, PREFIX_MASK: mask},
        "action_head": {
            PREFIX_MASK: mask,
            "state": TensorSpec("float32", (1, state_dim)),
            "noise": TensorSpec("float32", actions),
            "committed_actions": TensorSpec("float32", actions),
            "committed_mask": TensorSpec("bool", (1, action_shape[0])),
        },
    }
    floating = {"backbone": LANGUAGE_PREFIX, "action_head": ("features", *TEXT_PREFIX)}
    for name in ("backbone", "action_head"):
        wanted = {*fixed[name], *floating[name]}
        if set(graphs[name].inputs) != wanted:
            yield f"{name} takes {sorted(graphs[name].inputs)} and must take {sorted(wanted)}"
            return
        for tensor, spec in fixed[name].items():
            found = graphs[name].inputs[tensor]
            if found != spec:
                yield (
                    f"{name} takes {tensor} as {found.describe()}, and camera sizes, prefix "
                    f"length and action shape make it {spec.describe()}"
                )
    for name, tensors in (("backbone", LANGUAGE_PREFIX), ("action_head", TEXT_PREFIX)):
        keys, values = (graphs[name].inputs[tensor] for tensor in tensors)
        if keys != values or not _is_prefix(keys, prefix_length):
            yield (
                f"{name} takes {' and '.join(tensors)} as {keys.describe()} and "
                f"{values.describe()}; they must be alike, with {prefix_length} tokens on axis "
                f"{TOKEN_AXIS}"
            )
    for name, output in (("backbone", "features"), ("action_head", "action_pred")):
        if set(graphs[name].outputs) != {output}:
            yield f"{name} gives {sorted(graphs[name].outputs)} instead of {output}"
            return
    given, taken = backbone.outputs["features"], head.inputs["features"]
    if given.shape != taken.shape:
        yield f"backbone gives features as {given.describe()}, not {taken.describe()}"
    answer = head.outputs["action_pred"]
    if answer != TensorSpec("float32", actions):
        yield f"action_head answers with {answer.describe()}, not float32{list(actions)}"
    if PREFIX_GRAPH in graphs:
        yield from _prefix_faults(graphs)


def _is_prefix(spec: TensorSpec, length: int) -> bool:
    return len(spec.shape) == TOKEN_AXIS + 2 and spec.shape[TOKEN_AXIS] == length


def _prefix_faults(graphs: Mapping[str, GraphSpecs]) -> Iterator[str]:
    graph = graphs[PREFIX_GRAPH]
    inputs = {name: (spec.dtype, len(spec.shape)) for name, spec in graph.inputs.items()}
    if inputs != {"input_ids": ("int64", 2), "first_position": ("int64", 1)}:
        yield f"prefix takes {inputs} instead of input_ids and first_position in int64"
    for name, tensors in (("backbone", LANGUAGE_PREFIX), ("action_head", TEXT_PREFIX)):
        for tensor in tensors:
            given, taken = graph.outputs.get(tensor), graphs[name].inputs[tensor]
            if given is None or _but_tokens(given) != _but_tokens(taken):
                yield (
                    f"prefix gives {tensor} as {given.describe() if given else 'nothing'}, {name} "
                    f"takes {taken.describe()}"
                )


def _but_tokens(spec: TensorSpec) -> tuple[int | str, ...]:
    return spec.shape[:TOKEN_AXIS] + spec.shape[TOKEN_AXIS + 1 :]
