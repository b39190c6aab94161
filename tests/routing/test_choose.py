"""Which engine a request goes to: what must hold of every choice, and choices that a person can check."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm.routing.choose import OPEN_REQUEST_TOKENS, WORK_DIVISOR, Candidate, choose

AMPLE = 10**6
NUM_TOKENS = 1000
CANDIDATES = st.lists(st.builds(
    Candidate, matched_tokens=st.integers(0, NUM_TOKENS), waiting_tokens=st.integers(0, 3000),
    num_open=st.integers(0, 40), free_tokens=st.integers(0, 2000), is_full=st.booleans()), min_size=1, max_size=6)
TURNS = st.integers(0, 7)


def engine(matched: int = 0, waiting: int = 0, num_open: int = 0, free: int = AMPLE, full: bool = False) -> Candidate:
    return Candidate(matched_tokens=matched, waiting_tokens=waiting, num_open=num_open, free_tokens=free, is_full=full)


@pytest.mark.parametrize(("candidates", "chosen"), [
    ([engine(), engine(matched=500)], 1),
    ([engine(matched=500), engine(matched=600)], 1),
    ([engine(), engine(matched=500, waiting=624)], 1),
    ([engine(), engine(matched=500, waiting=626)], 0),
    ([engine(num_open=1), engine(matched=500, num_open=10)], 1),
    ([engine(), engine(matched=500, num_open=10)], 0),
    ([engine(num_open=3), engine(num_open=2)], 1),
    ([engine(waiting=OPEN_REQUEST_TOKENS), engine(num_open=1)], 0),
    ([engine(), engine(matched=500, free=499)], 0),
    ([engine(waiting=9000), engine(matched=500, free=500)], 1),
    ([engine(waiting=9000), engine(matched=900, full=True)], 0),
    ([engine(free=10), engine(full=True)], 0),
    ([engine(full=True), engine(full=True, matched=20)], 1),
], ids=["cached", "longer", "its queue is shorter", "its queue is longer", "few run there", "many run there",
        "fewer run", "waiting or running", "no memory", "memory enough", "full", "full is worse", "all full"])
def test_choices(candidates: list[Candidate], chosen: int) -> None:
    assert choose(candidates, NUM_TOKENS) == chosen


def test_equal_ones_take_turns() -> None:
    same = [engine(matched=7)] * 3
    assert [choose(same, NUM_TOKENS, turn) for turn in range(7)] == [0, 1, 2, 0, 1, 2, 0]


@given(CANDIDATES, TURNS)
def test_the_order_of_the_engines_does_not_matter(candidates: list[Candidate], turn: int) -> None:
    """But among those that are equal."""
    place = choose(candidates, NUM_TOKENS, turn)
    assert 0 <= place < len(candidates)
    mirrored = candidates[::-1]
    other = mirrored[choose(mirrored, NUM_TOKENS, turn)]
    assert cost(other) == cost(candidates[place])


def cost(candidate: Candidate) -> tuple[bool, bool, int, int]:
    left = NUM_TOKENS - candidate.matched_tokens
    sum_of_tokens = candidate.waiting_tokens + left + left // WORK_DIVISOR + OPEN_REQUEST_TOKENS * candidate.num_open
    return candidate.is_full, left > candidate.free_tokens, sum_of_tokens, candidate.num_open


@given(CANDIDATES, TURNS, st.data())
def test_more_cached_and_less_to_do_never_lose_a_request(candidates: list[Candidate], turn: int,
                                                         data: st.DataObject) -> None:
    place = choose(candidates, NUM_TOKENS, turn)
    old = candidates[place]
    better = replace(old, matched_tokens=data.draw(st.integers(old.matched_tokens, NUM_TOKENS)),
                     waiting_tokens=data.draw(st.integers(0, old.waiting_tokens)),
                     num_open=data.draw(st.integers(0, old.num_open)), free_tokens=old.free_tokens + 5)
    assert choose([*candidates[:place], better, *candidates[place + 1:]], NUM_TOKENS, turn) == place


@given(CANDIDATES, TURNS)
def test_the_longest_prefix_wins_unless_it_costs_more_than_it_saves(candidates: list[Candidate], turn: int) -> None:
    able = [c for c in candidates if not c.is_full and NUM_TOKENS - c.matched_tokens <= c.free_tokens]
    if not able:
        return
    chosen, longest = candidates[choose(candidates, NUM_TOKENS, turn)], max(able, key=lambda c: c.matched_tokens)
    saved = longest.matched_tokens - chosen.matched_tokens
    behind = (longest.waiting_tokens - chosen.waiting_tokens
              + OPEN_REQUEST_TOKENS * (longest.num_open - chosen.num_open))
    assert chosen in able and (saved <= 0 or behind >= saved)
