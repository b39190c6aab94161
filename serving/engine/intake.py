"""`Intake`: passes every request from the HTTP API to the engine, signed ones only, and counts what they use."""

from __future__ import annotations

from collections.abc import Sequence

from serving.engine.waiting import WaitingTokens
from serving.observe.caller_log import CallerLog
from serving.security.caller import CALLER, check_signed, num_prompt_tokens
from xllm.client.engine_client import EngineBusyError, EngineClient, Stream
from xllm.request import Request


class Intake:
    """Single-threaded, as the engine's client is."""

    def __init__(self, engine: EngineClient, waiting: WaitingTokens, callers: CallerLog):
        self.waiting = waiting
        self._engine, self._callers = engine, callers
        self._streams: dict[str, Stream] = {}  # of the requests that wait for their first output
        waiting.shed = self._shed

    async def submit(self, requests: Sequence[Request]) -> Stream:
        """Hand a call's requests to the engine in the name of the running task's caller; returns when it has taken them
        all. The caller of this closes the stream.

        Raises:
            RequestError: one was refused; none of them runs. EngineBusyError: the queue is full.
            EngineDeadError: no engine. IntegrityError: one is not in the caller's name.
        """
        caller = CALLER.get()
        check_signed(requests, caller)
        figures = self._callers.of(caller.name)
        request_ids = [request.request_id for request in requests]
        self.waiting.enter(requests)
        try:
            stream = self._engine.submit(requests)
        except BaseException:
            self.waiting.leave_all(request_ids)
            raise
        self._streams.update(dict.fromkeys(request_ids, stream))

        def note(request_id: str, num_tokens: int) -> None:
            if self._streams.pop(request_id, None) is not None:
                self.waiting.leave(request_id)
            caller.quota.charge_tokens(num_tokens)
            figures.generation_tokens += num_tokens

        stream.listeners.append(note)
        try:
            await stream.admitted()
        except BaseException:
            stream.close()
            raise
        caller.quota.charge_tokens(num_prompt_tokens(requests))
        figures.prompt_tokens += num_prompt_tokens(requests)
        return stream

    def _shed(self, request_ids: Sequence[str]) -> None:
        """End waiting requests to make room for better ones; each call that one belongs to fails as a whole."""
        for request_id in request_ids:
            if (stream := self._streams.get(request_id)) is not None:
                stream.fail(EngineBusyError("the server is overloaded: this request gave its place in the queue to one "
                                            "that cannot wait"))
