"""Names of tokens in log-probabilities: none is lost, each is found by its own (vllm#44319)."""

from __future__ import annotations

import pytest

from serving.api.logprob_shapes import LOWEST, LogprobsWriter
from tests.serving.sentencepiece_model import write_checkpoint
from xllm.request import SamplingParams, TokenLogprobs
from xllm.text.token_text import TextContext
from xllm.text.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_checkpoint(tmp_path_factory.mktemp("pieces"), [["▁Hello", "▁world", "A\\"]]))


def writer(tokenizer: Tokenizer | None, *, as_ids: bool = False, before: tuple[int, ...] = ()) -> LogprobsWriter:
    return LogprobsWriter(tokenizer and TextContext(tokenizer, before, SamplingParams()), as_ids=as_ids)


def entry(token_id: int, *top: int) -> TokenLogprobs:
    return TokenLogprobs(token_id, -9.0, 99, top, tuple(-float(rank) for rank in range(1, len(top) + 1)))


def ids(tokenizer: Tokenizer, *tokens: str) -> list[int]:
    return [tokenizer.backend.token_to_id(token) for token in tokens]


def test_tokens_of_one_text_are_told_apart(tokenizer):
    letter, byte, backslash, partial = ids(tokenizer, "A", "<0x41>", "\\", "<0xE2>")
    padding = tokenizer.vocab_size + 1
    written = writer(tokenizer).completion([byte], [entry(byte, letter, partial, backslash, padding, padding + 1)], [0])
    assert written["tokens"] == ["A"]
    assert written["top_logprobs"] == [{"A": -9.0, f"token_id:{letter}": -1.0, "bytes:\\xe2": -2.0, "\\": -3.0,
                                        f"token_id:{padding}": -4.0, f"token_id:{padding + 1}": -5.0}]
    own_first = writer(tokenizer).completion([letter], [entry(letter, byte, letter)], [0])
    assert own_first["top_logprobs"] == [{f"token_id:{byte}": -1.0, "A": -9.0}]


def test_every_token_of_a_vocabulary_has_a_key(tokenizer):
    everything = range(tokenizer.vocab_size)
    for before in ((), tuple(ids(tokenizer, "A"))):
        (top,) = writer(tokenizer, before=before).completion([0], [entry(0, *everything)], [0])["top_logprobs"]
        assert len(top) == tokenizer.vocab_size


def test_chats_have_bytes(tokenizer):
    first, second, hello = ids(tokenizer, "<0xC3>", "<0xA9>", "▁Hello")
    content = writer(tokenizer).chat([entry(hello, hello), entry(first, second, first), entry(hello)], 2)["content"]
    assert [(e["token"], bytes(e["bytes"])) for e in content] == [
        ("Hello", b"Hello"), ("\ufffd", b"\xc3"), (" Hello", b" Hello")]
    assert [bytes(e["bytes"]) for e in content[1]["top_logprobs"]] == [b"\xa9", b"\xc3"]


def test_ids_and_no_tokenizer(tokenizer):
    for made in (writer(tokenizer, as_ids=True), writer(None)):
        written = made.completion([5, 6], [None, entry(6, 7)], [])
        assert written == {"tokens": ["token_id:5", "token_id:6"], "text_offset": [0, 0],
                           "token_logprobs": [None, -9.0], "top_logprobs": [None, {"token_id:7": -1.0,
                                                                                   "token_id:6": -9.0}]}
    assert writer(None).chat([TokenLogprobs(5, float("-inf"), 1)], 0)["content"] == [
        {"token": "token_id:5", "logprob": LOWEST, "bytes": None, "top_logprobs": []}]


def test_prompts_are_read_in_context(tokenizer):
    hello, world = ids(tokenizer, "▁Hello", "▁world")
    written = writer(tokenizer).prompt([1, hello, world], [None, entry(hello, world), entry(world)])
    assert written[0] is None
    assert [{i: e["decoded_token"] for i, e in each.items()} for each in written[1:]] == [
        {str(hello): "Hello", str(world): "world"}, {str(world): " world"}]
