"""`StopMatcher`: watches growing text for stop strings, one character at a time.

Each stop string has a Knuth-Morris-Pratt automaton (Knuth, Morris, Pratt, "Fast pattern matching in
strings", 1977) whose state is the length of the longest suffix of the text that begins the stop
string. That one number answers both questions: has it matched, and how much text must be held back.
The automata are shared by all texts that are watched for the same stop strings; a text has states only.
"""

from __future__ import annotations

import functools
from array import array
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

    __slots__ = ("_automata", "_begun")

    def __init__(self, stops: Sequence[str]):
        self._automata = _automata(tuple(stops))
        self._begun: dict[int, int] = {}  # by automaton: characters of its stop string that the text ends with, if any

    def feed(self, piece: str) -> StopMatch | None:
        """Read more text; returns the first match. After a match the matcher is spent."""
        found: StopMatch | None = None
        for index in self._concerned(piece):
            automaton = self._automata[index]
            end = self._advance(index, piece if found is None else piece[: found.end - 1])
            if end:
                found = StopMatch(automaton.stop, end)
        return found

    def skip(self, piece: str) -> None:
        """Read text in which no stop string may end, though one may begin."""
        for index in self._concerned(piece):
            start = 0
            while end := self._advance(index, piece[start:]):
                start += end

    def _concerned(self, piece: str) -> Sequence[int]:
        """The automata that have begun or may begin in `piece`; the others stay where they are."""
        begun = self._begun
        return [index for index, automaton in enumerate(self._automata) if index in begun or automaton.first in piece]

    def _advance(self, index: int, piece: str) -> int:
        state, end = self._automata[index].advance(self._begun.get(index, 0), piece)
        if state:
            self._begun[index] = state
        else:
            self._begun.pop(index, None)
        return end

    @property
    def num_held(self) -> int:
        """Characters at the end of the text that could become a stop string."""
        return max(self._begun.values(), default=0)


class _Automaton:
    """Without a state, and so for any number of texts. The table grows as far as any of them has matched: a long stop
    string costs no more than the text in which it is looked for."""

    __slots__ = ("_borders", "first", "stop")

    def __init__(self, stop: str):
        self.stop, self.first = stop, stop[0]
        # For every prefix length n: the length of the longest proper prefix of stop[:n] that also ends it.
        self._borders = array("l", (0, 0))

    def advance(self, state: int, piece: str) -> tuple[int, int]:
        """Read `piece` in a state; the new state, and where the first match ends in the piece, or 0."""
        stop, position = self.stop, 0
        if state and state + len(piece) < len(stop) and stop.startswith(piece, state):  # it goes on, all of it
            return state + len(piece), 0
        while position < len(piece):
            if state == 0:  # jump to where a match can begin at all
                position = piece.find(self.first, position)
                if position < 0:
                    break
            char = piece[position]
            while state and stop[state] != char:
                state = self._fallback(state)
            if stop[state] == char:
                state += 1
            position += 1
            if state == len(stop):
                return self._fallback(state), position
        return state, 0

    def _fallback(self, state: int) -> int:
        return self._borders[state] if state < len(self._borders) else self._grown(state)[state]

    def _grown(self, state: int) -> array[int]:
        """A longer table, put in place of the old one when it is whole: texts may be watched in several threads."""
        borders, stop = self._borders[:], self.stop
        for char in stop[len(borders) - 1 : max(state, 2 * len(borders))]:
            length = borders[-1]
            while length and stop[length] != char:
                length = borders[length]
            borders.append(length + (stop[length] == char))
        self._borders = borders
        return borders


@functools.lru_cache(maxsize=64)
def _automata(stops: tuple[str, ...]) -> tuple[_Automaton, ...]:
    """The longest first."""
    return tuple(map(_Automaton, sorted(set(stops), key=len, reverse=True)))
