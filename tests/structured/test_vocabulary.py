"""Every kind of tokenizer as llguidance sees it: what its masks let through is the text that a user gets."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from tests.text.tiny_tokenizers import KINDS
from xllm import SamplingParams, StructuredOutput
from xllm.errors import RequestError
from xllm.structured.grammar import build_matcher, grammar_text
from xllm.structured.token_trie import vocabulary_source
from xllm.text.detokenizer import Detokenizer
from xllm.text.tokenizer import Tokenizer, load_tokenizer

READABLE = ["bundled", "byte_level", "byte_level_bos", "sentencepiece_like", "metaspace"]
PADDING = 37
RESERVED = b"\xff"  # llguidance keeps this byte for itself
TEXTS = {
    "json": '{"a": [1, 2.5, null], "b c": "x"}',
    "code": "def add(a, b):\n    return a + b\n",
    "blanks": "  lead and trail  ",
    "accents": "naïve café, Zürich",
    "chinese": "机器学习很有趣。",
    "emoji": "😀 👩‍👩‍👧 🇩🇪 done",
    "like-a-special": "<|im_end|></s>",
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> dict[str, Tokenizer]:
    import xllm.bundled

    made = {"bundled": load_tokenizer(Path(xllm.bundled.__file__).parent)}
    for kind, build in KINDS.items():
        folder = tmp_path_factory.mktemp(kind)
        build(folder)
        made[kind] = load_tokenizer(folder)
    return made


@pytest.fixture(scope="module")
def vocabularies(loaded):
    return {kind: vocabulary_source(loaded[kind], loaded[kind].vocab_size + PADDING, ()).build() for kind in READABLE}


def write(vocabulary, spec: StructuredOutput, chooser: random.Random, num_tokens: int) -> list[int]:
    """Token ids chosen at random among those that the masks allow."""
    matcher = build_matcher(vocabulary, grammar_text(spec))
    mask = np.zeros(-(-vocabulary.vocab_size // 32), dtype=np.int32)
    token_ids: list[int] = []
    while len(token_ids) < num_tokens:
        matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        assert not matcher.is_error(), matcher.get_error()
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()
        token_ids.append(chooser.choice(allowed))
        if token_ids[-1] in vocabulary.eos_tokens:
            return token_ids
        assert matcher.consume_token(token_ids[-1])
    return token_ids


def shown(tokenizer: Tokenizer, token_ids: list[int]) -> str:
    detokenizer = Detokenizer(tokenizer, SamplingParams())
    return detokenizer.feed(token_ids) + detokenizer.finish()


@pytest.mark.parametrize("kind", READABLE)
def test_tokens_are_the_bytes_that_they_stand_for(loaded, vocabularies, kind):
    tokenizer, vocabulary = loaded[kind], vocabularies[kind]
    assert vocabulary.vocab_size == tokenizer.vocab_size + PADDING
    assert set(vocabulary.eos_tokens) == set(tokenizer.eos_token_ids)
    for token_id in range(tokenizer.vocab_size):
        if tokenizer.token_bytes(token_id) != RESERVED:
            assert vocabulary.decode_bytes([token_id]) == tokenizer.token_bytes(token_id)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("kind", READABLE)
def test_a_text_can_be_written_and_is_shown_as_it_is(loaded, vocabularies, kind, text):
    tokenizer, vocabulary = loaded[kind], vocabularies[kind]
    if kind == "metaspace":  # it knows the characters of its corpus only
        ordinary = set(range(tokenizer.vocab_size)) - tokenizer.special_token_ids
        known = set(b"".join(map(tokenizer.token_bytes, ordinary)).decode())
        text = "".join(c for c in text if c in known and c != "\n")
    for seed in range(3):
        token_ids = write(vocabulary, StructuredOutput(choice=[text]), random.Random(seed), 200)
        assert token_ids[-1] in vocabulary.eos_tokens
        assert b"".join(map(tokenizer.token_bytes, token_ids[:-1])).decode() == text
        assert not tokenizer.special_token_ids & set(token_ids[:-1])
        if tokenizer.is_byte_level:
            assert shown(tokenizer, token_ids) == text


@pytest.mark.parametrize("kind", READABLE)
def test_the_tokenizer_s_own_way_is_let_through(loaded, vocabularies, kind):
    tokenizer, vocabulary = loaded[kind], vocabularies[kind]
    blank = tokenizer.encode("x", add_special_tokens=False)[:-1]  # the blank that some put before a text
    for text in ("def add(a, b)", "The quick brown dog sleeps"):
        token_ids = tokenizer.encode(text, add_special_tokens=False)
        first = tokenizer.token_bytes(token_ids[0]).decode()
        matcher = build_matcher(vocabulary, grammar_text(StructuredOutput(regex=re.escape(text)
                                                                          if not blank and not first.startswith(" ")
                                                                          else " ?" + re.escape(text))))
        assert matcher.validate_tokens(token_ids) == len(token_ids)


@pytest.mark.parametrize("kind", READABLE)
def test_random_texts_of_a_form_are_of_it(loaded, vocabularies, kind):
    tokenizer, vocabulary = loaded[kind], vocabularies[kind]
    spec = StructuredOutput(json={"type": "array", "items": {"type": "string", "maxLength": 3}, "minItems": 2,
                                  "maxItems": 3}) if tokenizer.is_byte_level else StructuredOutput(regex="[a-e ]{9}")
    ended = 0
    for seed in range(20):
        token_ids = write(vocabulary, spec, random.Random(seed), 60)
        if token_ids[-1] in vocabulary.eos_tokens:
            ended += 1
            text = b"".join(map(tokenizer.token_bytes, token_ids[:-1])).decode()
            assert len(json.loads(text)) in (2, 3) if spec.json else re.fullmatch("[a-e ]{9}", text)
    assert ended > 10


def test_tokens_that_the_model_does_not_have_are_never_let_through(loaded):
    tokenizer = loaded["byte_level_bos"]
    added = {i: t.content for i, t in tokenizer.backend.get_added_tokens_decoder().items()}
    last, text = max(added.items())
    vocabulary = vocabulary_source(tokenizer, last, ()).build()
    assert vocabulary.vocab_size == last == tokenizer.vocab_size - 1
    token_ids = write(vocabulary, StructuredOutput(choice=["a" + text]), random.Random(0), 40)
    assert b"".join(map(tokenizer.token_bytes, token_ids[:-1])).decode() == "a" + text
    assert max(token_ids) < last


def test_padding_and_special_tokens_are_never_let_through(loaded, vocabularies):
    vocabulary, tokenizer = vocabularies["bundled"], loaded["bundled"]
    mask = np.frombuffer(build_matcher(vocabulary, grammar_text(StructuredOutput(regex=r"(.|\n)*"))).compute_bitmask(),
                         np.uint8)
    allowed = set(np.flatnonzero(np.unpackbits(mask, bitorder="little")).tolist())
    assert len(allowed) > 3500
    assert max(allowed) < tokenizer.vocab_size
    assert allowed & tokenizer.special_token_ids == set(vocabulary.eos_tokens)


@pytest.mark.parametrize("kind", READABLE)
def test_special_tokens_have_names_in_grammars(loaded, vocabularies, kind):
    tokenizer, vocabulary = loaded[kind], vocabularies[kind]
    special = next(i for i in sorted(tokenizer.special_token_ids) if i not in vocabulary.eos_tokens)
    name = tokenizer.backend.id_to_token(special)
    if not name.startswith("<"):
        return
    spec = StructuredOutput(grammar=f'start: "a" {name} "b"')
    written = write(vocabulary, spec, random.Random(0), 20)
    assert special in written
    assert b"".join(tokenizer.token_bytes(i) for i in written if i not in tokenizer.special_token_ids) == b"ab"


def test_what_cannot_be_read_is_refused(loaded):
    with pytest.raises(RequestError, match="tokenizer"):
        vocabulary_source(loaded["wordpiece"], 300, ())
    with pytest.raises(RequestError, match="end token"):
        vocabulary_source(loaded["bundled"], 2, ())
    without_end = Tokenizer(tokenizers.Tokenizer.from_str(loaded["bundled"].backend.to_str()), {}, {})
    with pytest.raises(RequestError, match="end token"):
        vocabulary_source(without_end, 4096, ())
