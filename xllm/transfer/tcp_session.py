"""`TcpSession`: one sender as a TCP window sees it: the agreed puts, and the socket that their bytes come over."""

from __future__ import annotations

import fcntl
import socket
import struct
import termios
import zlib
from collections import deque
from collections.abc import Callable

from xllm.errors import TransferError
from xllm.transfer.grants import Grants
from xllm.transfer.put_wire import Bye, Ceased, FinishedPuts, FinishPuts, Put, PutMessage

MAX_AGREED = 1024  # puts of a sender whose bytes have not come; chosen: many layers of many requests
BUFFERS = 256  # filled by one call; chosen: 1 MiB of 4 KiB each, and a quarter of what Linux takes (IOV_MAX)
PASS_BYTES = 1 << 20  # taken by one call, so that senders take turns and an end waits for no more than this; chosen


class TcpSession:
    """Of the window's thread alone. reply: to the sender's control socket. num_senders: it is one of so many."""

    def __init__(self, grants: Grants, memory: memoryview, num_senders: int, reply: Callable[[PutMessage], None]):
        self.num_senders = num_senders
        self.reply = reply
        self.bulk: socket.socket | None = None
        self.is_over = False
        self._grants = grants
        self._memory = memory
        self._agreed: deque[Put | FinishPuts | Bye] = deque()
        self._rest: deque[tuple[int, int]] = deque()  # of the first put: what has not come
        self._crc = 0
        self._is_open = False  # the first one is a put under way
        self._is_let_in = True  # and its bytes are written, so far
        self._waste = bytearray()
        self._first_seen_s: float | None = None

    @property
    def wants_bytes(self) -> bool:
        return bool(self._agreed)

    def unannounced_s(self, now_s: float) -> float:
        """For how long bytes have lain here that no put was announced for, as far as this was asked."""
        if self.bulk is None or self.wants_bytes or not _num_readable(self.bulk):
            self._first_seen_s = None
        elif self._first_seen_s is None:
            self._first_seen_s = now_s
        return 0.0 if self._first_seen_s is None else now_s - self._first_seen_s

    def agree(self, message: Put | FinishPuts | Bye) -> None:
        """Take what the sender announces; done in the order of the announcements. Raises TransferError."""
        if len(self._agreed) >= MAX_AGREED:
            raise TransferError(f"its sender announced {MAX_AGREED} puts without their bytes")
        if isinstance(message, Put) and message.num_bytes != sum(length for _, length in message.pieces):
            raise TransferError("its sender announced pieces that do not add up")
        self._agreed.append(message)
        self._advance()

    def receive(self) -> None:
        """Take bytes that have come. Raises TransferError if there are none to come, OSError."""
        assert self.bulk is not None
        if not self._is_open:
            raise TransferError("its sender is gone")
        first = self._agreed[0]
        assert isinstance(first, Put)
        self._is_let_in = self._is_let_in and self._grants.begin(first.number, self)
        if not self._is_let_in:
            self._rest = deque([(0, sum(length for _, length in self._rest))])
            self._take([self._wasted(self._rest[0][1])])
            return self._advance()
        try:
            self._take(self._buffers())
        finally:
            self._grants.done(first.number)
        self._advance()

    def _buffers(self) -> list[memoryview]:
        found, num_bytes = [], 0
        for at, length in self._rest:
            found.append(self._memory[at : at + length][: PASS_BYTES - num_bytes])
            num_bytes += len(found[-1])
            if len(found) == BUFFERS or num_bytes == PASS_BYTES:
                break
        return found

    def _wasted(self, num_bytes: int) -> memoryview:
        """Where bytes go that nobody may write any more."""
        self._waste = self._waste or bytearray(PASS_BYTES)
        return memoryview(self._waste)[:num_bytes]

    def _take(self, buffers: list[memoryview]) -> None:
        assert self.bulk is not None
        try:
            num_bytes = self.bulk.recvmsg_into(buffers)[0]
        except BlockingIOError:
            return
        if num_bytes == 0:
            raise TransferError("its sender is gone")
        put = self._agreed[0]
        checks = self._is_let_in and isinstance(put, Put) and put.crc is not None
        for buffer in buffers:
            if num_bytes == 0:
                break
            came = min(num_bytes, len(buffer))
            if checks:
                self._crc = zlib.crc32(buffer[:came], self._crc)
            self._came(came)
            num_bytes -= came

    def _came(self, num_bytes: int) -> None:
        """Of the first piece that is not complete."""
        at, length = self._rest.popleft()
        if num_bytes < length:
            self._rest.appendleft((at + num_bytes, length - num_bytes))

    def _advance(self) -> None:
        """Do what needs no more bytes."""
        while self._agreed and not self.is_over:
            first = self._agreed[0]
            if isinstance(first, Put):
                if not self._is_open:
                    self._open(first)
                if self._rest:
                    return
                self._close(first)
            elif isinstance(first, FinishPuts):
                self.reply(FinishedPuts(first.number, self._grants.finished(first.number, self)))
            else:
                self.is_over = True
                self.reply(Bye())
            self._agreed.popleft()

    def _open(self, put: Put) -> None:
        outside = self._grants.first_outside(put.number, self, put.pieces)
        if outside is not None:
            raise TransferError(f"its sender announced {outside[1]} bytes at {outside[0]}, which it may not write")
        self._rest = deque(piece for piece in put.pieces if piece[1])
        self._crc, self._is_open, self._is_let_in = 0, True, True

    def _close(self, put: Put) -> None:
        self._is_open = False
        if self._is_let_in and put.crc is not None and put.crc != self._crc:
            self._grants.fail(put.number, "bytes that came are not those that were sent (CRC-32)")
        self._grants.landed(put.number, self, put.note, put.num_bytes)
        reason = self._grants.reason_of(put.number)
        if reason is not None:
            self.reply(Ceased(put.number, reason))


def _num_readable(connection: socket.socket) -> int:
    """Bytes that have come and were not read."""
    return int(struct.unpack("i", fcntl.ioctl(connection, termios.FIONREAD, bytes(4)))[0])
