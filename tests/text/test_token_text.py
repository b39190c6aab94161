"""An answer's text is what decoding prompt and answer adds to the decoded prompt, on every kind of tokenizer, however
it comes; each token's text and offset are those in that text (transformers#22710, vllm#19368)."""

from __future__ import annotations

import itertools
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from tests.text.tiny_tokenizers import KINDS
from xllm import SamplingParams, StructuredOutput
from xllm.text.detokenizer import Detokenizer
from xllm.text.token_text import TextContext
from xllm.text.tokenizer import Tokenizer, load_tokenizer

REPLACEMENT = "\ufffd"
SPECIAL = {"byte_level": "<|endoftext|>", "byte_level_bos": "<|endoftext|>", "sentencepiece_like": "<s>",
           "metaspace": "<unk>", "wordpiece": "[UNK]"}


@pytest.fixture(scope="module")
def tokenizers(folders) -> dict[str, Tokenizer]:
    return {kind: load_tokenizer(folder) for kind, folder in folders.items()}


def added_text(tokenizer: Tokenizer, prompt: list[int], answer: list[int], skip: bool) -> tuple[str, int]:
    """(what the answer adds, characters of the decoded prompt that it replaces): the tokenizer's own decoding."""
    before = tokenizer.decode(prompt, skip_special_tokens=skip)
    whole = tokenizer.decode(prompt + answer, skip_special_tokens=skip)
    shared = len(os.path.commonprefix([before, whole]))  # noqa: RUF071
    return whole[shared:], len(before) - shared


@st.composite
def sequences(draw, tokenizer: Tokenizer, special: int) -> tuple[list[int], list[int]]:
    """A prompt (empty, bos alone, or any) and an answer. Half of the tokens are of texts, so that many characters come
    out whole, and half of them random: parts of characters, special tokens, ids that nobody knows."""
    text = st.text(st.sampled_from("ab .\n▁é机😀e\u0301ش"), max_size=8).map(
        lambda t: tokenizer.encode(t, add_special_tokens=False))
    random_ids = st.lists(st.one_of(st.integers(0, tokenizer.vocab_size + 3), st.just(special)), max_size=6)
    parts = st.lists(st.one_of(text, random_ids), max_size=4).map(lambda ls: list(itertools.chain(*ls)))
    whole = draw(parts)
    cut = draw(st.integers(0, len(whole)))  # anywhere: within a character too
    prompt = draw(st.sampled_from([whole[:cut], whole[:cut], [], [special]]))
    return prompt, whole[cut:]


def streamed(detokenizer: Detokenizer, answer: list[int], cuts: list[int]) -> list[str]:
    bounds = sorted({0, len(answer), *(c for c in cuts if c < len(answer))})
    return [*(detokenizer.feed(answer[a:b]) for a, b in itertools.pairwise(bounds)), detokenizer.finish()]


@pytest.mark.parametrize("skip", [True, False], ids=["skip-special", "keep-special"])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_the_pieces_are_what_the_answer_adds(tokenizers, kind, skip, data):
    tokenizer = tokenizers[kind]
    prompt, answer = data.draw(sequences(tokenizer, tokenizer.backend.token_to_id(SPECIAL[kind])))
    cuts = data.draw(st.one_of(st.just(list(range(len(answer)))), st.lists(st.integers(0, 30), max_size=4)))
    detokenizer = Detokenizer(tokenizer, SamplingParams(skip_special_tokens=skip), prompt)
    pieces = streamed(detokenizer, answer, cuts)
    assert ("".join(pieces), detokenizer.num_replaced) == added_text(tokenizer, prompt, answer, skip)


@pytest.mark.parametrize("skip", [True, False], ids=["skip-special", "keep-special"])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_tokens_together_are_the_text_and_offsets_point_at_them(tokenizers, kind, skip, data):
    tokenizer = tokenizers[kind]
    prompt, answer = data.draw(sequences(tokenizer, tokenizer.backend.token_to_id(SPECIAL[kind])))
    sampling = SamplingParams(skip_special_tokens=skip, logprobs=0)
    detokenizer, context = Detokenizer(tokenizer, sampling, prompt), TextContext(tokenizer, prompt, sampling)
    pieces = streamed(detokenizer, answer, list(range(len(answer))))
    text, _ = added_text(tokenizer, prompt, answer, skip)
    assert "".join(pieces) == text
    hidden = tokenizer.special_token_ids if skip else frozenset()
    raw = []
    for token_id in answer:
        raw.append(b"" if token_id in hidden else context.bytes_of(token_id))
        context.move_past(token_id)
    assert len(detokenizer.offsets) == len(answer)
    assert all(0 <= offset <= len(text) for offset in detokenizer.offsets)
    if REPLACEMENT in text or REPLACEMENT in tokenizer.decode(prompt):
        return  # broken characters, of which it is open how many U+FFFD each byte is
    assert b"".join(raw).decode() == text
    for index, (token, offset) in enumerate(zip(raw, detokenizer.offsets)):
        before = b"".join(raw[:index])
        assert offset == len(before.decode(errors="ignore"))  # complete characters
        if not _is_part(before, token):
            assert text[offset:offset + len(token.decode())] == token.decode()


