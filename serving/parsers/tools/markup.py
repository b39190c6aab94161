"""`MarkupParser`: arguments as pairs of a key and a bare value between tags, as GLM-4.5 and Qwen3-Coder write them.

The schema of the tool says which values are strings; those are streamed, the others converted when complete.

Models leave closing tags out. Since a value is bare text and may itself speak of tags, a tag ends it only where the
format goes on behind that tag: with a parameter that the tool has and the call has not yet, with a tool that the
request offers, or with the end of the text. Everything else is part of the value.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import ClassVar

from serving.parsers.source import Markers, ParserSteps, UnreadableError
from serving.parsers.tools.tool_parser import ToolParser


class MarkupParser(ToolParser):
    """parts: what begins a pair, then what may end the arguments. value_end: what ends a value. value_begin: what the
    format puts before a value."""

    parts: ClassVar[Markers]
    value_end: ClassVar[Markers]
    value_begin: ClassVar[str] = ""

    def key(self) -> ParserSteps[str]:
        """Read a pair from its beginning to its value; `source.commit` as soon as it stands. Raises UnreadableError:
        then what the source holds is content."""
        raise NotImplementedError

    def value_markers(self) -> ParserSteps[Markers]:
        """What to look for in the value that begins here: `value_end`, and tags that stand where its end is missing."""
        raise NotImplementedError

    def ends_value(self, tag: str, next_keys: tuple[str, ...]) -> ParserSteps[bool]:
        """Read on behind `tag`, which does not close a value: whether the value ends before it all the same.

        next_keys: the parameters that the call does not have yet.
        """
        raise NotImplementedError

    def pairs(self, function: str) -> ParserSteps[str | None]:
        """Read all arguments of a call; returns the text that ends them, not read, or None if the text ended first."""
        self.arguments("{")
        given: list[str] = []
        while True:
            yield from self.source.space()
            part = yield from self.source.until(self.parts, self.content)
            if part != self.parts.texts[0]:
                break
            self.source.hold()
            try:
                key = yield from self.key()
            except UnreadableError:
                self.content(self.source.release())
                continue
            self.arguments(f"{', ' if given else ''}{json.dumps(key, ensure_ascii=False)}: ")
            given.append(key)
            if not (yield from self._value(function, given)):
                return None  # cut off: what came is passed on, unclosed
        if part is not None:
            self.arguments("}")
        return part

    def _value(self, function: str, given: list[str]) -> ParserSteps[bool]:
        """Read the value of the last key; returns False if the text ended within it."""
        key, markers = given[-1], (yield from self.value_markers())
        next_keys = tuple(name for name in self.tools.parameters(function) if name not in given)
        if self.tools.is_text(function, key):
            self.arguments('"')
            ended = yield from self._until_end(markers, next_keys, self.arguments_text)
            if ended:
                self.arguments('"')
        else:
            parts: list[str] = []
            ended = yield from self._until_end(markers, next_keys, parts.append)
            if ended:
                self.arguments(self.tools.as_json(function, key, "".join(parts)))
            else:
                self.arguments_text("".join(parts))
        return ended

    def _until_end(self, markers: Markers, next_keys: tuple[str, ...],
                   sink: Callable[[str], None]) -> ParserSteps[bool]:
        """Pass a value to `sink` and read its closing tag, if it has one; False: the text ended before the value."""
        source, is_first = self.source, True

        def pass_on(text: str) -> None:
            nonlocal is_first
            sink(text.removeprefix(self.value_begin) if is_first else text)
            is_first = False

        while (marker := (yield from source.until(markers, pass_on))) is not None:
            if marker in self.value_end.texts:
                yield from source.require(marker)
                return True
            source.mark()
            yield from source.require(marker)
            ended = yield from self.ends_value(marker.lstrip("\n"), next_keys)
            source.reset()
            if ended:
                return True
            pass_on(source.characters(len(marker)))
        return False
