"""Hazards of the small tokenizer: text that does not come back, special tokens that are split."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from groot_int8_ros.policy.preprocess import PromptTokenizer, prompt_text
from offline_tools.demo.small_tokenizer import SPECIAL_TOKENS, write_small_tokenizer


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    write_small_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(path: Path) -> Tokenizer:
    return Tokenizer.from_file(str(path))


def test_training_gives_the_same_file_each_time(path: Path, tmp_path: Path) -> None:
    vocabulary = write_small_tokenizer(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()
    assert [vocabulary[token] for token in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_text_has_tokens_and_comes_back(tokenizer: Tokenizer, text: str) -> None:
    normalized = tokenizer.normalizer.normalize_str(text)
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == normalized


def test_prompt_has_one_token_for_each_special_token_and_image_patch(path: Path) -> None:
    prompt = PromptTokenizer.from_file(path)
    ids = prompt.encode_prompt(prompt_text("Pick up 12 cubes!", [6, 6], True))[0].tolist()
    assert ids.count(prompt.image_token_id) == 12
    names = dict(zip(SPECIAL_TOKENS, range(len(SPECIAL_TOKENS)), strict=True))
    assert ids[0] == names["<|im_start|>"]
    assert ids.count(names["<img>"]) == ids.count(names["</img>"]) == 2


def test_every_digit_is_a_token_of_its_own(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("1234").ids) == 4
