"""`EngineClient`, the interface to an engine in this process or another, and `Stream`, the deltas of one call."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from xllm.engine.commands import Action, Controlled, Expected
from xllm.engine.facts import EngineFacts
from xllm.engine.step_log import StepReport
from xllm.errors import EngineDeadError, RequestError
from xllm.kv_offer import KVOffer
from xllm.request import OutputDelta, Request
from xllm.stats import EngineStats


class EngineBusyError(RequestError):
    """The queue has no room; the same request may succeed later."""


class EngineAwayError(EngineDeadError):
    """There is no engine at the moment; there may be one soon."""


class RequestTimeoutError(RequestError):
    """A request was not done within its time limit."""


class EngineClient(Protocol):
    """An engine, or several that look like one, for one event loop. It handles requests and tokens only: who may send
    them, how many, and which text they make is decided elsewhere."""

    @property
    def facts(self) -> EngineFacts | None:
        """None until the engine has been loaded."""

    @property
    def dead_reason(self) -> str | None:
        """Why nothing is taken any more."""

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names that requests may ask for."""

    @property
    def sleep_level(self) -> int:
        """0: awake."""

    @property
    def stats(self) -> EngineStats:
        """The latest that is known."""

    @property
    def request_ids(self) -> tuple[str, ...]:
        """Of the requests that have not ended."""

    def submit(self, requests: Sequence[Request]) -> Stream:
        """Send the requests of one call: all of them are run or none. The caller closes the stream; `Stream.admitted`,
        or else `Stream.next`, tells whether they were taken.

        Raises: RequestError: an id is in use. EngineDeadError: there is no engine.
        """

    async def expect(self, request: Request, lease_s: float) -> Expected:
        """Make room for the KV of a request that another instance computes; see `commands.Expect`.

        Raises: EngineDeadError: no engine, or it ended meanwhile.
        """

    def unexpect(self, landing: int) -> None:
        """Take back an `expect` that was answered with an offer; see `commands.Unexpect`."""

    def depart(self, request_id: str, offer: KVOffer) -> None:
        """Have a request go on elsewhere; see `commands.Depart`. Unknown ids are ignored."""

    def abort(self, request_ids: Iterable[str]) -> None:
        """End requests; each reader gets the terminal delta. Unknown ids are ignored."""

    async def control(self, action: Action, **options: Any) -> Controlled:
        """Send a command about the engine as a whole (`commands.Control`) and return its answer.

        Raises: EngineDeadError: no engine, or it ended meanwhile.
        """


class WatchedEngine(EngineClient, Protocol):
    """An `EngineClient` with what a server wants to know of its engine besides."""

    on_steps: Callable[[StepReport], None]  # called with each report that comes

    @property
    def phase(self) -> str:
        """Of the start-up; "ready" or "dead" after it."""

    @property
    def restarting_after(self) -> str | None:
        """Why the last engine died, while another one starts."""

    @property
    def steps(self) -> StepReport:
        """The latest report that has come."""

    @property
    def is_up(self) -> bool:
        """Whether requests are taken."""

    @property
    def engines(self) -> Sequence[WatchedEngine]:
        """The engines that it is made of, by their numbers; of one engine itself."""

    def silent_for_s(self) -> float:
        """For how many seconds there has been no sign of progress; 0 while the engine idles and answers."""


