"""`BadWords` against a search through all words."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from xllm.request import SamplingParams
from xllm.runner.bad_words import BadWords
from xllm.runner.logit_edits import LogitEdits, TableStore

TOKENS = st.integers(0, 2) | st.sampled_from([255, 256, 70000])
WORDS = st.lists(st.lists(TOKENS, min_size=2, max_size=5).map(tuple), min_size=1, max_size=8, unique=True)


@given(WORDS, st.lists(TOKENS, max_size=8))
def test_completed(words: list[tuple[int, ...]], output: list[int]) -> None:
    found = BadWords(words).completed(np.array(output, dtype=np.int32))
    tail = tuple(output)
    assert sorted(found) == sorted(word[-1] for word in words if tail[-len(word) + 1:] == word[:-1])


def test_rows_of_a_call_share_their_tables() -> None:
    store = TableStore(100, torch.device("cpu"))
    first = SamplingParams(allowed_token_ids=range(50), bad_words_token_ids=[(1, 2)], seed=1)
    one, other = (LogitEdits(params, store.of(params, (7,))) for params in (first, first.varied(seed=2)))
    assert one.allowed_W is other.allowed_W is not None
    alike = SamplingParams(allowed_token_ids=range(50), bad_words_token_ids=[(1, 2)])
    assert store.of(alike, (7,)) is not store.of(first, (7,)) is store.of(first, (7,))
    assert store.of(first, (8,)) is not store.of(first, (7,))
