"""Calls that the request forces: the output is JSON of a schema that this server wrote, without any markers."""

from __future__ import annotations

from serving.parsers.source import ParserSteps, UnreadableError
from serving.parsers.tool_set import ToolSet
from serving.parsers.tools.tool_parser import ToolParser


class RequiredParser(ToolParser):
    """`tool_choice` "required": a list of {"name": ..., "parameters": {...}}."""

    def read(self) -> ParserSteps[None]:
        source = self.source
        source.hold()
        try:
            yield from source.space()
            yield from source.require("[")
            while True:
                yield from source.space()
                yield from self.call_object(None)
                self.end_call()
                source.hold()
                yield from source.space()
                if not (yield from source.expect(",")):
                    break
            yield from source.require("]")
            source.commit()
        except UnreadableError:
            self.end_call()
        self.content(source.release())
        yield from source.drain(self.content)


class NamedParser(ToolParser):
    """A named `tool_choice`: nothing but the function's arguments."""

    def __init__(self, tools: ToolSet, name: str):
        self._name = name
        super().__init__(tools)

    def read(self) -> ParserSteps[None]:
        if not (yield from self.source.peek()):
            return
        self.begin_call(self._name)
        yield from self.source.space()
        yield from self.stream_arguments(None)
        self.end_call()
        yield from self.source.drain(self.content)
