"""`JsonScanner`: checks one JSON value (RFC 8259) while it arrives, in time linear in its length.

Two slips that models make inside strings are mended, so that clients can read the result: a bare
control character is escaped, and so is a backslash that begins no escape.
"""

from __future__ import annotations

import re
from collections.abc import Callable

_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_SPACE = re.compile(r"[ \t\n\r]*")
_WORD = re.compile(r"[\w.+\-]*", re.ASCII)
_SCALAR = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?|true|false|null", re.ASCII)
_ESCAPES = frozenset('"\\/bfnrt')
_HEX = frozenset("0123456789abcdefABCDEF")
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t", "\b": "\\b", "\f": "\\f"}


class JsonScanner:
    """Feed it with `advance` until `done` or `failed`; what follows the value is not read."""

    def __init__(self) -> None:
        self.done = False
        self.failed = False
        self._closers: list[str] = []
        self._scalar: list[str] = []
        self._escape = ""  # the part of an escape that has come
        self._in_key = False
        self._state: Callable[[str, int], int] = self._value
        self._out: list[str] = []

    def advance(self, text: str, position: int) -> tuple[str, int]:
        """Read on in `text` from `position`; returns (what may be passed on, where reading stopped)."""
        while position < len(text) and not self.done and not self.failed:
            position = self._state(text, position)
        out, self._out = "".join(self._out), []
        return out, position

    def finish(self) -> str:
        """Return what was held back: no more text comes. A scalar may be complete only now."""
        if self._state == self._number and not self.failed:
            self._end_scalar()
        held, self._escape = self._escape, ""
        return held

    def _take(self, text: str, start: int, end: int) -> int:
        self._out.append(text[start:end])
        return end

    def _skip_space(self, text: str, position: int) -> int:
        match = _SPACE.match(text, position)
        assert match is not None
        return self._take(text, position, match.end()) if match.end() > position else position

    def _open(self, text: str, position: int, closer: str, state: Callable[[str, int], int]) -> int:
        self._closers.append(closer)
        self._state = state
        return self._take(text, position, position + 1)

    def _end_value(self) -> None:
        if self._closers:
            self._state = self._after
        else:
            self.done = True

    def _value(self, text: str, position: int) -> int:
        position = self._skip_space(text, position)
        char = text[position: position + 1]
        if char == "{":
            return self._open(text, position, "}", self._first_key)
        if char == "[":
            return self._open(text, position, "]", self._first_item)
        if char == '"':
            return self._begin_string(text, position, in_key=False)
        if char and char in "-0123456789tfn":
            self._state = self._number
            return position
        self.failed = bool(char)
        return position

    def _first_item(self, text: str, position: int) -> int:
        position = self._skip_space(text, position)
        if text[position: position + 1] == "]":
            return self._close(text, position)
        if position < len(text):
            self._state = self._value
        return position

    def _first_key(self, text: str, position: int) -> int:
        position = self._skip_space(text, position)
        return self._close(text, position) if text[position: position + 1] == "}" else self._key(text, position)

    def _key(self, text: str, position: int) -> int:
        position = self._skip_space(text, position)
        if text[position: position + 1] == '"':
            return self._begin_string(text, position, in_key=True)
        self.failed = position < len(text)
        return position

    def _colon(self, text: str, position: int) -> int:
        position = self._skip_space(text, position)
        if text[position: position + 1] == ":":
            self._state = self._value
            return self._take(text, position, position + 1)
        self.failed = position < len(text)
        return position

    def _after(self, text: str, position: int) -> int:
        position = self._skip_space(text, position)
        char = text[position: position + 1]
        if char == ",":
            self._state = self._key if self._closers[-1] == "}" else self._value
            return self._take(text, position, position + 1)
        if char == self._closers[-1]:
            return self._close(text, position)
        self.failed = bool(char)
        return position

    def _close(self, text: str, position: int) -> int:
        self._closers.pop()
        self._end_value()
        return self._take(text, position, position + 1)

    def _number(self, text: str, position: int) -> int:
        match = _WORD.match(text, position)
        assert match is not None
        self._scalar.append(match[0])
        self._take(text, position, match.end())
        if match.end() < len(text):
            self._end_scalar()
        return match.end()

    def _end_scalar(self) -> None:
        word = "".join(self._scalar)
        self._scalar.clear()
        if _SCALAR.fullmatch(word):
            self._end_value()
        else:
            self.failed = True

    def _begin_string(self, text: str, position: int, *, in_key: bool) -> int:
        self._in_key, self._state = in_key, self._string
        return self._take(text, position, position + 1)

    def _string(self, text: str, position: int) -> int:
        match = _PLAIN.match(text, position)
        assert match is not None
        position = self._take(text, position, match.end())
        if position == len(text):
            return position
        char = text[position]
        if char == '"':
            self._out.append(char)
            if self._in_key:
                self._state = self._colon
            else:
                self._end_value()
        elif char == "\\":
            self._escape, self._state = "\\", self._escaped
        else:
            self._out.append(_SHORT.get(char) or f"\\u{ord(char):04x}")
        return position + 1

    def _escaped(self, text: str, position: int) -> int:
        char = text[position]
        if len(self._escape) == 1 and char in _ESCAPES:
            self._pass_escape(self._escape + char)
        elif char == "u" if len(self._escape) == 1 else char in _HEX:
            self._escape += char
            if len(self._escape) == 6:
                self._pass_escape(self._escape)
        else:  # no escape after all: the backslash stands for itself, what follows is read again as text
            self._pass_escape("\\" + self._escape)
            return position
        return position + 1

    def _pass_escape(self, text: str) -> None:
        self._out.append(text)
        self._escape, self._state = "", self._string
