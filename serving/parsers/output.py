"""`OutputParser`: turns one choice's text into events, reasoning first, then tool calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from serving.parsers import parser_registry
from serving.parsers.events import CallStart, Event, ParsedOutput, Reasoning, assemble, merged
from serving.parsers.reasoning.think_parser import ThinkParser
from serving.parsers.tools.tool_parser import ToolParser


class AnswerParser(Protocol):
    """What reads the text of the answer, such as a `ToolParser`. `markers`: texts that it looks for."""

    @property
    def markers(self) -> tuple[str, ...]: ...

    def feed(self, text: str) -> list[Event]: ...

    def finish(self) -> list[Event]: ...


class OutputParser:
    """Feed it with text as it comes; the events together do not depend on how the text was cut. Without an `answer`
    parser all text of the answer is content."""

    def __init__(self, thinking: ThinkParser | None, answer: AnswerParser | None):
        self._thinking = thinking
        self._answer = answer
        if thinking is not None and isinstance(answer, ToolParser) and answer.endings:
            thinking.expect_calls(answer.opening.texts, answer.endings)
        self.has_calls = False
        self._events: list[Event] = []
        self.num_reasoning_tokens = 0
        self.markers = (*(thinking.markers if thinking else ()), *(answer.markers if answer else ()))

    def feed(self, text: str, *, num_tokens: int = 0, last: bool = False) -> list[Event]:
        """Read more text, of `num_tokens` tokens; `last`: there is no more after it."""
        events: list[Event] = []
        if self._thinking is not None and self._thinking.is_thinking:
            self.num_reasoning_tokens += num_tokens
        if self._thinking is not None:
            events, text = self._thinking.feed(text)
            if last:
                more, rest = self._thinking.finish()
                events, text = events + more, text + rest
        if self._answer is None:
            events += [text] if text else []
        else:
            events += self._answer.feed(text)
            if last:
                events += self._answer.finish()
        if len(events) > 1:
            events = merged(events)
        self.has_calls = self.has_calls or any(isinstance(event, CallStart) for event in events)
        self._events += events
        if self._thinking is not None and not (self._thinking.is_thinking or self._has_thought):
            self.num_reasoning_tokens = 0  # it might have thought, and did not
        return events

    @property
    def _has_thought(self) -> bool:
        return any(isinstance(event, Reasoning) for event in self._events[:1])

    def answer(self) -> ParsedOutput:
        """All that has been found so far, joined."""
        return assemble(self._events)


@dataclass(frozen=True)
class Parsers:
    """The parsers of one model's formats; None where the model has no such format, or it is not known."""

    tools: type[ToolParser] | None
    reasoning: type[ThinkParser] | None

    @classmethod
    def chosen(cls, tools: str, reasoning: str, templates: str) -> Parsers:
        """By name; "auto" looks into the model's chat templates. Raises ConfigError for an unknown name."""
        if tools == parser_registry.AUTO:
            tools = parser_registry.guess_tool_parser(templates) or parser_registry.NONE
        if reasoning == parser_registry.AUTO:
            reasoning = parser_registry.guess_reasoning_parser(templates) or parser_registry.NONE
        return cls(None if tools == parser_registry.NONE else parser_registry.tool_parser(tools),
                   None if reasoning == parser_registry.NONE else parser_registry.reasoning_parser(reasoning))
