"""`Stream`: the reader's end of the requests of one call."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from xllm.errors import EngineDeadError, RequestError
from xllm.request import OutputDelta, Request


class StreamOwner(Protocol):
    """What a stream needs of the client that made it."""

    dead_reason: str | None

    def drop(self, stream: Stream, request_ids: Sequence[str]) -> None:
        """Abort requests and forget them."""


class EngineBusyError(RequestError):
    """The engine has no room in its queue; the same request may succeed later."""


class RequestTimeoutError(RequestError):
    """A request was not done in the time that it was given."""


class Stream:
    """The deltas of the requests of one call, merged. Close it when done: what is still open is aborted."""

    def __init__(self, client: StreamOwner, requests: Sequence[Request]):
        self._client = client
        self.open_ids = {request.request_id for request in requests}
        self.num_unanswered = len(requests)
        self.scheduled_s: dict[str, float] = {}  # when each left the queue, on the `time.monotonic()` clock
        self.rejection: RequestError | None = None
        self.expires_s: float | None = None  # on the `time.monotonic()` clock
        self.on_tokens: Callable[[int], None] = lambda num_tokens: None
        self._deltas: list[OutputDelta] = []
        self._news = asyncio.Event()

    async def admitted(self) -> None:
        """Wait until the engine has taken all requests. Raises RequestError or EngineDeadError."""
        while self.num_unanswered and self._client.dead_reason is None:
            self._news.clear()
            await self._news.wait()
        if self._client.dead_reason is not None:
            raise EngineDeadError(self._client.dead_reason)
        if self.rejection is not None:
            raise self.rejection

    async def next(self) -> list[OutputDelta]:
        """The deltas that have come since the last call, at least one; empty once every request has ended.

        Raises:
            EngineDeadError: the engine is gone while requests are open. EngineBusyError: they had to make room.
            RequestTimeoutError: their time is over.
        """
        while not self._deltas:
            if self.rejection is not None:
                raise self.rejection
            if not self.open_ids:
                return []
            if self._client.dead_reason is not None:
                raise EngineDeadError(self._client.dead_reason)
            self._news.clear()
            await self._wait()
        taken, self._deltas = self._deltas, []
        return taken

    async def _wait(self) -> None:
        if self.expires_s is None:
            await self._news.wait()
            return
        try:
            await asyncio.wait_for(self._news.wait(), self.expires_s - time.monotonic())
        except asyncio.TimeoutError:
            raise RequestTimeoutError("the time that this request was given is over") from None

    def fail(self, error: RequestError) -> None:
        """End what is still open; the reader gets the error."""
        self.close()
        self.open_ids.clear()
        self.rejection = error
        self._news.set()

    def abort(self, request_id: str) -> None:
        """End one request now; no more deltas of it will come."""
        if request_id in self.open_ids:
            self._client.drop(self, [request_id])
            self._deltas = [d for d in self._deltas if d.request_id != request_id]

    def close(self) -> None:
        """Abort what is still open. Idempotent."""
        if self.open_ids:
            self._client.drop(self, list(self.open_ids))

    def push(self, delta: OutputDelta) -> None:
        if delta.finish_reason is not None:
            self.open_ids.discard(delta.request_id)
        self.on_tokens(len(delta.token_ids))
        self._deltas.append(delta)
        self._news.set()

    def wake(self) -> None:
        self._news.set()
