"""Kimi K2: calls between markers, an id that holds the name, and JSON.

    <|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{"city": "Paris"}
    <|tool_call_end|><|tool_calls_section_end|>
"""

from __future__ import annotations

from serving.parsers.source import Markers, ParserSteps, UnreadableError, checked_name
from serving.parsers.tools.tool_parser import ToolParser

SECTION, SECTION_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CALL, ARGUMENTS, CALL_END = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"


class KimiK2Parser(ToolParser):
    """Reads the sample above; the model's own id is passed on as the call's."""

    opening = Markers(SECTION)
    endings = (SECTION_END, CALL_END)
    markers = (SECTION, SECTION_END, CALL, ARGUMENTS, CALL_END)
    _closing = Markers(CALL_END, CALL, SECTION_END)

    def read_calls(self, marker: str) -> ParserSteps[None]:
        source = self.source
        while True:
            yield from source.space()
            if not (yield from source.expect(CALL)):
                break
            yield from self._read_call()
            yield from self.after_call(self._closing)
            source.hold()
        if self.num_calls and (yield from source.expect(SECTION_END)):
            source.commit()

    def _read_call(self) -> ParserSteps[None]:
        source = self.source
        yield from source.space()
        call_id = yield from source.name()
        yield from source.space()
        yield from source.require(ARGUMENTS)
        name, colon, number = call_id.rpartition(":")
        if not colon or not number.isdecimal():
            raise UnreadableError
        self.begin_call(checked_name(name.removeprefix("functions.")), call_id)
        yield from source.space()
        if (yield from source.peek()) in ("", "<"):
            self.arguments("{}")
        else:
            yield from self.stream_arguments(self._closing)
