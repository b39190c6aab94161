"""Is there an order of concurrent operations on one register in which each answers what it did, and none comes before
one that had ended when it was begun? (Wing and Gong 1993, with Lowe's memory of what was tried, 2017.)"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

NEVER = float("inf")
State = TypeVar("State", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Call(Generic[State]):
    """step(state): the state behind it; raises Impossible where it could not have answered as it did. ended_s:
    NEVER where no answer came: it may have been done at any time since, or not at all."""

    begun_s: float
    ended_s: float
    step: Callable[[State], State]
    shown: str = ""


class Impossible(Exception):
    """Of a call in a state."""


def stuck_at(calls: Sequence[Call[State]], start: State) -> list[Call[State]] | None:
    """None: there is such an order. Else the calls one of which would have to come next in the longest beginning of an
    order, and none can."""
    calls = sorted(calls, key=lambda call: call.begun_s)
    owed = sum(1 << place for place, call in enumerate(calls) if call.ended_s != NEVER)
    tried = {(0, start)}
    ways = [(0, start)]
    best, stuck = -1, list[Call[State]]()
    while ways:
        done, state = ways.pop()
        if done & owed == owed:
            return None
        next_ones = _next_ones(calls, done)
        if (length := done.bit_count()) > best:
            best, stuck = length, [calls[place] for place in next_ones]
        # Those that ended first are tried first, and last those that may never have been done.
        for place in sorted(next_ones, key=lambda place: -calls[place].ended_s):
            try:
                way = done | 1 << place, calls[place].step(state)
            except Impossible:
                continue
            if way not in tried:
                tried.add(way)
                ways.append(way)
    return stuck


def _next_ones(calls: Sequence[Call[State]], done: int) -> list[int]:
    """Those that are left and were begun before any of those that are left had ended."""
    found, first_end_s = [], NEVER
    place = (~done & (done + 1)).bit_length() - 1  # the first one that is left
    while place < len(calls) and calls[place].begun_s <= first_end_s:
        if not done >> place & 1:
            found.append(place)
            first_end_s = min(first_end_s, calls[place].ended_s)
        place += 1
    return [place for place in found if calls[place].begun_s <= first_end_s]
