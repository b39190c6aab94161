"""`InputProcessor`: what a request becomes, and every way in which it can be wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import xllm
from xllm.errors import RequestError
from xllm.inputs import InputProcessor
from xllm.request import MAX_BAD_WORDS, SamplingParams
from xllm.text.tokenizer import Tokenizer, load_tokenizer

VOCAB = 4096


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(Path(xllm.__file__).parent / "bundled")


@pytest.fixture(scope="module")
def inputs(tokenizer) -> InputProcessor:
    return InputProcessor(tokenizer, vocab_size=VOCAB, max_model_len=32, eos_token_ids=(0,))


@pytest.fixture(scope="module")
def blind() -> InputProcessor:
    """With skip_tokenizer_init."""
    return InputProcessor(None, vocab_size=VOCAB, max_model_len=32, eos_token_ids=(0,))


@pytest.mark.parametrize("prompt", [
    "def f", {"prompt": "def f"}, "ids", "array", "mapping",
], ids=["text", "prompt", "ids", "array", "mapping"])
def test_forms_of_a_prompt(inputs, tokenizer, prompt):
    ids = tokenizer.encode("def f")
    forms = {"ids": ids, "array": np.array(ids), "mapping": {"prompt_token_ids": tuple(ids), "prompt": "def f"}}
    given = forms.get(prompt, prompt) if isinstance(prompt, str) else prompt
    source = inputs.process("r", given, SamplingParams())
    assert source.prompt_token_ids == ids
    assert source.prompt == (None if prompt in ("ids", "array") else "def f")
    (request,) = source.requests
    assert request.eos_token_ids[0] == 0
    assert set(tokenizer.eos_token_ids) <= set(request.eos_token_ids)


@pytest.mark.parametrize(("prompt", "word"), [
    ("", "empty"), ([], "empty"), ({"prompt": None}, "give"), ({"text": "x"}, "unknown key 'text'"), (7, "got int"),
    (b"x", "got bytes"), ([1, "2"], "integers"), ([True], "integers"), ([1.0], "integers"), ([-1], "outside"),
    ([VOCAB], "outside"), ([1] * 32, "at most 31"), ("a\ud800", "surrogate"),
])
def test_wrong_prompts(inputs, prompt, word):
    with pytest.raises(RequestError, match=word) as caught:
        inputs.process("r", prompt, SamplingParams())
    assert caught.value.field == "prompt"


@pytest.mark.parametrize(("field", "params"), [
    ("stop_token_ids", {"stop_token_ids": [VOCAB]}), ("logit_bias", {"logit_bias": {-1: 1.0}}),
    ("allowed_token_ids", {"allowed_token_ids": [VOCAB]}), ("stop", {"stop": "x", "detokenize": False}),
    ("bad_words", {"bad_words": ["\udc00"]}),
    ("bad_words", {"bad_words": [f"w{n}" for n in range(MAX_BAD_WORDS)]}),
])
def test_wrong_parameters(inputs, field, params):
    with pytest.raises(RequestError) as caught:
        inputs.process("r", "x", SamplingParams(**params))
    assert caught.value.field == field


@pytest.mark.parametrize(("field", "prompt", "params"), [
    ("prompt", "text", {}), ("prompt", {"prompt": "text"}, {}), ("stop", [1], {"stop": "x"}),
    ("bad_words", [1], {"bad_words": ["x"]}),
])
def test_text_needs_a_tokenizer(blind, field, prompt, params):
    with pytest.raises(RequestError, match="skip_tokenizer_init") as caught:
        blind.process("r", prompt, SamplingParams(**params))
    assert caught.value.field == field
    assert blind.process("r", [1, 2], SamplingParams()).prompt_token_ids == [1, 2]


def test_choices_get_ids_and_seeds_of_their_own(inputs):
    seeded = inputs.process("r", "x", SamplingParams(n=3, seed=7, prompt_logprobs=1))
    seeds = [r.sampling.seed for r in seeded.requests]
    assert seeds[0] == 7
    assert len(set(seeds)) == 3
    assert [r.sampling.prompt_logprobs for r in seeded.requests] == [1, None, None]
    assert all(r.sampling.n == 1 for r in seeded.requests)
    unseeded = inputs.process("r", "x", SamplingParams(n=2))
    assert [r.sampling.seed for r in unseeded.requests] == [None, None]
    ids = [r.request_id for r in (*seeded.requests, *unseeded.requests)]
    assert len(set(ids)) == 5


def test_bad_words_are_banned_with_and_without_a_blank(inputs, tokenizer):
    (request,) = inputs.process("r", "x", SamplingParams(bad_words=["return", " self"])).requests
    banned = set(request.sampling.bad_words_token_ids)
    for text in ("return", " return", "self", " self"):
        assert tuple(tokenizer.encode(text)) in banned


def test_sequences_of_a_call_share_their_parameters(inputs):
    params = SamplingParams(n=4, seed=1, stop=["x"], bad_words=["return"], logit_bias={5: 1.0})
    first, *others = (request for _ in range(2) for request in inputs.process("r", "x", params).requests)
    assert all(other.sampling.shares_collections(first.sampling) for other in others)
    assert len({request.sampling.seed for request in (first, *others)}) == 4
    alike = inputs.process("r", "x", SamplingParams(n=3, stop=["x"])).requests
    assert len({id(request.sampling) for request in alike}) == 1
