"""`Blocks`: a model's answer as a row of blocks - thinking, text, tool calls - that open, grow and close one after the
other. Both the Responses API and the Messages API stream that way."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from serving.parsers.events import CallArguments, CallStart, Event, Reasoning

Kind = Literal["reasoning", "text", "call"]


@dataclass(frozen=True, slots=True)
class Block:
    """text: what it holds, of a call its arguments; empty until the block is closed. call_id, name: of a call."""

    index: int
    kind: Kind
    text: str = ""
    call_id: str = ""
    name: str = ""


@dataclass(frozen=True, slots=True)
class Opened:
    """A block begins. The event keeps its values, whatever comes after it."""

    block: Block


@dataclass(frozen=True, slots=True)
class Grew:
    """Text was added to the open block."""

    block: Block
    text: str


@dataclass(frozen=True, slots=True)
class Closed:
    """A block is complete. block: with its whole text."""

    block: Block


Change = Opened | Grew | Closed


class Blocks:
    """Turns a parser's events into changes of blocks. parallel: whether calls after the first count. Thinking that
    nobody may see is left out (`shows_reasoning`)."""

    def __init__(self, *, parallel: bool = True, shows_reasoning: bool = True):
        self.all: list[Block] = []
        self._parallel, self._shows_reasoning = parallel, shows_reasoning
        self._open: Block | None = None
        self._pieces: list[str] = []  # the text of the open block

    @property
    def has_calls(self) -> bool:
        return any(block.kind == "call" for block in self.all)

    def feed(self, events: Iterable[Event]) -> list[Change]:
        """The changes that these events make. Every block is closed before the next one opens."""
        changes: list[Change] = []
        for event in events:
            if isinstance(event, Reasoning):
                if self._shows_reasoning:
                    changes += self._grow("reasoning", event.text)
            elif isinstance(event, str):
                changes += self._grow("text", event)
            elif isinstance(event, CallStart) and (self._parallel or not event.index):
                changes += self._switch(Block(len(self.all), "call", call_id=event.id, name=event.name))
            elif isinstance(event, CallArguments) and (self._parallel or not event.index):
                changes += self._add(event.text)
        return changes

    def end(self) -> list[Change]:
        """Close the open block: the answer is complete."""
        if self._open is None:
            return []
        closed, self._open = replace(self._open, text="".join(self._pieces)), None
        self.all[closed.index] = closed
        return [Closed(closed)]

    def _grow(self, kind: Kind, text: str) -> list[Change]:
        changes: list[Change] = []
        if self._open is None or self._open.kind != kind:
            if kind == "text" and not text.strip() and self.all:
                return []  # blanks between thinking and calls are no text
            changes = self._switch(Block(len(self.all), kind))
        return changes + self._add(text)

    def _add(self, text: str) -> list[Change]:
        if not text or self._open is None:
            return []
        self._pieces.append(text)
        return [Grew(self._open, text)]

    def _switch(self, block: Block) -> list[Change]:
        changes = self.end()
        self._open, self._pieces = block, []
        self.all.append(block)
        return [*changes, Opened(block)]
