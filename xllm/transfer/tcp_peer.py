"""`TcpPeer`: the sender's side of a window reached over TCP."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Sequence
from urllib.parse import urlsplit

import zmq

from xllm.errors import TransferError
from xllm.kv import failpoints
from xllm.transfer.entering import Entry, read_entry
from xllm.transfer.pieces import PutPiece, as_bytes, checksum, lengths
from xllm.transfer.put_wire import (
    Bye,
    Ceased,
    Enter,
    FinishedPuts,
    FinishPuts,
    Introduce,
    Introduced,
    Put,
    PutMessage,
    decode,
    encode,
)
from xllm.transfer.tcp import watch_over

BUFFERS = 512  # handed to the system by one call, half of what Linux takes (IOV_MAX); chosen
MAX_CEASED = 1024  # grants whose ends were not asked for yet; chosen
GOODBYE_S = 1.0  # for the window's answer to the last word; chosen


class TcpPeer:
    """See `Peer`. Raises TransferError if the window does not answer or is another one now."""

    def __init__(self, address: str, *, num_senders: int = 1, timeout_s: float = 10.0):
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._entries: dict[int, Entry] = {}
        self._ceased: dict[int, str] = {}  # why grants ended that were put into
        self._broken = ""  # why nothing goes over this connection any more
        host, port, bulk_port, self._checks, incarnation = _parsed(address)
        self._context = zmq.Context()
        self._bulk: socket.socket | None = None
        try:
            self._control = self._open(host, port)
            self._session = self._introduce(address, incarnation, num_senders)
            self._bulk = socket.create_connection((host, bulk_port), timeout_s)
            watch_over(self._bulk)
            self._bulk.sendall(self._session)
        except (OSError, zmq.ZMQError) as error:
            self._shut()
            raise TransferError(f"the window {address} is not reached: {error}") from None
        except BaseException:
            self._shut()
            raise

    def put(self, number: int, key: bytes, pieces: Sequence[PutPiece], note: bytes) -> None:
        flat = as_bytes(pieces, note)
        places = lengths(flat)
        with self._lock:
            self._look()
            entry = self._entries.get(number) or self._enter(number, key)
            entry.check(number, key, places)
            if failpoints.armed is not None:
                failpoints.hit("transfer.put_begun")
            self._send(Put(number, note, sum(length for _, length in places), places,
                           checksum(flat) if self._checks else None, self._session))  # fmt: skip
            self._send_bytes([data for _, data in flat if len(data)])

    def finish(self, number: int) -> None:
        with self._lock:
            self._look()
            reason = self._ceased.pop(number, None)
            if self._entries.pop(number, None) is None:
                raise TransferError(f"grant {number} is over: {reason}" if reason else
                                    f"nothing was put into grant {number} from here")  # fmt: skip
            self._send(FinishPuts(number, self._session))
            answer = self._receive_answer(self._timeout_s)
            self._ceased.pop(number, None)
            if not isinstance(answer, FinishedPuts) or answer.reason:
                raise TransferError(f"grant {number} is over: {getattr(answer, 'reason', answer)}")

    def close(self) -> None:
        with self._lock:
            if not self._broken:
                with contextlib.suppress(TransferError):
                    self._look()
                    self._send(Bye(self._session))
                    deadline_s = time.monotonic() + GOODBYE_S
                    while not isinstance(self._receive(max(0.0, deadline_s - time.monotonic())), Bye):
                        pass
            self._broken = self._broken or "the way to the window is closed"
            self._shut()

    def _open(self, host: str, port: int) -> zmq.Socket:
        control = self._context.socket(zmq.DEALER)
        control.setsockopt(zmq.LINGER, 0)
        control.setsockopt(zmq.SNDTIMEO, max(1, int(self._timeout_s * 1000)))
        control.setsockopt(zmq.IPV6, int(":" in host))
        control.connect(f"tcp://{f'[{host}]' if ':' in host else host}:{port}")
        return control

    def _introduce(self, address: str, incarnation: bytes, num_senders: int) -> bytes:
        self._control.send(encode(Introduce(incarnation, num_senders)))
        answer = self._receive(self._timeout_s)
        if not isinstance(answer, Introduced):
            raise TransferError(f"the window {address} refuses: {getattr(answer, 'reason', answer)}")
        return answer.session

    def _enter(self, number: int, key: bytes) -> Entry:
        self._send(Enter(number, key, self._timeout_s, self._session))
        entry = read_entry(key, lambda: self._receive_answer(self._timeout_s + GOODBYE_S))
        self._entries[number] = entry
        return entry

    def _receive_answer(self, timeout_s: float) -> PutMessage:
        """The next message that was asked for."""
        while isinstance(answer := self._receive(timeout_s), Ceased):
            self._cease(answer)
        return answer

    def _cease(self, message: Ceased) -> None:
        if self._entries.pop(message.number, None) is not None:
            self._ceased[message.number] = message.reason
            while len(self._ceased) > MAX_CEASED:
                del self._ceased[next(iter(self._ceased))]

    def _look(self) -> None:
        """Take what the window said unasked, and see that it is there."""
        self._check()
        assert self._bulk is not None
        self._bulk.settimeout(0)
        try:
            self._bulk.recv(1)
        except BlockingIOError:
            pass
        except OSError as error:
            self._break(f"the window is gone: {error}")
        else:
            self._break("the window is gone")
        while self._control.poll(0):
            message = self._receive(0.0)
            if isinstance(message, Ceased):
                self._cease(message)
            else:
                self._break(f"the window refuses: {getattr(message, 'reason', message)}")
        self._check()

    def _check(self) -> None:
        if self._broken:
            raise TransferError(self._broken)

    def _break(self, reason: str) -> None:
        """The window hears of it, too."""
        self._broken = self._broken or reason
        if self._bulk is not None:
            with contextlib.suppress(OSError):
                self._bulk.shutdown(socket.SHUT_RDWR)

    def _send(self, message: PutMessage) -> None:
        try:
            self._control.send(encode(message))
        except zmq.ZMQError as error:
            self._break(f"the window does not listen: {error}")
            raise TransferError(self._broken) from None

    def _receive(self, timeout_s: float) -> PutMessage:
        if not self._control.poll(int(timeout_s * 1000)):
            self._break(f"the window did not answer within {timeout_s} s")
            raise TransferError(self._broken)
        return decode(self._control.recv())

    def _send_bytes(self, views: list[memoryview]) -> None:
        assert self._bulk is not None
        self._bulk.settimeout(self._timeout_s)
        half = len(views) // 2
        try:
            _send_all(self._bulk, views[:half])
            if failpoints.armed is not None:
                failpoints.hit("transfer.put_half")
            _send_all(self._bulk, views[half:])
        except OSError as error:
            self._break(f"the window is gone or takes nothing: {error}")
            raise TransferError(self._broken) from None

    def _shut(self) -> None:
        if self._bulk is not None:
            self._bulk.close()
        self._context.destroy(linger=0)


def _send_all(connection: socket.socket, views: list[memoryview]) -> None:
    """views: changed."""
    first = 0
    while first < len(views):
        num_bytes = connection.sendmsg(views[first : first + BUFFERS])
        while first < len(views) and num_bytes >= len(views[first]):
            num_bytes -= len(views[first])
            first += 1
        if num_bytes:
            views[first] = views[first][num_bytes:]


def _parsed(address: str) -> tuple[str, int, int, bool, bytes]:
    try:
        parts = urlsplit(address)
        _, bulk_port, checked, incarnation = parts.path.split("/")
        assert parts.scheme == "tcp" and parts.hostname and parts.port and checked in ("checked", "unchecked")
        return parts.hostname, parts.port, int(bulk_port), checked == "checked", bytes.fromhex(incarnation)
    except (ValueError, AssertionError):
        raise TransferError(f"no address of a TCP window: {address}") from None
