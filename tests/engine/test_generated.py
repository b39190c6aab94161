"""Requests that go on after tokens that another engine has drawn: what comes is what that one would have drawn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from xllm.config import EngineConfig
from xllm.engine.core import EngineCore
from xllm.errors import RequestError
from xllm.request import FinishReason, Request, SamplingParams, TokenLogprobs
from xllm.structured.spec import StructuredOutput

NUM_TOKENS = 30
PROMPTS = [tuple(range(5, 60)), (17, 4, 99, 1000, 17, 4, 99, 1000, 17, 4), (8,)]
GOES_ON = {"max_tokens": NUM_TOKENS, "ignore_eos": True}
SAMPLINGS = {
    "greedy": SamplingParams(temperature=0, **GOES_ON),
    "seeded": SamplingParams(temperature=0.9, top_k=40, top_p=0.95, min_p=0.01, seed=7, **GOES_ON),
    "penalties": SamplingParams(temperature=0.8, seed=3, repetition_penalty=1.3, frequency_penalty=0.4,
                                presence_penalty=0.3, **GOES_ON),
    "logprobs": SamplingParams(temperature=0.7, seed=1, logprobs=3, prompt_logprobs=1, **GOES_ON),
    "bias and bad words": SamplingParams(temperature=0, logit_bias={17: 3.0}, bad_words_token_ids=((17, 4), (99,)),
                                         **GOES_ON),
    "form": SamplingParams(temperature=1.0, seed=5, max_tokens=NUM_TOKENS, min_tokens=NUM_TOKENS,
                           structured=StructuredOutput(regex=r"(return [a-c]\n){60}")),
    "stops": SamplingParams(temperature=1.0, seed=2, max_tokens=NUM_TOKENS, min_tokens=12,
                            stop_token_ids=tuple(range(4, 260))),
}
ENGINES: dict[str, dict[str, Any]] = {
    "plain": {},
    "thread": {"worker": "codec", "async_scheduling": True},
    "drafts in chunks, few blocks": {"speculative_method": "ngram", "max_num_batched_tokens": 19, "num_kv_blocks": 14,
                                     "watermark": 0.0},
}


@dataclass
class Answer:
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[Any] | None = None
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0


def open_engine(**settings: Any) -> EngineCore:
    return EngineCore(EngineConfig.from_flat(**{"max_model_len": 128, "num_kv_blocks": 64, "num_threads": 1,
                                                "max_num_seqs": 8, **settings}))


def answers(core: EngineCore, requests: Iterable[Request]) -> dict[str, Answer]:
    found: dict[str, Answer] = {}
    for request in requests:
        found[request.request_id] = Answer()
        core.add(request)
    while any(answer.finish_reason is None for answer in found.values()):
        for delta in core.step():
            answer = found[delta.request_id]
            answer.token_ids += delta.token_ids
            answer.logprobs += delta.logprobs or []
            answer.prompt_logprobs = delta.prompt_logprobs or answer.prompt_logprobs
            answer.finish_reason = delta.finish_reason
            answer.num_cached_tokens = delta.num_cached_tokens
    return found


@pytest.fixture(scope="module")
def whole() -> Iterator[dict[str, Answer]]:
    """Of one engine, without a break."""
    core = open_engine()
    yield answers(core, (Request(request_id=f"{name}/{place}", prompt_token_ids=prompt, sampling=sampling)
                         for name, sampling in SAMPLINGS.items() for place, prompt in enumerate(PROMPTS)))
    core.shutdown()


@pytest.mark.parametrize("engine", ENGINES)
def test_another_engine_goes_on(whole: dict[str, Answer], engine: str) -> None:
    core, requests, expected = open_engine(**ENGINES[engine]), [], {}
    for number, (name, first) in enumerate(whole.items()):
        kind, place = name.split("/")
        for cut in {1, 7 + number % 9, len(first.token_ids) - 1} & set(range(1, len(first.token_ids))):
            request = Request(request_id=f"{name}/{cut}", prompt_token_ids=PROMPTS[int(place)],
                              sampling=SAMPLINGS[kind], generated_token_ids=tuple(first.token_ids[:cut]))
            requests.append(request)
            expected[request.request_id] = (first, cut)
    found = answers(core, requests)
    core.shutdown()
    assert len(found) >= 2 * len(whole)
    for name, answer in found.items():
        first, cut = expected[name]
        assert answer.token_ids == first.token_ids[cut:], name
        assert answer.finish_reason == first.finish_reason
        assert [(e.token_id, e.rank, e.top_ids) for e in answer.logprobs] == [
            (e.token_id, e.rank, e.top_ids) for e in first.logprobs[cut:]]
        assert answer.prompt_logprobs is None
    assert {answer.finish_reason for answer in whole.values()} == {FinishReason.LENGTH, FinishReason.STOP}


def test_cached_tokens_are_of_the_prompt() -> None:
    """What the cache has of the generated tokens is not counted, as a prompt has no more tokens than it has."""
    core, prompt = open_engine(), tuple(range(5, 40))
    first = answers(core, [Request(request_id="a", prompt_token_ids=prompt, sampling=SAMPLINGS["greedy"])])["a"]
    again = Request(request_id="b", prompt_token_ids=prompt, sampling=SAMPLINGS["greedy"],
                    generated_token_ids=tuple(first.token_ids[:-1]))
    found = answers(core, [again])["b"]
    assert found.token_ids == first.token_ids[-1:] and found.num_cached_tokens == len(prompt)
    assert core.stats().cached_prompt_tokens_total == len(prompt)
    core.shutdown()


@pytest.fixture(scope="module")
def idle() -> Iterator[EngineCore]:
    core = open_engine()
    yield core
    core.shutdown()


@pytest.mark.parametrize(("fields", "reason"), [
    ({"generated_token_ids": tuple(range(NUM_TOKENS))}, "after 5 tokens of prompt and 30 generated ones no token is"),
    ({"generated_token_ids": (4, 4096)}, "generated_token_ids must be in 0 to 4095"),
    ({"generated_token_ids": (-1,)}, "generated_token_ids must be in 0 to 4095"),
    ({"generated_token_ids": (5,) * 123, "sampling": SamplingParams(max_tokens=None)}, "the sequence may have 128"),
])
def test_refused(idle: EngineCore, fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(RequestError, match=reason) as raised:
        idle.add(Request(**{"request_id": "a", "prompt_token_ids": (1, 2, 3, 4, 5), "sampling": SAMPLINGS["greedy"],
                            **fields}))
    assert raised.value.field == "generated_token_ids"
    assert not idle.has_work()
