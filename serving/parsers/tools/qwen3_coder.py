"""Qwen3-Coder: XML whose values are bare text.

    <tool_call>
    <function=f>
    <parameter=city>
    Paris
    </parameter>
    </function>
    </tool_call>

The model sometimes leaves `<tool_call>` out.
"""

from __future__ import annotations

from serving.parsers.source import Markers, Steps
from serving.parsers.tools.markup import MarkupParser

OPEN, CLOSE = "<tool_call>", "</tool_call>"
FUNCTION, FUNCTION_END = "<function=", "</function>"
PARAMETER, PARAMETER_END = "<parameter=", "</parameter>"


class Qwen3CoderParser(MarkupParser):
    opening = Markers(OPEN, FUNCTION)
    parts = Markers(PARAMETER, FUNCTION_END, CLOSE)
    value_end = Markers("\n" + PARAMETER_END, PARAMETER_END)
    _closing = Markers(CLOSE, OPEN, FUNCTION)

    def read_calls(self, marker: str) -> Steps[None]:
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

    def key(self) -> Steps[str]:
        source = self.source
        yield from source.require(PARAMETER)
        name = yield from source.name()
        yield from source.require(">")
        source.commit()
        yield from source.expect("\n")
        return name
