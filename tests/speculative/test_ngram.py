"""The n-gram proposer against a search in plain Python."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm.config import SpeculativeSettings
from xllm.speculative.ngram import NgramProposer
from xllm.speculative.proposer_registry import make_proposer


def history_of(rows: list[list[int]]) -> SimpleNamespace:
    """Rows in a matrix whose unused part holds a tempting repetition of the last token."""
    width = max(map(len, rows)) + 8
    matrix = np.array([row + row[-1:] * (width - len(row)) for row in rows], dtype=np.int32)
    return SimpleNamespace(token_ids=matrix, num_tokens=np.array([len(row) for row in rows], dtype=np.int32))


def naive(tokens: list[int], num: int, min_length: int, max_length: int) -> list[int]:
    for length in range(min(max_length, len(tokens) - 1), min_length - 1, -1):
        suffix = tokens[-length:]
        for start in range(len(tokens) - length - 1, -1, -1):
            if tokens[start:start + length] == suffix:
                copy = list(tokens)
                for i in range(num):
                    copy.append(copy[start + length + i])
                return copy[len(tokens):]
    return []


@given(st.lists(st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=24), st.integers(0, 6)), min_size=1,
                max_size=4), st.integers(1, 3), st.integers(0, 3))
def test_equals_the_naive_search(rows: list[tuple[list[int], int]], min_length: int, more: int) -> None:
    proposer = NgramProposer(min_length=min_length, max_length=min_length + more)
    max_drafts_S = np.array([num for _, num in rows], dtype=np.int32)
    drafts_SR, num_drafts_S = proposer.propose(np.arange(len(rows), dtype=np.int32), max_drafts_S,
                                               history_of([tokens for tokens, _ in rows]))
    assert drafts_SR.dtype == num_drafts_S.dtype == np.int32
    assert drafts_SR.shape == (len(rows), max_drafts_S.max())
    expected = [naive(tokens, num, min_length, min_length + more) for tokens, num in rows]
    assert num_drafts_S.tolist() == [len(drafts) for drafts in expected]
    assert [row[:n] for row, n in zip(drafts_SR.tolist(), num_drafts_S.tolist())] == expected
    assert (drafts_SR[np.arange(drafts_SR.shape[1]) >= num_drafts_S[:, None]] == -1).all()


@pytest.mark.parametrize(("tokens", "drafts"), [
    ([1, 2, 3, 4, 1, 2], [3, 4, 1]),  # what followed
    ([1, 2, 3, 1, 2, 4, 1, 2], [4, 1, 2]),  # the most recent of two
    ([9, 1, 2, 3, 8, 1, 2, 4, 9, 1, 2], [3, 8, 1]),  # the longer suffix beats the more recent
    ([5, 5, 5], [5, 5, 5]),  # an overlapping match goes on for ever
    ([1, 2, 3], []),
    ([1], []),
])
def test_examples(tokens: list[int], drafts: list[int]) -> None:
    proposer = make_proposer(SpeculativeSettings(speculative_method="ngram", prompt_lookup_min=2, prompt_lookup_max=4))
    assert proposer is not None
    found, num = proposer.propose(np.array([0], np.int32), np.array([3], np.int32), history_of([tokens]))
    assert found[0, : num[0]].tolist() == drafts


def test_no_method_no_proposer() -> None:
    assert make_proposer(SpeculativeSettings()) is None
