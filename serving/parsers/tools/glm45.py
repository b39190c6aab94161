"""GLM-4.5 to 4.7: XML whose values are bare text.

    <tool_call>f
    <arg_key>city</arg_key>
    <arg_value>Paris</arg_value>
    </tool_call>

The schema of the tool says which values are strings; those are streamed, the others converted when complete.
GLM-4.7 writes it without line breaks.
"""

from __future__ import annotations

import json

from serving.parsers.source import Markers, Steps, UnreadableError
from serving.parsers.tools.base import ToolParser

OPEN, CLOSE = "<tool_call>", "</tool_call>"
KEY, KEY_END = "<arg_key>", "</arg_key>"
VALUE, VALUE_END = "<arg_value>", "</arg_value>"


class Glm45Parser(ToolParser):
    opening = Markers(OPEN)
    _parts = Markers(KEY, CLOSE)
    _key_end = Markers(KEY_END)
    _value_end = Markers(VALUE_END)
    _closing = Markers(CLOSE, OPEN)

    def read_calls(self, marker: str) -> Steps[None]:
        source = self.source
        yield from source.space()
        name = yield from source.name()
        if (yield from source.peek()) not in ("\n", "<"):
            raise UnreadableError
        yield from source.space()
        if (yield from source.peek()) != "<":
            raise UnreadableError
        self.begin_call(name)
        self.arguments("{")
        yield from self._pairs(name)
        yield from self.after_call(self._closing)

    def _pairs(self, function: str) -> Steps[None]:
        before = ""
        while True:
            yield from self.source.space()
            part = yield from self.source.until(self._parts, self.content)
            if part != KEY:
                break
            try:
                key = yield from self._key()
            except UnreadableError:
                self.content(self.source.release())
                continue
            self.arguments(f"{before}{json.dumps(key, ensure_ascii=False)}: ")
            before = ", "
            if not (yield from self._value(function, key)):
                return  # cut off: what came is passed on, unclosed
        if part is not None:
            self.arguments("}")

    def _key(self) -> Steps[str]:
        """A key and all markup up to its value."""
        source, parts = self.source, list[str]()
        source.hold()
        yield from source.require(KEY)
        yield from source.until(self._key_end, parts.append)
        yield from source.require(KEY_END)
        yield from source.space()
        yield from source.require(VALUE)
        source.commit()
        return "".join(parts).strip()

    def _value(self, function: str, key: str) -> Steps[bool]:
        """One value; False: the text ended within it."""
        source = self.source
        if self.tools.is_text(function, key):
            self.arguments('"')
            end = yield from source.until(self._value_end, self.arguments_text)
            if end is not None:
                self.arguments('"')
        else:
            parts: list[str] = []
            end = yield from source.until(self._value_end, parts.append)
            if end is not None:
                self.arguments(self.tools.as_json(function, key, "".join(parts)))
            else:
                self.arguments_text("".join(parts))
        if end is not None:
            yield from source.require(end)
        return end is not None
