"""One captured observation, with whatever of the policy's run on it is known.

Owns: `CaptureSample`, its flat form (name to array) and the checks a sample has to pass. Must not
import ROS or an engine. A recorder on a robot knows observation, noise, committed rows and chunk;
the tensors inside the policy are filled in where the policy runs graph by graph. Arrays have no
batch axis; the store's feeds add it.

Which arrays feed the graphs depends on their family (`policy.families`). Reference graphs take
token ids, pixel values and embeddings, which are stored. Deployed graphs take the frames, state
and noise themselves, and the bundle has the instruction's prefix; `features` alone are stored
beside them. To recompute them would take a run of the backbone in each pass of a quantisation, and
at true size with four cameras they are 1.6 MB in half precision beside 3.7 MB of frames.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from groot_int8_ros.errors import CaptureError
from groot_int8_ros.policy.families import REFERENCE
from groot_int8_ros.policy.types import (
    BoolArray,
    CommittedActions,
    Float32Array,
    Int64Array,
    UInt8Array,
)

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class BackboneInputs:
    """What the graph `backbone` was given.

    Attributes:
        input_ids: Token ids, int64 (S,).
        attention_mask: int64 (S,).
        pixel_values: float32 (cameras, 3, H, W).
    """

    input_ids: Int64Array
    attention_mask: Int64Array
    pixel_values: Float32Array


@dataclass(frozen=True, eq=False)
class DitInputs:
    """What the graph `dit` was given, at every denoising step of one observation.

    Attributes:
        vl_embs: Vision-language features, floating (S, D); the same at every step.
        image_mask: Which tokens are image tokens, bool (S,).
        backbone_attention_mask: Which tokens are real, bool (S,).
        sa_embs: State and action embeddings, floating (steps, 1 + horizon, E).
        timestep: Time bucket of each step, int64 (steps,).
    """

    vl_embs: NDArray[Any]
    image_mask: BoolArray
    backbone_attention_mask: BoolArray
    sa_embs: NDArray[Any]
    timestep: Int64Array


@dataclass(frozen=True, eq=False)
class CapturedChunk:
    """What the policy answered.

    Attributes:
        actions: Action key to targets in physical units, float32 (rows, D).
        action_pred: Normalised answer, float32 (horizon, max_action_dim); None where only the
            published chunk was seen.
    """

    actions: Mapping[str, Float32Array]
    action_pred: Float32Array | None = None


@dataclass(frozen=True, eq=False)
class CaptureSample:
    """One observation and what is known of the policy's run on it.

    Attributes:
        instruction: As the user gave it; empty where it is unknown.
        stamp_ns: The observation's stamp in nanoseconds.
        source: Where it comes from, for a person: "episode 3 frame 120", a bag, a topic.
        state: State key to joint values in physical units, float32 (D,).
        noise: Initial noise of the flow, float32 (horizon, max_action_dim), or None.
        seed: Seed that the noise was drawn with, or None where it was not drawn.
        images: Camera key to RGB frame, uint8 (height, width, 3), or None.
        chunk: The answer, or None.
        backbone: Inputs of the backbone, or None.
        dit: Inputs of the diffusion transformer, or None.
        normalised_state: The network's state input, float32 (max_state_dim,), or None.
        features: What the deployed family's backbone gave, floating (live tokens, D), or None.
        committed: Rows of the chunk that the policy was given, or None: it was free.
    """

    instruction: str
    stamp_ns: int
    source: str
    state: Mapping[str, Float32Array] = field(default_factory=dict)
    noise: Float32Array | None = None
    seed: int | None = None
    images: Mapping[str, UInt8Array] | None = None
    chunk: CapturedChunk | None = None
    backbone: BackboneInputs | None = None
    dit: DitInputs | None = None
    normalised_state: Float32Array | None = None
    features: NDArray[Any] | None = None
    committed: CommittedActions | None = None

    def has(self, family: str, graph: str) -> bool:
        """Whether the inputs of a family's large graph are known."""
        if family == REFERENCE:
            return (self.backbone if graph == "backbone" else self.dit) is not None
        observed = self.images is not None and bool(self.instruction)
        if graph == "backbone":
            return observed
        return observed and self.features is not None and self.noise is not None

    def arrays(self) -> Arrays:
        """Return every array under its flat name, such as `dit/vl_embs` or `state/arm`."""
        arrays: Arrays = {f"state/{key}": value for key, value in self.state.items()}
        for name in ("noise", "normalised_state", "features"):
            value = getattr(self, name)
            if value is not None:
                arrays[name] = value
        for key, frame in (self.images or {}).items():
            arrays[f"images/{key}"] = frame
        if self.chunk is not None:
            for key, actions in self.chunk.actions.items():
                arrays[f"actions/{key}"] = actions
            if self.chunk.action_pred is not None:
                arrays["action_pred"] = self.chunk.action_pred
        if self.committed is not None:
            arrays["committed_rows"] = np.array(self.committed.rows, np.int64)
            for key, actions in self.committed.actions.items():
                arrays[f"committed/{key}"] = actions
        for group, inputs in (("backbone", self.backbone), ("dit", self.dit)):
            if inputs is not None:
                arrays |= {f"{group}/{name}": value for name, value in vars(inputs).items()}
        return arrays

    def sha256(self) -> str:
        """Return the hash of the sample's content; `source` is no part of it."""
        digest = hashlib.sha256(f"{self.instruction}\0{self.stamp_ns}\0{self.seed}\0".encode())
        for name, array in sorted(self.arrays().items()):
            digest.update(f"{name}\0{array.dtype.str}{array.shape}\0".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def sample_from_arrays(
    instruction: str, stamp_ns: int, source: str, seed: int | None, arrays: Mapping[str, Any]
) -> CaptureSample:
    """Put a sample together again; the inverse of `CaptureSample.arrays`.

    Raises:
        KeyError: A group of arrays is incomplete.
    """

    def group(prefix: str) -> Arrays:
        return {
            name.split("/", 1)[1]: np.asarray(array)
            for name, array in arrays.items()
            if name.startswith(f"{prefix}/")
        }

    images, actions, backbone, dit = map(group, ("images", "actions", "backbone", "dit"))
    chunk = CapturedChunk(actions, arrays.get("action_pred"))
    committed = None
    if given := group("committed"):
        committed = CommittedActions(arrays["committed_rows"].tolist(), given)
    elif "committed_rows" in arrays:
        raise KeyError("committed/")
    return CaptureSample(
        instruction=instruction,
        stamp_ns=stamp_ns,
        source=source,
        state=group("state"),
        noise=arrays.get("noise"),
        seed=seed,
        images=images or None,
        chunk=chunk if actions or chunk.action_pred is not None else None,
        backbone=BackboneInputs(**{n: backbone[n] for n in BACKBONE_NAMES}) if backbone else None,
        dit=DitInputs(**{n: dit[n] for n in DIT_NAMES}) if dit else None,
        normalised_state=arrays.get("normalised_state"),
        features=arrays.get("features"),
        committed=committed,
    )


BACKBONE_NAMES = tuple(BackboneInputs.__dataclass_fields__)
DIT_NAMES = tuple(DitInputs.__dataclass_fields__)

# Flat name -> kinds of dtype (as in numpy.dtype.kind) and number of axes.
_EXPECTED: Mapping[str, tuple[str, int]] = {
    "noise": ("f", 2),
    "action_pred": ("f", 2),
    "normalised_state": ("f", 1),
    "features": ("f", 2),
    "committed_rows": ("i", 1),
    "backbone/input_ids": ("i", 1),
    "backbone/attention_mask": ("i", 1),
    "backbone/pixel_values": ("f", 4),
    "dit/vl_embs": ("f", 2),
    "dit/image_mask": ("b", 1),
    "dit/backbone_attention_mask": ("b", 1),
    "dit/sa_embs": ("f", 3),
    "dit/timestep": ("i", 1),
}
_EXPECTED_GROUPS = {
    "state": ("f", 1),
    "images": ("u", 3),
    "actions": ("f", 2),
    "committed": ("f", 2),
}


def check_sample(sample: CaptureSample) -> None:
    """Refuse a sample that would spoil a calibration.

    Raises:
        CaptureError: An array has the wrong type, the arrays' lengths contradict each other, or
            one holds NaN or infinity; the message names the array and the sample's source.
    """
    arrays = sample.arrays()
    for name, array in arrays.items():
        kind, axes = _EXPECTED.get(name) or _EXPECTED_GROUPS[name.split("/", 1)[0]]
        if array.dtype.kind != kind or array.ndim != axes:
            raise CaptureError(
                f"{sample.source}: array {name} is {array.dtype}{list(array.shape)}, which is no "
                f"such tensor (kind {kind!r}, {axes} axes). The writer of this sample is wrong."
            )
        if kind == "f" and not np.isfinite(array).all():
            place = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
            raise CaptureError(
                f"{sample.source}: array {name} holds NaN or infinity, first at {place}. The "
                "sample is refused, for it would spoil every scale. A state comes from a sensor: "
                "check it; any other array comes from a graph that overflows: run groot-int8 "
                "verify on the bundle."
            )
    committed = tuple(name for name in arrays if name.startswith("committed"))
    for names in (("backbone/input_ids", "backbone/attention_mask"), _TOKENS, _STEPS, committed):
        lengths = {name: len(arrays[name]) for name in names if name in arrays}
        if len(set(lengths.values())) > 1:
            raise CaptureError(
                f"{sample.source}: these arrays belong together but differ in length: {lengths}. "
                "The sample is refused."
            )


_TOKENS = (
    "backbone/input_ids",
    "dit/vl_embs",
    "dit/image_mask",
    "dit/backbone_attention_mask",
)
_STEPS = ("dit/sa_embs", "dit/timestep")
