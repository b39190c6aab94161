"""Refuses mistakes in regular expressions that llguidance's parser would accept with another meaning.

llguidance reads the syntax of Rust's `regex` crate, which takes `foo**` for a repetition of a repetition; Python and
ECMA-262 refuse it. `[]a]` is a class that holds a bracket to the crate and to Python; to ECMA-262 it is a class without
members, and `a]`. A JSON schema's `pattern` is read by `ecma.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

_COUNT = re.compile(r"\{\s*\d*\s*(,\s*\d*\s*)?\}")
_ESCAPE = re.compile(r"\\(?:[pP](?:\{[^}]*\}|.)|[xuU]\{[^}]*\}|x..|u.{4}|U.{8}|.)", re.DOTALL)
_GROUP = re.compile(r"\((?:\?(?:P?<\w+>|(?P<flags>[a-zA-Z-]*)(?P<end>[:)])))?")
_POSIX = re.compile(r"\[:\^?[a-z]+:\]")
# What a repetition cannot stand behind, besides the beginning.
_NOTHING = frozenset({"open", "bar", "anchor", "flags"})
_SHOWN_CHARS = 12  # of the expression around a mistake, in its message


class RegexError(ValueError):
    """A mistake in a regular expression, with its position."""


class _Part(NamedTuple):
    kind: str
    start: int
    end: int


def check_regex(pattern: str) -> None:
    """Raise RegexError for what only the `regex` crate's syntax accepts. Whether it is a valid expression at all,
    llguidance checks."""
    _read(pattern)


def _read(pattern: str) -> None:
    before = ""
    for part in _parts(pattern):
        if part.kind == "repetition":
            if before == "repetition":
                raise mistake(pattern, part.start, "a repetition cannot be repeated; put it in a group, or escape it")
            if before in _NOTHING or not before:
                raise mistake(pattern, part.start, "there is nothing to repeat; escape it if it stands for itself")
        before = part.kind


def _parts(pattern: str) -> Iterator[_Part]:
    place = 0
    while place < len(pattern):
        kind, end = _part(pattern, place)
        if kind == "unknown":  # a group that llguidance will refuse, or (?x), after which blanks mean nothing
            return
        yield _Part(kind, place, end)
        place = end


def _part(pattern: str, place: int) -> tuple[str, int]:
    """Kind and end of what begins there."""
    first = pattern[place]
    if first == "\\":
        found = _ESCAPE.match(pattern, place)
        end = len(pattern) if found is None else found.end()
        name = pattern[place + 1:place + 2]
        return "class" if name in ("p", "P") else "anchor" if name and name in "AzbB<>" else "atom", end
    if first == "[":
        end = _class_end(pattern, place)
        return "class" if pattern[end - 1] == "]" else "atom", end
    if first == "(":
        found = _GROUP.match(pattern, place)
        assert found is not None, "a bracket is enough"
        if found[0] == "(" and pattern.startswith("?", found.end()):
            return "unknown", found.end()
        flags, closes = found["flags"] or "", found["end"] == ")"
        if "x" in flags.partition("-")[0]:
            return "unknown", found.end()
        return "flags" if closes else "open", found.end()
    if first in "*+?" or (first == "{" and _COUNT.match(pattern, place)):
        return "repetition", _repetition_end(pattern, place)
    return {")": "close", "|": "bar", "^": "anchor", "$": "anchor"}.get(first, "atom"), place + 1


def _repetition_end(pattern: str, place: int) -> int:
    """Behind the question mark that makes it lazy, if there is one."""
    end = place + 1
    if count := _COUNT.match(pattern, place):
        end = count.end()
        if any(char.isspace() for char in count[0]):
            raise mistake(pattern, place, "a count holds no blanks")
    return end + pattern.startswith("?", end)


def _class_end(pattern: str, place: int, *, is_inner: bool = False) -> int:
    """The end of the class that begins there; of the pattern if it does not end. Raises RegexError."""
    inside = place + (2 if pattern.startswith("[^", place) else 1)
    if pattern.startswith("]", inside):
        raise mistake(pattern, place, r"a bracket within a class begins another class; one that stands for itself is "
                      r"written \[" if is_inner else r"a class needs members; a bracket is written \]")
    while inside < len(pattern):
        char = pattern[inside]
        if char == "]":
            return inside + 1
        if char == "\\":
            inside += 2
        elif char != "[":
            inside += 1
        else:
            posix = _POSIX.match(pattern, inside)
            inside = posix.end() if posix else _class_end(pattern, inside, is_inner=True)
    return len(pattern)


def mistake(pattern: str, place: int, reason: str) -> RegexError:
    """The error for what is wrong at a place of a pattern."""
    shown = pattern[max(0, place - _SHOWN_CHARS):place + _SHOWN_CHARS]
    return RegexError(f"position {place} of the regular expression, in {shown!r}: {reason}")
