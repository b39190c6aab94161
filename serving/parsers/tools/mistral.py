"""Mistral, in the three spellings of its tokenizers.

`[TOOL_CALLS][{"name": "f", "arguments": {...}}]` up to v7, `[TOOL_CALLS]f{...}` of v11, and
`[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{...}` since, once for each call.
"""

from __future__ import annotations

import re
import secrets
import string

from serving.parsers.source import Markers, ParserSteps, UnreadableError
from serving.parsers.tools.tool_parser import ToolParser

OPEN, CALL_ID, ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
_ID_ALPHABET = string.ascii_letters + string.digits
_ID_CHARS = 9  # of a call's id: Mistral's chat templates accept nothing else
_ID = re.compile(r"[A-Za-z0-9]*")


class MistralParser(ToolParser):
    """Reads all three spellings, told apart by what follows the marker."""

    opening = Markers(OPEN)
    markers = (OPEN, CALL_ID, ARGS)
    _end = Markers(OPEN)

    def read_calls(self, marker: str) -> ParserSteps[None]:
        yield from self.source.space()
        if (yield from self.source.peek()) == "[":
            yield from self._read_list()
        else:
            yield from self._read_call()

    def _read_list(self) -> ParserSteps[None]:
        source = self.source
        yield from source.require("[")
        while True:
            yield from source.space()
            yield from self.call_object(self._end)
            self.end_call()
            source.hold()
            yield from source.space()
            if not (yield from source.expect(",")):
                break
        yield from source.require("]")
        source.commit()

    def _read_call(self) -> ParserSteps[None]:
        source, call_id = self.source, list[str]()
        name = yield from source.name()
        if (yield from source.expect(CALL_ID)):
            yield from source.run_of(_ID, call_id.append)
        if not (yield from source.expect(ARGS)) and (yield from source.peek()) != "{":
            raise UnreadableError
        self.begin_call(name, "".join(call_id) or None)
        yield from source.space()
        yield from self.stream_arguments(self._end)
        self.end_call()

    def new_id(self) -> str:
        return "".join(secrets.choice(_ID_ALPHABET) for _ in range(_ID_CHARS))
