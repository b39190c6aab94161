"""`ThinkParser`: splits reasoning from the answer, for models that put it between tags."""

from __future__ import annotations

from typing import ClassVar

from serving.parsers.events import Event, Reasoning, merged
from serving.parsers.source import Markers, ParserSteps, Source

OPEN, CLOSE = "<think>", "</think>"


class ThinkParser:
    """Text in; (what it thinks, the text of the answer) out. The answer may still hold tool calls.

    The line breaks that the templates put beside the tags belong to the markup.

    prompt: the end of the rendered prompt; a template may have opened or closed the tag there.
    """

    markers: ClassVar[tuple[str, ...]] = (OPEN, CLOSE)
    thinks_at_once: ClassVar[bool] = False  # without an opening tag in prompt or output
    also_ends: ClassVar[tuple[str, ...]] = ()  # begins the answer even when the closing tag is missing

    def __init__(self, prompt: str = ""):
        prompt = prompt.rstrip()
        self._inside = prompt.endswith(OPEN)
        self._over = prompt.endswith(CLOSE)
        self._closing = Markers("\n" + CLOSE, CLOSE, *self.also_ends)
        self._stops = self._closing
        self._endings: tuple[str, ...] = ()
        self._source = Source()
        self._events: list[Event] = []
        self._answer: list[str] = []
        self._steps = self._read()
        self._ended = False
        self._advance()

    def expect_calls(self, openings: tuple[str, ...], endings: tuple[str, ...]) -> None:
        """Look for tool calls that follow the thinking without a closing tag; before anything is fed.

        What begins with one of `openings` is part of the thinking where the closing tag comes after it. Where the text
        ends without one, and on one of `endings`, it is the answer; until then it is held back.
        """
        openings = tuple(text for text in openings if text not in self.also_ends)
        self._stops = Markers(*self._closing.texts, *openings, *("\n" + text for text in openings))
        self._endings = endings

    @property
    def is_thinking(self) -> bool:
        """Whether more text would be thought, as far as is known: true at the beginning as long as it may open."""
        return not self._ended

    @property
    def opens_for_sure(self) -> bool:
        """Whether the model thinks before anything else, without a tag of its own to open it."""
        return self._inside or (self.thinks_at_once and not self._over)

    @property
    def num_handled(self) -> int:
        return self._source.num_handled

    def feed(self, text: str) -> tuple[list[Event], str]:
        """Read more text; returns (events of reasoning, text of the answer)."""
        if self._ended:
            return [], text
        self._source.push(text)
        return self._advance()

    def finish(self) -> tuple[list[Event], str]:
        """As `feed`, at the end of the text: what was held back comes out."""
        self._source.close()
        return self._advance()

    def _advance(self) -> tuple[list[Event], str]:
        try:
            if not self._ended:
                next(self._steps)
        except StopIteration:
            self._ended = True
            self._answer.append(self._source.rest())
        events, answer = merged(self._events), "".join(self._answer)
        self._events, self._answer = [], []
        return events, answer

    def _think(self, text: str) -> None:
        self._events.append(Reasoning(text))

    def _read(self) -> ParserSteps[None]:
        source = self._source
        if self._over:
            return
        source.hold()
        yield from source.space()
        opened = yield from source.expect(OPEN)
        if not (opened or self._inside or self.thinks_at_once):
            self._answer.append(source.release())
            return
        if opened:
            source.commit()
            yield from source.expect("\n")
        elif text := source.release():
            self._think(text)
        end = yield from source.until(self._stops, self._think)
        if end is not None and end not in self._closing.texts:
            end = yield from self._read_call()
        if end is None or end in self.also_ends:
            return
        yield from source.require(end)
        yield from source.expect("\n")
        yield from source.expect("\n")

    def _read_call(self) -> ParserSteps[str | None]:
        """Read from what looks like a tool call up to what ends the thinking, which is returned; None: nothing does."""
        parts: list[str] = []
        end = yield from self._source.until(self._closing, parts.append)
        text = "".join(parts)
        if end is None and text.rstrip().endswith(self._endings):
            self._answer.append(text.removeprefix("\n"))
        else:
            self._think(text)
        return end
