"""The instructions whose prefix was computed beforehand, and what each hands to the graphs.

Owns: `PromptPrefix` and its file, `PromptBank`, and the bank's entry of the manifest. Must not
import torch, ROS or an engine.

Text comes first in the prompt and the language model is causal, so keys and values of all tokens
before the first image token depend on the instruction alone (`token_layout`). They are computed
once, in float32, and stand in `prompts/<16 hexadecimal digits>.npz` of the bundle, one file an
instruction, named after its token ids. The graphs have room for P tokens; a shorter prefix is
padded on the left and a mask tells which places are real.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from groot_int8_ros.errors import BundleError, ObservationError, UnknownInstructionError
from groot_int8_ros.policy.engines.base import TensorSpec
from groot_int8_ros.policy.families import LANGUAGE_PREFIX, PREFIX_MASK, TEXT_PREFIX, TOKEN_AXIS
from groot_int8_ros.policy.npz import read_npz
from groot_int8_ros.policy.token_layout import padded_left
from groot_int8_ros.policy.types import Float32Array, Int64Array

PROMPT_FOLDER = "prompts"

# Padded prefixes that are kept in memory, a few megabytes each at true size: those that can be
# read again, and those that took a run of the prefix model.
_KEPT_OF_FILES = 8
_KEPT_COMPUTED = 32

_TENSORS = (*LANGUAGE_PREFIX, *TEXT_PREFIX)


@dataclass(frozen=True)
class PromptRecord:
    """One instruction of the bank.

    Attributes:
        text: As the user gave it to the export.
        file: Path inside the bundle.
        tokens: Number of its prefix's tokens.
    """

    text: str
    file: str
    tokens: int


@dataclass(frozen=True)
class PromptRecords:
    """The bank's entry of the manifest.

    Attributes:
        length: P, the room for a prefix in tokens.
        instructions: What is in the bank; may be empty where the bundle has a prefix model.
    """

    length: int
    instructions: tuple[PromptRecord, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the entry as it stands in the manifest."""
        return {
            "length": self.length,
            "instructions": [vars(record) for record in self.instructions],
        }


def parse_prompts(content: Mapping[str, Any]) -> PromptRecords:
    """Read the bank's entry of a manifest.

    Raises:
        KeyError, TypeError, ValueError: An entry is missing, of another type or not allowed.
    """
    length = _count(content["length"])
    instructions = []
    for entry in content["instructions"]:
        text, file = entry["text"], entry["file"]
        if not isinstance(text, str) or not isinstance(file, str):
            raise TypeError(f"the instruction {text!r:.80} in {file!r:.80} is no text in a file")
        record = PromptRecord(text, file, _count(entry["tokens"]))
        if record.tokens > length:
            raise ValueError(f"{record.tokens} tokens of {text!r:.80} do not fit into {length}")
        instructions.append(record)
    return PromptRecords(length, tuple(instructions))


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise TypeError(f"{value!r:.80} is not a whole number of at least 1")
    return value


@dataclass(frozen=True, eq=False)
class PromptPrefix:
    """What one instruction's prefix gives to the graphs, computed in float32.

    Attributes:
        input_ids: Token ids before the first image token, int64 (n,).
        checkpoint_sha256: The checkpoint that it was computed with, as the manifest has it.
        first_position: Position of the first token: P - n.
        tensors: `prefix_keys`, `prefix_values` (G, K, n, h), `prefix_text_keys`,
            `prefix_text_values` (B, n_h, n, d); see `families`.
    """

    input_ids: Int64Array
    checkpoint_sha256: str
    first_position: int
    tensors: Mapping[str, Float32Array]

    @property
    def file(self) -> str:
        """Path of its file inside a bundle."""
        return f"{PROMPT_FOLDER}/{_key(self.input_ids)}.npz"

    def write(self, stream: Path | IO[bytes]) -> None:
        """Write the prefix as an `.npz` file that needs no pickle to be read."""
        arrays: dict[str, Any] = {
            "input_ids": self.input_ids,
            "checkpoint_sha256": np.array(self.checkpoint_sha256),
            "first_position": np.array(self.first_position, np.int64),
            **self.tensors,
        }
        np.savez(stream, **arrays)


