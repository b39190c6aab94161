"""Granite 3: `<|tool_call|>` and a JSON list of calls, up to the end of the answer."""

from __future__ import annotations

from serving.parsers.source import Markers, ParserSteps, UnreadableError
from serving.parsers.tools.tool_parser import ToolParser

TAG = "<|tool_call|>"


class GraniteParser(ToolParser):
    opening = Markers(TAG)
    markers = (TAG,)

    def read_calls(self, marker: str) -> ParserSteps[None]:
        source = self.source
        yield from source.space()
        yield from source.require("[")
        while True:
            yield from source.space()
            try:
                yield from self.call_object(None)
            except UnreadableError:
                if not self.in_call:
                    raise
                return
            self.end_call()
            source.hold()
            yield from source.space()
            if not (yield from source.expect(",")):
                break
        if (yield from source.expect("]")):
            source.commit()
