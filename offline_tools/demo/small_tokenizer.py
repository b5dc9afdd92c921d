"""A small byte-level tokenizer with the special tokens of GR00T N1.6's prompt.

Owns: generating it. Must not import torch. The public tokenizer has 151,680 entries, which alone
would make a tiny checkpoint large; this one has the same structure and a few hundred entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
)
IMAGE_TOKEN = "<IMG_CONTEXT>"

_SENTENCES = (
    "system\nYou are a helpful assistant.",
    "user\npick up the red cube and place it in the green bowl<image 1><image 2>",
    "put the yellow bottle on the table<image 1><image 2><image 3><image 4>",
    "open the drawer, move the lid, hold still for 10 seconds",
)


def write_small_tokenizer(path: Path, sentences: Sequence[str] = _SENTENCES) -> dict[str, int]:
    """Train the tokenizer on a few sentences and write `tokenizer.json`.

    Args:
        path: The file to write.
        sentences: What it is trained on; words that occur twice become one token each.

    Returns:
        Token to id, for every entry.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    # As in Qwen's tokenizer every digit is a token of its own and a word keeps its leading space.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        sentences,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.save(str(path))
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    return vocabulary
