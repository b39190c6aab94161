"""`SocketWindow`: memory that other processes reach: those of the same machine and user by mapping it, others over TCP.

Messages go over ZeroMQ, encrypted with a key that stands in the window's address; nobody is let in by that alone, each
grant has a key of its own. A peer has a second connection besides: a TCP socket for the bytes of its puts, whose
lengths its messages say, or a Unix socket that hands it the memory and tells when its process is gone.
"""

from __future__ import annotations

import array
import mmap
import os
import queue
import secrets
import socket
import threading
import time
import zlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
import zmq

from xllm.errors import ConfigError
from xllm.transfer.grants import Grants
from xllm.transfer.transport import TransferEvent
from xllm.transfer.wire import (
    AskGrant,
    Finished,
    FinishGrant,
    GrantedRanges,
    PeerHello,
    PeerRefused,
    PeerWelcome,
    Put,
    Released,
    RevokeGrant,
    WindowAddress,
    encode,
    here,
    read_up,
)

TOKEN_BYTES = 16  # of a connection: nobody guesses 128 bits
MAX_PEERS = 256  # Chosen: a few ranks of many instances
UNKNOWN_S = 5.0  # that a peer may be sooner than the grant it asks for. Chosen: far longer than a message takes
STALL_S = 10.0  # without a byte of a put that has begun. Chosen: as long as a slow network may stand still
LOOK_S = 0.2  # between looks at leases and connections. Chosen: a lease ends that late
MAX_FRAME_BYTES = 2**24  # of a message. Chosen: a put of a million pieces
IOV_MAX = 512  # pieces of one system call; Linux takes 1024


@dataclass(eq=False)
class _Visitor:
    """A peer that has said hello, and when. puts: what its messages announce, for the thread of its TCP socket."""

    identity: bytes
    way: str
    token: bytes
    puts: queue.SimpleQueue[Put | FinishGrant | None] = field(default_factory=queue.SimpleQueue)
    socket: socket.socket | None = None
    since_s: float = field(default_factory=time.monotonic)


