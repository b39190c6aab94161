"""`GateSession`: what one client has asked of an instance through its gate, and what it is owed."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from serving.cluster.gated_call import GatedCall
from xllm.client.engine_client import WatchedEngine
from xllm.client.gate_wire import GateReport, Lost
from xllm.engine.commands import (
    Abort,
    Action,
    Command,
    Control,
    Controlled,
    Depart,
    EngineState,
    Expect,
    Expected,
    Outputs,
    Refused,
    Submit,
    Unexpect,
)
from xllm.errors import EngineDeadError, RequestError
from xllm.request import OutputDelta, Request
from xllm.transfer_settings import MAX_LEASE_S

# What a client may ask of the engine as a whole: what the HTTP API's administrators may. Never `Shutdown`.
ALLOWED: tuple[Action, ...] = ("state", "pause", "resume", "sleep", "wakeup", "reset_prefix_cache", "load_adapter",
                               "unload_adapter")
# Offers of one client that it has not used, and that are taken back when it is lost. Chosen: as many as an engine makes
# at a time (`xllm/kv/landing.py`); of more the oldest are over.
MAX_LANDINGS = 4096
MAX_CONTROLS = 64  # of one client that have not been answered, and questions for room. Chosen: far more than any asks
TENANT_WEIGHTS = (0.001, 1000.0)  # as in a file of keys (`serving/security/keys.py`)


class BadFrameError(Exception):
    """What a client sent makes no sense; the message says why."""


class GateSession:
    """Belongs to the event loop of the engine's client. Its requests have ids of their own in the engine, which begin
    with its number. post(answer): sends it. on_news: called once before each time that `tell` has something
    to do. lora_folder: where adapters may be loaded from; None: nowhere. on_call_end: called with each call that the
    engine had taken, when it is over.

    unheard_s: since its last frame. num_sent_bytes, num_read_bytes: to it, and by it as it says. num_come_bytes: from
    it, behind its greeting. num_frames: to it, the greeting included.
    """

    def __init__(self, number: int, name: str, engine: WatchedEngine, post: Callable[[GateReport], None],
                 on_news: Callable[[], object], lora_folder: Path | None, on_call_end: Callable[[GatedCall], None]):
        self.number, self.name = number, name
        self.unheard_s = 0.0
        self.num_sent_bytes = self.num_read_bytes = self.num_come_bytes = self.num_frames = 0
        self._prefix = f"{number}:"
        self._engine, self._post, self._on_news, self._lora_folder = engine, post, on_news, lora_folder
        self._on_call_end = on_call_end
        self._calls: dict[GatedCall, None] = {}
        self._news: dict[GatedCall, None] = {}
        self._controls: set[asyncio.Task[None]] = set()
        self._landings: dict[int, None] = {}  # of the offers made to it that it has not used, the oldest first

    @property
    def num_open(self) -> int:
        """Its requests that have not ended."""
        return sum(len(call.stream.open_ids) for call in self._calls)

    def obey(self, command: Command) -> None:
        """Carry out a command. Raises BadFrameError for one that no client sends."""
        if isinstance(command, Submit) and command.requests:
            self._submit(command.requests)
        elif isinstance(command, Abort):
            self._engine.abort([self._prefix + request_id for request_id in command.request_ids])
        elif isinstance(command, Control) and command.action in ALLOWED and len(self._controls) < MAX_CONTROLS:
            task = asyncio.create_task(self._control(command))
            self._controls.add(task)
            task.add_done_callback(self._controls.discard)
        elif isinstance(command, Unexpect):
            self._unexpect([command.landing])
        elif isinstance(command, Depart):
            self._engine.depart(self._prefix + command.request_id, command.offer)
        elif isinstance(command, Expect) and len(self._controls) < MAX_CONTROLS:
            task = asyncio.create_task(self._expect(command))
            self._controls.add(task)
            task.add_done_callback(self._controls.discard)
        else:
            raise BadFrameError(f"{type(command).__name__} is not taken from a client")

    def leave(self, reason: str = "abort") -> None:
        """Abort what it has open, free the room that it asked for, and tell it nothing more. reason: the finish reason
        that is noted."""
        calls, self._calls, self._news = self._calls, {}, {}
        for call in calls:
            call.stream.on_news = lambda: None
            call.stream.close()
            self._end(call, reason)
        for task in self._controls:
            task.cancel()
        self._unexpect(list(self._landings))

    # --- requests

    def _submit(self, requests: Sequence[Request]) -> None:
        request_ids = [request.request_id for request in requests]
        try:
            stream = self._engine.submit([self._own(request) for request in requests])
        except RequestError as error:
            self._unexpect([request.landing for request in requests if request.landing is not None])
            self._post(Refused(request_ids[0], str(error), error.field))
            return
        except EngineDeadError as error:
            self._post(Lost(request_ids, str(error)))
            return
        for request in requests:
            self._landings.pop(-1 if request.landing is None else request.landing, None)
        call = GatedCall(self.name, self._prefix, requests, stream)
        self._calls[call] = None
        stream.on_news = lambda: self._note(call)

    def _own(self, request: Request) -> Request:
        """As the engine gets it: a landing that is not its own is none. Raises RequestError for what the HTTP API never
        lets through."""
        low, high = TENANT_WEIGHTS
        if not low <= request.tenant_weight <= high:
            raise RequestError(f"tenant_weight must be in {low} to {high}", field="tenant_weight")
        if not math.isfinite(request.arrival_s):
            raise RequestError("arrival_s must be finite", field="arrival_s")
        return replace(request, request_id=self._prefix + request.request_id, lora_slot=0, traceparent=None,
                       landing=request.landing if request.landing in self._landings else None)

    def _end(self, call: GatedCall, reason: str) -> None:
        self._calls.pop(call, None)
        if call.stream.is_admitted:
            call.end(reason)
            self._on_call_end(call)

    def _note(self, call: GatedCall) -> None:
        if not self._news:
            self._on_news()
        self._news[call] = None

    def tell(self) -> None:
        """Send all that has come for it since the last call, in one frame."""
        news, self._news = self._news, {}
        found, errors = Outputs(), list[GateReport]()
        for call in news:
            try:
                self._add(found, call, call.stream.take())
                call.stream.take()  # raises what ended it behind these deltas
            except Exception as error:
                errors.append(_failure(call, error))
                self._end(call, "error")
                continue
            if not call.stream.open_ids:
                self._end(call, "abort")
        if found.taken or found.deltas or found.staying:
            self._post(found)
        for answer in errors:
            self._post(answer)

    def _add(self, found: Outputs, call: GatedCall, deltas: list[OutputDelta]) -> None:
        cut, stream = len(self._prefix), call.stream
        if not call.is_taken:
            call.is_taken = True
            found.taken.append(call.request_ids[0])
        if len(stream.scheduled_s) > call.num_admitted:
            fresh = list(stream.scheduled_s.items())[call.num_admitted:]
            call.num_admitted += len(fresh)
            found.admitted.extend((request_id[cut:], at_s) for request_id, at_s in fresh)
        if stream.staying:
            found.staying.extend(request_id[cut:] for request_id in stream.staying)
            stream.staying.clear()
        now_s = time.monotonic()
        for delta in deltas:
            delta.request_id = delta.request_id[cut:]
            call.requests[delta.request_id].note(delta, now_s)
        found.deltas.extend(deltas)

    # --- commands about the engine as a whole

    async def _control(self, command: Control) -> None:
        refusal = self._refusal(command)
        if refusal is None:
            try:
                done = await self._engine.control(command.action, mode=command.mode, level=command.level,
                                                  name=command.name, folder=command.folder)
            except EngineDeadError:
                return  # the gate says so to all
        else:
            state = (await self._engine.control("state")).state if self._engine.is_up else EngineState()
            done = Controlled(command.number, state, error=refusal, is_state=True)
        self._post(replace(done, number=command.number))

    async def _expect(self, command: Expect) -> None:
        try:
            if not 0.0 < command.lease_s <= MAX_LEASE_S:  # nan is not, either
                raise RequestError(f"lease_s must be in (0, {MAX_LEASE_S:g}]", field="lease_s")
            found = await self._engine.expect(self._own(command.request), command.lease_s)
        except RequestError as error:
            found = Expected(command.number, reason=str(error))
        except EngineDeadError:
            return  # the gate says so to all
        if found.offer is not None:
            self._landings[found.landing] = None
            if len(self._landings) > MAX_LANDINGS:
                del self._landings[next(iter(self._landings))]
        self._post(replace(found, number=command.number))

    def _unexpect(self, landings: Sequence[int]) -> None:
        """Free the room of its own landings: those of other clients are not its affair."""
        for landing in landings:
            if landing in self._landings:
                del self._landings[landing]
                self._engine.unexpect(landing)

    def _refusal(self, command: Control) -> str | None:
        if command.action != "load_adapter":
            return None
        if self._lora_folder is None:
            return "this instance loads no adapters over the network: --lora-folder is not set"
        if not Path(command.folder).resolve().is_relative_to(self._lora_folder.resolve()):
            return "adapters are loaded from below --lora-folder only"
        return None


def _failure(call: GatedCall, error: Exception) -> GateReport:
    if not call.is_taken and isinstance(error, RequestError):
        return Refused(call.request_ids[0], str(error), error.field)
    return Lost(call.request_ids, str(error))  # the client knows which of them had ended
