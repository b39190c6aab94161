"""A sampling parameter, a backend, a setting of the cache, a proposer and a policy, in one engine."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from backends import get_backend
from backends.backend import Backend
from xllm import LLM, SamplingParams
from xllm.errors import RequestError

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
PROMPTS = ["def add(a, b):", "Once upon a time", "one two one two one"]
SETTINGS: dict[str, Any] = {"max_model_len": 96, "num_kv_blocks": 48, "num_threads": 1}


def tokens(llm: LLM, sampling: SamplingParams) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in llm.generate(PROMPTS, sampling, use_tqdm=False)]


@pytest.fixture(scope="module")
def truth() -> list[list[int]]:
    """Of the CPU's own operators."""
    with LLM(device="cpu", **SETTINGS) as llm:
        return tokens(llm, GREEDY)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(device="plain", scheduling_policy="ljf", eviction_policy="lifo", speculative_method="repeat",
             num_speculative_tokens=3, **SETTINGS) as loaded:
        yield loaded


def test_backend_is_one() -> None:
    backend = get_backend("plain")
    assert isinstance(backend, Backend)
    assert backend.kv_cache_shape(3, 8, 2, 16)[0] == 3


def test_backend_policy_and_proposer_change_no_token(llm: LLM, truth: list[list[int]]) -> None:
    assert llm.facts.placement.device == "plain" and llm.facts.config.cache.block_size == 8
    for _ in range(2):  # the second time with cached prefixes
        assert tokens(llm, GREEDY) == truth
    assert llm.stats().spec_draft_tokens_total > 0


def test_no_ngram_comes_twice(llm: LLM, truth: list[list[int]]) -> None:
    def repeats(found: list[int]) -> bool:
        pairs = list(itertools.pairwise(found))
        return len(set(pairs)) < len(pairs)

    sampling = GREEDY.varied(max_tokens=40)
    assert any(map(repeats, tokens(llm, sampling)))
    assert not any(map(repeats, tokens(llm, sampling.varied(no_repeat_ngram_size=2))))
    with pytest.raises(RequestError, match="no_repeat_ngram_size must be in"):
        SamplingParams(no_repeat_ngram_size=-1)


def test_a_gap_of_almost_nothing_is_greedy(llm: LLM, truth: list[list[int]]) -> None:
    assert tokens(llm, GREEDY.varied(temperature=1.0, max_gap=1e-6)) == truth
