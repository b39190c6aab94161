"""GLM-4.5 to 4.7: XML whose values are bare text.

    <tool_call>f
    <arg_key>city</arg_key>
    <arg_value>Paris</arg_value>
    </tool_call>

GLM-4.7 writes it without line breaks. Closing tags may be missing.
"""

from __future__ import annotations

from serving.parsers.source import Markers, ParserSteps, UnreadableError
from serving.parsers.tools.markup import MarkupParser

OPEN, CLOSE = "<tool_call>", "</tool_call>"
KEY, KEY_END = "<arg_key>", "</arg_key>"
VALUE, VALUE_END = "<arg_value>", "</arg_value>"


class Glm45Parser(MarkupParser):
    """Reads the sample above; a value ends at `</arg_value>`, or at a tag that stands where the next pair or call
    begins."""

    opening = Markers(OPEN)
    endings = (CLOSE,)
    parts = Markers(KEY, CLOSE, OPEN)
    value_end = Markers(VALUE_END)
    _in_value = Markers(VALUE_END, KEY, CLOSE, OPEN, "\n" + KEY, "\n" + CLOSE, "\n" + OPEN)
    _key_end = Markers(KEY_END, VALUE, KEY, CLOSE, OPEN)
    _closing = Markers(CLOSE, OPEN)

    def read_calls(self, marker: str) -> ParserSteps[None]:
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

    def key(self) -> ParserSteps[str]:
        source, parts = self.source, list[str]()
        yield from source.require(KEY)
        if (yield from source.until(self._key_end, parts.append)) == KEY_END:
            yield from source.require(KEY_END)
            yield from source.space()
        yield from source.require(VALUE)
        source.commit()
        return "".join(parts).strip()

    def value_markers(self) -> ParserSteps[Markers]:
        yield from ()
        return self._in_value

    def ends_value(self, tag: str, next_keys: tuple[str, ...]) -> ParserSteps[bool]:
        source = self.source
        if tag == KEY:
            heads = [key + follows for key in next_keys for follows in (KEY_END, VALUE, "\n" + VALUE)]
            return (yield from source.expect_any(heads)) is not None
        if tag == CLOSE:
            yield from source.layout()
            if not (yield from source.peek()):
                return True
            if not (yield from source.expect(OPEN)):
                return False
        yield from source.layout()
        heads = [name + follows for name in self.tools.names for follows in ("\n", "<")]
        return (yield from source.expect_any(heads)) is not None
