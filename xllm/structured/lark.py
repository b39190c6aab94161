"""Finds the regular expressions and JSON schemas in a grammar in llguidance's Lark."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

_TOKEN = re.compile(r'"(?:\\.|[^"\\])*"|//[^\n]*|\#[^\n]*|/(?P<regex>(?:\\.|[^/\\\n])+)/|(?P<json>%json\s*)(?=\{)',
                    re.DOTALL)


def with_schemas(grammar: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> str:
    """The grammar with each `%json {...}` changed."""
    shown, begin = "", 0
    for start, end, schema in schemas_of(grammar):
        shown += grammar[begin:start] + json.dumps(change(schema))
        begin = end
    return shown + grammar[begin:]


def schemas_of(grammar: str) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """(start, end, schema) of each `%json {...}`; what is no JSON is left to llguidance."""
    for found, end in _tokens(grammar):
        if found["json"] is not None and end > found.end():
            yield found.end(), end, json.loads(grammar[found.end():end])


def regexes_of(grammar: str) -> Iterator[tuple[int, str]]:
    """(line, expression) of each `/.../`, a slash in it as it means it. Lines count from 1."""
    for found, _ in _tokens(grammar):
        if found["regex"] is not None:
            yield grammar.count("\n", 0, found.start()) + 1, found["regex"].replace("\\/", "/")


def _tokens(grammar: str) -> Iterator[tuple[re.Match[str], int]]:
    """Every token that may hold what looks like another one, and where it ends."""
    place = 0
    while found := _TOKEN.search(grammar, place):
        place = found.end()
        if found["json"] is not None:
            try:
                place = json.JSONDecoder().raw_decode(grammar, place)[1]
            except ValueError:
                return
        yield found, place
