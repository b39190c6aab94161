"""`RemoteClient`: a client of the engine of an `xllm serve` instance, over TCP. The other end is
`serving/cluster/engine_gate.py`."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import time

import zmq
from zmq.utils.monitor import parse_monitor_message

from xllm.client.cluster_keys import ClusterKeys
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
    GateReport,
    Hello,
    Lost,
    Welcome,
    encode_up,
    farewell,
    greeted,
    greeting,
    prepare,
    protocol_of,
    unnumbered,
)
from xllm.client.member_client import MemberClient
from xllm.engine.commands import Command, Outputs, Submit
from xllm.engine.facts import EngineFacts
from xllm.errors import EngineDeadError
from xllm.host_port import host_and_port

CONNECT_S = 5.0  # for an instance to answer. Chosen: many times a way through a network
# Without a sign of life the instance is lost. Chosen: ten of them.
SILENCE_S = 5.0
# Without progress of its engine it is lost, too. Chosen: longer than the steps of a slow device.
PROGRESS_S = 60.0
TELL_BYTES = 2**22  # After so many the gate is told that they were read. Chosen: far below what it lets wait
_FAREWELL_MS = 200  # for an abort or a last command to leave. Chosen: a way through a network
_NEVER_MS = 3_600_000  # Chosen: longer than this process takes to see that a connection is lost
_ZMTP = b"\xff"  # the first byte of each of its connections
_HANDSHAKE_FAILED = (zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL, zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL,
                     zmq.EVENT_HANDSHAKE_FAILED_AUTH)
logger = logging.getLogger("xllm.client")


class RemoteClient(MemberClient):
    """A `WatchedEngine` behind the gate at `address` (HOST:PORT). Make it, `await connect()`, use it, `close()` it.

    name: what the instance's log calls this client. silence_s, progress_s: how long the instance may give no sign of
    life, and its engine none of progress, before it counts as lost; 0: for ever. One that is lost stays so until
    `connect` is called again.
    """

    def __init__(self, address: str, keys: ClusterKeys, *, name: str = "client", silence_s: float = SILENCE_S,
                 progress_s: float = PROGRESS_S):
        super().__init__(address)
        self._keys, self._name = keys, name
        self._silence_s, self._progress_s = silence_s, progress_s
        self.is_refused = False  # another secret or protocol: connecting again is no use until that has changed
        self._port: FramePort | None = None
        self._welcomed: asyncio.Future[None] | None = None
        self._wanted: str | None = None
        self._ahead_s = 0.0  # our clock before the instance's
        self._heard_s, self._engine_silent_s = time.monotonic(), 0.0
        self._unheard_s = 0.0  # in beats of ours, so that a pause of this process does not count
        self._num_read_bytes = self._num_told_bytes = 0  # in this connection, and as the gate knows
        self._num_sent_bytes = self._num_frames = 0  # in this connection, behind the greeting: sent, and read

    # --- connecting

    async def connect(self, *, incarnation: str | None = None) -> EngineFacts:
        """Connect, for the first time or once more; returns the facts of the engine that answered, of which
        `incarnation`, `model` and the rest speak from then on. incarnation: the one that must answer, if given.

        Raises: EngineDeadError: none did; the reason is `dead_reason`, too.
        """
        self._leave("it is connected again")
        self.dead_reason, self.phase, self._wanted, self.is_refused = None, "connecting", incarnation, False
        self._unheard_s = self._engine_silent_s = 0.0
        self._num_read_bytes = self._num_told_bytes = self._num_sent_bytes = self._num_frames = 0
        self._heard_s = time.monotonic()
        self._welcomed = asyncio.get_running_loop().create_future()
        try:
            self._open(await asyncio.wait_for(self._reach(), CONNECT_S))
            await asyncio.wait_for(asyncio.shield(self._welcomed), CONNECT_S)
        except asyncio.TimeoutError:
            self._die(f"no answer within {CONNECT_S:g} s")
        except EngineDeadError as error:
            self._die(str(error))
        except OSError as error:
            known = os.strerror(error.errno) if error.errno is not None and error.errno > 0 else None
            self._die((known or error.strerror or str(error)).lower())  # asyncio's texts name its own functions
        except BaseException:
            self._die("connecting was given up")
            raise
        self._check_up()
        assert self.facts is not None
        return self.facts

    async def _reach(self) -> str:
        """Where the address leads, once something there speaks zmq's protocol: zmq does not say why it reaches nobody,
        and takes a proxy without an instance behind it for one with another secret. Raises OSError, EngineDeadError."""
        reader, writer = await asyncio.open_connection(*host_and_port(self.address))
        try:
            host, port = writer.get_extra_info("peername")[:2]
            head = await reader.read(1)  # of the greeting (ZMTP 3.1), for which nobody waits for the other end
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
        if head != _ZMTP:
            raise EngineDeadError("what listens there is no instance of xLLM" if head else
                                  "the connection was closed at once: no instance is behind what listens there")
        return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"

    def _open(self, endpoint: str) -> None:
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        prepare(socket, endpoint)
        socket.setsockopt(zmq.CURVE_SERVERKEY, self._keys.instance_public)
        socket.setsockopt(zmq.CURVE_PUBLICKEY, self._keys.client_public)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self._keys.client_secret)
        # Another connection is another session: this socket is closed when it loses its first. Were it never to
        # connect again (-1), zmq would drop what has come and was not read.
        socket.setsockopt(zmq.RECONNECT_IVL, _NEVER_MS)
        events = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED | sum(_HANDSHAKE_FAILED))
        self._events, self._stop_events = FramePort(events, self._note_event), socket.disable_monitor
        self._port = FramePort(socket, self._read)
        socket.connect(endpoint)
        self._port.send(greeting(HELLO, Hello(self._name)))
        self._beats = asyncio.create_task(self._beat(), name="remote-beats")

    def close(self, reason: str = "this client was closed") -> None:
        """Leave; open requests end with an EngineDeadError of that reason, and the instance aborts them. Idempotent."""
        self._leave(reason)

    def _leave(self, reason: str) -> None:
        if self._port is not None:
            self._send_frame(farewell(reason))
        self._die(reason)

    # --- how it is

    def silent_for_s(self) -> float:
        """See `WatchedEngine.silent_for_s`: since the last sign of life, and what that said of the engine."""
        return time.monotonic() - self._heard_s + self._engine_silent_s

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(BEAT_S)
            self._unheard_s += BEAT_S
            if self._silence_s and self._unheard_s > self._silence_s:
                self._die(f"no sign of life for {time.monotonic() - self._heard_s:.1f} s")
            elif self._progress_s and self._engine_silent_s > self._progress_s:
                self._die(f"its engine has made no progress for {self.silent_for_s():.1f} s")
            if self.dead_reason is not None:
                return
            self._tell_alive()

    def _tell_alive(self) -> None:
        self._num_told_bytes = self._num_read_bytes
        self._send_frame(encode_up(Alive(self._num_read_bytes, self._num_sent_bytes)))

    # --- frames

    def _send(self, command: Command) -> None:
        if isinstance(command, Submit):
            command = Submit([request.varied(
                arrival_s=request.arrival_s - self._ahead_s,
                deadline_s=None if request.deadline_s is None else request.deadline_s - self._ahead_s)
                for request in command.requests])
        self._send_frame(encode_up(command))

    def _send_frame(self, frame: bytes) -> None:
        assert self._port is not None
        try:
            self._port.send(frame)
        except zmq.Again:
            self._die("it reads nothing of what it is sent")
        else:
            self._num_sent_bytes += len(frame)

    def _note_event(self, parts: list[bytes]) -> None:
        event = parse_monitor_message(parts)["event"]  # type: ignore[arg-type]
        if event in _HANDSHAKE_FAILED and self.phase == "ready":  # what zmq says of any frame that breaks its rules
            self._die("a frame that it sent came changed, twice, or not in its turn")
        elif event in _HANDSHAKE_FAILED:
            self.is_refused = True
            self._die("wrong cluster secret: what listens there has another one, or broke the connection off")
        elif event == zmq.EVENT_DISCONNECTED and self._port is not None:
            self._port.read_rest()  # which may say why
            self._die("the connection was lost")

    def _read(self, parts: list[bytes]) -> None:
        frame = parts[-1]
        self._heard_s, self._unheard_s = time.monotonic(), 0.0
        self._num_read_bytes += len(frame)
        try:
            if frame[:1] == GOODBYE:
                self._die(frame[1:].decode(errors="replace"))
            elif self.phase == "ready":
                self._num_frames += 1
                if (content := unnumbered(frame, self._num_frames)) is None:
                    self._die("frames that it sent have not come")
                    return
                self._take(GATE_REPORTS.decode(content))
                if self._num_read_bytes - self._num_told_bytes > TELL_BYTES and self._port is not None:
                    self._tell_alive()
            elif frame[:1] == WELCOME:
                self._take_welcome(frame)
            else:
                self._die("its greeting has not come")
        except Exception as error:  # no reader may wait for deltas that never come
            logger.exception("reading what the instance at %s sends failed", self.address)
            self._die(f"what it sends cannot be read: {type(error).__name__}")

    def _take_welcome(self, frame: bytes) -> None:
        if (theirs := protocol_of(frame)) != PROTOCOL:
            self.is_refused = True
            self._die(f"speaks protocol {theirs}, this speaks {PROTOCOL}")
            return
        welcome = greeted(frame, Welcome)
        if self._wanted is not None and welcome.incarnation != self._wanted:
            self._die(f"another incarnation answers: {welcome.incarnation}, not {self._wanted}")
            return
        self.incarnation, self.started_unix_s = welcome.incarnation, welcome.started_unix_s
        self.model, self.role, self.facts, self.phase = welcome.model, welcome.role, welcome.facts, "ready"
        self._take_condition(welcome.condition)
        if self._welcomed is not None and not self._welcomed.done():
            self._welcomed.set_result(None)

    def _take(self, answer: GateReport) -> None:
        if isinstance(answer, Condition):
            self._take_condition(answer)
        elif isinstance(answer, Lost):
            for stream in {self._streams[name] for name in answer.request_ids if name in self._streams}:
                stream.lose(EngineDeadError(answer.reason))
        else:
            if isinstance(answer, Outputs) and answer.admitted:
                answer.admitted[:] = [(name, at_s + self._ahead_s) for name, at_s in answer.admitted]
            self._hand_out(answer)

    def _take_condition(self, found: Condition) -> None:
        self._ahead_s = ahead_s = self._heard_s - found.clock_s
        self._engine_silent_s, self.draining = found.silent_s, found.draining
        self.adapters, self.adapter_digests = found.adapters, found.adapter_digests
        self.sleep_level, self.stats, self.steps = found.sleep_level, found.stats, found.steps
        self.stats.last_step_s += ahead_s if self.stats.last_step_s else 0.0
        self.steps.recent = [(end_s + ahead_s, *rest) for end_s, *rest in self.steps.recent]  # type: ignore[misc]
        self.on_steps(self.steps)
        self.on_condition()

    def _die(self, reason: str) -> None:
        if self.dead_reason is not None:
            return
        super()._die(reason)
        self.phase = "dead"
        self.stats = dataclasses.replace(self.stats, num_running=0, num_waiting=0, num_waiting_by_reason={},
                                         oldest_waiting_s=0.0)
        if self._welcomed is not None and not self._welcomed.done():
            self._welcomed.set_result(None)
        if self._port is not None:
            self._beats.cancel()
            self._stop_events()  # first: zmq's own thread, which all connections share, waits for who reads them
            self._events.close()
            self._port.close(_FAREWELL_MS)
            self._port = None
        self.on_lost(reason)
