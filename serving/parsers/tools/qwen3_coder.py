"""Qwen3-Coder: XML whose values are bare text.

    <tool_call>
    <function=f>
    <parameter=city>
    Paris
    </parameter>
    </function>
    </tool_call>

The model sometimes leaves `<tool_call>` out, and closing tags. Where a value begins on a line of its own, a tag that
ends it without `</parameter>` must do so too.
"""

from __future__ import annotations

from serving.parsers.source import Markers, ParserSteps
from serving.parsers.tools.markup import MarkupParser

OPEN, CLOSE = "<tool_call>", "</tool_call>"
FUNCTION, FUNCTION_END = "<function=", "</function>"
PARAMETER, PARAMETER_END = "<parameter=", "</parameter>"
TAGS = (PARAMETER, FUNCTION_END, CLOSE, OPEN, FUNCTION)


class Qwen3CoderParser(MarkupParser):
    """Reads the sample above."""

    opening = Markers(OPEN, FUNCTION)
    endings = (CLOSE, FUNCTION_END)
    parts = Markers(*TAGS)
    value_end = Markers("\n" + PARAMETER_END, PARAMETER_END)
    value_begin = "\n"
    _in_lines = Markers(*value_end.texts, *("\n" + tag for tag in TAGS))
    _inline = Markers(*value_end.texts, *TAGS)
    _closing = Markers(CLOSE, OPEN, FUNCTION)
    _num_inner = 0  # functions that the value itself speaks of, and whose end comes before its own

    def read_calls(self, marker: str) -> ParserSteps[None]:
        if marker == OPEN:
            yield from self.source.space()
            yield from self.source.require(FUNCTION)
        name = yield from self.source.name()
        yield from self.source.require(">")
        self.begin_call(name)
        if (yield from self.pairs(name)) == FUNCTION_END:
            yield from self.source.require(FUNCTION_END)
        if marker == OPEN:
            yield from self.after_call(self._closing)
        self.end_call()

    def key(self) -> ParserSteps[str]:
        source = self.source
        yield from source.require(PARAMETER)
        name = yield from source.name()
        yield from source.require(">")
        source.commit()
        return name

    def value_markers(self) -> ParserSteps[Markers]:
        self._num_inner = 0
        return self._in_lines if (yield from self.source.peek()) == "\n" else self._inline

    def ends_value(self, tag: str, next_keys: tuple[str, ...]) -> ParserSteps[bool]:
        source = self.source
        if tag == PARAMETER:
            return (yield from source.expect_any([key + ">" for key in next_keys])) is not None
        if tag in (OPEN, FUNCTION):
            return (yield from self._opens_call(tag))
        if tag == FUNCTION_END:
            if self._num_inner:
                self._num_inner -= 1
                return False
            yield from source.layout()
            if (yield from source.expect(CLOSE)):
                return True
        return (yield from self._text_goes_on())

    def _text_goes_on(self) -> ParserSteps[bool]:
        """Whether, behind the end of a call, there is nothing or another call."""
        yield from self.source.layout()
        if not (yield from self.source.peek()):
            return True
        tag = yield from self.source.expect_any((OPEN, FUNCTION))
        return tag is not None and (yield from self._opens_call(tag))

    def _opens_call(self, tag: str) -> ParserSteps[bool]:
        """Whether the tag, which has been read, begins a call of a function that the request offers."""
        source = self.source
        if tag == OPEN:
            yield from source.layout()
            if not (yield from source.expect(FUNCTION)):
                return False
        is_known = (yield from source.expect_any([name + ">" for name in self.tools.names])) is not None
        self._num_inner += tag == FUNCTION and not is_known
        return is_known