class Stream:
    """The deltas of the requests of one call, merged. Close it when done: requests that have not ended are aborted.

    drop(request ids): aborts requests and forgets them; None: `_withdraw` is overridden. listeners: each is called
    (request id, number of tokens) whenever something came for a request, and when it left without more. on_news: called
    whenever `take` may have something to say. engine: the number of the one that has them.
    """

    def __init__(self, requests: Sequence[Request], drop: Callable[[Sequence[str]], None] | None):
        self.open_ids = {request.request_id for request in requests}
        self.scheduled_s: dict[str, float] = {}  # when each left the queue, on the `time.monotonic()` clock
        self.expires_s: float | None = None  # on the `time.monotonic()` clock
        self.staying: list[str] = []  # requests whose KV could not be sent elsewhere, as they were to go on there
        self.listeners: list[Callable[[str, int], None]] = []
        self.on_news: Callable[[], None] = lambda: None
        self.engine = 0
        self.is_admitted = False  # the engine has taken the requests
        self._drop = drop
        self._failure: Exception | None = None
        self._deltas: list[OutputDelta] = []
        self._news = asyncio.Event()

    async def admitted(self) -> None:
        """Wait until the engine has taken all requests. Raises RequestError or EngineDeadError."""
        while not self.is_admitted and self._failure is None:
            await self._wait()
        if self._failure is not None:
            raise self._failure

    async def next(self) -> list[OutputDelta]:
        """The deltas that have come since the last call, at least one; empty once every request has ended.

        Raises:
            RequestError: the requests were refused. EngineDeadError: the engine is gone while requests are open.
            EngineBusyError: they had to make room. RequestTimeoutError: their time is over.
        """
        while not (taken := self.take()):
            if not self.open_ids:
                return []
            await self._wait()
        return taken

    def take(self) -> list[OutputDelta]:
        """As `next`, without waiting: empty if nothing has come. Raises what `next` raises, but for the time limit."""
        if not self._deltas and self._failure is not None:
            raise self._failure
        taken, self._deltas = self._deltas, []
        return taken

    async def _wait(self) -> None:
        self._news.clear()
        if self.expires_s is None:
            await self._news.wait()
            return
        try:
            await asyncio.wait_for(self._news.wait(), self.expires_s - time.monotonic())
        except asyncio.TimeoutError:
            raise RequestTimeoutError("the time that this request was given is over") from None

    def abort(self, request_id: str) -> None:
        """End one request now; no more deltas of it will come."""
        if request_id in self.open_ids:
            self._leave([request_id])
            self._deltas = [d for d in self._deltas if d.request_id != request_id]

    def close(self) -> None:
        """Abort the requests that have not ended. Idempotent."""
        self._leave(list(self.open_ids))

    def _leave(self, request_ids: Sequence[str]) -> None:
        self._withdraw(request_ids)
        self.open_ids.difference_update(request_ids)
        for request_id in request_ids:
            self._tell(request_id, 0)

    def _withdraw(self, request_ids: Sequence[str]) -> None:
        """Abort requests and forget them."""
        assert self._drop is not None
        self._drop(request_ids)

    def _tell(self, request_id: str, num_tokens: int) -> None:
        for listener in self.listeners:
            listener(request_id, num_tokens)

    # --- for the client that made it

    def lose(self, error: Exception) -> None:
        """Note that the engine has none of the open requests, or that it refuses them."""
        self.fail(error)

    def schedule(self, request_id: str, at_s: float) -> None:
        """Note that a request left the queue then, on the `time.monotonic()` clock."""
        self.scheduled_s[request_id] = at_s

    def stay(self, request_id: str) -> None:
        """Note that a request that was to go on elsewhere stays, since its KV cannot be sent."""
        self.staying.append(request_id)
        self._note_news()

    def fail(self, error: Exception) -> None:
        """End the requests that have not ended; the reader gets the error after the deltas that have come."""
        self.close()
        self._failure = error
        self._note_news()

    def admit(self) -> None:
        """Note that the engine has taken the requests."""
        self.is_admitted = True
        self._note_news()

    def push(self, delta: OutputDelta) -> None:
        """Add a delta of one of the requests."""
        if delta.finish_reason is not None:
            self.open_ids.discard(delta.request_id)
        self._deltas.append(delta)
        self._note_news()
        self._tell(delta.request_id, len(delta.token_ids))

    def _note_news(self) -> None:
        self._news.set()
        self.on_news()
