"""Checks what methods and filters of text are given, so that none makes too much or runs for long inside C."""

from __future__ import annotations

import re
from collections.abc import Sized
from typing import Any

from xllm.text.template_weights import MAX_VALUES, TemplateLimitError, TemplateWeights

MAX_INDENT = 64  # chosen: more than any layout needs; each level of nesting repeats it
# Of a longer text only what copies or searches it once is allowed. Chosen: one such pass is short.
LONG_TEXT_CHARS = 2**20
MARKUP_CHARS = 2**16  # for filters whose time grows with the square of the text. Chosen: 2^32 cheap steps at most
# Of a search that compares every place with every character. Chosen: some tenths of a second at a step a nanosecond.
MAX_STEPS = 2**28
_LONG_FIELD = re.compile(r"\d{5}")
_WHITESPACE = " \n\t\r\v\f\x1c\x1d\x1e\x85\xa0\u2028\u2029\u3000"
# They take about as long as copying the text does, or look at each pair of places at worst, which is counted.
_CHEAP = frozenset({"strip", "lstrip", "rstrip", "trim", "replace", "startswith", "endswith", "find", "index", "count",
                    "rfind", "rindex", "split", "rsplit", "partition", "rpartition", "removeprefix", "removesuffix",
                    "join", "length", "default", "d", "first", "last", "string", "tojson", "indent", "expandtabs",
                    "splitlines", "map", "select", "reject", "upper", "lower", "safe", "truncate"})
_QUADRATIC = frozenset({"striptags", "urlize", "wordwrap", "title", "wordcount", "xmlattr", "pprint"})
_FROM_BEHIND = frozenset({"rfind", "rindex", "rsplit", "rpartition", "strip", "lstrip", "rstrip", "trim"})


def check_text_call(text: str, method: str, arguments: tuple[Any, ...], weights: TemplateWeights,
                    max_chars: int) -> None:
    """Raise TemplateLimitError for a method or filter of `text` that would take or make too much."""
    if len(text) > (MARKUP_CHARS if method in _QUADRATIC else LONG_TEXT_CHARS) and method not in _CHEAP:
        raise TemplateLimitError(f"it uses {method} on a text of {len(text)} characters")
    if method == "translate":
        raise TemplateLimitError("it translates text")
    if method in ("split", "rsplit", "splitlines"):
        _check_cuts(text, arguments)
    if method in _FROM_BEHIND:
        for sought in arguments:
            if isinstance(sought, str) and len(sought) > 1 and len(text) * len(sought) > MAX_STEPS:
                raise TemplateLimitError(f"it uses {method} with too long a text")
    if method == "replace" and len(arguments) > 1 and isinstance(arguments[1], str):
        check_product(len(text) + 1, len(arguments[1]), max_chars)
    elif method == "join" and arguments and isinstance(arguments[0], Sized):
        weights.check(arguments[0])
        check_product(len(arguments[0]), len(text), max_chars)
    elif method in ("indent", "expandtabs"):
        widths = [value if isinstance(value, int) else len(value) for value in arguments
                  if isinstance(value, (int, str))]
        if max(widths, default=0) > MAX_INDENT:
            raise TemplateLimitError(f"it indents by more than {MAX_INDENT}")
        check_product(text.count("\n") + text.count("\t") + 1, max(widths, default=8), max_chars)
    elif method in ("format", "format_map"):
        check_format(text, arguments, weights, max_chars)


def check_format(text: str, arguments: tuple[Any, ...], weights: TemplateWeights, max_chars: int) -> None:
    """Formatting by `%` or by `{}`: every field may show all there is."""
    if len(text) > LONG_TEXT_CHARS:
        raise TemplateLimitError(f"it formats with a text of {len(text)} characters")
    if _LONG_FIELD.search(text) or "*" in text:
        raise TemplateLimitError("it formats with a field of great width")
    num_chars = 0
    for value in arguments:
        weights.check(value)
        num_chars += weights.num_chars(value) + weights.num_values(value)
    num_fields = text.count("%") + text.count("{")
    if num_fields > 1 and not all(isinstance(value, tuple) for value in arguments):
        check_product(num_fields, num_chars, max_chars)


def check_product(first: int, second: int, max_chars: int) -> None:
    """Raise TemplateLimitError if so many pieces of so many characters are too much."""
    if first * second > max_chars:
        raise TemplateLimitError(f"it makes a text of more than {max_chars} characters")


def _check_cuts(text: str, arguments: tuple[Any, ...]) -> None:
    """A list of pieces is made in one go."""
    if len(text) <= MAX_VALUES:
        return
    if len(arguments) > 1 and isinstance(arguments[1], int) and 0 <= arguments[1] <= MAX_VALUES:
        return
    separator = arguments[0] if arguments and isinstance(arguments[0], str) else None
    num_cuts = text.count(separator) if separator else sum(map(text.count, _WHITESPACE))
    if num_cuts > MAX_VALUES:
        raise TemplateLimitError(f"it cuts a text into more than {MAX_VALUES} pieces")
