"""`EngineGate`: lets other processes of the cluster use the engine of this one, over TCP.

It serves several clients at once (`xllm/client/remote.py`), each of which proves that it knows the cluster's secret
before anything of it is read. One that is lost, does not read, or sends what makes no sense is dropped: what it had
open is aborted, and nobody else notices.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import secrets
import socket as sockets
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import zmq

from serving.cluster.cached_blocks import CachedBlocks
from serving.cluster.gate_lock import DOMAIN, GateLock
from serving.cluster.gate_session import BadFrameError, GateSession
from serving.cluster.gated_call import GatedCall
from xllm.client.cluster_keys import ClusterKeys
from xllm.client.commanding import CommandingClient
from xllm.client.engine_client import WatchedEngine
from xllm.client.frame_port import FramePort
from xllm.client.gate_wire import (
    BEAT_S,
    GATE_REPORTS,
    GOODBYE,
    HELLO,
    PROTOCOL,
    WELCOME,
    Alive,
    Condition,
    Hello,
    ServedModel,
    Welcome,
    decode_up,
    farewell,
    greeted,
    greeting,
    numbered,
    prepare,
    protocol_of,
)
from xllm.engine.commands import CacheChanges, Expect, Expected, Refused, Submit
from xllm.engine.step_log import MAX_STEPS_A_BEAT, StepReport, StepTiming
from xllm.errors import ConfigError
from xllm.host_port import host_and_port

MAX_SESSIONS = 16  # Chosen: a master, its standby, and tools beside them
CLIENT_SILENCE_S = 5.0  # Chosen: ten signs of life; a connection that is closed is noticed at the next one
MAX_FRAME_BYTES = 2**28  # Chosen: the prompts of the largest call are half of that
MAX_UNREAD_BYTES = 2**26  # that may wait for one client. Chosen: a minute of answers to a thousand requests
_HANDSHAKE_MS = 5000  # for a connection to show what it knows. Chosen: many times a way through a network
logger = logging.getLogger("xllm.gate")


class EngineGate:
    """Listens once `listen` was called, takes clients once `open` was, as long as the engine is up. Belongs to the
    event loop of the engine's client. engines: those that it is made of. lora_folder: where clients may load adapters
    from; None: nowhere. tells_cache: clients are told what is cached. role: of `routing/roles.py:ROLES`.

    num_dropped: clients, by why. on_call_end: called with each call of a client that the engine had taken, when it is
    over.
    """

    def __init__(self, engine: WatchedEngine, engines: Sequence[CommandingClient], keys: ClusterKeys,
                 lora_folder: Path | None = None, *, tells_cache: bool = True, role: str = "DEFAULT"):
        self._engine, self._engines, self._keys, self._lora_folder = engine, engines, keys, lora_folder
        self._role = role
        self.num_dropped = Counter[str]()
        self.on_call_end: Callable[[GatedCall], None] = lambda call: None
        self.port = 0
        self._is_draining = False
        self._model: ServedModel | None = None
        self._incarnation, self._started_unix_s = "", 0.0
        self._sessions: dict[bytes, GateSession] = {}  # by what zmq calls the connection
        self._num_sessions = 0  # that there have been
        self._recent: list[StepTiming] = []  # since the last beat
        self._hear_steps = engine.on_steps
        self._cached = CachedBlocks(len(engines))
        for number, one in enumerate(engines if tells_cache else ()):
            one.on_cache_changes = functools.partial(self._note_cache, number, one.on_cache_changes)

    # --- its life

    def listen(self, address: str) -> None:
        """Listen at HOST:PORT; port 0: any free one. Raises ConfigError."""
        endpoint = _endpoint(address)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._context = context
        self._lock = GateLock(context, self._keys.client_public)
        socket = context.socket(zmq.ROUTER)
        prepare(socket, endpoint)
        for option, value in ((zmq.ROUTER_MANDATORY, 1), (zmq.CURVE_SERVER, 1), (zmq.ZAP_ENFORCE_DOMAIN, 1),
                              (zmq.MAXMSGSIZE, MAX_FRAME_BYTES), (zmq.HANDSHAKE_IVL, _HANDSHAKE_MS)):
            socket.setsockopt(option, value)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self._keys.instance_secret)
        socket.setsockopt(zmq.ZAP_DOMAIN, DOMAIN)
        try:
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            socket.close()
            self._lock.close()
            context.term()
            raise ConfigError(f"cluster_listen: cannot listen on {address}: {error.strerror}") from None
        self._host = address.rpartition(":")[0]
        self.port = int(socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])
        self._port = FramePort(socket, self._read)
        self._beats = asyncio.create_task(self._beat(), name="gate-beats")

    def open(self, model: ServedModel) -> None:
        """Take clients from now on; the engine is loaded. model: what it serves."""
        self._model = model
        self._hear_steps, self._engine.on_steps = self._engine.on_steps, self._note_steps

    def drain(self) -> None:
        """Take no more requests, and tell the clients so; what they have open goes on."""
        self._is_draining = True
        self._post_all(GATE_REPORTS.encode(self._condition(self._engine.steps)))

    @property
    def address(self) -> str:
        """HOST:PORT that it listens at."""
        return f"{self._host}:{self.port}"

    @property
    def incarnation(self) -> str:
        """Of the engine that clients get; empty while there is none."""
        if self._model is None or not self._is_up() or self._engine.facts is None:
            return ""
        if not self._incarnation:
            self._incarnation, self._started_unix_s = secrets.token_hex(8), time.time()
        return self._incarnation

    @property
    def num_open(self) -> int:
        """Requests of clients that have not ended."""
        return sum(session.num_open for session in self._sessions.values())

    def close(self) -> None:
        """Tell the clients that it is over and stop listening. Idempotent."""
        if not self._port.is_closed:
            self._drop_all("the instance was shut down")
            self._beats.cancel()
            self._port.close(linger_ms=100)  # for the farewells
            self._lock.close()
            self._context.term()

    # --- what comes

    def _read(self, parts: list[bytes]) -> None:
        identity, frame = parts[0], parts[-1]
        session = self._sessions.get(identity)
        try:
            if len(parts) != 2:
                raise BadFrameError(f"a message of {len(parts) - 1} parts")
            if session is None:
                if frame[:1] == HELLO:  # else of one that was dropped
                    self._greet(identity, frame)
                return
            session.unheard_s = 0.0
            session.num_come_bytes += len(frame)
            if frame[:1] == GOODBYE:
                self._drop(identity, "left", frame[1:].decode(errors="replace"), is_told=False)
            elif isinstance(message := decode_up(frame), Alive):
                if message.num_sent_bytes != session.num_come_bytes - len(frame):
                    raise BadFrameError("frames that it sent have not come")
                session.num_read_bytes = message.num_read_bytes
            elif self._is_draining and isinstance(message, Submit) and message.requests:
                refusal = Refused(message.requests[0].request_id, "it is shutting down")
                self._post(identity, GATE_REPORTS.encode(refusal))
            elif self._is_draining and isinstance(message, Expect):
                self._post(identity, GATE_REPORTS.encode(Expected(message.number, reason="it is shutting down")))
            elif self._is_up():
                session.obey(message)
        except Exception as error:  # whatever a client sends costs that client alone
            if session is None:
                self._farewell(identity, f"what it sends cannot be read: {error}")
                logger.warning("a client was refused, it sends what cannot be read: %s", error)
            else:
                self._drop(identity, "bad frame", f"what it sends cannot be read: {error}")

    def _greet(self, identity: bytes, frame: bytes) -> None:
        if (theirs := protocol_of(frame)) != PROTOCOL:
            self._farewell(identity, f"speaks protocol {PROTOCOL}, this speaks {theirs}")
            logger.warning("a client was refused: it speaks protocol %d, this speaks %d", theirs, PROTOCOL)
            return
        name = greeted(frame, Hello).name[:100]
        if self._model is None or not self.incarnation or self._engine.facts is None:
            why = self._engine.dead_reason or self._engine.restarting_after or f"phase {self._engine.phase}"
            self._farewell(identity, f"its engine is not up: {why}")
            return
        if len(self._sessions) >= MAX_SESSIONS:
            self._farewell(identity, f"has {MAX_SESSIONS} clients already")
            logger.warning("a client was refused: there are %d already", MAX_SESSIONS)
            return
        self._num_sessions += 1
        # What else comes for it in this turn of the event loop goes into the same frame.
        soon = functools.partial(asyncio.get_running_loop().call_soon, self._tell, identity)
        session = GateSession(self._num_sessions, name, self._engine,
                              lambda report: self._post(identity, GATE_REPORTS.encode(report)), soon,
                              self._lora_folder, lambda call: self.on_call_end(call))
        self._sessions[identity] = session
        welcome = Welcome(self._incarnation, self._started_unix_s, self._model, self._engine.facts,
                          self._condition(self._engine.steps), self._role)
        self._post(identity, greeting(WELCOME, welcome))
        for changes in self._cached.snapshot():
            self._post(identity, GATE_REPORTS.encode(changes))
        logger.info("client %d (%r) is connected", session.number, name)

    # --- what goes

    def _tell(self, identity: bytes) -> None:
        if not self._is_up() or (session := self._sessions.get(identity)) is None:
            return
        try:
            session.tell()
        except Exception as error:  # a bug of ours; no reader may wait for deltas that never come
            logger.exception("answers to client %d cannot be sent", session.number)
            self._drop(identity, "error", f"what it is owed cannot be sent: {type(error).__name__}")

    def _post(self, identity: bytes, frame: bytes) -> None:
        session = self._sessions.get(identity)
        if session is None:
            return  # it was dropped meanwhile
        if session.num_frames:  # it is no greeting, whose form stays
            frame = numbered(frame, session.num_frames)
        session.num_frames += 1
        try:
            self._port.send(identity, frame)
        except zmq.Again:
            self._drop(identity, "does not read", "it does not read what it is sent")
        except zmq.ZMQError as error:
            self._drop(identity, "lost", f"the connection is lost ({error.strerror})", is_told=False)
        else:
            session.num_sent_bytes += len(frame)
            if (waiting := session.num_sent_bytes - session.num_read_bytes) > MAX_UNREAD_BYTES:
                self._drop(identity, "does not read", f"it does not read what it is sent: {waiting} bytes wait")

    def _post_all(self, frame: bytes) -> None:
        for identity in list(self._sessions):
            self._post(identity, frame)

    def _farewell(self, identity: bytes, reason: str) -> None:
        try:
            self._port.send(identity, farewell(reason))
        except zmq.ZMQError as error:  # there is nobody, or nobody who reads
            logger.debug("a farewell was not sent: %s", error)

    def _drop(self, identity: bytes, kind: str, reason: str, *, is_told: bool = True) -> None:
        if (session := self._sessions.pop(identity, None)) is None:
            return
        self.num_dropped[kind] += 1
        aborted = f"; {session.num_open} requests of it are aborted" if session.num_open else ""
        level = logging.INFO if kind == "left" else logging.WARNING
        logger.log(level, "client %d (%r) is dropped: %s%s", session.number, session.name, reason, aborted)
        session.leave("abort" if self._engine.is_up else "error")
        if is_told:
            self._farewell(identity, reason)

    def _drop_all(self, reason: str) -> None:
        for identity in list(self._sessions):
            self._drop(identity, "engine", reason)

    # --- signs of life

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(BEAT_S)
            if not self._is_up():
                continue
            recent, self._recent = self._recent, []
            steps = self._engine.steps
            frame = GATE_REPORTS.encode(self._condition(StepReport(steps.time_s, steps.tokens, recent)))
            for identity, session in list(self._sessions.items()):
                session.unheard_s += BEAT_S  # not by the clock: a pause of this process is not theirs
                if session.unheard_s > CLIENT_SILENCE_S:
                    self._drop(identity, "silent", f"it has given no sign of life for {session.unheard_s:g} s")
            self._post_all(frame)

    def _is_up(self) -> bool:
        """Whether there is an engine; where there is none any more, its clients are told and the next one will be
        another incarnation."""
        engine = self._engine
        for number, one in enumerate(self._engines):
            if one.dead_reason is not None:
                for changes in self._cached.forget(number):
                    self._post_all(GATE_REPORTS.encode(changes))
        reason = engine.dead_reason or engine.restarting_after
        if reason is not None and self._incarnation:
            self._incarnation = ""
            self._drop_all(f"its engine stopped: {reason}")
        return reason is None

    def _condition(self, steps: StepReport) -> Condition:
        engine = self._engine
        up = next((one for one in self._engines if one.dead_reason is None), self._engines[0])
        return Condition(time.monotonic(), engine.silent_for_s(), engine.stats, steps, up.adapters, up.adapter_digests,
                         up.sleep_level, self._is_draining)

    def _note_steps(self, report: StepReport) -> None:
        self._recent = [*self._recent, *report.recent][-MAX_STEPS_A_BEAT:]
        self._hear_steps(report)

    def _note_cache(self, number: int, hear: Callable[[CacheChanges], None], changes: CacheChanges) -> None:
        hear(changes)
        changes = self._cached.change(number, changes)
        if changes.stored or changes.removed:
            self._post_all(GATE_REPORTS.encode(changes))


def _endpoint(address: str) -> str:
    host, port = host_and_port(address)
    try:
        found = sockets.getaddrinfo(host, port, type=sockets.SOCK_STREAM, flags=sockets.AI_PASSIVE)[0][4][0]
    except sockets.gaierror as error:
        raise ConfigError(f"cluster_listen: {host!r} cannot be resolved: {error.strerror}") from None
    return f"tcp://[{found}]:{port}" if ":" in str(found) else f"tcp://{found}:{port}"