def _is_part(before: bytes, token: bytes) -> bool:
    """Whether it begins or ends within a character."""
    try:
        before.decode()
        token.decode()
    except UnicodeDecodeError:
        return True
    return False


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece_like"])
def test_offsets_within_broken_characters(tokenizers, kind):
    """A first byte, then a letter: one U+FFFD and the letter behind it."""
    tokenizer = tokenizers[kind]
    id_of = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    answer = [id_of[data] for data in (b"a", b"\xe6", b"a", b"\xe6", b"\xe6", b"b")]
    detokenizer = Detokenizer(tokenizer, SamplingParams(logprobs=0), answer[:1])
    assert "".join(streamed(detokenizer, answer, [1, 2, 3, 4, 5])) == "a\ufffda\ufffd\ufffdb"
    assert detokenizer.offsets == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece_like"])
def test_a_character_that_the_prompt_leaves_unfinished(tokenizers, kind):
    tokenizer = tokenizers[kind]
    id_of = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    parts = [id_of[bytes([byte])] for byte in "😀".encode()]
    word = id_of[b"b"]
    for cut in (1, 2, 3):
        detokenizer = Detokenizer(tokenizer, SamplingParams(logprobs=0), [word, *parts[:cut]])
        assert "".join(streamed(detokenizer, [*parts[cut:], word], [1, 2])) == "😀b"
        assert detokenizer.offsets == [0] * (4 - cut) + [1]
        assert detokenizer.num_replaced == (1 if kind == "byte_level" else cut)
    broken = Detokenizer(tokenizer, SamplingParams(), [word, parts[0]])
    assert "".join(streamed(broken, [word], [])) == "b"
    assert broken.num_replaced == 0


@pytest.mark.parametrize("kind", ["sentencepiece_like", "metaspace"])
def test_a_long_run_of_bytes_in_the_prompt_is_context_too(tokenizers, kind):
    tokenizer = tokenizers[kind]
    prompt = tokenizer.encode("机器学习" * 50, add_special_tokens=False)
    answer = tokenizer.encode("x dog 机", add_special_tokens=False)
    detokenizer = Detokenizer(tokenizer, SamplingParams(), prompt)
    assert "".join(streamed(detokenizer, answer, [])) == added_text(tokenizer, prompt, answer, True)[0] != ""


@pytest.mark.parametrize("kind", ["sentencepiece_like", "metaspace"])
@pytest.mark.parametrize("prompt", ["", "bos", "word"])
def test_a_prescribed_form_keeps_its_first_blank(tokenizers, kind, prompt):
    """A grammar counts the blank of the first token, so it is shown even where decoding would drop it."""
    tokenizer = tokenizers[kind]
    bos, blank, word = map(tokenizer.backend.token_to_id, (SPECIAL[kind], "▁", "o"))
    before = {"": [], "bos": [bos], "word": [word]}[prompt]
    for form, shown in ((StructuredOutput(choice=[" o"]), " o" if before else "o"),
                        (None, " o" if prompt == "word" else "o")):
        detokenizer = Detokenizer(tokenizer, SamplingParams(structured=form), before)
        assert detokenizer.feed([blank, word]) + detokenizer.finish() == shown


def test_bytes_of_a_token_are_those_within_a_text(tokenizers):
    tokenizer = tokenizers["wordpiece"]
    ids = tokenizer.encode("the dogs", add_special_tokens=False)
    context = TextContext(tokenizer, (), SamplingParams())
    texts = []
    for token_id in ids:
        texts.append(context.text_of(token_id))
        context.move_past(token_id)
    assert "".join(texts) == tokenizer.decode(ids)
    assert any(text.startswith(" ") for text in texts[1:])
    assert all(tokenizer.token_text(i) == t for i, t in zip(ids[1:], texts[1:]))
    assert context.text_of(10**6) == ""


@pytest.mark.parametrize("kind", ["byte_level", "byte_level_bos", "sentencepiece_like", "metaspace"])
@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_offsets_of_a_text_point_at_its_tokens(tokenizers, kind, data):
    tokenizer = tokenizers[kind]
    # Not "fox", which is a special token of byte_level_bos.
    alphabet = "aob .o T" if kind == "metaspace" else "aob \n机😀é foz"
    text = data.draw(st.text(st.sampled_from(alphabet), max_size=12)).lstrip(" ")
    ids, offsets = tokenizer.encode(text), tokenizer.offsets(text)
    assert len(ids) == len(offsets)
    context, seen = TextContext(tokenizer, (), SamplingParams()), b""
    for token_id, offset in zip(ids, offsets):
        assert offset == len(seen.decode(errors="ignore"))
        if token_id not in tokenizer.special_token_ids:
            seen += context.bytes_of(token_id)
        context.move_past(token_id)
    assert seen.decode() == text


def test_offsets_where_spans_leave_blanks_out(folders):
    """Llama 3's post-processor trims the blanks of words from their spans."""
    trimming = load_tokenizer(folders["byte_level"])
    trimming.backend.post_processor = processors.ByteLevel(trim_offsets=True)
    text = "a dog  is\n\na fox"
    plain = load_tokenizer(folders["byte_level"])
    assert trimming.encode_with_spans(text) != plain.encode_with_spans(text)
    assert trimming.offsets(text) == plain.offsets(text)
