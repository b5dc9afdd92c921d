"""Reading the released checkpoint layout, strictly and one tensor at a time.

Owns: the safetensors files of a checkpoint (`model.safetensors`, or shards with
`model.safetensors.index.json`), which keys inference needs, and the loading of weights into the
model. Must not import the export or the checks that build on it.

Every complaint about a checkpoint is raised before the first weight is read: headers alone tell
whether a file was truncated, a key is missing or a shape is wrong. Weights are read lazily, so a
three-billion-parameter checkpoint is never held twice.

A parameter's name in `GrootN16` is its key in the checkpoint, without exception; so
`expected_keys(config)` tells an exporter what to stream.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from groot_int8_ros.errors import CheckpointError
from groot_int8_ros.policy.files import leads_outside, read_json
from offline_tools.model.configuration import (
    INDEX_FILE,
    SINGLE_FILE,
    ModelConfig,
    find_eagle_config,
    load_model_config,
)
from offline_tools.model.policy_model import GrootN16

_SUPPORTED_DTYPES = {"BF16": 2, "F16": 2, "F32": 4}
_LENGTH_BYTES = 8
_LONGEST_NAME = 200
_LARGEST_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
_NAMED_PROBLEMS = 8

# Keys that the released layout may hold and inference does not read.
_UNUSED_KEYS = (
    re.compile(r"action_head\.mask_token"),  # takes the state's place in training (dropout)
    re.compile(r"backbone\.model\.vision_model\.vision_model\.head\..+"),  # attention pooling
    re.compile(r"backbone\.model\.language_model\.lm_head\.weight"),  # tied to the embeddings
)
_LANGUAGE_LAYER = re.compile(r"backbone\.model\.language_model\.model\.layers\.(\d+)\..+")
_BACKBONE = "backbone."


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor is and what it looks like.

    Attributes:
        file: Safetensors file that holds it.
        shape: Its shape.
        dtype: Its type as safetensors spells it, such as `BF16`.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} {what}. Copy the file again from where it was saved.")


def _read_header(path: Path) -> dict[str, TensorEntry]:
    """Read a safetensors header and check that the file is as long as the header says."""
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            prefix = stream.read(_LENGTH_BYTES)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < _LENGTH_BYTES or length > min(size, _LARGEST_HEADER_BYTES):
                raise _damaged(path, "is truncated or no safetensors file: its header is cut off")
            raw = stream.read(length)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} is missing. Copy the whole checkpoint folder, all shards included."
        ) from error
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}). Make it readable, then try again."
        ) from error
    try:
        header = json.loads(raw.decode("utf-8"))
        entries = {
            key: (
                TensorEntry(path, tuple(map(int, value["shape"])), str(value["dtype"])),
                tuple(map(int, value["data_offsets"])),
            )
            for key, value in header.items()
            if key != "__metadata__"
        }
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        OverflowError,
        RecursionError,
    ) as error:
        raise _damaged(path, "has a corrupt safetensors header") from error
    expected = _LENGTH_BYTES + length + max((end for _, (_, end) in entries.values()), default=0)
    if size != expected:
        raise _damaged(
            path,
            f"is truncated or was overwritten: it has {size:,} bytes, its header promises "
            f"{expected:,}",
        )
    for key, (entry, (start, end)) in entries.items():
        width = _SUPPORTED_DTYPES.get(entry.dtype)
        if width is not None and end - start != width * math.prod(entry.shape):
            raise _damaged(path, f"has a corrupt safetensors header: {key} has the wrong length")
    return {key: entry for key, (entry, _) in entries.items()}


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = read_json(path)["weight_map"]
        files = {str(key): str(file) for key, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, "is no index of safetensors shards") from error
    # A name that no file can have would make the search for it fail in another way.
    outside = [file for file in files.values() if leads_outside(file) or len(file) > _LONGEST_NAME]
    if outside:
        raise _damaged(path, f"names the shard {outside[0]!r:.80}, which cannot be in its folder")
    return files


def _shorten(lines: list[str]) -> str:
    shown = [f"  {line}" for line in lines[:_NAMED_PROBLEMS]]
    if len(lines) > _NAMED_PROBLEMS:
        shown.append(f"  and {len(lines) - _NAMED_PROBLEMS} more")
    return "\n".join(shown)


class CheckpointReader:
    """A checkpoint's tensors by key, each read when it is asked for.

    No file stays open or mapped between two tensors: the pages of a mapped shard would count as
    this process's memory until the last of its tensors is gone.

    Attributes:
        directory: Folder of the checkpoint.
        notes: What the user should see about the files.

    Raises:
        CheckpointError: On construction, if a file is missing, truncated or corrupt, or if the
            index and the shards disagree.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        single, index = directory / SINGLE_FILE, directory / INDEX_FILE
        self.notes: tuple[str, ...] = ()
        if single.exists():
            self._entries = _read_header(single)
            if index.exists():
                # transformers prefers the single file as well.
                self.notes = (
                    f"{directory} holds {SINGLE_FILE} and {INDEX_FILE}: the former is "
                    "read, the shards are not",
                )
        elif index.exists():
            self._entries = self._read_shards(index)
        else:
            raise CheckpointError(
                f"{directory} holds neither {SINGLE_FILE} nor {INDEX_FILE}. Give the folder of a "
                "GR00T N1.6 checkpoint with its weights."
            )

    @staticmethod
    def _read_shards(index: Path) -> dict[str, TensorEntry]:
        weight_map = _read_index(index)
        shards = sorted(set(weight_map.values()))
        missing = [name for name in shards if not (index.parent / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{index} names {len(shards)} shards, of which {len(missing)} are missing:\n"
                f"{_shorten(missing)}\nCopy them into the folder beside the index."
            )
        entries: dict[str, TensorEntry] = {}
        problems: list[str] = []
        for name in shards:
            for key, entry in _read_header(index.parent / name).items():
                if weight_map.get(key) == name:
                    entries[key] = entry
                else:
                    wanted = weight_map.get(key, "no shard")
                    problems.append(f"{key} is in {name}, the index says {wanted}")
        problems += [
            f"{key} is not in {name}, where the index says it is"
            for key, name in weight_map.items()
            if key not in entries
        ]
        if problems:
            raise CheckpointError(
                f"{index} and its shards disagree:\n{_shorten(problems)}\nUse the index and the "
                "shards that were saved together."
            )
        return entries

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys of the checkpoint, also those that inference leaves unused."""
        return tuple(self._entries)

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def shape(self, key: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return self._entries[key].shape

    def dtype(self, key: str) -> str:
        """Return a tensor's type as safetensors spells it: `BF16`, `F16` or `F32`."""
        return self._entries[key].dtype

    def file(self, key: str) -> Path:
        """Return the safetensors file that holds a tensor."""
        return self._entries[key].file

    @property
    def files(self) -> tuple[Path, ...]:
        """The safetensors files, sorted by name."""
        return tuple(sorted({entry.file for entry in self._entries.values()}))

    def tensor(self, key: str) -> Tensor:
        """Read one tensor in the type it is stored in.

        Raises:
            CheckpointError: The file cannot be read (any more).
        """
        path = self._entries[key].file
        try:
            with safe_open(str(path), framework="pt") as shard:
                result: Tensor = shard.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise _damaged(path, f"cannot be read at {key} ({error})") from error
        return result

    def tensors(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Read tensors one after the other."""
        for key in keys:
            yield key, self.tensor(key)

    def validate(self, config: ModelConfig, eagle_config: Path | None = None) -> None:
        """Check that the checkpoint holds exactly the model that a configuration describes.

        Args:
            config: The configuration.
            eagle_config: The Eagle configuration it came from; None means the public sizes. Only
                the advice in the error depends on it.

        Raises:
            CheckpointError: Keys are missing, unexpected, misshapen or of an unsupported type.
                The message names them with what was expected and found.
        """
        expected = expected_keys(config)
        groups: dict[str, list[str]] = {"missing": [], "unexpected": [], "misshapen": []}
        wrong_dtype: list[str] = []
        concerned: list[str] = []
        for key, shape in expected.items():
            entry = self._entries.get(key)
            if entry is None:
                groups["missing"].append(f"{key} {list(shape)}")
            elif entry.shape != shape:
                groups["misshapen"].append(
                    f"{key}: expected {list(shape)}, found {list(entry.shape)}"
                )
            else:
                if entry.dtype not in _SUPPORTED_DTYPES:
                    wrong_dtype.append(f"{key}: {entry.dtype}")
                continue
            concerned.append(key)
        for key, entry in self._entries.items():
            if key not in expected and not is_unused_key(key, config):
                groups["unexpected"].append(f"{key} {list(entry.shape)}")
                concerned.append(key)
        if wrong_dtype:
            raise CheckpointError(
                f"{self.directory}: {len(wrong_dtype)} tensors are not bfloat16, float16 or "
                f"float32:\n{_shorten(wrong_dtype)}\nGive the checkpoint as training saved it; "
                "already quantised weights cannot be read."
            )
        if concerned:
            listed = "\n".join(
                f"{len(lines)} {kind}:\n{_shorten(lines)}"
                for kind, lines in groups.items()
                if lines
            )
            raise CheckpointError(
                f"{self.directory} does not hold the model that its configuration describes.\n"
                f"{listed}\n{_likely_reason(concerned, eagle_config)}"
            )


def _likely_reason(keys: list[str], eagle_config: Path | None) -> str:
    if not all(key.startswith(_BACKBONE) for key in keys):
        return (
            "Use the config.json that was saved with these weights, or copy the checkpoint "
            "again if it is incomplete."
        )
    if eagle_config is None:
        return (
            "Only the vision tower, the connector or the language model are concerned, and they "
            "were taken to have the public sizes: pass --eagle-config with the JSON file of the "
            "training's Eagle model (config.json in its folder), or copy that file into the "
            "checkpoint's folder as eagle_config.json."
        )
    return (
        "Only the vision tower, the connector or the language model are concerned: "
        f"{eagle_config} or config.json's select_layer is not the one of the training, pass "
        "another --eagle-config; or copy the checkpoint again if it is incomplete."
    )


def is_unused_key(key: str, config: ModelConfig) -> bool:
    """Whether a key belongs to the released layout though inference does not read it."""
    layer = _LANGUAGE_LAYER.fullmatch(key)
    if layer is not None:
        return int(layer[1]) >= config.language.layers
    return any(pattern.fullmatch(key) for pattern in _UNUSED_KEYS)


def build_empty_model(config: ModelConfig) -> GrootN16:
    """Build the model with its parameters on the meta device: shapes without memory.

    The rotary frequencies, which no checkpoint stores, are real float32 values.
    """
    with torch.device("meta"):
        model = GrootN16(config)
    model.backbone.language.restore_buffers()
    return model.requires_grad_(False).eval()


def expected_keys(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the checkpoint keys that inference reads, with their shapes."""
    return {
        name: tuple(parameter.shape)
        for name, parameter in build_empty_model(config).named_parameters()
    }


def load_weights(
    module: nn.Module, weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype
) -> None:
    """Put tensors in the place of a module's parameters, one at a time.

    Args:
        module: Module whose parameters may be on the meta device.
        weights: Parameter names and tensors of the parameters' shapes.
        dtype: Type the parameters get.
    """
    for name, tensor in weights:
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        setattr(owner, leaf, nn.Parameter(tensor.to(dtype), requires_grad=False))


def load_model(
    checkpoint: Path, eagle_config: Path | None = None, dtype: torch.dtype = torch.float32
) -> tuple[GrootN16, ModelConfig, tuple[str, ...]]:
    """Load a checkpoint strictly.

    Args:
        checkpoint: Folder with `config.json` and the weights.
        eagle_config: Eagle configuration of vision tower and language model; if None, the one
            beside the checkpoint, else the public sizes.
        dtype: Type of the loaded parameters.

    Returns:
        The model in evaluation mode on the CPU, its configuration, and notes: decisions that the
        user should see.

    Raises:
        CheckpointError: A file is missing, damaged or contradicts another, or a tensor is
            missing, unexpected, misshapen or of an unsupported type.
    """
    config, notes = load_model_config(checkpoint, eagle_config)
    reader = CheckpointReader(checkpoint)
    reader.validate(config, find_eagle_config(checkpoint, eagle_config))
    model = build_empty_model(config)
    names = [name for name, _ in model.named_parameters()]
    load_weights(model, reader.tensors(names), dtype)
    notes = (*notes, *reader.notes)
    left = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    assert not left, f"not loaded: {left}"
    return model, config, notes