def read_prefix(stream: Path | IO[bytes]) -> PromptPrefix:
    """Read what `PromptPrefix.write` wrote.

    Raises:
        ValueError: It is damaged, or something else.
    """
    found = read_npz(stream)
    wanted = {"input_ids", "checkpoint_sha256", "first_position", *_TENSORS}
    if set(found) != wanted:
        raise ValueError(f"it holds {sorted(found)} instead of {sorted(wanted)}")
    ids = found["input_ids"]
    if ids.dtype != np.int64 or ids.ndim != 1 or found["first_position"].shape != ():
        raise ValueError("its token ids or its position are of another kind")
    for name in _TENSORS:
        array = found[name]
        if array.dtype != np.float32 or array.ndim != TOKEN_AXIS + 2:
            raise ValueError(f"its {name} is {array.dtype} of shape {array.shape}")
        if array.shape[TOKEN_AXIS] != ids.size:
            raise ValueError(f"its {name} has {array.shape[TOKEN_AXIS]} tokens, not {ids.size}")
        if not np.isfinite(array).all():
            raise ValueError(f"its {name} holds NaN or infinity")
    return PromptPrefix(
        input_ids=ids,
        checkpoint_sha256=str(found["checkpoint_sha256"]),
        first_position=int(found["first_position"]),
        tensors={name: found[name] for name in _TENSORS},
    )


def _key(input_ids: Int64Array) -> str:
    data = np.ascontiguousarray(input_ids, np.dtype("<i8")).tobytes()
    return hashlib.sha256(data).hexdigest()[:16]


def _keep(
    kept: OrderedDict[str, dict[str, NDArray[Any]]],
    key: str,
    feeds: dict[str, NDArray[Any]],
    most: int,
) -> None:
    kept[key] = feeds
    kept.move_to_end(key)
    while len(kept) > most:
        kept.popitem(last=False)


