"""`Source`: a model's text while it arrives, for parsers that are written as generators.

A reading method is a generator that yields where it needs more text, so that a parser reads like one
for whole texts and yet goes on with every piece. Each character is looked at a bounded number of
times: what has been read is cut off, and what stays behind is never longer than a marker.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

from serving.parsers.json_scan import JsonScanner

T = TypeVar("T")
ParserSteps = Generator[None, None, T]
Sink = Callable[[str], None]

MAX_NAME_CHARS = 256  # of a function. Chosen: OpenAI allows 64; text that is longer is no name
# Of white space between tags. Chosen: models write a line break and an indentation; more is no layout.
MAX_LAYOUT_CHARS = 16
_SPACE = re.compile(r"\s*")
_ANYTHING = re.compile(r".*", re.DOTALL)
_NAME = re.compile(r"[\w.\-:/]*")


class UnreadableError(Exception):
    """The text does not follow the format. The source holds what has been read of it."""


class Markers:
    """A few literal texts to look for. None begins with another, so that the leftmost match is the right one."""

    def __init__(self, *texts: str):
        self.texts = texts
        self.longest = max(map(len, texts))
        self.pattern = re.compile("|".join(map(re.escape, texts)))
        self._beginnings = frozenset(text[:n] for text in texts for n in range(1, len(text)))

    def num_held(self, text: str, start: int) -> int:
        """Characters at the end of text[start:] that may become a marker."""
        for length in range(min(self.longest - 1, len(text) - start), 0, -1):
            if text[-length:] in self._beginnings:
                return length
        return 0


class Source:
    """Text that is read once, from left to right. Written by `push` and `close`, read by the generators.

    What is read between `hold` and `commit` can be had again as text with `release`.
    """

    def __init__(self) -> None:
        self.num_handled = 0  # characters moved or searched, for the proof that this stays linear
        self._text = ""
        self._position = 0
        self._closed = False
        self._held: list[str] | None = None
        self._mark: int | None = None  # position to which `reset` goes back

    def push(self, text: str) -> None:
        """Append text that has arrived."""
        begin = self._position if self._mark is None else self._mark
        self._text = self._text[begin:] + text
        self._position -= begin
        if self._mark is not None:
            self._mark = 0
        self.num_handled += len(self._text)

    def close(self) -> None:
        """No more text comes."""
        self._closed = True

    def hold(self, first: str = "") -> None:
        """Begin to remember what is read; `first` has been read already."""
        self._held = [first]

    def commit(self) -> None:
        """Forget what was held: it is markup, or was passed on otherwise."""
        self._held = None

    def release(self) -> str:
        """Return what was held, and hold it no longer."""
        held, self._held = "".join(self._held or ()), None
        return held

    def mark(self) -> None:
        """Look ahead from here: what is read up to `reset` is read again. It must be bounded, or work is not linear.
        Nothing may be held."""
        assert self._mark is None and self._held is None
        self._mark = self._position

    def reset(self) -> None:
        """Go back to `mark`: what was read since is read again."""
        assert self._mark is not None
        self._position, self._mark = self._mark, None

    def _take(self, end: int) -> str:
        text, self._position = self._text[self._position: end], end
        if self._held is not None and text:
            self._held.append(text)
        self.num_handled += len(text)
        return text

    def rest(self) -> str:
        """Read and return everything that has come."""
        return self._take(len(self._text))

    def more(self) -> ParserSteps[bool]:
        """Wait for more text; returns False if there is none."""
        if self._closed:
            return False
        yield
        return True

    def peek(self) -> ParserSteps[str]:
        """The next character without reading it; empty at the end."""
        while self._position == len(self._text):
            if not (yield from self.more()):
                return ""
        return self._text[self._position]

    def expect(self, text: str) -> ParserSteps[bool]:
        """Read `text` if it comes next, and return whether it does."""
        while True:
            seen = self._text[self._position: self._position + len(text)]
            self.num_handled += len(seen)
            if seen == text:
                self._take(self._position + len(text))
                return True
            if not text.startswith(seen) or not (yield from self.more()):
                return False

    def expect_any(self, texts: Sequence[str]) -> ParserSteps[str | None]:
        """Read the one of `texts` that comes next and return it, the longest of several; else read nothing."""
        longest = max(map(len, texts), default=0)
        while True:
            seen = self._text[self._position: self._position + longest]
            self.num_handled += len(seen)
            if not any(text.startswith(seen) and text != seen for text in texts) or not (yield from self.more()):
                break
        found = max((text for text in texts if seen.startswith(text)), key=len, default=None)
        if found is not None:
            self._take(self._position + len(found))
        return found

    def layout(self) -> ParserSteps[None]:
        """Read white space between tags, a few characters at most."""
        for _ in range(MAX_LAYOUT_CHARS):
            char = yield from self.peek()
            if not char.isspace():
                return
            self._take(self._position + 1)

    def characters(self, num: int) -> str:
        """Read the next `num` characters, which must have come."""
        return self._take(self._position + num)

    def require(self, text: str) -> ParserSteps[None]:
        """Read `text`. Raises UnreadableError if something else comes next."""
        if not (yield from self.expect(text)):
            raise UnreadableError

    def run_of(self, pattern: re.Pattern[str], sink: Sink) -> ParserSteps[None]:
        """Read as long as `pattern`, which is of the form [...]*, goes on."""
        while True:
            match = pattern.match(self._text, self._position)
            assert match is not None
            if match.end() > self._position:
                sink(self._take(match.end()))
            if self._position < len(self._text) or not (yield from self.more()):
                return

    def space(self) -> ParserSteps[None]:
        """Read all white space that comes next."""
        yield from self.run_of(_SPACE, _ignore)

    def drain(self, sink: Sink) -> ParserSteps[None]:
        """Pass on all text up to the end."""
        yield from self.run_of(_ANYTHING, sink)

    def until(self, markers: Markers, sink: Sink) -> ParserSteps[str | None]:
        """Pass text to `sink` up to the first marker, which is not read but returned; None: the end came first."""
        while True:
            match = markers.pattern.search(self._text, self._position)
            end = len(self._text) - markers.num_held(self._text, self._position) if match is None else match.start()
            self.num_handled += end - self._position
            if end > self._position:
                sink(self._take(end))
            if match is not None:
                return match[0]
            if not (yield from self.more()):
                if self._position < len(self._text):
                    sink(self._take(len(self._text)))
                return None

    def name(self) -> ParserSteps[str]:
        """Read a function's name. Raises UnreadableError."""
        parts: list[str] = []
        yield from self.run_of(_NAME, parts.append)
        return checked_name("".join(parts))

    def json_string(self) -> ParserSteps[str]:
        """Read a JSON string and return it decoded. Raises UnreadableError."""
        if (yield from self.peek()) != '"':
            raise UnreadableError
        parts: list[str] = []
        if not (yield from self.json_value(parts.append)):
            raise UnreadableError
        text: str = json.loads("".join(parts))
        return text

    def json_value(self, sink: Sink) -> ParserSteps[bool]:
        """Pass one JSON value to `sink`. False: it broke off or turned wrong; what is wrong has not been read."""
        scanner = JsonScanner()
        while True:
            out, end = scanner.advance(self._text, self._position)
            self._take(end)
            if out:
                sink(out)
            if scanner.done or scanner.failed:
                return scanner.done
            if not (yield from self.more()):
                if held := scanner.finish():
                    sink(held)
                return scanner.done


def _ignore(text: str) -> None:
    pass


def checked_name(name: str) -> str:
    """The name, if a function can be called so. Raises UnreadableError."""
    if not name or len(name) > MAX_NAME_CHARS or not name.isprintable():  # lone surrogates do not print
        raise UnreadableError
    return name
