"""From an observation to the network's input tensors: images, prompt and state.

Owns: the image chain, the prompt and its tokens, the state normalisation. Must not import torch,
transformers or ROS: robot, calibration and evaluation run this one copy, so none can drift.

Sources: the public Isaac-GR00T processor (commit e29d8fc), its Eagle-Block2A-2B-v2 processor and
the albumentations transforms it uses. Images and token ids agree with them exactly.

The network's resize is done as two one-axis resizes, width first. Pillow up to 12 works in that
order inside one call; Pillow 13 sometimes takes the height first, and because the intermediate
image is rounded to 8 bits, the order changes the result.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import ArrayLike
from PIL import Image
from tokenizers import Tokenizer

from groot_int8_ros.errors import ObservationError, ProcessorError
from groot_int8_ros.policy.image_sizes import ImageSizes, image_sizes, network_side
from groot_int8_ros.policy.processor import ImageChain, Processor, StateKey
from groot_int8_ros.policy.types import (
    CameraSpec,
    Float32Array,
    Int64Array,
    Observation,
    UInt8Array,
)

MAX_INSTRUCTION_CHARACTERS = 1000

_IM_START = "<|im_start|>"
_IM_END = "<|im_end|>"
_IMAGE_START = "<img>"
_IMAGE_TOKEN = "<IMG_CONTEXT>"
_IMAGE_END = "</img>"
_PAD = "<|endoftext|>"

_CACHED_INSTRUCTIONS = 32
# As many instructions as a robot is told, banks included, at 10 kB each. A prompt beyond these
# takes reading the tokenizer again.
_CACHED_PROMPTS = 256

# np.isclose's defaults, with which the public code tells a constant joint.
_CONSTANT_ABSOLUTE = 1e-8
_CONSTANT_RELATIVE = 1e-5

_NOT_A_WORD = re.compile(r"[^\w\s]")
_MEDIA_PLACEHOLDER = re.compile(r"<(?:image|video)-\d+>")


@dataclass(frozen=True, eq=False)
class ModelInputs:
    """The network's inputs for one observation.

    Attributes:
        pixel_values: float32 (cameras, 3, H, W) in [-1, 1].
        input_ids: Token ids, int64 (1, S).
        attention_mask: Ones, int64 (1, S).
        state: Normalised state, float32 (1, max_state_dim).
    """

    pixel_values: Float32Array
    input_ids: Int64Array
    attention_mask: Int64Array
    state: Float32Array


def _resized_area(image: UInt8Array, size: tuple[int, int]) -> UInt8Array:
    if image.shape[:2] == size:
        return image
    resized = cv2.resize(image, (size[1], size[0]), interpolation=cv2.INTER_AREA)
    return np.asarray(resized, dtype=np.uint8)


def evaluation_image(frame: UInt8Array, chain: ImageChain) -> UInt8Array:
    """Scale, crop and scale a frame as the public evaluation transform does.

    Args:
        frame: RGB, uint8, shape (height, width, 3).
        chain: Scaling and cropping.

    Returns:
        RGB, uint8, shape `image_sizes(...).evaluation` + (3,). It may share memory with `frame`
        where no stage changes the size.

    Raises:
        ProcessorError: As `image_sizes`.
    """
    return _evaluation_image(frame, image_sizes(frame.shape[0], frame.shape[1], chain))


def _evaluation_image(frame: UInt8Array, sizes: ImageSizes) -> UInt8Array:
    resized = _resized_area(frame, sizes.resized)
    height, width = sizes.cropped
    top = (sizes.resized[0] - height) // 2
    left = (sizes.resized[1] - width) // 2
    return _resized_area(resized[top : top + height, left : left + width], sizes.evaluation)


def network_image(evaluation: UInt8Array) -> UInt8Array:
    """Resize an evaluation image to whole tokens, antialiased bicubic, width before height.

    Args:
        evaluation: RGB, uint8, shape (height, width, 3).

    Returns:
        RGB, uint8, both sides multiples of 28 pixels.
    """
    height, width = network_side(evaluation.shape[0]), network_side(evaluation.shape[1])
    image = Image.fromarray(evaluation)
    if image.width != width:
        image = image.resize((width, image.height), Image.Resampling.BICUBIC)
    if image.height != height:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image)


def pixel_values(frames: Sequence[UInt8Array], chain: ImageChain) -> Float32Array:
    """Run the whole image chain.

    Args:
        frames: One RGB frame per camera, uint8, shape (height, width, 3) each. Sizes may differ as
            long as all give the same network size.
        chain: Scaling and cropping.

    Returns:
        float32 (N, 3, H, W), (v - 127.5) / 127.5.

    Raises:
        ProcessorError: As `image_sizes`, or the frames end at different network sizes.
    """
    sizes = [image_sizes(frame.shape[0], frame.shape[1], chain) for frame in frames]
    _require_one_network_size(
        (f"frame {index}", frame.shape[0], frame.shape[1], size)
        for index, (frame, size) in enumerate(zip(frames, sizes, strict=True))
    )
    return _pixel_values(frames, sizes)


def _pixel_values(frames: Sequence[UInt8Array], sizes: Sequence[ImageSizes]) -> Float32Array:
    half_range = np.float32(127.5)
    values = np.empty((len(frames), 3, *sizes[0].network), dtype=np.float32)
    for out, frame, size in zip(values, frames, sizes, strict=True):
        out[...] = network_image(_evaluation_image(frame, size)).transpose(2, 0, 1)
    values -= half_range
    values /= half_range
    return values


def _require_one_network_size(
    cameras: Iterable[tuple[str, int, int, ImageSizes]],
) -> None:
    listed = list(cameras)
    if not listed:
        raise ProcessorError("no camera is given: the policy needs at least one.")
    if len({sizes.network for *_, sizes in listed}) > 1:
        found = "; ".join(
            f"{name} {height}x{width} becomes {sizes.network[0]}x{sizes.network[1]}"
            for name, height, width, sizes in listed
        )
        raise ProcessorError(
            f"all cameras must reach the network at one size (height x width), but {found}. "
            "Choose camera resolutions of one aspect ratio."
        )


def formalize(instruction: str) -> str:
    """Lower-case an instruction and drop all that is neither word character nor white space.

    White space stays as it is. Combining marks are dropped too, as in training: a decomposed
    accent disappears while a composed one stays.
    """
    return _NOT_A_WORD.sub("", instruction.lower())


def task_text(instruction: str, formalized: bool) -> str:
    """Return an instruction as the policy is told it; two that differ in case may be one.

    Args:
        instruction: The task as the user gave it.
        formalized: Whether it is formalized: the processor's `formalize_language`.
    """
    return formalize(instruction) if formalized else instruction


def prompt_text(instruction: str, tokens_per_image: Sequence[int], formalize: bool) -> str:
    """Return the whole string that is tokenised.

    Args:
        instruction: The task as the user gave it.
        tokens_per_image: Number of image tokens of each camera, in order.
        formalize: Whether the instruction is formalized: the processor's `formalize_language`.

    Returns:
        System message, user message with the instruction and then the image blocks.
    """
    images = "".join(
        f"<image {number}>{_IMAGE_START}{_IMAGE_TOKEN * tokens}{_IMAGE_END}"
        for number, tokens in enumerate(tokens_per_image, start=1)
    )
    return (
        f"{_IM_START}system\nYou are a helpful assistant.{_IM_END}\n"
        f"{_IM_START}user\n{task_text(instruction, formalize)}{images}{_IM_END}\n"
    )


def _read_tokenizer(path: Path) -> tuple[Tokenizer, str]:
    """Read `tokenizer.json`, with the SHA-256 of what was read."""
    if not path.is_file():
        raise ProcessorError(
            f"{path} is missing. Without it the instruction cannot be converted. Copy "
            "tokenizer.json from the Eagle-Block2A-2B-v2 folder of the training code."
        )
    try:
        content = path.read_bytes()
        return Tokenizer.from_buffer(content), hashlib.sha256(content).hexdigest()
    except (KeyboardInterrupt, SystemExit):
        raise
    # The library raises plain Exception, and a panic of its Rust code is not even that.
    except BaseException as error:
        raise ProcessorError(
            f"{path} is not a tokenizer ({error}). It is damaged or cut short: copy it again."
        ) from error


def _return_freed_memory() -> None:
    # What the tokenizer leaves are freed blocks between others, which glibc keeps for later use
    # unless it is told. Other C libraries have no such call.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class PromptTokenizer:
    """Turns instructions into token ids.

    A formalized instruction cannot spell a special token: the brackets are gone. In a raw one
    the public code would take `<|im_end|>` or `<img>` inside it as that token, and would put a
    second image block in place of `<image-1>`. No training data means that, and a network input
    of another structure than the engine's would follow, so such an instruction is refused.

    Attributes:
        image_token_id: Id of the token that image features replace.
        pad_token_id: Id that fills a batch on the left, with attention mask 0.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        max_instruction_characters: int = MAX_INSTRUCTION_CHARACTERS,
    ) -> None:
        """Take over a tokenizer; its truncation and padding are switched off.

        Args:
            tokenizer: The checkpoint's tokenizer.
            max_instruction_characters: Longer instructions are refused.

        Raises:
            ProcessorError: The tokenizer lacks a special token that the prompt is made of.
        """
        self._tokenizer: Tokenizer | None = _whole(tokenizer)
        self._path: Path | None = None
        self._sha256 = ""
        self._ids = lru_cache(maxsize=_CACHED_PROMPTS)(self._tokenize)
        self._max_characters = max_instruction_characters
        added = {
            token.content: token_id
            for token_id, token in tokenizer.get_added_tokens_decoder().items()
        }
        needed = (_IM_START, _IM_END, _IMAGE_START, _IMAGE_TOKEN, _IMAGE_END, _PAD)
        missing = [token for token in needed if token not in added]
        if missing:
            raise ProcessorError(
                f"the tokenizer has no special token {', '.join(missing)}: it is not the one of "
                "GR00T N1.6, and its ids would mean other words. Use tokenizer.json of the "
                "Eagle-Block2A-2B-v2 folder in the training code."
            )
        self._added = added
        self._added_ids = frozenset(added.values())
        self.image_token_id: int = added[_IMAGE_TOKEN]
        self.pad_token_id: int = added[_PAD]

    @classmethod
    def from_file(
        cls,
        path: Path,
        *,
        max_instruction_characters: int = MAX_INSTRUCTION_CHARACTERS,
    ) -> PromptTokenizer:
        """Read `tokenizer.json`.

        Args:
            path: The file.
            max_instruction_characters: Longer instructions are refused.

        Returns:
            The tokenizer.

        Raises:
            ProcessorError: The file is missing, damaged or of another model.
        """
        tokenizer, sha256 = _read_tokenizer(path)
        made = cls(tokenizer, max_instruction_characters=max_instruction_characters)
        made._path, made._sha256 = path, sha256
        return made

    def release(self) -> None:
        """Free the tokenizer itself, which holds some 100 MB; it must come from a file.

        The prompts encoded last stay known. A new one is encoded by reading the file again, which
        takes half a second, and freeing it again.
        """
        if self._path is None:
            raise RuntimeError("a tokenizer that is not from a file cannot be read again")
        self._tokenizer = None
        _return_freed_memory()

    def encode(
        self, instruction: str, tokens_per_image: Sequence[int], *, formalize: bool
    ) -> tuple[Int64Array, Int64Array]:
        """Return the token ids of the whole prompt.

        Args:
            instruction: The task as the user gave it.
            tokens_per_image: Number of image tokens of each camera, in order.
            formalize: The processor's `formalize_language`.

        Returns:
            `input_ids` and `attention_mask`, int64 (1, S) each; the mask is all ones.

        Raises:
            ObservationError: The instruction is empty, too long, not valid text or spells special
                tokens.
        """
        self._check_instruction(instruction, formalize)
        ids = self.encode_prompt(prompt_text(instruction, tokens_per_image, formalize))
        self._check_structure(ids, tokens_per_image)
        return ids, np.ones_like(ids)

    def encode_prompt(self, prompt: str) -> Int64Array:
        """Return the ids of a complete prompt, int64 (1, S), without any check of its text.

        Raises:
            ObservationError: The tokenizer was released, the prompt is new, and the file is not
                the one any more that was read.
        """
        return self._ids(prompt).copy()

    def _tokenize(self, prompt: str) -> Int64Array:
        if self._tokenizer is not None:
            return _token_ids(self._tokenizer, prompt)
        ids = _token_ids(self._read_again(), prompt)
        _return_freed_memory()
        return ids

    def _read_again(self) -> Tokenizer:
        assert self._path is not None
        try:
            tokenizer, sha256 = _read_tokenizer(self._path)
        except ProcessorError as error:
            raise ObservationError(
                f"the instruction is new, and to convert it the tokenizer is needed: {error}"
            ) from error
        if sha256 != self._sha256:
            raise ObservationError(
                f"the instruction is new, and {self._path} was changed since the policy was "
                "loaded: it could mean other words. Load the policy again."
            )
        return _whole(tokenizer)

    def _check_instruction(self, instruction: str, formalized: bool) -> None:
        if len(instruction) > self._max_characters:
            raise ObservationError(
                f"the instruction has {len(instruction)} characters, more than the "
                f"{self._max_characters} allowed: every token costs memory and time. Shorten it "
                "to the sentence that the policy was trained with."
            )
        task = task_text(instruction, formalized)
        if not task.strip():
            raise ObservationError(
                f"the instruction {instruction!r} is empty"
                + (" once punctuation and symbols are dropped" if instruction.strip() else "")
                + ". The policy would act without a task. Send the sentence it was trained with."
            )
        try:
            task.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ObservationError(
                f"the instruction holds half a surrogate pair at character {error.start}, which "
                "is no text. Send it as valid UTF-8."
            ) from error
        placeholder = _MEDIA_PLACEHOLDER.search(task)
        if placeholder:
            raise _spells_special_text(placeholder.group())

    def _check_structure(self, ids: Int64Array, tokens_per_image: Sequence[int]) -> None:
        expected = [_IM_START, _IM_END, _IM_START]
        for tokens in tokens_per_image:
            expected += [_IMAGE_START, *[_IMAGE_TOKEN] * tokens, _IMAGE_END]
        expected.append(_IM_END)
        found = [token_id for token_id in ids[0].tolist() if token_id in self._added_ids]
        if found != [self._added[token] for token in expected]:
            names = {token_id: token for token, token_id in self._added.items()}
            surplus = sorted({names[i] for i in found} - set(expected))
            raise _spells_special_text(", ".join(surplus) or "one of the prompt's own")


