"""Members of tokenizer_config.json that change ids or texts: as transformers has them, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from tests.text.tiny_tokenizers import KINDS, byte_level, wordpiece
from xllm.errors import ModelError
from xllm.text.tokenizer import load_tokenizer
from xllm.text.tokenizer_config import FORCED_CLEAN_UP

TEXT = "<|im_start|>user\nthe fox <s>, <late>, [SEP] [X] isn't it ?<|im_end|></s>"


def edit(folder: Path, **members: Any) -> Path:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **members}))
    return folder


def ids(folder: Path) -> list[int]:
    """By us; transformers says the same."""
    found, reference = load_tokenizer(folder).encode(TEXT), AutoTokenizer.from_pretrained(folder)
    assert found == reference(TEXT)["input_ids"]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_split_special_tokens(tmp_path: Path, kind: str) -> None:
    KINDS[kind](tmp_path)
    whole = ids(tmp_path)
    split = ids(edit(tmp_path, split_special_tokens=True))
    assert split != whole or kind == "metaspace"  # whose vocabulary has `</s>` as an ordinary piece, too
    assert ids(edit(tmp_path, split_special_tokens=False)) == whole


@pytest.mark.parametrize("members", [
    {"additional_special_tokens": ["<late>"]}, {"extra_special_tokens": ["<late>"]},
    {"extra_special_tokens": {"late_token": "<late>"}},
    {"added_tokens_decoder": {"5000": {"content": "<late>", "special": False, "normalized": False, "lstrip": True,
                                       "rstrip": False, "single_word": False}}},
], ids=str)
def test_tokens_that_only_the_config_knows(tmp_path: Path, members: dict[str, Any]) -> None:
    byte_level(tmp_path)
    before = ids(tmp_path)
    assert ids(edit(tmp_path, **members)) != before


@pytest.mark.parametrize("name", ["sep_token", "cls_token", "mask_token", "pad_token", "unk_token", "bos_token"])
def test_named_tokens_are_special(tmp_path: Path, name: str) -> None:
    byte_level(tmp_path)
    before = ids(tmp_path)
    found = ids(edit(tmp_path, **{name: "[X]"}))
    assert found != before
    token_id = load_tokenizer(tmp_path).backend.token_to_id("[X]")
    assert token_id in found and token_id in load_tokenizer(tmp_path).special_token_ids


def test_cleaning_up_is_left_out_where_transformers_does_and_refused_elsewhere(tmp_path: Path) -> None:
    bpe, other = tmp_path / "bpe", tmp_path / "other"
    for folder, build in ((bpe, byte_level), (other, wordpiece)):
        folder.mkdir()
        build(folder)
    found = ids(edit(bpe, clean_up_tokenization_spaces=True))
    assert load_tokenizer(bpe).decode(found) == AutoTokenizer.from_pretrained(bpe).decode(found)
    with pytest.raises(ModelError, match=r"tokenizer_config\.json: clean_up_tokenization_spaces"):
        load_tokenizer(edit(other, clean_up_tokenization_spaces=True))
    with pytest.raises(ModelError, match="clean_up_tokenization_spaces"):
        load_tokenizer(edit(bpe, **{FORCED_CLEAN_UP: True}))


def test_a_space_in_front_must_stand_in_tokenizer_json(tmp_path: Path) -> None:
    byte_level(tmp_path)
    assert ids(edit(tmp_path, add_prefix_space=True)) == ids(edit(tmp_path, add_prefix_space=False))
    with pytest.raises(ModelError, match="add_prefix_space"):
        load_tokenizer(edit(tmp_path, add_prefix_space=True, tokenizer_class="Qwen2TokenizerFast"))
    backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode("x") == load_tokenizer(tmp_path).encode(" x")


@pytest.mark.parametrize("name", ["split_special_tokens", "clean_up_tokenization_spaces", "add_prefix_space"])
def test_what_is_no_boolean_is_named(tmp_path: Path, name: str) -> None:
    byte_level(tmp_path)
    with pytest.raises(ModelError, match=f"{name} must be true or false"):
        load_tokenizer(edit(tmp_path, **{name: "yes"}))
