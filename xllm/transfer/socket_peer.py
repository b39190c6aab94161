"""`TcpPeer` and `SharedPeer`: write into the memory of a `SocketWindow`, over a TCP socket or by mapping it."""

from __future__ import annotations

import array
import mmap
import os
import socket
import time
import zlib
from collections.abc import Sequence
from typing import TypeVar

import msgspec
import numpy as np
import zmq

from xllm.errors import ConfigError, TransferError
from xllm.host_port import host_and_port
from xllm.transfer.grants import within
from xllm.transfer.socket_window import IOV_MAX, STALL_S
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
    read_down,
)

ANSWER_S = 10.0  # for an answer of the window. Chosen: twice as long as it waits for a grant that is not there yet
A = TypeVar("A")


class _Messages:
    """The connection for messages. Takes in what the window says without being asked."""

    def __init__(self, address: WindowAddress):
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = dealer = self._context.socket(zmq.DEALER)
        public, secret = zmq.curve_keypair()
        for option, value in ((zmq.LINGER, 0), (zmq.IPV6, "[" in address.control), (zmq.SNDTIMEO, int(ANSWER_S * 1000)),
                              (zmq.CURVE_SERVERKEY, address.curve), (zmq.CURVE_PUBLICKEY, public),
                              (zmq.CURVE_SECRETKEY, secret)):
            dealer.setsockopt(option, value)
        dealer.connect(address.control)
        self.revoked: dict[int, str] = {}

    def say(self, message: object) -> None:
        """Send a message."""
        try:
            self._socket.send(encode(message))
        except zmq.ZMQError as error:
            raise TransferError(f"the window takes no messages: {error.strerror}") from None

    def hear(self) -> None:
        """Take in what has come."""
        while self._socket.poll(0):
            self._read()

    def answer(self, kind: type[A], number: int | None = None) -> A:
        """Wait for a message of this kind, about grant `number` if it is about one. Raises TransferError."""
        until_s = time.monotonic() + ANSWER_S
        while (left_s := until_s - time.monotonic()) > 0.0:
            if number is not None and number in self.revoked and kind is GrantedRanges:
                raise TransferError(self.revoked[number])
            if self._socket.poll(int(left_s * 1000) + 1):
                message = self._read()
                if isinstance(message, kind) and number in (None, getattr(message, "number", None)):
                    return message
        raise TransferError(f"the window has not answered for {ANSWER_S:g} s")

    def _read(self) -> object:
        try:
            message = read_down(self._socket.recv())
        except msgspec.DecodeError as error:
            raise TransferError(f"the window says what makes no sense: {error}") from None
        if isinstance(message, PeerRefused):
            raise TransferError(f"the window refuses: {message.reason}")
        if isinstance(message, RevokeGrant):
            self.revoked[message.number] = message.reason or "it wants no more"
            self.say(Released(message.number))
        return message

    def close(self) -> None:
        """End the connection."""
        self._socket.close()
        self._context.term()


class _SocketPeer:
    """What both kinds share: a grant is asked for with its first put, and every put stays within its ranges."""

    way = ""

    def __init__(self, address: WindowAddress):
        self._messages = _Messages(address)
        self._granted: dict[int, list[tuple[int, int]]] = {}
        self._socket: socket.socket | None = None
        try:
            self._messages.say(PeerHello(address.life, self.way))
            welcome = self._messages.answer(PeerWelcome)
            self._socket = self._connect(address, welcome)
        except OSError as error:
            self.close()
            raise TransferError(f"the window cannot be reached at {address.bulk}: {error}") from None
        except BaseException:
            self.close()
            raise

    def _connect(self, address: WindowAddress, welcome: PeerWelcome) -> socket.socket:
        raise NotImplementedError

    def _write(self, number: int, pieces: Sequence[tuple[int, memoryview]], note: bytes) -> None:
        raise NotImplementedError

    def put(self, number: int, key: bytes, pieces: Sequence[tuple[int, memoryview]], note: bytes) -> None:
        """See `TransferPeer.put`."""
        self._messages.hear()
        if (reason := self._messages.revoked.get(number)) is not None:
            raise TransferError(reason)
        if number not in self._granted:
            self._messages.say(AskGrant(number, key))
            self._granted[number] = self._messages.answer(GrantedRanges, number).ranges
        ranges = self._granted[number]
        if not all(within(ranges, offset, len(data)) for offset, data in pieces):
            raise TransferError("a piece lies outside the ranges that were granted")
        try:
            self._write(number, pieces, note)
        except OSError as error:
            self._messages.hear()  # it may have said why
            raise TransferError(f"the window is gone: {error}") from None

    def finish(self, number: int, num_peers: int = 1) -> None:
        """See `TransferPeer.finish`."""
        self._messages.say(FinishGrant(number, num_peers))
        finished = self._messages.answer(Finished, number)
        self._granted.pop(number, None)
        self._messages.revoked.pop(number, None)
        if finished.reason:
            raise TransferError(f"the window did not take all of it: {finished.reason}")

    def close(self) -> None:
        """See `TransferPeer.close`."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        self._messages.close()


class TcpPeer(_SocketPeer):
    """A `TransferPeer` that sends its bytes over a TCP socket, with a checksum."""

    way = "tcp"

    def _connect(self, address: WindowAddress, welcome: PeerWelcome) -> socket.socket:
        try:
            connection = socket.create_connection(host_and_port(address.bulk), timeout=STALL_S)
        except ConfigError as error:
            raise TransferError(f"no address of a window: {error}") from None
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(welcome.token)
        return connection

    def _write(self, number: int, pieces: Sequence[tuple[int, memoryview]], note: bytes) -> None:
        assert self._socket is not None
        crc, views = 0, [data.cast("B") for _, data in pieces]
        for view in views:
            crc = zlib.crc32(view, crc)
        self._messages.say(Put(number, [(offset, len(data)) for offset, data in pieces], note, crc))
        for first in range(0, len(views), IOV_MAX):
            part = views[first : first + IOV_MAX]
            sent, whole = self._socket.sendmsg(part), sum(map(len, part))
            if sent < whole:  # the rest goes as one run of bytes
                self._socket.sendall(memoryview(b"".join(part))[sent:])


class SharedPeer(_SocketPeer):
    """A `TransferPeer` on the same machine, which maps the window's memory."""

    way = "shm"

    def _connect(self, address: WindowAddress, welcome: PeerWelcome) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(STALL_S)
        try:
            connection.connect("\0" + address.bulk)
            connection.sendall(welcome.token)
            _, ancillary, _, _ = connection.recvmsg(1, socket.CMSG_SPACE(4))
            if not ancillary:
                raise TransferError("the window does not lend its memory")
            fd = array.array("i", ancillary[0][2][:4])[0]
            try:
                self._memory = np.frombuffer(mmap.mmap(fd, welcome.num_bytes), dtype=np.uint8)
            finally:
                os.close(fd)
        except BaseException:
            connection.close()
            raise
        return connection

    def _write(self, number: int, pieces: Sequence[tuple[int, memoryview]], note: bytes) -> None:
        memory = self._memory
        for offset, data in pieces:
            memory[offset : offset + len(data)] = np.frombuffer(data, dtype=np.uint8)
        self._messages.say(Put(number, [(offset, len(data)) for offset, data in pieces], note))
