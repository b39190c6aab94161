"""Llama 3.1 to 3.3: `{"name": "f", "parameters": {...}}`, nothing around it but an optional `<|python_tag|>`.

Several calls are separated by `;`. Since a bare object may as well be an answer, it is a call only at the very
beginning and only if it names a function that the request offers.
"""

from __future__ import annotations

from serving.parsers.source import Markers, ParserSteps, UnreadableError
from serving.parsers.tools.tool_parser import ToolParser

TAG = "<|python_tag|>"


class Llama3JsonParser(ToolParser):
    """Reads such objects; see above."""

    opening = Markers(TAG)
    markers = (TAG,)
    _end = Markers(TAG)

    def read(self) -> ParserSteps[None]:
        self.source.hold()
        yield from self.source.space()
        self.content(self.source.release())
        if (yield from self.source.peek()) == "{":
            yield from self.attempt("")
        yield from super().read()

    def read_calls(self, marker: str) -> ParserSteps[None]:
        source = self.source
        while True:
            yield from source.space()
            try:
                yield from self.call_object(self._end, known_only=not marker)
            except UnreadableError:
                if not self.in_call:
                    raise
                return
            self.end_call()
            source.hold()
            yield from source.space()
            if not (yield from source.expect(";")):
                return
