"""`drive`: turns the requests of a call into an answer, whole or as a stream of events, in the same way for every API.

A `Writer` decides what an API's events and bodies look like.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from typing import Any, Protocol

from fastapi import Request as HTTPRequest
from fastapi.responses import Response

from serving.api.errors import json_response
from serving.api.generation import Generation, begin_generation
from serving.api.json_slices import Sliced, event_parts, sliced_response
from serving.api.sse import EventForm, EventStream, LastEvents, until_disconnect
from serving.api.state import ServerState
from xllm.client.assemble import Piece
from xllm.request import Request


class Writer(Protocol):
    """Writes one generation's answers in the form of one API. It is shown every piece once, in their order: by `piece`
    in a stream, else by `take`. Events and bodies are data for JSON; a large one is `Sliced`. form: of the events.
    """

    form: EventForm

    def begin(self) -> Iterable[dict[str, Any]]:
        """The events before the first piece; none of them is large."""

    def piece(self, piece: Piece) -> Iterable[dict[str, Any]]:
        """The events of a piece."""

    def end(self) -> Iterable[dict[str, Any]]:
        """The events behind the last piece; none of them is large."""

    def error(self, error: Exception) -> dict[str, Any]:
        """The last event of a stream that fails."""

    def take(self, piece: Piece) -> None:
        """Read a piece, and keep of it what `body` needs and the choice does not hold."""

    def body(self) -> dict[str, Any]:
        """The whole answer, once every choice has ended."""


async def drive(state: ServerState, http: HTTPRequest, requests: Sequence[Request],
                make_writer: Callable[[Generation], Writer], *, timeout_s: float | None,
                stream: bool | None) -> Response:
    """Submit requests and answer with what is generated; they end when the answer is complete, fails or has no reader
    any more. timeout_s: as in `begin_generation`.

    Raises:
        ApiError, RequestError, EngineDeadError: it was refused, or it failed before an answer had begun.
        ClientGone: the client left before.
    """
    beginning = begin_generation(state, requests, timeout_s)
    if stream:
        generation = await until_disconnect(http.scope, http.receive, beginning)
        writer = make_writer(generation)
        return EventStream(_events(generation, writer), generation.close, form=writer.form,
                           show_error=writer.error)
    body = (await until_disconnect(http.scope, http.receive, _collect(beginning, make_writer))).body()
    return await sliced_response(body) if isinstance(body, Sliced) else json_response(body)


async def _events(generation: Generation, writer: Writer
                  ) -> AsyncGenerator[dict[str, Any] | list[dict[str, Any]] | bytes, None]:
    """Those of one piece together, unless one of them is large."""
    async with generation as pieces:
        if first := list(writer.begin()):
            yield first
        async for piece in pieces:
            contents = list(writer.piece(piece))
            if Sliced not in map(type, contents):
                yield contents
                continue
            for content in contents:
                if isinstance(content, Sliced):
                    async for part in event_parts(content):
                        yield part
                else:
                    yield content
        last = LastEvents(writer.end())
    yield last


async def _collect(beginning: Awaitable[Generation], make_writer: Callable[[Generation], Writer]) -> Writer:
    """The text is read as it comes, so that a long one never stops the event loop."""
    generation = await beginning
    async with generation as pieces:
        writer = make_writer(generation)
        async for piece in pieces:
            writer.take(piece)
    return writer
