"""Llama 3.2 and 4, ToolACE: a Python list of calls, `[f(city="Paris", days=3), g()]`.

Literals are turned into JSON while they are read, without Python's own parser: no expression is evaluated,
nothing is read twice. A call counts when its closing bracket has come. A bare list is taken for calls only at the very
beginning and only if it names functions that the request offers.
"""

from __future__ import annotations

import json
import re

from serving.parsers.source import Markers, ParserSteps, Source, UnreadableError, checked_name
from serving.parsers.tools.tool_parser import ToolParser

OPEN, CLOSE = "<|python_start|>", "<|python_end|>"
MAX_DEPTH = 32  # of nested lists and dicts. Chosen: far beyond real arguments, below Python's limit on recursion
_WORD = re.compile(r"[\w.+\-]*", re.ASCII)
_KEY = re.compile(r"\w*")
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)
_MAX_INT_CHARS = 4000  # below 4,300 digits, beyond which Python refuses to read an integer
_PLAIN = {'"': re.compile(r'[^"\\\n]*'), "'": re.compile(r"[^'\\\n]*")}
_WORDS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "\\": "\\", "'": "'", '"': '"', "\n": ""}
_HEX_ESCAPES = {"x": 2, "u": 4, "U": 8}
_HEX = "0123456789abcdefABCDEF"


class PythonicParser(ToolParser):
    """Reads such a list, between markers or bare."""

    opening = Markers(OPEN)
    markers = (OPEN, CLOSE)

    def read(self) -> ParserSteps[None]:
        self.source.hold()
        yield from self.source.space()
        self.content(self.source.release())
        if (yield from self.source.peek()) == "[":
            yield from self.attempt("")
        yield from super().read()

    def read_calls(self, marker: str) -> ParserSteps[None]:
        source = self.source
        yield from source.space()
        yield from source.require("[")
        while True:
            yield from source.space()
            yield from self._call(known_only=not marker)
            source.hold()
            yield from source.space()
            if not (yield from source.expect(",")):
                break
        yield from source.require("]")
        if marker:
            yield from source.space()
            yield from source.expect(CLOSE)
        source.commit()

    def _call(self, *, known_only: bool) -> ParserSteps[None]:
        source = self.source
        name = yield from source.name()
        if known_only and not self.tools.knows(name):
            raise UnreadableError
        yield from source.require("(")
        arguments = yield from self._keywords()
        self.begin_call(name)
        self.arguments(arguments)
        self.end_call()

    def _keywords(self) -> ParserSteps[str]:
        """`key=value, ...)` as a JSON object."""
        source, out = self.source, ["{"]
        yield from source.space()
        while not (yield from source.expect(")")):
            if len(out) > 1:
                out.append(", ")
            parts: list[str] = []
            yield from source.run_of(_KEY, parts.append)
            out.append(f"{json.dumps(checked_name(''.join(parts)), ensure_ascii=False)}: ")
            yield from source.space()
            yield from source.require("=")
            yield from source.space()
            yield from literal(source, out, 0)
            yield from self._comma(")")
        out.append("}")
        return "".join(out)

    def _comma(self, closer: str) -> ParserSteps[None]:
        yield from comma(self.source, closer)


def comma(source: Source, closer: str) -> ParserSteps[None]:
    """A comma, or nothing before `closer`, and the white space around it."""
    yield from source.space()
    if not (yield from source.expect(",")) and (yield from source.peek()) != closer:
        raise UnreadableError
    yield from source.space()


def literal(source: Source, out: list[str], depth: int) -> ParserSteps[None]:
    """One Python literal, as JSON. Raises UnreadableError."""
    char = yield from source.peek()
    if depth > MAX_DEPTH:
        raise UnreadableError
    if char in ("'", '"'):
        yield from _string(source, out, char)
    elif char == "[" or char == "(":
        yield from _list(source, out, char, depth)
    elif char == "{":
        yield from _dict(source, out, depth)
    else:
        parts: list[str] = []
        yield from source.run_of(_WORD, parts.append)
        out.append(_scalar("".join(parts)))


def _scalar(word: str) -> str:
    if word in _WORDS:
        return _WORDS[word]
    if not _NUMBER.fullmatch(word):
        raise UnreadableError
    if word.lstrip("+-").isdecimal():
        if len(word) > _MAX_INT_CHARS:
            raise UnreadableError
        return str(int(word))
    number = float(word)
    if number in (float("inf"), float("-inf")):
        raise UnreadableError
    return repr(number)


def _list(source: Source, out: list[str], opener: str, depth: int) -> ParserSteps[None]:
    closer = "]" if opener == "[" else ")"
    yield from source.require(opener)
    yield from source.space()
    out.append("[")
    first = True
    while not (yield from source.expect(closer)):
        if not first:
            out.append(", ")
        first = False
        yield from literal(source, out, depth + 1)
        yield from comma(source, closer)
    out.append("]")


def _dict(source: Source, out: list[str], depth: int) -> ParserSteps[None]:
    yield from source.require("{")
    yield from source.space()
    out.append("{")
    first = True
    while not (yield from source.expect("}")):
        if not first:
            out.append(", ")
        first = False
        quote = yield from source.peek()
        if quote not in ("'", '"'):
            raise UnreadableError
        yield from _string(source, out, quote)
        yield from source.space()
        yield from source.require(":")
        yield from source.space()
        out.append(": ")
        yield from literal(source, out, depth + 1)
        yield from comma(source, "}")
    out.append("}")


def _string(source: Source, out: list[str], quote: str) -> ParserSteps[None]:
    """A string without prefix in single or double quotes."""
    parts: list[str] = []
    yield from source.require(quote)
    while True:
        yield from source.run_of(_PLAIN[quote], parts.append)
        if (yield from source.expect(quote)):
            break
        if (yield from source.expect("\n")):  # Python would not have it; models do
            parts.append("\n")
            continue
        yield from source.require("\\")
        yield from _escape(source, parts)
    out.append(json.dumps("".join(parts), ensure_ascii=False))


def _escape(source: Source, parts: list[str]) -> ParserSteps[None]:
    char = yield from source.peek()
    if not char:
        raise UnreadableError
    if char not in _ESCAPES and char not in _HEX_ESCAPES:
        parts.append("\\")  # as Python does with an escape that it does not know
        return
    yield from source.require(char)
    if char in _ESCAPES:
        parts.append(_ESCAPES[char])
        return
    digits = ""
    while len(digits) < _HEX_ESCAPES[char]:
        digit = yield from source.peek()
        if not digit or digit not in _HEX:
            raise UnreadableError
        yield from source.require(digit)
        digits += digit
    code = int(digits, 16)
    if code > 0x10FFFF or 0xD800 <= code <= 0xDFFF:
        raise UnreadableError
    parts.append(chr(code))
