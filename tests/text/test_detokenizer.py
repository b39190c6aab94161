"""The deltas of a `Detokenizer`, put together, are the decoded text; stop strings cut it exactly."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.text.tiny_tokenizers import KINDS
from xllm.request import SamplingParams
from xllm.text.detokenizer import Detokenizer
from xllm.text.text_stream import ByteStream, WindowStream
from xllm.text.tokenizer import Tokenizer, load_tokenizer

CHARACTERS = st.one_of(st.sampled_from("ab .,\n▁�é机器学🇩🇪😀👩\u200d👧e\u0301ش한"),
                       st.characters(exclude_categories=["Cs"]))
TEXTS = st.text(CHARACTERS, max_size=25)


@pytest.fixture(scope="module")
def tokenizers(folders) -> dict[str, Tokenizer]:
    return {kind: load_tokenizer(folder) for kind, folder in folders.items()}


def stream(detokenizer: Detokenizer, ids: list[int], cuts: list[int] = ()) -> list[str]:
    """Feed `ids` in groups, finish; the deltas."""
    deltas, bounds = [], sorted({0, len(ids), *(c for c in cuts if c < len(ids))})
    for start, end in itertools.pairwise(bounds):
        if detokenizer.stopped is None:
            deltas.append(detokenizer.feed(ids[start:end]))
    return [*deltas, detokenizer.finish()]


@pytest.mark.parametrize("skip", [True, False], ids=["skip-special", "keep-special"])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_random_ids_stream_to_the_decoded_text(tokenizers, kind, skip, data):
    tokenizer = tokenizers[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 5), max_size=30))
    detokenizer = Detokenizer(tokenizer, SamplingParams(skip_special_tokens=skip))
    deltas = stream(detokenizer, ids, list(range(len(ids))))
    assert "".join(deltas) == tokenizer.decode(ids, skip_special_tokens=skip) == detokenizer.text
    assert detokenizer.num_tokens == len(ids)


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece_like"])
@settings(max_examples=150, deadline=None)
@given(text=TEXTS, cuts=st.lists(st.integers(0, 60), max_size=5))
def test_texts_stream_whole_characters(tokenizers, kind, text, cuts):
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(text, add_special_tokens=False)
    deltas = stream(Detokenizer(tokenizer, SamplingParams()), ids, cuts)
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    assert "".join(deltas) == whole
    if "\ufffd" not in whole:
        assert not any("\ufffd" in delta for delta in deltas)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_byte_and_window_streams_agree_on_text(tokenizers, data):
    tokenizer = tokenizers["byte_level"]
    ids = tokenizer.encode(data.draw(TEXTS), add_special_tokens=False)
    fast, slow = (kind(tokenizer, (), SamplingParams()) for kind in (ByteStream, WindowStream))
    assert ("".join(map(fast.push, ids)) + fast.flush()) == ("".join(map(slow.push, ids)) + slow.flush())


@pytest.mark.parametrize("include", [False, True], ids=["cut", "include"])
@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece_like", "metaspace"])
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_stop_strings_cut_the_text_and_never_leak(tokenizers, kind, include, data):
    tokenizer = tokenizers[kind]
    ids = data.draw(st.lists(st.integers(3, tokenizer.vocab_size - 1), min_size=1, max_size=25))
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    fragments = st.integers(0, max(0, len(whole) - 1)).flatmap(
        lambda start: st.integers(start + 1, start + 6).map(lambda end: whole[start:end]))
    stops = [s for s in data.draw(st.lists(st.one_of(fragments, st.text("ab .", max_size=3)), max_size=3)) if s]
    params = SamplingParams(stop=stops, include_stop_str_in_output=include)
    detokenizer = Detokenizer(tokenizer, params)
    shown = ""
    for token_id in ids:
        shown += detokenizer.feed([token_id])
        if detokenizer.stopped:
            break
    shown += detokenizer.finish()
    match = min(((whole.find(s) + len(s), -len(s), s) for s in stops if s in whole), default=None)
    if match is None:
        assert (shown, detokenizer.stopped) == (whole, None)
        return
    end, _, stop = match
    assert detokenizer.stopped == stop
    assert shown == detokenizer.text == (whole[:end] if include else whole[: end - len(stop)])
    assert stop in tokenizer.decode(ids[: detokenizer.num_tokens], skip_special_tokens=True)
    if kind != "sentencepiece_like" and "\ufffd" not in stop:  # else the text of a token is known later than the token
        assert stop not in tokenizer.decode(ids[: detokenizer.num_tokens - 1], skip_special_tokens=True)[:end]


def test_text_is_shown_as_soon_as_it_cannot_be_a_stop_string(tokenizers):
    tokenizer = tokenizers["byte_level"]
    detokenizer = Detokenizer(tokenizer, SamplingParams(stop=["xyz"]))
    deltas = [detokenizer.feed(tokenizer.encode(c)) for c in "axbxyxyz!"[:8]]
    assert deltas == ["a", "", "xb", "", "", "xy", "", ""]
    assert (detokenizer.stopped, detokenizer.finish(), detokenizer.text) == ("xyz", "", "axbxy")


def test_held_text_comes_at_the_end(tokenizers):
    tokenizer = tokenizers["byte_level"]
    detokenizer = Detokenizer(tokenizer, SamplingParams(stop=["dog!"]))
    assert detokenizer.feed(tokenizer.encode("a dog")) == "a "
    assert detokenizer.finish() == "dog"


def test_one_delta_with_tokens_beyond_the_stop(tokenizers):
    tokenizer = tokenizers["byte_level"]
    ids = [i for c in "abcdef" for i in tokenizer.encode(c)]
    detokenizer = Detokenizer(tokenizer, SamplingParams(stop=["d", "cd", "f"]))
    assert detokenizer.feed(ids) == "ab"
    assert (detokenizer.stopped, detokenizer.num_tokens) == ("cd", 4)


@pytest.mark.parametrize(("min_tokens", "stopped_at"), [(0, 2), (1, 2), (2, 4), (3, 4), (4, None)])
def test_stop_strings_wait_for_min_tokens(tokenizers, min_tokens, stopped_at):
    tokenizer = tokenizers["byte_level"]
    detokenizer = Detokenizer(tokenizer, SamplingParams(stop=["b"], min_tokens=min_tokens))
    shown = ""
    for char in "abab":
        shown += detokenizer.feed(tokenizer.encode(char))
        if detokenizer.stopped:
            break
    assert shown + detokenizer.finish() == ("abab"[: stopped_at - 1] if stopped_at else "abab")
    assert detokenizer.num_tokens == (stopped_at or 4)


def test_hidden_last_token_counts_but_does_not_show(tokenizers):
    tokenizer = tokenizers["byte_level"]
    ids = tokenizer.encode("a") + tokenizer.encode("b")
    for include, text in ((False, "a"), (True, "ab")):
        detokenizer = Detokenizer(tokenizer, SamplingParams(include_stop_str_in_output=include))
        assert detokenizer.feed(ids, hide_last=True) == text
        assert detokenizer.num_tokens == 2


def test_unfinished_character_shows_as_replacement_at_the_end(tokenizers):
    tokenizer = tokenizers["byte_level"]
    id_of = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    ids = [id_of[bytes([b])] for b in "😀".encode()]
    detokenizer = Detokenizer(tokenizer, SamplingParams())
    assert [detokenizer.feed([i]) for i in ids[:3]] == ["", "", ""]
    assert detokenizer.finish() == "\ufffd"
