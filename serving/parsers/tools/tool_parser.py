"""`ToolParser`: what the parsers of all formats share.

The rules, the same in every format:

- Text outside of calls is content. White space alone, beside a call, is layout and not shown.
- What looks like a call but breaks off or turns wrong before its name is certain was no call: it is
  content, markers included.
- From there on the call stands. If its arguments are not JSON they are passed on as they are, up to
  the format's end marker or the next call's beginning, so that the client can see what the model wrote.
- A closing tag that is missing costs nothing but itself: the call ends where the next one begins.
- How the text is cut into pieces changes nothing.
"""

from __future__ import annotations

import json
import uuid
from typing import ClassVar

from serving.parsers.events import CallArguments, CallEnd, CallStart, Event, merged
from serving.parsers.source import Markers, ParserSteps, Source, UnreadableError, checked_name
from serving.parsers.tool_set import ToolSet

ARGUMENT_KEYS = ("arguments", "parameters")


class ToolParser:
    """Text in, events out. A subclass states which markers open a call, and reads what follows them (`read_calls`)."""

    opening: ClassVar[Markers]
    endings: ClassVar[tuple[str, ...]] = ()  # what an answer ends with whose last part is a call, if that is certain
    trigger: ClassVar[str | None] = None  # what `frame` begins with, if the format can be put as a frame around JSON
    markers: ClassVar[tuple[str, ...]] = ()  # all of the format's texts that a tokenizer may hide as special tokens

    def __init__(self, tools: ToolSet | None = None):
        self.tools = tools or ToolSet(())
        self.source = Source()
        self.num_calls = 0
        self.in_call = False
        self._blank: list[str] | None = []  # white space that opens a stretch of content; None: content has begun
        self._events: list[Event] = []
        self._steps = self.read()
        self._ended = False
        self._advance()

    @classmethod
    def frame(cls, name: str) -> tuple[str, str]:
        """(text before, text after) the JSON of the arguments in a call of the function; only with `trigger`."""
        raise NotImplementedError

    def feed(self, text: str) -> list[Event]:
        """Read more text."""
        self.source.push(text)
        return self._advance()

    def finish(self) -> list[Event]:
        """Read to the end: there is no more text, and what was held back comes out."""
        self.source.close()
        return self._advance()

    def _advance(self) -> list[Event]:
        if not self._ended:
            try:
                next(self._steps)
            except StopIteration:
                self._ended = True
                self._wrap_up()
        events, self._events = self._events, []
        return merged(events)

    def _wrap_up(self) -> None:
        self.end_call()
        if self._blank and not self.num_calls:
            self._events.append("".join(self._blank))

    # What subclasses build from.

    def read(self) -> ParserSteps[None]:
        """All of the text: content, and calls where a marker opens one."""
        while (marker := (yield from self.source.until(self.opening, self.content))) is not None:
            yield from self.attempt(marker)

    def attempt(self, marker: str) -> ParserSteps[None]:
        """Read calls at `marker`; what turns out not to be one is content."""
        self.source.hold()
        try:
            yield from self.source.require(marker)
            yield from self.read_calls(marker)
        except UnreadableError:
            self.end_call()
        self.content(self.source.release())

    def read_calls(self, marker: str) -> ParserSteps[None]:
        """Read what follows `marker`. Raises UnreadableError: then what the source holds is content."""
        raise NotImplementedError

    def content(self, text: str) -> None:
        """Add text of the answer. White space alone, beside a call, is layout and is dropped."""
        if not text:
            return
        if self._blank is not None:
            self._blank.append(text)
            if text.isspace():
                return
            text, self._blank = "".join(self._blank), None
        self._events.append(text)

    def begin_call(self, name: str, call_id: str | None = None) -> None:
        """Begin a call; what was held was its beginning."""
        self._events.append(CallStart(self.num_calls, call_id or self.new_id(), name))
        self.num_calls += 1
        self.in_call = True
        self._blank = []
        self.source.commit()

    def arguments(self, text: str) -> None:
        """Add text to the arguments of the open call."""
        if text:
            self._events.append(CallArguments(self.num_calls - 1, text))

    def arguments_text(self, text: str) -> None:
        """Add text to the arguments that came as the inside of a JSON string."""
        self.arguments(json.dumps(text, ensure_ascii=False)[1:-1])

    def end_call(self) -> None:
        """End the open call, if there is one."""
        if self.in_call:
            self._events.append(CallEnd(self.num_calls - 1))
            self.in_call = False

    def new_id(self) -> str:
        return f"call_{uuid.uuid4().hex[:24]}"

    def stream_arguments(self, end: Markers | None) -> ParserSteps[None]:
        """Pass the call's arguments on: a JSON value, or all text before `end` (None: before the end of the text)."""
        if (yield from self.source.json_value(self.arguments)):
            return
        if end is None:
            yield from self.source.drain(self.arguments)
        else:
            yield from self.source.until(end, self.arguments)

    def call_object(self, end: Markers | None, *, known_only: bool = False) -> ParserSteps[None]:
        """Read one call written as {"name": ..., "arguments": {...}}, in any order.

        end: what to look for when the arguments are not JSON. known_only: names that were not offered make no call.

        Raises: UnreadableError: it is no call; or, when `in_call`, the call is over and what is held follows it.
        """
        source = self.source
        name, held = "", ""
        yield from source.require("{")
        while True:
            yield from source.space()
            key = yield from source.json_string()
            yield from source.space()
            yield from source.require(":")
            yield from source.space()
            if key == "name" and not name:
                name = checked_name((yield from source.json_string()))
                if known_only and not self.tools.knows(name):
                    raise UnreadableError
                if held:
                    self.begin_call(name)
                    self._pass_whole(held)
            elif key in ARGUMENT_KEYS and not held and not self.in_call:
                if not name or (yield from source.peek()) != "{":  # a string of JSON, null: not to be streamed
                    held = yield from self._whole_value()
                    if name:
                        self.begin_call(name)
                        self._pass_whole(held)
                else:
                    self.begin_call(name)
                    yield from self.stream_arguments(end)
            else:
                yield from self._whole_value()
            if self.in_call:
                source.hold()
            yield from source.space()
            if not (yield from source.expect(",")):
                break
        yield from source.require("}")
        if not self.in_call:
            if not name:
                raise UnreadableError
            self.begin_call(name)
            self.arguments("{}")
        source.commit()

    def _whole_value(self) -> ParserSteps[str]:
        parts: list[str] = []
        if not (yield from self.source.json_value(parts.append)):
            raise UnreadableError
        return "".join(parts)

    def _pass_whole(self, value: str) -> None:
        """Pass on arguments that came as one string: the string holds their JSON; null and an empty string mean
        none."""
        if value.startswith('"'):
            text: str = json.loads(value)
            value = text if text.isascii() or _is_unicode(text) else value
        self.arguments("{}" if value in ("null", "") else value)

    def after_call(self, stops: Markers) -> ParserSteps[None]:
        """Read on to the call's end marker, the first of `stops`, or to another of them, which is not read.

        What stands before it is content.
        """
        self.end_call()
        self.content(self.source.release())
        if (yield from self.source.until(stops, self.content)) == stops.texts[0]:
            yield from self.source.require(stops.texts[0])
            self._blank = []


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= c <= "\udfff" for c in text)
