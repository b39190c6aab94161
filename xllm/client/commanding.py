"""`CommandingClient`: the part that all clients share whose engine takes the commands of `xllm/engine/commands.py`."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from xllm.client.engine_client import EngineBusyError, Stream
from xllm.engine.commands import (
    Abort,
    Action,
    CacheChanges,
    Command,
    CommandReply,
    Control,
    Controlled,
    Depart,
    Expect,
    Expected,
    Outputs,
    Refused,
    Submit,
    Unexpect,
)
from xllm.engine.facts import EngineFacts
from xllm.errors import EngineDeadError, RequestError
from xllm.kv_offer import KVOffer
from xllm.request import OutputDelta, Request

logger = logging.getLogger("xllm.client")


class CommandingClient(ABC):
    """Passes each answer of the engine to the call that waits for it. Belongs to one event loop; every request ends
    with a terminal delta or an error."""

    def __init__(self) -> None:
        self.facts: EngineFacts | None = None
        self.dead_reason: str | None = None
        self.adapters: tuple[str, ...] = ()
        self.adapter_digests: tuple[str, ...] = ()  # of their files, in the same order
        self.sleep_level = 0
        self.on_cache_changes: Callable[[CacheChanges], None] = lambda changes: None  # each that is reported
        self._streams: dict[str, Stream] = {}  # by request id
        self._answers: dict[int, asyncio.Future[Controlled]] = {}
        self._expected: dict[int, asyncio.Future[Expected]] = {}
        self._numbers = itertools.count()

    @abstractmethod
    def _send(self, command: Command) -> None:
        """Send a command to the engine, without waiting for anything."""

    @property
    def request_ids(self) -> tuple[str, ...]:
        """Of the requests that have not ended."""
        return tuple(self._streams)

    def has(self, request_id: str) -> bool:
        """Whether a request of this id has not ended."""
        return request_id in self._streams

    def submit(self, requests: Sequence[Request]) -> Stream:
        """See `EngineClient.submit`."""
        stream = Stream(requests, self.drop)
        self.submit_for(stream, requests)
        return stream

    def submit_for(self, stream: Stream, requests: Sequence[Request]) -> None:
        """As `submit`, for a stream that is there already: what comes of these requests goes to it until it drops them.
        All of its open requests are among them."""
        self._check_up()
        for request in requests:
            if request.request_id in self._streams:
                raise RequestError(f"request_id {request.request_id!r} is in use", field="request_id")
        self._streams.update((request.request_id, stream) for request in requests)
        try:
            self._send(Submit(list(requests)))
        except BaseException:
            for request in requests:
                self._streams.pop(request.request_id, None)
            raise

    def redirect(self, request_ids: Iterable[str], stream: Stream) -> None:
        """Have what comes of these requests, which were sent, go to another stream."""
        self._streams.update((request_id, stream) for request_id in request_ids if request_id in self._streams)

    def abort(self, request_ids: Iterable[str]) -> None:
        """See `EngineClient.abort`."""
        self._send_abort([request_id for request_id in request_ids if request_id in self._streams])

    def drop(self, request_ids: Sequence[str]) -> None:
        """Abort requests and forget them: nothing of them comes to their stream any more. Unknown ids are ignored."""
        self._send_abort([request_id for request_id in request_ids
                          if self._streams.pop(request_id, None) is not None])

    def _send_abort(self, request_ids: list[str]) -> None:
        if request_ids and self.dead_reason is None:
            self._send(Abort(request_ids))

    async def control(self, action: Action, **options: Any) -> Controlled:
        """See `EngineClient.control`."""
        self._check_up()
        number = next(self._numbers)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        try:
            self._send(Control(number, action, **options))
            done = await answer
        finally:
            self._answers.pop(number, None)
        self.adapters, self.adapter_digests = done.state.adapters, done.state.adapter_digests
        self.sleep_level = done.state.sleep_level
        return done

    async def expect(self, request: Request, lease_s: float) -> Expected:
        """See `EngineClient.expect`. Room that nobody waits for any more when its answer comes is given back."""
        self._check_up()
        number = next(self._numbers)
        answer = self._expected[number] = asyncio.get_running_loop().create_future()
        try:
            self._send(Expect(number, request, lease_s))
            return await answer
        except asyncio.CancelledError:
            if answer.done() and not answer.cancelled() and answer.exception() is None:
                self._give_back(answer.result())
            raise
        finally:
            self._expected.pop(number, None)

    def _give_back(self, unread: Expected) -> None:
        if unread.offer is not None:
            self.unexpect(unread.landing)

    def unexpect(self, landing: int) -> None:
        """See `EngineClient.unexpect`."""
        with contextlib.suppress(EngineDeadError):  # what it kept is gone with it
            self._check_up()
            self._send(Unexpect(landing))

    def depart(self, request_id: str, offer: KVOffer) -> None:
        """See `EngineClient.depart`."""
        if request_id in self._streams and self.dead_reason is None:
            self._send(Depart(request_id, offer))

    async def control_or_log(self, action: Action, **options: Any) -> None:
        """Send a command that brings an engine that comes later to where others are, or it was itself; what it refuses
        is logged."""
        done = await CommandingClient.control(self, action, **options)
        if done.error is not None:
            logger.error("an engine that came later is not as it should be: %s: %s", action, done.error)

    def _check_up(self) -> None:
        """Raise EngineDeadError if the engine takes no requests."""
        if self.dead_reason is not None:
            raise EngineDeadError(self.dead_reason)

    def _hand_out(self, answer: CommandReply) -> None:
        """Pass an answer of the engine to the call that waits for it; ignore it if that has gone."""
        if isinstance(answer, Outputs):
            for request_id in answer.taken:
                if (stream := self._streams.get(request_id)) is not None:
                    stream.admit()
            for request_id, at_s in answer.admitted:
                if (stream := self._streams.get(request_id)) is not None:
                    stream.schedule(request_id, at_s)
            for request_id in answer.staying:
                if (stream := self._streams.get(request_id)) is not None:
                    stream.stay(request_id)
            for delta in answer.deltas:
                self._deliver(delta)
        elif isinstance(answer, Refused):
            if (stream := self._streams.get(answer.request_id)) is not None:
                self._refuse(stream, answer)
        elif isinstance(answer, CacheChanges):
            self.on_cache_changes(answer)
        elif isinstance(answer, Expected):
            if (asking := self._expected.get(answer.number)) is not None and not asking.done():
                asking.set_result(answer)
            else:
                self._give_back(answer)
        elif (waiting := self._answers.get(answer.number)) is not None and not waiting.done():
            waiting.set_result(answer)

    def _deliver(self, delta: OutputDelta) -> None:
        stream = self._streams.get(delta.request_id)
        if stream is None:
            return  # dropped by its reader while this was on its way
        if delta.finish_reason is not None:
            del self._streams[delta.request_id]
        stream.push(delta)

    def _refuse(self, stream: Stream, answer: Refused) -> None:
        for request_id in stream.open_ids:  # the engine has none of them
            self._streams.pop(request_id, None)
        # Admission names the field of a wrong request; what names none is about the queue.
        stream.lose((RequestError if answer.field else EngineBusyError)(answer.error, field=answer.field))

    def _die(self, reason: str) -> None:
        """Give every waiting call an EngineDeadError. If it is called again, the first reason stays."""
        if self.dead_reason is not None:
            return
        self.dead_reason = reason
        if self._streams:  # each of them says why
            logger.debug("%d open requests end: %s", len(self._streams), reason)
        for stream in set(self._streams.values()):
            stream.lose(EngineDeadError(reason))
        waiting: list[asyncio.Future[Any]] = [*self._answers.values(), *self._expected.values()]
        for answer in waiting:
            if not answer.done():
                answer.set_exception(EngineDeadError(reason))
