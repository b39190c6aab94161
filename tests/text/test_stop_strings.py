"""`StopMatcher` against the definition: the match that ends first, whatever the pieces."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm.text.stop_strings import StopMatcher

LETTERS = st.text(alphabet="ab", max_size=30)
STOPS = st.lists(st.text(alphabet="ab", min_size=1, max_size=5), min_size=1, max_size=4)


def first_match(text: str, stops: list[str]) -> tuple[str, int] | None:
    """The slow truth: (stop, where it ends)."""
    for end in range(1, len(text) + 1):
        ending = [s for s in stops if text[:end].endswith(s)]
        if ending:
            return max(ending, key=len), end
    return None


def num_held(text: str, stops: list[str]) -> int:
    return max(n for s in stops for n in range(len(s)) if text.endswith(s[:n]))


@settings(max_examples=300, deadline=None)
@given(LETTERS, STOPS, st.lists(st.integers(0, 30), max_size=6))
def test_equals_the_definition(text, stops, cuts):
    matcher = StopMatcher(stops)
    bounds = sorted({0, len(text), *(c for c in cuts if c < len(text))})
    for start, end in itertools.pairwise(bounds):
        match = matcher.feed(text[start:end])
        expected = first_match(text[:end], stops)
        assert (match and (match.stop, start + match.end)) == expected
        if match:
            return
        assert matcher.num_held == num_held(text[:end], stops)


@settings(max_examples=200, deadline=None)
@given(LETTERS, LETTERS, STOPS)
def test_skipped_text_can_begin_a_match_but_not_end_one(skipped, text, stops):
    matcher = StopMatcher(stops)
    matcher.skip(skipped)
    assert matcher.num_held == num_held(skipped, stops)
    match = matcher.feed(text)
    ends = [(n, s) for n in range(1, len(text) + 1) for s in stops if (skipped + text[:n]).endswith(s)]
    expected = min(ends, key=lambda e: (e[0], -len(e[1])), default=None)
    assert (match and (match.end, match.stop)) == expected


@pytest.mark.timeout(10)
def test_long_repetitive_stop_strings_stay_linear():
    matcher = StopMatcher([("a" * 4000) + c for c in "bcdefgh"])
    for _ in range(2000):
        assert matcher.feed("aaaa") is None
    assert matcher.num_held == 4000
    match = matcher.feed("ad")
    assert match is not None
    assert match.stop[-1] == "d"
