"""`TcpDoor`: a window reached over TCP. Control messages come over ZMQ, the bytes of puts over a plain socket of each
sender, whose lengths were announced before. The window's thread writes them where they belong, so that it alone decides
when a grant ends."""

from __future__ import annotations

import contextlib
import functools
import secrets
import select
import socket
import threading
import time
from collections.abc import Callable

import zmq

from xllm.errors import ConfigError, TransferError
from xllm.transfer.entering import Entering
from xllm.transfer.grants import Grants
from xllm.transfer.put_wire import (
    MAX_SENDERS,
    Bye,
    Enter,
    FinishPuts,
    Introduce,
    Introduced,
    Put,
    PutMessage,
    Rejected,
    decode,
    encode,
)
from xllm.transfer.tcp_session import TcpSession

MAX_SESSIONS = 1024  # chosen: ranks of many instances
MAX_CONTROL_BYTES = 4 << 20  # of one message: MAX_PIECES of 18 bytes each, and the note
SESSION_BYTES = 32  # 256 bits, which nobody guesses
UNANNOUNCED_S = 2.0  # that bytes may lie before they are announced elsewhere; chosen: a few retransmissions
INTRODUCTION_S = 10.0  # from a connection to its session, and from a session to its connection; chosen
LOST_MS = 20_000  # bytes that nobody acknowledges for so long say that the other host is gone; chosen
KEEPALIVE_S = 5  # between two questions whether a silent host is there, of which four are unanswered; chosen


