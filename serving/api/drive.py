"""`drive`: turns a generation into an answer, whole or as a stream of events, in the same way for every API.

A `Writer` decides what an API's events and bodies look like.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable
from typing import Any, Protocol

from fastapi import Request
from fastapi.responses import Response

from serving.api.errors import json_response
from serving.api.generation import Generation
from serving.api.json_slices import Sliced, event_parts, sliced_response
from serving.api.sse import EventStream, until_disconnect
from xllm.client.assemble import Piece


class Writer(Protocol):
    """Writes one generation's answers in the form of one API. It is shown every piece once, in their order: by `piece`
    in a stream, else by `take`. Events and bodies are data for JSON; a large one is `Sliced`.

    is_named: events bear their type as their name, and the last of them ends the stream; else `[DONE]` does.
    """

    is_named: bool

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


async def drive(request: Request, generation: Generation, writer: Writer, *, stream: bool | None) -> Response:
    """Start a generation and answer with it; it is closed when the answer is complete, fails or has no reader any more.

    Raises:
        ApiError, RequestError, EngineDeadError: it was refused, or it failed before an answer had begun.
        ClientGone: the client left before.
    """
    if stream:
        await until_disconnect(request.receive, generation.start())
        return EventStream(_events(generation, writer), generation.close, is_named=writer.is_named,
                           show_error=writer.error)
    await until_disconnect(request.receive, _collect(generation, writer))
    body = writer.body()
    return await sliced_response(body) if isinstance(body, Sliced) else json_response(body)


async def _events(generation: Generation, writer: Writer) -> AsyncGenerator[dict[str, Any] | bytes, None]:
    async with generation as pieces:
        for content in writer.begin():
            yield content
        async for piece in pieces:
            for content in writer.piece(piece):
                if isinstance(content, Sliced):
                    async for part in event_parts(content):
                        yield part
                else:
                    yield content
        for content in writer.end():
            yield content


async def _collect(generation: Generation, writer: Writer) -> None:
    """The text is read as it comes, so that a long one never stops the event loop."""
    await generation.start()
    async with generation as pieces:
        async for piece in pieces:
            writer.take(piece)
