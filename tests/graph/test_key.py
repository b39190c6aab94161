"""Buckets: every step finds the smallest shape that can hold it, and padding that no kernel trips over."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graph.key import BucketRules, GraphKey, at_least, bucket_sizes, padding_lengths, power_sizes

RULES = st.builds(BucketRules, max_seqs=st.integers(1, 80), draft_length=st.integers(0, 6),
                  max_mixed_tokens=st.sampled_from([0, 7, 64, 100]), step=st.sampled_from([8, 16]))


def test_sizes() -> None:
    assert bucket_sizes(256)[:8] == (1, 2, 4, 8, 16, 32, 48, 64)
    assert bucket_sizes(64, 8) == (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64)
    assert bucket_sizes(100)[-3:] == (80, 96, 100)
    assert [bucket_sizes(n) for n in (1, 3, 16, 17)] == [(1,), (1, 2, 3), (1, 2, 4, 8, 16), (1, 2, 4, 8, 16, 17)]
    assert power_sizes(100) == (1, 2, 4, 8, 16, 32, 64, 100)
    assert power_sizes(0) == ()


@given(st.integers(1, 600), st.integers(1, 64), st.integers(1, 700))
def test_the_next_size_is_the_smallest_that_holds(limit: int, step: int, size: int) -> None:
    sizes = bucket_sizes(limit, step)
    assert list(sizes) == sorted(set(sizes))
    assert at_least(sizes, size) == min((s for s in sizes if s >= size), default=None)


@given(RULES, st.integers(1, 80))
def test_decode_pads_to_the_next_size(rules: BucketRules, num_seqs: int) -> None:
    key = rules.find(num_seqs, num_seqs, 1)
    assert (key is None) == (num_seqs > rules.max_seqs)
    if key is not None:
        size = at_least(bucket_sizes(rules.max_seqs, rules.step), num_seqs)
        assert key == GraphKey(kind="decode", num_tokens=size, num_seqs=size)
        assert padding_lengths(key, num_seqs, num_seqs).tolist() == [1] * (size - num_seqs)


@given(RULES, st.data())
def test_any_step_fits_its_key(rules: BucketRules, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 8), min_size=1, max_size=rules.max_seqs))
    num_tokens, num_seqs, longest = sum(lengths), len(lengths), max(lengths)
    key = rules.find(num_tokens, num_seqs, longest)
    if key is None:
        assert longest > 1
        assert longest > 1 + rules.draft_length or num_tokens + rules.step > rules.max_seqs * (1 + rules.draft_length)
        return
    padding = padding_lengths(key, num_tokens, num_seqs)
    assert key.num_tokens == num_tokens + padding.sum()
    assert key.num_seqs == num_seqs + len(padding)
    assert longest <= key.max_query_len
    assert not len(padding) or 1 <= padding.min() <= padding.max() <= key.max_query_len
    assert key.num_tokens <= rules.max_num_tokens
    assert key.num_seqs <= rules.max_num_seqs


@given(st.lists(st.integers(1, 5), min_size=1, max_size=16))
def test_every_step_of_drafts_has_a_bucket_while_rows_are_free(lengths: list[int]) -> None:
    """Half of the rows idle: then there is always room for padding rows."""
    rules = BucketRules(max_seqs=32, draft_length=4)
    assert rules.find(sum(lengths), len(lengths), max(*lengths, 2)) is not None


def test_the_smallest_number_of_tokens_wins() -> None:
    """Compute goes with tokens, so rows are added to take a smaller step's padding."""
    key = BucketRules(max_seqs=16, draft_length=4).find(11, 4, 5)
    assert key == GraphKey(kind="verify", num_tokens=16, num_seqs=8, draft_length=4)
    full = BucketRules(max_seqs=4, draft_length=3).find(16, 4, 4)
    assert (full.num_tokens, full.num_seqs) == (16, 4)


def test_kinds() -> None:
    rules = BucketRules(max_seqs=8, draft_length=2, max_mixed_tokens=32)
    assert [rules.find(n, 1, n).kind for n in (1, 2, 3, 4, 31)] == ["decode", "verify", "verify", "mixed", "mixed"]
    assert rules.find(33, 1, 33) is None
    assert BucketRules(max_seqs=8).find(2, 1, 2) is None
    keys = rules.find(1, 1, 1), rules.find(3, 1, 3), rules.find(20, 2, 19)
    assert [key.max_query_len for key in keys] == [1, 3, 32]


def test_padding_is_even_and_refuses_what_does_not_fit() -> None:
    key = GraphKey(kind="verify", num_tokens=16, num_seqs=8, draft_length=4)
    assert padding_lengths(key, 6, 4).tolist() == [3, 3, 2, 2]
    assert padding_lengths(key, 6, 4).dtype == np.int32
    with pytest.raises(AssertionError, match="without a row"):
        padding_lengths(key, 15, 8)
    with pytest.raises(AssertionError, match="does not fit"):
        padding_lengths(key, 2, 7)
