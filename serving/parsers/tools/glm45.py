"""GLM-4.5 to 4.7: XML whose values are bare text.

    <tool_call>f
    <arg_key>city</arg_key>
    <arg_value>Paris</arg_value>
    </tool_call>

GLM-4.7 writes it without line breaks.
"""

from __future__ import annotations

from serving.parsers.source import Markers, Steps, UnreadableError
from serving.parsers.tools.markup import MarkupParser

OPEN, CLOSE = "<tool_call>", "</tool_call>"
KEY, KEY_END = "<arg_key>", "</arg_key>"
VALUE, VALUE_END = "<arg_value>", "</arg_value>"


class Glm45Parser(MarkupParser):
    opening = Markers(OPEN)
    parts = Markers(KEY, CLOSE)
    value_end = Markers(VALUE_END)
    _key_end = Markers(KEY_END)
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
        yield from self.pairs(name)
        yield from self.after_call(self._closing)

    def key(self) -> Steps[str]:
        source, parts = self.source, list[str]()
        yield from source.require(KEY)
        yield from source.until(self._key_end, parts.append)
        yield from source.require(KEY_END)
        yield from source.space()
        yield from source.require(VALUE)
        source.commit()
        return "".join(parts).strip()