class TcpDoor:
    """Of one window, with a thread that speaks with senders and writes what they put.

    host: an address of this machine, or its name, that senders connect to. address: for `TcpPeer`; who does not have
    it is not let in. checksums: whether senders are to send them.
    """

    def __init__(self, grants: Grants, memory: memoryview, host: str, *, checksums: bool | None = None):
        if host in ("", "*", "0.0.0.0", "::"):
            raise ConfigError(f"a TCP window needs an address that senders can connect to, not {host or 'none'}")
        self._grants, self._memory = grants, memory
        self._incarnation = secrets.token_bytes(16)
        self._entering = Entering(grants, lambda number: 0)
        self._sessions: dict[bytes, TcpSession] = {}
        self._strangers: dict[socket.socket, tuple[float, bytes]] = {}  # connections without a session yet
        self._fresh: dict[bytes, float] = {}  # sessions without a connection yet
        self._context = zmq.Context()
        self._listener: socket.socket | None = None
        try:
            self._control = self._bind(host)
            self._listener = _listen(host)
        except (zmq.ZMQError, OSError) as error:
            self._context.destroy(linger=0)
            raise ConfigError(f"a TCP window cannot listen at {host}: {error}") from None
        shown = f"[{host}]" if ":" in host else host
        port = self._control.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2]
        checked = "checked" if checksums is None or checksums else "unchecked"
        self.address = f"tcp://{shown}:{port}/{self._listener.getsockname()[1]}/{checked}/{self._incarnation.hex()}"
        self._bell, self._ringer = socket.socketpair()
        self._bell.setblocking(False)
        self._ringer.setblocking(False)
        self._closing = False
        self._thread = threading.Thread(target=self._serve, name="xllm-window-tcp", daemon=True)
        self._thread.start()

    def open(self, number: int) -> None:
        self._ring()

    def bar(self, number: int) -> bool:
        return True  # the grants count who writes

    def close(self) -> None:
        """May be called once, after the grants are closed."""
        self._closing = True
        self._ring()
        self._thread.join()
        self._bell.close()
        self._ringer.close()

    def _ring(self) -> None:
        with contextlib.suppress(BlockingIOError):  # it rings
            self._ringer.send(b"\0")

    def _bind(self, host: str) -> zmq.Socket:
        control = self._context.socket(zmq.ROUTER)
        control.setsockopt(zmq.LINGER, 0)
        control.setsockopt(zmq.MAXMSGSIZE, MAX_CONTROL_BYTES)
        control.setsockopt(zmq.IPV6, int(":" in host))
        control.bind(f"tcp://{f'[{host}]' if ':' in host else host}:0")
        return control

    # --- the thread

    def _serve(self) -> None:
        assert self._listener is not None
        while not self._closing:
            while self._hear():  # to the last: its descriptor tells of messages that came after this alone
                pass
            for action in self._wait():
                action()
            self._entering.retry()
            self._drop_late()
        for key in list(self._sessions):
            self._drop(key, "the window was closed")
        for stranger in self._strangers:
            stranger.close()
        self._listener.close()
        self._context.destroy(linger=0)

    def _wait(self) -> list[Callable[[], None]]:
        """What is to be done next."""
        assert self._listener is not None
        poll = select.poll()
        actions: dict[int, Callable[[], None]] = {}
        for file, action in ((int(self._control.getsockopt(zmq.FD)), _nothing), (self._listener.fileno(), self._accept),
                             (self._bell.fileno(), self._silence)):  # fmt: skip
            actions[file] = action
            poll.register(file, select.POLLIN)
        for stranger in self._strangers:
            actions[stranger.fileno()] = functools.partial(self._identify, stranger)
            poll.register(stranger, select.POLLIN)
        for key, session in self._sessions.items():
            if session.bulk is not None:
                actions[session.bulk.fileno()] = functools.partial(self._receive, key)
                poll.register(session.bulk, select.POLLIN | select.POLLRDHUP if session.wants_bytes
                              else select.POLLRDHUP)  # fmt: skip
        timeout_s = self._entering.next_s(1.0 if self._strangers or self._sessions else 60.0)
        return [actions[fd] for fd, _ in poll.poll(int(timeout_s * 1000) + 1)]

    def _silence(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._bell.recv(4096):
                pass

    def _hear(self) -> bool:
        """Take one control message; whether there was one."""
        try:
            identity, data = self._control.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return False
        except ValueError:  # more or fewer frames than a sender sends
            return True
        try:
            self._answer(identity, decode(data))
        except TransferError as error:
            self._say(identity, Rejected(str(error)))
        return True

    def _answer(self, identity: bytes, message: PutMessage) -> None:
        if isinstance(message, Introduce):
            return self._introduce(identity, message)
        key = getattr(message, "session", b"")
        session = self._sessions.get(key)
        if session is None:
            raise TransferError("the window does not know this sender (any more)")
        try:
            if isinstance(message, Enter):
                self._entering.ask(session, session.num_senders, message, session.reply)
            elif isinstance(message, (Put, FinishPuts, Bye)):
                session.agree(message)
        except TransferError as error:
            self._drop(key, str(error))
            raise
        if session.is_over:
            self._drop(key, "its sender left")

    def _introduce(self, identity: bytes, message: Introduce) -> None:
        if not secrets.compare_digest(message.incarnation, self._incarnation):
            raise TransferError("another window is there now")
        if not 1 <= message.num_senders <= MAX_SENDERS or len(self._sessions) >= MAX_SESSIONS:
            raise TransferError(f"the window has {MAX_SESSIONS} senders at most, and a grant {MAX_SENDERS}")
        key = secrets.token_bytes(SESSION_BYTES)
        self._sessions[key] = TcpSession(self._grants, self._memory, message.num_senders,
                                         lambda reply: self._say(identity, reply))  # fmt: skip
        self._fresh[key] = time.monotonic() + INTRODUCTION_S
        self._say(identity, Introduced(key))

    def _say(self, identity: bytes, message: PutMessage) -> None:
        with contextlib.suppress(zmq.ZMQError):  # it takes no answers: found gone by its other socket
            self._control.send_multipart([identity, encode(message)], zmq.NOBLOCK)

    def _accept(self) -> None:
        assert self._listener is not None
        with contextlib.suppress(OSError):
            stranger, _ = self._listener.accept()
            if len(self._strangers) >= MAX_SESSIONS:
                stranger.close()
                return
            stranger.setblocking(False)
            watch_over(stranger)
            self._strangers[stranger] = (time.monotonic() + INTRODUCTION_S, b"")

    def _identify(self, stranger: socket.socket) -> None:
        """Read which session it is of."""
        deadline_s, key = self._strangers[stranger]
        try:
            data = stranger.recv(SESSION_BYTES - len(key))
        except OSError:
            data = b""
        key += data
        self._strangers[stranger] = (deadline_s, key)
        if data and len(key) < SESSION_BYTES:
            return
        del self._strangers[stranger]
        if key in self._fresh:
            del self._fresh[key]
            self._sessions[key].bulk = stranger
        else:
            stranger.close()

    def _receive(self, key: bytes) -> None:
        session = self._sessions.get(key)
        if session is None:
            return
        try:
            session.receive()
        except (OSError, TransferError) as error:
            while self._hear():  # what it announced before it left
                pass
            self._drop(key, str(error))
        else:
            if session.is_over:
                self._drop(key, "its sender left")

    def _drop_late(self) -> None:
        now_s = time.monotonic()
        for stranger in [stranger for stranger, (deadline_s, _) in self._strangers.items() if now_s > deadline_s]:
            del self._strangers[stranger]
            stranger.close()
        for key in [key for key, deadline_s in self._fresh.items() if now_s > deadline_s]:
            self._drop(key, "its sender did not connect")
        for key in [key for key, session in self._sessions.items() if session.unannounced_s(now_s) > UNANNOUNCED_S]:
            self._drop(key, "its sender is gone")  # the end of the connection lies behind the bytes

    def _drop(self, key: bytes, reason: str) -> None:
        session = self._sessions.pop(key, None)
        self._fresh.pop(key, None)
        if session is not None:
            self._entering.forget(session)
            self._grants.lost(session, reason)
            if session.bulk is not None:
                session.bulk.close()


def watch_over(connection: socket.socket) -> None:
    """Let the system find out that the other host is gone, and send small messages at once."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, LOST_MS)


def _listen(host: str) -> socket.socket:
    family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
    listener = socket.create_server((host, 0), family=family, backlog=MAX_SESSIONS)
    listener.setblocking(False)
    return listener


def _nothing() -> None:
    """Control messages are heard before anything is waited for."""