class PromptBank:
    """The prefixes of a deployed bundle, and those that were computed since.

    Instructions are found by their token ids, so two that differ in what the processor drops
    (letter case, punctuation) are one.
    """

    def __init__(
        self,
        folder: Path,
        records: PromptRecords,
        *,
        checkpoint_sha256: str,
        specs: Mapping[str, TensorSpec],
        has_prefix_model: bool,
        encode: Callable[[str], Int64Array],
        make_again: str,
    ) -> None:
        """Read and check every prefix of a bundle.

        Args:
            folder: The bundle.
            records: Its manifest's entry.
            checkpoint_sha256: The manifest's.
            specs: Inputs of the graphs, for types and shapes of the four prefix tensors.
            has_prefix_model: Whether a new instruction can be computed here.
            encode: Token ids of an instruction's prefix.
            make_again: The sentence that says which command makes the bundle again.

        Raises:
            BundleError: A prefix is damaged, of another checkpoint, tokenizer or length.
        """
        self._folder = folder
        self._make_again = make_again
        self._length = records.length
        self._checkpoint_sha256 = checkpoint_sha256
        self._specs = {name: specs[name] for name in _TENSORS}
        self._files: dict[str, Path] = {}
        self._of_files: OrderedDict[str, dict[str, NDArray[Any]]] = OrderedDict()
        self._computed: OrderedDict[str, dict[str, NDArray[Any]]] = OrderedDict()
        self.has_prefix_model = has_prefix_model
        self.instructions: tuple[str, ...] = tuple(r.text for r in records.instructions)
        for record in records.instructions:
            path = folder / record.file
            prefix = self._read(path)
            if not np.array_equal(encode(record.text), prefix.input_ids):
                raise self._refused(path, "it was computed for another text or tokenizer")
            self._files[_key(prefix.input_ids)] = path

    def check(self, input_ids: Int64Array) -> None:
        """Raise if there is no prefix of these token ids.

        Args:
            input_ids: Ids of the whole prefix, int64 (n,).

        Raises:
            UnknownInstructionError: It can be computed (`has_prefix_model`), or added to the
                bundle; the message says so.
            ObservationError: It is longer than the graphs have room for.
        """
        self.check_length(input_ids)
        if self.knows(input_ids):
            return
        known = "; ".join(repr(text) for text in self.instructions) or "none"
        raise UnknownInstructionError(
            "the instruction's prefix is not in the bundle, "
            + (
                "and has to be computed first. "
                if self.has_prefix_model
                else "and the bundle was exported without --prefix-model, so it cannot be "
                "computed here. "
            )
            + f"In the bundle are: {known}. To add it: groot-int8 add-instruction --bundle "
            f"{self._folder} TEXT"
        )

    def knows(self, input_ids: Int64Array) -> bool:
        """Whether there is a prefix of these token ids."""
        key = _key(input_ids)
        return key in self._computed or key in self._files

    def check_length(self, input_ids: Int64Array) -> None:
        """Raise `ObservationError` if a prefix is longer than the graphs have room for."""
        if input_ids.size > self._length:
            raise ObservationError(
                f"the instruction's prefix has {input_ids.size} tokens, and the bundle's graphs "
                f"have room for {self._length}. Shorten it, or export again: groot-int8 export "
                f"--max-prefix-tokens {-(-input_ids.size // 8) * 8}"
            )

    def add(self, prefix: PromptPrefix) -> None:
        """Take in a prefix that was computed since.

        The 32 of them that were used last are kept until the policy is closed, whatever else is
        asked; the oldest beyond that is forgotten, so that memory has a bound.

        Raises:
            BundleError: It is of another checkpoint or does not fit the graphs.
        """
        feeds = self._padded(self._checked(prefix, "the new prefix"))
        _keep(self._computed, _key(prefix.input_ids), feeds, _KEPT_COMPUTED)

    def feeds(self, input_ids: Int64Array) -> Mapping[str, NDArray[Any]]:
        """Return the graphs' inputs for a prefix.

        Args:
            input_ids: Ids of the whole prefix, int64 (n,).

        Returns:
            The four prefix tensors in the graphs' types and `prefix_mask`, read-only; the same
            arrays each time, so that an engine may keep what it copied.

        Raises:
            UnknownInstructionError, ObservationError: As `check`.
        """
        self.check(input_ids)
        key = _key(input_ids)
        if key in self._computed:
            self._computed.move_to_end(key)
            return self._computed[key]
        if key not in self._of_files:
            read = self._padded(self._read(self._files[key]))
            _keep(self._of_files, key, read, _KEPT_OF_FILES)
        self._of_files.move_to_end(key)
        return self._of_files[key]

    def blank(self) -> Mapping[str, NDArray[Any]]:
        """Return inputs of a prefix without any token, for a first run that nobody reads."""
        shapes = {
            name: [0 if axis == TOKEN_AXIS else int(n) for axis, n in enumerate(spec.shape)]
            for name, spec in self._specs.items()
        }
        tensors = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        empty = np.zeros(0, np.int64)
        return self._padded(PromptPrefix(empty, self._checkpoint_sha256, self._length, tensors))

    def _padded(self, prefix: PromptPrefix) -> dict[str, NDArray[Any]]:
        feeds: dict[str, NDArray[Any]] = {
            name: padded_left(prefix.tensors[name], self._length, TOKEN_AXIS).astype(spec.dtype)
            for name, spec in self._specs.items()
        }
        feeds[PREFIX_MASK] = np.arange(self._length) >= self._length - prefix.input_ids.size
        for array in feeds.values():
            array.flags.writeable = False
        return feeds

    def _read(self, path: Path) -> PromptPrefix:
        try:
            return self._checked(read_prefix(path), str(path))
        except ValueError as error:
            raise self._refused(path, str(error)) from error

    def _checked(self, prefix: PromptPrefix, what: str) -> PromptPrefix:
        if prefix.checkpoint_sha256 != self._checkpoint_sha256:
            raise self._refused(
                what,
                f"it was computed with the checkpoint {prefix.checkpoint_sha256[:16]}..., and the "
                f"graphs are of {self._checkpoint_sha256[:16]}...",
            )
        if prefix.first_position + prefix.input_ids.size != self._length:
            raise self._refused(
                what,
                f"it ends at position {prefix.first_position + prefix.input_ids.size}, and the "
                f"graphs have room for {self._length} tokens",
            )
        for name, spec in self._specs.items():
            found = list(prefix.tensors[name].shape)
            found[TOKEN_AXIS] = self._length
            if found != list(spec.shape):
                raise self._refused(what, f"its {name} does not fit the graph's {spec.describe()}")
        return prefix

    def _refused(self, what: object, reason: str) -> BundleError:
        return BundleError(
            f"{what}: {reason}. Add its instruction again: groot-int8 add-instruction --bundle "
            f"{self._folder} TEXT. Or make the bundle again. {self._make_again}"
        )