class SocketWindow:
    """A `TransferWindow` over memory of its own (memfd). ways: of shm and tcp. host: where TCP sockets listen. Raises
    ConfigError where they cannot."""

    def __init__(self, ways: Sequence[str], num_bytes: int, *, host: str = "127.0.0.1"):
        self._fd = os.memfd_create("xllm-window", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, num_bytes)
        self.memory: np.ndarray = np.frombuffer(mmap.mmap(self._fd, num_bytes), dtype=np.uint8)
        self._events: queue.SimpleQueue[TransferEvent] = queue.SimpleQueue()
        self._visitors: dict[bytes, _Visitor] = {}
        self._by_token: dict[bytes, _Visitor] = {}
        self._early: list[tuple[float, bytes, AskGrant]] = []  # asks for grants that are not there yet, and until when
        self._grants = Grants(self._events.put, self._tell_revoked, self._shares)
        self._outgoing: deque[tuple[bytes, bytes]] = deque()
        self._stopping = threading.Event()
        self._wake_out, self._wake_in = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._listeners: list[socket.socket] = []
        try:
            self._listen(tuple(ways), host)
        except OSError as error:  # ZMQError is one
            self._drop_sockets()
            raise ConfigError(f"kv_transfer_host: cannot listen on {host}: {error}") from None
        self._thread = threading.Thread(target=self._run, name="xllm-transfer", daemon=True)
        self._thread.start()

    def _listen(self, ways: tuple[str, ...], host: str) -> None:
        self._router = router = self._context.socket(zmq.ROUTER)
        public, secret = zmq.curve_keypair()
        life, at = secrets.token_hex(8), f"tcp://{_place(host, 0)}"
        for option, value in ((zmq.LINGER, 0), (zmq.IPV6, ":" in host), (zmq.CURVE_SERVER, 1),
                              (zmq.MAXMSGSIZE, MAX_FRAME_BYTES)):
            router.setsockopt(option, value)
        router.setsockopt(zmq.CURVE_SECRETKEY, secret)
        router.bind(at)
        control = router.getsockopt_string(zmq.LAST_ENDPOINT)
        self._life, addresses = life, []
        for way in ways:
            if way == "shm":
                listener, bulk = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM), f"xllm-window-{life}"
                self._listeners.append(listener)
                listener.bind("\0" + bulk)
            else:
                family = socket.AF_INET6 if ":" in host else socket.AF_INET
                listener = socket.socket(family, socket.SOCK_STREAM)
                self._listeners.append(listener)
                listener.bind((host, 0))
                bulk = _place(host, listener.getsockname()[1])
            listener.listen(MAX_PEERS)
            addresses.append(WindowAddress(way, control, bulk, life, public, here()).text())
        self.addresses = tuple(addresses)

    # --- for the window's owner: see `TransferWindow`

    def grant(self, number: int, key: bytes, ranges: Sequence[tuple[int, int]], lease_s: float) -> None:
        """See `TransferWindow.grant`."""
        self._grants.add(number, key, ranges, lease_s)
        self._wake()

    def take(self, timeout_s: float) -> list[TransferEvent]:
        """See `TransferWindow.take`."""
        events = []
        try:
            events.append(self._events.get(timeout=timeout_s))
            while True:
                events.append(self._events.get_nowait())
        except queue.Empty:
            return events

    def revoke(self, number: int) -> None:
        """See `TransferWindow.revoke`."""
        self._grants.revoke(number)

    def close(self) -> None:
        """See `TransferWindow.close`."""
        if not self._stopping.is_set():
            self._stopping.set()
            self._wake()
            self._thread.join()
            self._drop_sockets()

    def _drop_sockets(self) -> None:
        for listener in self._listeners:
            listener.close()
        for visitor in list(self._visitors.values()):
            self._drop(visitor)
        self._router.close()
        self._context.term()
        for fd in (self._wake_out, self._wake_in, self._fd):
            os.close(fd)

    # --- messages

    def _wake(self) -> None:
        try:
            os.write(self._wake_in, b"x")
        except BlockingIOError:  # it has many reasons to wake up already
            return

    def _post(self, identity: bytes, message: object) -> None:
        self._outgoing.append((identity, encode(message)))
        self._wake()

    def _tell_revoked(self, identity: bytes, number: int, reason: str) -> None:
        self._post(identity, RevokeGrant(number, reason))

    def _shares(self, identity: bytes) -> bool:
        visitor = self._visitors.get(identity)
        return visitor is not None and visitor.way == "shm"

    def _run(self) -> None:
        poller = zmq.Poller()
        for source in (self._router, self._wake_out, *self._listeners):
            poller.register(source, zmq.POLLIN)
        while not self._stopping.is_set():
            ready = dict(poller.poll(int(LOOK_S * 1000)))
            if self._wake_out in ready:
                os.read(self._wake_out, 4096)
            while self._router in ready:
                try:
                    identity, frame = self._router.recv_multipart(zmq.NOBLOCK)[:2]
                except zmq.Again:
                    break
                self._read(identity, frame)
            for listener in self._listeners:
                if listener.fileno() in ready:
                    self._accept(listener)
            self._look(time.monotonic())
            while self._outgoing:
                self._router.send_multipart(self._outgoing.popleft(), zmq.NOBLOCK)

    def _look(self, now_s: float) -> None:
        self._grants.expire(now_s)
        for visitor in [v for v in list(self._visitors.values()) if v.socket is None and v.since_s < now_s - STALL_S]:
            self._by_token.pop(visitor.token, None)
            self._visitors.pop(visitor.identity, None)
        early, self._early = self._early, []
        for until_s, identity, ask in early:
            self._ask(identity, ask, until_s, now_s)

    def _read(self, identity: bytes, frame: bytes) -> None:
        try:
            message = read_up(frame)
        except msgspec.DecodeError:
            self._post(identity, PeerRefused("a message makes no sense"))
            return
        visitor = self._visitors.get(identity)
        if isinstance(message, PeerHello):
            self._greet(identity, message)
        elif visitor is None:
            self._post(identity, PeerRefused("the connection was dropped"))
        elif isinstance(message, AskGrant):
            now_s = time.monotonic()
            self._ask(identity, message, now_s + UNKNOWN_S, now_s)
        elif isinstance(message, Released):
            self._grants.release(identity, message.number)
        elif visitor.way == "tcp":
            visitor.puts.put(message)
        elif isinstance(message, Put):
            self._grants.wrote(identity, message.number, message.note, sum(size for _, size in message.pieces))
        else:
            self._finish(identity, message)

    def _greet(self, identity: bytes, hello: PeerHello) -> None:
        if hello.life != self._life:
            self._post(identity, PeerRefused("it is another life of the window"))
        elif len(self._visitors) >= MAX_PEERS:
            self._post(identity, PeerRefused(f"{MAX_PEERS} peers are connected"))
        else:
            visitor = _Visitor(identity, hello.way, secrets.token_bytes(TOKEN_BYTES))
            self._visitors[identity] = self._by_token[visitor.token] = visitor
            self._post(identity, PeerWelcome(visitor.token, len(self.memory)))

    def _ask(self, identity: bytes, ask: AskGrant, until_s: float, now_s: float) -> None:
        answer = self._grants.ask(identity, ask.number, ask.key)
        if isinstance(answer, list):
            self._post(identity, GrantedRanges(ask.number, answer))
        elif isinstance(answer, str):
            self._post(identity, RevokeGrant(ask.number, answer))
        elif now_s < until_s:
            self._early.append((until_s, identity, ask))
        else:
            self._post(identity, RevokeGrant(ask.number, "there is no such grant"))

    def _finish(self, identity: bytes, message: FinishGrant) -> None:
        reason = self._grants.finish(identity, message.number, message.num_peers)
        self._post(identity, Finished(message.number, reason))

    # --- second connections

    def _accept(self, listener: socket.socket) -> None:
        connection, _ = listener.accept()
        threading.Thread(target=self._serve, args=(connection,), name="xllm-transfer-peer", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        """In a thread of its own: find out whose connection this is, and serve it to its end."""
        connection.settimeout(STALL_S)
        visitor = None
        try:
            visitor = self._by_token.pop(_receive(connection, TOKEN_BYTES), None)
            if visitor is not None:
                visitor.socket = connection
                if visitor.way == "shm":
                    self._lend(connection)
                else:
                    self._receive_puts(visitor, connection)
        except OSError:
            pass  # it is gone, which is told below
        finally:
            connection.close()
            if visitor is not None:
                self._visitors.pop(visitor.identity, None)
                self._grants.lose(visitor.identity)

    def _drop(self, visitor: _Visitor) -> None:
        visitor.puts.put(None)
        if visitor.socket is not None:
            try:
                visitor.socket.shutdown(socket.SHUT_RDWR)
            except OSError:
                return

    def _lend(self, connection: socket.socket) -> None:
        """Hand the memory over, and wait until the peer's process is gone."""
        connection.sendmsg([b"m"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [self._fd]))])
        connection.settimeout(None)
        connection.recv(1)

    def _receive_puts(self, visitor: _Visitor, connection: socket.socket) -> None:
        while True:
            try:
                message = visitor.puts.get(timeout=LOOK_S)
            except queue.Empty:
                if _is_gone(connection):
                    return
                continue
            if message is None:
                return
            if isinstance(message, FinishGrant):
                self._finish(visitor.identity, message)
                continue
            refusal = self._grants.begin_put(visitor.identity, message.number, message.pieces)
            if refusal is not None:
                self._post(visitor.identity, PeerRefused(refusal))
                return
            fault: str | None = "the sender is gone"
            try:
                fault = self._receive_put(message, connection)
            finally:
                self._grants.end_put(message.number, message.note, sum(size for _, size in message.pieces), fault)
            if fault is not None:
                self._post(visitor.identity, PeerRefused(fault))
                return

    def _receive_put(self, message: Put, connection: socket.socket) -> str | None:
        """Take in the bytes of a put; returns what is wrong with them, or None."""
        views = deque(self.memory.data[offset : offset + size] for offset, size in message.pieces)
        crc, whole = 0, list(views)
        while views:
            got = connection.recvmsg_into([views[i] for i in range(min(len(views), IOV_MAX))])[0]
            if not got:
                return "the sender is gone"
            while got:
                taken = min(got, len(views[0]))
                got -= taken
                views[0] = views[0][taken:]
                if not len(views[0]):
                    views.popleft()
        for view in whole:
            crc = zlib.crc32(view, crc)
        return None if crc == message.crc else "the bytes that came are not those that were sent (checksum)"


def _place(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _receive(connection: socket.socket, num_bytes: int) -> bytes:
    found = b""
    while len(found) < num_bytes and (more := connection.recv(num_bytes - len(found))):
        found += more
    return found


def _is_gone(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    finally:
        connection.settimeout(STALL_S)
