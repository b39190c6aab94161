"""Qwen3-Coder: XML whose values are bare text.

    <tool_call>
    <function=f>
    <parameter=city>
    Paris
    </parameter>
    </function>
    </tool_call>

The schema of the tool says which values are strings; those are streamed, the others converted when complete.
The model sometimes leaves `<tool_call>` out.
"""

from __future__ import annotations

import json

from serving.parsers.source import Markers, Steps, UnreadableError
from serving.parsers.tools.base import ToolParser

OPEN, CLOSE = "<tool_call>", "</tool_call>"
FUNCTION, FUNCTION_END = "<function=", "</function>"
PARAMETER, PARAMETER_END = "<parameter=", "</parameter>"


class Qwen3CoderParser(ToolParser):
    opening = Markers(OPEN, FUNCTION)
    _parts = Markers(PARAMETER, FUNCTION_END, CLOSE)
    _value_end = Markers("\n" + PARAMETER_END, PARAMETER_END)
    _closing = Markers(CLOSE, OPEN, FUNCTION)

    def read_calls(self, marker: str) -> Steps[None]:
        if marker == OPEN:
            yield from self.source.space()
            yield from self.source.require(FUNCTION)
        name = yield from self.source.name()
        yield from self.source.require(">")
        self.begin_call(name)
        self.arguments("{")
        yield from self._parameters(name)
        if marker == OPEN:
            yield from self.after_call(self._closing)
        self.end_call()

    def _parameters(self, function: str) -> Steps[None]:
        source, before = self.source, ""
        while True:
            yield from source.space()
            part = yield from source.until(self._parts, self.content)
            if part != PARAMETER:
                break
            source.hold()
            yield from source.require(PARAMETER)
            try:
                name = yield from source.name()
                yield from source.require(">")
            except UnreadableError:
                self.content(source.release())
                continue
            source.commit()
            self.arguments(f"{before}{json.dumps(name, ensure_ascii=False)}: ")
            before = ", "
            if not (yield from self._value(function, name)):
                return  # cut off: what came is passed on, unclosed
        if part is not None:
            self.arguments("}")
        if part == FUNCTION_END:
            yield from source.require(FUNCTION_END)

    def _value(self, function: str, name: str) -> Steps[bool]:
        """One parameter; False: the text ended within it."""
        source = self.source
        yield from source.expect("\n")
        if self.tools.is_text(function, name):
            self.arguments('"')
            end = yield from source.until(self._value_end, self.arguments_text)
            if end is not None:
                self.arguments('"')
        else:
            parts: list[str] = []
            end = yield from source.until(self._value_end, parts.append)
            if end is not None:
                self.arguments(self.tools.as_json(function, name, "".join(parts)))
            else:
                self.arguments_text("".join(parts))
        if end is not None:
            yield from source.require(end)
        return end is not None
