"""The boundaries that an observation's recording holds, each fed with its recorded input.

Owns: the list of boundaries from the camera frame to the decoded action and the way each is
computed. All counts (cameras, layers, denoising steps, keys) come from the recording itself. An
array that no boundary knows, and a boundary whose arrays were not recorded, become notes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from groot_int8_ros.errors import GrootError
from groot_int8_ros.policy.postprocess import decode_actions, decode_actions_float64
from groot_int8_ros.policy.preprocess import (
    evaluation_image,
    formalize,
    network_image,
    normalize_state,
    pixel_values,
    prompt_text,
)
from groot_int8_ros.policy.processor import Processor
from offline_tools.model.action_head import time_bucket
from offline_tools.model.backbone import VisionTower, pixel_unshuffle
from offline_tools.parity.chain import Array, Chain, RawObservation, tensor
from offline_tools.parity.recording import Recording
from offline_tools.parity.report import Report, Rule

_STEPS = re.compile(r"n(\d+)\..+")
_IMAGE_BLOCK = re.compile(r"<image (\d+)><img>(?:<IMG_CONTEXT>)*</img>")

_END_TO_END = "raw observation"


@dataclass(frozen=True)
class Boundary:
    """One stage of the policy.

    Attributes:
        output: Name of the recorded array that the stage gives.
        inputs: Names of the recorded arrays that it takes.
        compute: The stage, on those arrays.
        rule: What the result has to keep.
        label: Name in the table; the output's name if empty.
        transform: Applied to the recorded output before it is compared.
    """

    output: str
    inputs: tuple[str, ...]
    compute: Callable[..., Any]
    rule: Rule = Rule.RELATIVE
    label: str = ""
    transform: Callable[[Array], Array] | None = None


def run_boundary(recording: Recording, report: Report, boundary: Boundary) -> None:
    """Compute a boundary from its recorded inputs and compare, or note what is not recorded."""
    label = boundary.label or boundary.output
    if boundary.output not in recording:
        report.note(f"{recording.name}: {boundary.output} is not recorded")
        return
    missing = [name for name in boundary.inputs if name not in recording]
    if missing:
        report.note(
            f"{recording.name}: {label} is not compared, its input {', '.join(missing)} is not "
            "recorded"
        )
        return
    with torch.no_grad():
        actual = boundary.compute(*(recording[name] for name in boundary.inputs))
    if isinstance(actual, Tensor):
        actual = actual.numpy()
    expected = recording[boundary.output]
    if boundary.transform is not None:
        expected = boundary.transform(expected)
    source = ", ".join(boundary.inputs)
    report.add(recording.name, label, source, boundary.rule, actual, expected)


def raw_observation(recording: Recording) -> RawObservation:
    """Return the raw observation of a recording."""
    return RawObservation(
        images=recording.with_prefix("image."),
        # Recorded with a time axis of one step.
        state={key: value[-1] for key, value in recording.with_prefix("state.").items()},
        instruction=str(recording["instruction"]),
    )


def window_order(shapes: NDArray[np.int64], window: int) -> NDArray[np.int64]:
    """Return for each patch in the reference's window order its index in row-major order.

    Args:
        shapes: Patch rows and columns of each image, shape (images, 2).
        window: Side of a window in patches; windows at the far edges are cut off.
    """
    order = []
    start = 0
    for rows, columns in shapes.tolist():
        index = np.arange(start, start + rows * columns).reshape(rows, columns)
        order += [
            index[top : top + window, left : left + window].reshape(-1)
            for top in range(0, rows, window)
            for left in range(0, columns, window)
        ]
        start += rows * columns
    return np.concatenate(order)


def levels(values: Array) -> Array:
    """Return pixel values as grey levels, which are whole but for float rounding."""
    return np.round(values.astype(np.float64) * 127.5 + 127.5, 3)


class ObservationCheck:
    """All boundaries of one recorded observation."""

    def __init__(self, chain: Chain, recording: Recording, report: Report) -> None:
        self._chain = chain
        self._model = chain.model
        self._recording = recording
        self._report = report
        self.observation = raw_observation(recording)
        self.processor: Processor = chain.processor(
            int(recording["embodiment_id"][0]), self.observation
        )

    def run(self) -> None:
        """Compare every boundary, then the whole policy end to end."""
        for boundary in (
            *self._image_boundaries(),
            *self._prompt_boundaries(),
            *self._vision_boundaries(),
            *self._language_boundaries(),
            *self._head_boundaries(),
        ):
            run_boundary(self._recording, self._report, boundary)
        counts = sorted({int(m[1]) for m in map(_STEPS.fullmatch, self._recording) if m})
        if not counts:
            self._report.note(f"{self._recording.name}: no denoising steps are recorded")
        for steps in counts:
            for boundary in self._step_boundaries(steps):
                run_boundary(self._recording, self._report, boundary)
            self._decoding(steps)
        self._end_to_end(counts)
        for name in self._recording.unused:
            self._report.note(
                f"{self._recording.name}: the array {name} is recorded, but no boundary is known "
                "under this name; it is not compared"
            )

    # Images, prompt and state: the robot's code.

    def _image_boundaries(self) -> list[Boundary]:
        chain = self.processor.image_chain

        def evaluate(*frames: Array) -> Array:
            return np.stack([evaluation_image(frame, chain) for frame in frames])

        def resize(images: Array) -> Array:
            return np.stack([network_image(image) for image in images])

        frames = tuple(f"image.{camera}" for camera in self.processor.cameras)
        return [
            Boundary("eval_images", frames, evaluate, Rule.IMAGE),
            Boundary(
                "pixel_values",
                ("eval_images",),
                resize,
                Rule.IMAGE,
                "network image",
                lambda values: np.rint(levels(values)).transpose(0, 2, 3, 1),
            ),
            Boundary(
                "pixel_values",
                frames,
                lambda *given: levels(pixel_values(given, chain)),
                Rule.IMAGE,
                transform=levels,
            ),
        ]

    def _prompt_boundaries(self) -> list[Boundary]:
        processor, observation = self.processor, self.observation
        tokens = self._chain.tokens_per_image(processor, observation)
        wanted = processor.formalize_language

        def expanded(instruction: Array) -> str:
            return prompt_text(str(instruction), tokens, wanted)

        def state(*_: Array) -> Array:
            return normalize_state(processor, observation.state)[:, None]

        def prompt(_: Array) -> tuple[Array, Array]:
            return self._chain.prompt(processor, observation)

        text = ("instruction",)
        states = tuple(f"state.{key.key}" for key in processor.state_keys)
        return [
            Boundary(
                "formalized",
                text,
                lambda given: formalize(str(given)) if wanted else str(given),
                Rule.EXACT,
            ),
            Boundary("expanded_text", text, expanded, Rule.EXACT),
            Boundary(
                "chat_text",
                text,
                lambda given: _IMAGE_BLOCK.sub(r"<image-\1>", expanded(given)),
                Rule.EXACT,
            ),
            Boundary("input_ids", text, lambda given: prompt(given)[0], Rule.EXACT),
            Boundary("attention_mask", text, lambda given: prompt(given)[1], Rule.EXACT),
            Boundary("normalized_state", states, state),
        ]

    # Vision tower and connector. Recorded features run over all images in one row.

    def _vision_boundaries(self) -> list[Boundary]:
        vision = self._model.backbone.vision
        layers: nn.ModuleList = vision.vision_model.encoder.layers
        grids = "spatial_shapes"
        boundaries = [
            Boundary(grids, ("pixel_values",), lambda v: _grids(vision, v), Rule.EXACT),
        ]
        previous = "dbg_vision_embeddings_windoworder"
        if previous in self._recording:
            boundaries.append(Boundary(previous, ("pixel_values", grids), self._vision_embeddings))
        for index in self._numbered("dbg_vision_layer", len(layers), "_windoworder"):
            name = f"dbg_vision_layer{index}_windoworder"
            boundaries.append(
                Boundary(name, (previous, grids), self._windowed_layer(layers[index]))
            )
            previous = name
        unshuffled = "pixel_unshuffled"
        features = "vision_last_hidden_state"
        connector = self._model.backbone.connector
        boundaries += [
            Boundary(features, ("pixel_values",), lambda v: vision(tensor(v)).flatten(0, 1)[None]),
            Boundary(unshuffled, (features, grids), _unshuffle),
        ]
        if unshuffled in self._recording:
            boundaries.append(Boundary("mlp1_out", (unshuffled,), lambda v: connector(tensor(v))))
        else:
            boundaries.append(
                Boundary("mlp1_out", (features, grids), lambda v, g: connector(_unshuffle(v, g)))
            )
        return boundaries

    def _vision_embeddings(self, values: Array, grids: Array) -> Tensor:
        vision = self._model.backbone.vision
        position = vision.position_embedding(*vision.patch_grid(tensor(values)))
        embedded = vision.embed(tensor(values), position).flatten(0, 1)
        return embedded[window_order(grids, self._chain.window_size)][None]

    def _windowed_layer(self, layer: nn.Module) -> Callable[[Array, Array], Tensor]:
        def compute(features: Array, grids: Array) -> Tensor:
            order = window_order(grids, self._chain.window_size)
            rows = torch.empty_like(tensor(features)[0])
            rows[order] = tensor(features)[0]
            result: Tensor = layer(rows.reshape(len(grids), -1, rows.shape[-1]), None)
            return result.flatten(0, 1)[order][None]

        return compute

    # Language model.

    def _language_boundaries(self) -> list[Boundary]:
        backbone = self._model.backbone
        language = backbone.language
        layers: nn.ModuleList = language.model.layers

        def layer_of(index: int) -> Callable[[Array, Array], Tensor]:
            layer = layers[index]

            def compute(hidden: Array, mask: Array) -> Tensor:
                states = tensor(hidden)
                positions = torch.arange(states.shape[1])[None]
                result: Tensor = layer(
                    states,
                    attention_mask=language.attention_bias(tensor(mask), states.dtype),
                    position_embeddings=language.model.rotary_emb(states, positions),
                )
                return result

            return compute

        boundaries = [
            Boundary(
                "inputs_embeds",
                ("input_ids", "mlp1_out"),
                lambda ids, features: backbone.embed(tensor(ids), tensor(features)),
            )
        ]
        previous = "inputs_embeds"
        for index in self._numbered("dbg_llm_layer", len(layers)):
            name = f"dbg_llm_layer{index}"
            boundaries.append(Boundary(name, (previous, "attention_mask"), layer_of(index)))
            previous = name
        return [
            *boundaries,
            Boundary(
                "backbone_features",
                ("inputs_embeds", "attention_mask"),
                lambda embeds, mask: language(tensor(embeds), tensor(mask)),
            ),
            Boundary(
                "backbone_features",
                ("input_ids", "attention_mask", "pixel_values"),
                lambda *given: backbone(*map(tensor, given))[0],
                label="backbone_features (whole backbone)",
            ),
            Boundary(
                "backbone_attention_mask", ("attention_mask",), lambda mask: mask == 1, Rule.EXACT
            ),
            Boundary(
                "image_mask",
                ("input_ids",),
                lambda ids: ids == backbone.image_token_id,
                Rule.EXACT,
            ),
        ]

    # Action head.

    def _rows(self, batch: int) -> Tensor:
        return torch.full((batch,), self.processor.embodiment_id, dtype=torch.int64)

    def _head_boundaries(self) -> list[Boundary]:
        head = self._model.action_head

        def state_token(state: Array) -> Tensor:
            result: Tensor = head.state_encoder(tensor(state), self._rows(len(state)))
            return result

        return [
            Boundary(
                "embodiment_id",
                (),
                lambda: np.array([self.processor.embodiment_id]),
                Rule.EXACT,
            ),
            Boundary("vlln_out", ("backbone_features",), lambda v: head.vlln(tensor(v))),
            Boundary("state_features", ("normalized_state",), state_token),
        ]

    def _step_boundaries(self, steps: int) -> list[Boundary]:
        """List what was recorded at each of N Euler steps; the first axis runs over the steps."""
        head = self._model.action_head
        buckets = self._model.config.timestep_buckets
        dit = head.model

        def name(part: str) -> str:
            return f"n{steps}.{part}"

        def times(x_t: Array) -> Array:
            schedule = [time_bucket(step, steps, buckets) for step in range(steps)]
            return np.repeat(np.array(schedule)[:, None], x_t.shape[1], axis=1)

        def encode(x_t: Array, timestep: Array) -> Tensor:
            rows = self._rows(x_t.shape[1])
            return _each(lambda x, t: head.action_encoder(x, t, rows), x_t, timestep)

        def join(state_features: Array, features: Array) -> Tensor:
            state = tensor(state_features)
            return _each(lambda action: head.join_tokens(state, action), features)

        def run_dit(tokens: Array, timestep: Array, *context: Array) -> Tensor:
            features, image_mask, valid = map(tensor, context)
            return _each(lambda x, t: dit(x, features, t, image_mask, valid), tokens, timestep)

        def decode(output: Array) -> Tensor:
            rows = self._rows(output.shape[1])
            return _each(lambda x: head.decode_velocity(x, rows), output)

        def loop(noise: Array, state_features: Array, *context: Array) -> Tensor:
            features, image_mask, valid = map(tensor, context)
            return head.denoise(
                features,
                tensor(state_features),
                tensor(noise),
                image_mask,
                valid,
                self._rows(len(noise)),
                steps,
            )

        context = ("vlln_out", "image_mask", "backbone_attention_mask")
        x_t, timestep, velocity = name("x_t"), name("timestep"), name("velocity")
        boundaries = [
            Boundary(timestep, (x_t,), times, Rule.EXACT),
            Boundary(name("action_features"), (x_t, timestep), encode),
            Boundary(name("sa_embs"), ("state_features", name("action_features")), join),
        ]
        # Recorded with one of the step counts; its number of steps tells with which.
        time_embedding = "dbg_temb"
        if time_embedding in self._recording and len(self._recording[time_embedding]) == steps:
            boundaries += self._dit_debug_boundaries(name("sa_embs"), timestep, context)
        return [
            *boundaries,
            Boundary(name("dit_out"), (name("sa_embs"), timestep, *context), run_dit),
            Boundary(velocity, (name("dit_out"),), decode),
            Boundary(
                x_t,
                ("noise", velocity),
                lambda noise, v: np.concatenate(
                    [noise[None], noise + np.cumsum(v[:-1], axis=0) / steps]
                ),
            ),
            Boundary(
                name("action_pred"),
                (x_t, velocity),
                lambda x, v: x[-1] + v[-1] / steps,
                label=name("action_pred (last step)"),
            ),
            Boundary(
                name("action_pred"),
                ("noise", "state_features", *context),
                loop,
                label=name("action_pred (denoising loop)"),
            ),
        ]

    def _dit_debug_boundaries(
        self, tokens: str, timestep: str, context: tuple[str, ...]
    ) -> list[Boundary]:
        dit = self._model.action_head.model

        def block_of(index: int) -> Callable[..., Tensor]:
            def compute(x: Array, time: Array, *given: Array) -> Tensor:
                features, image_mask, valid = map(tensor, given)
                biases = dit.attention_biases(image_mask, valid, features.dtype)
                return _each(lambda a, t: dit.run_block(index, a, t, features, biases), x, time)

            return compute

        boundaries = [Boundary("dbg_temb", (timestep,), lambda t: _each(dit.timestep_encoder, t))]
        previous = tokens
        for index in self._numbered("dbg_dit_block", len(dit.transformer_blocks)):
            name = f"dbg_dit_block{index}"
            boundaries.append(Boundary(name, (previous, "dbg_temb", *context), block_of(index)))
            previous = name
        return boundaries

    # Decoded actions.

    def _decoding(self, steps: int) -> None:
        name = f"n{steps}.action_pred"
        if name in self._recording:
            self._compare_decoded(steps, self._recording[name][0], name)

    def _compare_decoded(self, steps: int, prediction: Array, source: str) -> None:
        recording, report = self._recording, self._report
        state = self.observation.state
        for kind, decode in (
            ("decoded", decode_actions),
            ("decoded64", decode_actions_float64),
        ):
            recorded = recording.with_prefix(f"n{steps}.{kind}.")
            try:
                decoded: Mapping[str, Array] = decode(self.processor, prediction, state)
            except GrootError as error:
                report.fail(recording.name, f"n{steps}.{kind}", source, str(error))
                continue
            for key in sorted(set(decoded) ^ set(recorded)):
                where = "recorded" if key in decoded else "an action key of the processor"
                report.note(
                    f"{recording.name}: n{steps}.{kind}.{key} is not compared, it is not {where}"
                )
            for key in [key for key in decoded if key in recorded]:
                report.add(
                    recording.name,
                    f"n{steps}.{kind}.{key}",
                    source,
                    Rule.RELATIVE,
                    decoded[key][None],
                    recorded[key],
                )

    # The whole policy.

    def _end_to_end(self, counts: list[int]) -> None:
        recording, report = self._recording, self._report
        inputs = self._chain.inputs(self.processor, self.observation)
        if "backbone_features" in recording:
            with torch.no_grad():
                features = self._model.backbone(
                    inputs.input_ids, inputs.attention_mask, inputs.pixel_values
                )[0]
            report.add(
                recording.name,
                "backbone_features (end to end)",
                _END_TO_END,
                Rule.RELATIVE,
                features.numpy(),
                recording["backbone_features"],
            )
        if "noise" not in recording:
            report.note(f"{recording.name}: nothing is compared end to end, noise is not recorded")
            return
        noise = tensor(recording["noise"])
        for steps in counts:
            name = f"n{steps}.action_pred"
            if name not in recording:
                continue
            prediction = self._model.get_action(inputs, noise, steps).numpy()
            report.add(
                recording.name,
                f"{name} (end to end)",
                f"{_END_TO_END}, noise",
                Rule.RELATIVE,
                prediction,
                recording[name],
            )
            self._compare_decoded(steps, prediction[0], f"{_END_TO_END}, noise")

    def _numbered(self, prefix: str, count: int, suffix: str = "") -> list[int]:
        """Return which of the model's layers are recorded."""
        return [index for index in range(count) if f"{prefix}{index}{suffix}" in self._recording]


def _each(compute: Callable[..., Tensor], *arrays: Array) -> Tensor:
    """Compute each denoising step on its own and stack the results again."""
    return torch.stack([compute(*map(tensor, step)) for step in zip(*arrays, strict=True)])


def _grids(vision: VisionTower, values: Array) -> Array:
    return np.array([vision.patch_grid(tensor(values))] * len(values), dtype=np.int64)


def _unshuffle(features: Array, grids: Array) -> Tensor:
    rows, columns = (int(side) for side in grids[0])
    images = tensor(features).reshape(len(grids), rows * columns, -1)
    return pixel_unshuffle(images, rows, columns).flatten(0, 1)[None]
