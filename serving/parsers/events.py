"""The events that parsers find in a model's text, in the order in which they stand there. A text alone is more of the
answer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Reasoning:
    """More of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A tool call begins. `index` counts the calls of one answer from zero."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of a call's arguments, which together are JSON text as far as the model wrote JSON."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """The call `index` is complete."""

    index: int


Event = str | Reasoning | CallStart | CallArguments | CallEnd


@dataclass
class ToolCall:
    """A whole tool call; `arguments` is JSON text as far as the model wrote JSON."""

    id: str
    name: str
    arguments: str = ""


@dataclass
class ParsedOutput:
    """All events of one answer, joined: text, reasoning and calls."""

    content: str = ""
    reasoning: str = ""
    calls: list[ToolCall] = field(default_factory=list)


def merged(events: Iterable[Event]) -> list[Event]:
    """The same events, with neighbours of one kind joined: a piece of text then gives few."""
    found: list[Event] = []
    run: list[str] = []
    for event in events:
        last = found[-1] if found else None
        if isinstance(event, (str, Reasoning, CallArguments)):
            text = event if isinstance(event, str) else event.text
            if run and type(last) is type(event) and (
                    not isinstance(event, CallArguments) or event.index == last.index):  # type: ignore[union-attr]
                run.append(text)
                continue
            _join(found, run)
            run = [text]
        else:
            _join(found, run)
            run = []
        found.append(event)
    _join(found, run)
    return found


def _join(found: list[Event], run: list[str]) -> None:
    if len(run) > 1:
        last, text = found[-1], "".join(run)
        found[-1] = CallArguments(last.index, text) if isinstance(last, CallArguments) else type(last)(text)  # type: ignore[call-arg, arg-type]


def assemble(events: Iterable[Event]) -> ParsedOutput:
    """Join all events of one answer."""
    answer = ParsedOutput()
    content, reasoning = [], []
    arguments: list[list[str]] = []
    for event in events:
        if isinstance(event, str):
            content.append(event)
        elif isinstance(event, Reasoning):
            reasoning.append(event.text)
        elif isinstance(event, CallStart):
            answer.calls.append(ToolCall(event.id, event.name))
            arguments.append([])
        elif isinstance(event, CallArguments):
            arguments[event.index].append(event.text)
    for call, parts in zip(answer.calls, arguments, strict=True):
        call.arguments = "".join(parts)
    answer.content, answer.reasoning = "".join(content), "".join(reasoning)
    return answer