def _whole(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _token_ids(tokenizer: Tokenizer, prompt: str) -> Int64Array:
    return np.array([tokenizer.encode(prompt, add_special_tokens=False).ids], dtype=np.int64)


def _spells_special_text(text: str) -> ObservationError:
    return ObservationError(
        f"the instruction spells special text of the prompt ({text}), which would change the "
        "network's input beyond its words. Send plain words without such brackets."
    )


def state_vector(state: Mapping[str, ArrayLike], key: str, dim: int) -> Float32Array:
    """Return one state key's raw values, checked.

    Args:
        state: Raw state, shape (D,) per key.
        key: The key.
        dim: Its D.

    Returns:
        float32 (D,).

    Raises:
        ObservationError: The key is missing, of another shape, not numeric or not finite.
    """
    if key not in state:
        raise ObservationError(
            f"the observation has no state '{key}' (it has {', '.join(state) or 'none'}). Map the "
            "robot's joints to every state key of the policy."
        )
    raw = np.asarray(state[key])
    if raw.dtype.kind not in "fiu":
        raise ObservationError(
            f"state '{key}' holds {raw.dtype} instead of numbers. Send one number per joint."
        )
    if raw.shape != (dim,):
        raise ObservationError(
            f"state '{key}' has shape {raw.shape}, the policy was trained with ({dim},). Map "
            f"exactly {dim} joints to it, in the order of the training data."
        )
    with np.errstate(over="ignore"):
        values = raw.astype(np.float32)
    finite = np.isfinite(values)
    if not finite.all():
        joint = int(np.argmin(finite))
        raise ObservationError(
            f"state '{key}' is {values[joint]} at joint index {joint}. Nothing is computed from "
            "it. Check that joint's sensor and its driver."
        )
    return values


def normalize_state(processor: Processor, state: Mapping[str, ArrayLike]) -> Float32Array:
    """Encode, concatenate and pad the raw state.

    Args:
        processor: The embodiment's conventions.
        state: Raw state in physical units, shape (D,) per key. Other keys are ignored.

    Returns:
        float32 (1, max_state_dim), zero beyond the encoded values.

    Raises:
        ObservationError: A key is missing, misshapen or not finite.
    """
    encoded = np.zeros((1, processor.max_state_dim), dtype=np.float32)
    start = 0
    for key in processor.state_keys:
        values = _encode_state(
            key, state_vector(state, key.key, key.dim), clip=processor.clip_outliers
        )
        finite = np.isfinite(values)
        if not finite.all():
            joint = int(np.argmin(finite)) % key.dim
            raise ObservationError(
                f"state '{key.key}' at joint index {joint} lies so far from the training data "
                "that its normalised value overflows. Check that joint's unit and sensor."
            )
        encoded[0, start : start + key.encoded_dim] = values
        start += key.encoded_dim
    return encoded


def _encode_state(key: StateKey, values: Float32Array, *, clip: bool) -> Float32Array:
    """Encode one key; float64 only where the public code has float64, to agree to the bit."""
    if key.encoding == "sin_cos":
        return np.concatenate([np.sin(values), np.cos(values)])
    if key.encoding == "mean_std":
        assert key.mean is not None
        assert key.std is not None
        varies = key.std != 0.0
        with np.errstate(over="ignore"):
            scaled = ((values - key.mean) / np.where(varies, key.std, 1.0)).astype(np.float32)
        return np.where(varies, scaled, values)
    assert key.low is not None
    assert key.high is not None
    span = key.high - key.low
    varies = span > _CONSTANT_ABSOLUTE + _CONSTANT_RELATIVE * np.abs(key.low)
    with np.errstate(over="ignore"):
        unit = ((values - key.low) / np.where(varies, span, 1.0)).astype(np.float32)
        scaled = np.float32(2.0) * unit - np.float32(1.0)
    scaled = np.where(varies, scaled, np.float32(0.0))
    return np.clip(scaled, -1.0, 1.0) if clip else scaled


class Preprocessor:
    """Turns observations of one robot into network inputs."""

    def __init__(
        self, processor: Processor, tokenizer: PromptTokenizer, cameras: Sequence[CameraSpec]
    ) -> None:
        """Fix cameras and sizes.

        Args:
            processor: The embodiment's conventions.
            tokenizer: The checkpoint's tokenizer.
            cameras: Each of the processor's cameras once, with the size it was exported for.

        Raises:
            ProcessorError: The cameras are not the processor's, or reach the network at different
                sizes.
        """
        by_key = {camera.key: camera for camera in cameras}
        if len(by_key) != len(cameras) or set(by_key) != set(processor.cameras):
            raise ProcessorError(
                f"the cameras given are {', '.join(c.key for c in cameras) or 'none'}; embodiment "
                f"'{processor.embodiment_tag}' was trained with {', '.join(processor.cameras)}. "
                "Name each of these once, with its frame size."
            )
        self._processor = processor
        self.cameras: tuple[CameraSpec, ...] = tuple(by_key[key] for key in processor.cameras)
        self._tokenizer = tokenizer
        self.image_token_id = tokenizer.image_token_id
        self._sizes = tuple(
            image_sizes(camera.height, camera.width, processor.image_chain)
            for camera in self.cameras
        )
        _require_one_network_size(
            (f"camera '{camera.key}'", camera.height, camera.width, sizes)
            for camera, sizes in zip(self.cameras, self._sizes, strict=True)
        )
        self.tokens_per_image: tuple[int, ...] = tuple(sizes.tokens for sizes in self._sizes)

        def encode(instruction: str) -> tuple[Int64Array, Int64Array]:
            return tokenizer.encode(
                instruction, self.tokens_per_image, formalize=processor.formalize_language
            )

        self._encode = lru_cache(maxsize=_CACHED_INSTRUCTIONS)(encode)

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width of the network's images in pixels."""
        return self._sizes[0].network

    def prompt_ids(self, instruction: str) -> Int64Array:
        """Return the token ids of the whole prompt, int64 (S,).

        Raises:
            ObservationError: The instruction cannot be used.
        """
        ids: Int64Array = self._encode(instruction)[0][0].copy()
        return ids

    def check_instruction(self, instruction: str) -> None:
        """Raise `ObservationError` if an instruction cannot be used."""
        self._encode(instruction)

    def release_tokenizer(self) -> None:
        """Free the tokenizer until an instruction comes that is new; see `PromptTokenizer`."""
        self._tokenizer.release()

    def frames(self, images: Mapping[str, UInt8Array]) -> list[UInt8Array]:
        """Return the frames in the order of the cameras, checked and not copied.

        Args:
            images: Camera key to RGB frame, uint8 (height, width, 3).

        Raises:
            ObservationError: A frame is missing, or of another type or size.
        """
        return [self._frame(images, camera) for camera in self.cameras]

    def __call__(self, observation: Observation) -> ModelInputs:
        """Convert one observation for graphs that take pixel values and token ids.

        Args:
            observation: Frames of every camera, raw state and instruction.

        Returns:
            The network's inputs. The arrays belong to the caller.

        Raises:
            ObservationError: A frame, a state key or the instruction cannot be used; the message
                names it.
        """
        state = normalize_state(self._processor, observation.state)
        input_ids, attention_mask = self._encode(observation.instruction)
        return ModelInputs(
            pixel_values=_pixel_values(self.frames(observation.images), self._sizes),
            input_ids=input_ids.copy(),
            attention_mask=attention_mask.copy(),
            state=state,
        )

    def _frame(self, images: Mapping[str, UInt8Array], camera: CameraSpec) -> UInt8Array:
        if camera.key not in images:
            raise ObservationError(
                f"the observation has no frame of camera '{camera.key}' (it has "
                f"{', '.join(images) or 'none'}). Check that camera's topic and driver."
            )
        frame = images[camera.key]
        if frame.dtype != np.uint8:
            raise ObservationError(
                f"camera '{camera.key}' gives {frame.dtype} frames; the policy takes 8-bit RGB "
                "(uint8). Convert them before."
            )
        if frame.ndim != 3 or frame.shape[2] != 3:
            raise ObservationError(
                f"camera '{camera.key}' gives frames of shape {frame.shape}; the policy takes "
                "(height, width, 3) in RGB. Convert them before."
            )
        if frame.shape[:2] != (camera.height, camera.width):
            raise ObservationError(
                f"camera '{camera.key}' gives frames of {frame.shape[0]}x{frame.shape[1]} (height "
                f"x width), the bundle was exported for {camera.height}x{camera.width}. Set the "
                "camera to that resolution, or export again for the new one: groot-int8 export "
                "with --robot or --dataset that say so."
            )
        return frame
