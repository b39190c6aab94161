"""Hermes 2 Pro, Qwen 2.5, Qwen 3 and QwQ: `<tool_call>{"name": "f", "arguments": {...}}</tool_call>`."""

from __future__ import annotations

from serving.parsers.source import Markers, ParserSteps, UnreadableError
from serving.parsers.tools.tool_parser import ToolParser

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class HermesParser(ToolParser):
    """Reads the sample above, once for each call."""

    opening = Markers(OPEN)
    endings = (CLOSE,)
    trigger = OPEN
    _closing = Markers(CLOSE, OPEN)

    @classmethod
    def frame(cls, name: str) -> tuple[str, str]:
        return f'{OPEN}\n{{"name": "{name}", "arguments": ', f"}}\n{CLOSE}"

    def read_calls(self, marker: str) -> ParserSteps[None]:
        yield from self.source.space()
        try:
            yield from self.call_object(self._closing)
        except UnreadableError:
            if not self.in_call:
                raise
        yield from self.after_call(self._closing)
