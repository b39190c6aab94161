"""`StopMatcher`: watches growing text for stop strings, one character at a time.

Each stop string has a Knuth-Morris-Pratt automaton (Knuth, Morris, Pratt, "Fast pattern matching in
strings", 1977) whose state is the length of the longest suffix of the text that begins the stop
string. That one number answers both questions: has it matched, and how much text must be held back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StopMatch:
    """`stop` ends `end` characters into the piece that was fed."""

    stop: str
    end: int


class StopMatcher:
    """Finds the stop string that is complete first; of two that end together, the longer.

    The result depends on the text alone, not on how it was cut into pieces.
    """

    __slots__ = ("_stops",)

    def __init__(self, stops: Sequence[str]):
        self._stops = [_Automaton(stop) for stop in sorted(set(stops), key=len, reverse=True)]

    def feed(self, piece: str) -> StopMatch | None:
        """Read more text; returns the first match. After a match the matcher is spent."""
        found: StopMatch | None = None
        for automaton in self._stops:
            end = automaton.advance(piece if found is None else piece[: found.end - 1])
            if end:
                found = StopMatch(automaton.stop, end)
        return found

    def skip(self, piece: str) -> None:
        """Read text in which no stop string may end, though one may begin."""
        for automaton in self._stops:
            start = 0
            while end := automaton.advance(piece[start:]):
                start += end

    @property
    def num_held(self) -> int:
        """Characters at the end of the text that could become a stop string."""
        return max([automaton.state for automaton in self._stops], default=0)


class _Automaton:
    __slots__ = ("_fallback", "state", "stop")

    def __init__(self, stop: str):
        self.stop = stop
        self.state = 0  # characters of `stop` that the text ends with
        self._fallback = _borders(stop)

    def advance(self, piece: str) -> int:
        """Read `piece`; where the first match ends in it, or 0."""
        stop, fallback, state, position = self.stop, self._fallback, self.state, 0
        while position < len(piece):
            if state == 0:  # jump to where a match can begin at all
                position = piece.find(stop[0], position)
                if position < 0:
                    break
            char = piece[position]
            while state and stop[state] != char:
                state = fallback[state]
            if stop[state] == char:
                state += 1
            position += 1
            if state == len(stop):
                self.state = fallback[state]
                return position
        self.state = state
        return 0


def _borders(stop: str) -> list[int]:
    """For every prefix length n: the length of the longest proper prefix of stop[:n] that also ends it."""
    borders = [0, 0]
    length = 0
    for char in stop[1:]:
        while length and stop[length] != char:
            length = borders[length]
        if stop[length] == char:
            length += 1
        borders.append(length)
    return borders
