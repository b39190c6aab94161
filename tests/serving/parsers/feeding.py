"""Running a parser over a text that is cut somewhere."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable
from typing import Protocol

from serving.parsers.events import CallArguments, CallEnd, CallStart, Event, ParsedOutput, assemble
from serving.parsers.parser_registry import tool_parser
from serving.parsers.tool_set import ToolSet
from serving.parsers.tools.tool_parser import ToolParser
from tests.serving.parsers.recorded import FUNCTIONS

TOOLS = ToolSet(FUNCTIONS)


class Parser(Protocol):
    def feed(self, text: str) -> list[Event]: ...

    def finish(self) -> list[Event]: ...


def make(name: str) -> ToolParser:
    return tool_parser(name)(TOOLS)


def run(parser: Parser, pieces: Iterable[str]) -> list[Event]:
    events = [event for piece in pieces for event in parser.feed(piece)] + parser.finish()
    check_order(events)
    return events


def answer(make_parser: Callable[[], Parser], pieces: Iterable[str]) -> ParsedOutput:
    """What the text means, without the random ids."""
    found = assemble(run(make_parser(), pieces))
    for call in found.calls:
        assert call.id
        call.id = ""
    return found


def check_order(events: list[Event]) -> None:
    """Calls start in the order of their indices, once each, and their arguments lie between start and end."""
    open_call, num_calls = None, 0
    for event in events:
        if isinstance(event, CallStart):
            assert open_call is None
            assert event.index == num_calls
            assert event.name
            open_call, num_calls = event.index, num_calls + 1
        elif isinstance(event, CallArguments):
            assert event.index == open_call
            assert event.text
        elif isinstance(event, CallEnd):
            assert event.index == open_call
            open_call = None
        else:
            assert event if isinstance(event, str) else event.text
    assert open_call is None


def byte_cut(text: str, position: int) -> list[str]:
    """The two pieces of `text` that a server has when the model's bytes are cut at `position`."""
    data, decoder = text.encode(), codecs.getincrementaldecoder("utf-8")("replace")
    return [decoder.decode(data[:position]), decoder.decode(data[position:], True)]
