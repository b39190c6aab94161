"""Windows of shared memory: senders of the same machine and user map it and write into it themselves.

How writing is ended. Each grant has a mark: eight bytes of a second shared file, its number while it is open. A sender
holds a shared lock on the mark's place during a put, and writes only if the mark, read under the lock, is the number of
its grant. The window clears the mark, and then takes the lock for itself alone: once it has had it, no sender is in a
put of that grant, and each that comes later sees the cleared mark. The kernel releases a lock when its holder dies,
after the last thread of the holder has left its memory. A sender that is stopped in the middle of a put has its ranges
until it goes on or dies: `Ended` comes late, never too early. The kernel's locks order memory on every processor.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import socket
import struct
import threading
from collections.abc import Sequence
from pathlib import Path

from xllm.errors import TransferError
from xllm.kv import failpoints
from xllm.transfer.entering import Entering, Entry, read_entry
from xllm.transfer.grants import MAX_GRANTS, Grants
from xllm.transfer.memfd import Memfd
from xllm.transfer.pieces import PutPiece, as_bytes, copy, lengths
from xllm.transfer.put_wire import (
    MAX_SENDERS,
    Bye,
    Enter,
    FinishedPuts,
    FinishPuts,
    Introduce,
    Introduced,
    Put,
    PutMessage,
    Rejected,
    decode,
    encode,
)

MAX_MESSAGE_BYTES = 212_992  # that a Unix socket takes by default (net.core.wmem_max)
MAX_CONNECTIONS = 1024  # chosen: ranks of many instances on one machine
REPLY_S = 1.0  # that a sender has for taking a reply, which it waits for; chosen
_CREDENTIALS = struct.Struct("iII")  # `struct ucred`: process, user, group


def machine_id() -> str:
    """Of this machine since it was started, and this user: who may share memory."""
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}/{os.geteuid()}"


class SharedMemoryDoor:
    """Of one window, with a thread that speaks with senders. address: for `SharedMemoryPeer`."""

    def __init__(self, grants: Grants, memory: Memfd):
        self._memory = memory
        self._incarnation = secrets.token_bytes(16)
        self.address = f"shm://{machine_id()}/{self._incarnation.hex()}"
        self._marks = _Marks()
        self._listener = _socket()
        self._listener.bind(_socket_name(self.address))
        self._listener.listen(MAX_CONNECTIONS)
        self._grants = grants
        self._entering = Entering(grants, self._marks.place_of)
        self._senders: dict[socket.socket, int | None] = {}  # how many it is one of; None before it said so
        self._selector = selectors.DefaultSelector()
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._closing = False
        self._thread = threading.Thread(target=self._serve, name="xllm-window-shm", daemon=True)
        self._thread.start()

    def open(self, number: int) -> None:
        self._marks.set(number)
        os.eventfd_write(self._bell, 1)

    def bar(self, number: int) -> bool:
        return self._marks.clear(number)

    def close(self) -> None:
        """May be called once, after the grants are closed."""
        self._closing = True
        os.eventfd_write(self._bell, 1)
        self._thread.join()
        os.close(self._bell)
        self._marks.close()

    # --- the thread

    def _serve(self) -> None:
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._bell, selectors.EVENT_READ)
        while not self._closing:
            for key, _ in self._selector.select(self._entering.next_s(60.0)):
                self._handle(key.fileobj)
            self._entering.retry()
        for sender in list(self._senders):
            self._drop(sender, "the window was closed")
        self._listener.close()
        self._selector.close()

    def _handle(self, ready: object) -> None:
        if ready is self._listener:
            self._accept()
        elif isinstance(ready, socket.socket):
            self._hear(ready)
        else:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._bell)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            sender, _ = self._listener.accept()
            if len(self._senders) >= MAX_CONNECTIONS or _user_of(sender) != os.geteuid():
                sender.close()
                return
            sender.settimeout(REPLY_S)
            self._senders[sender] = None
            self._selector.register(sender, selectors.EVENT_READ)

    def _hear(self, sender: socket.socket) -> None:
        try:
            data = sender.recv(MAX_MESSAGE_BYTES)
            if not data:
                raise TransferError("its sender is gone")
            self._answer(sender, decode(data))
        except (OSError, TransferError) as error:
            self._drop(sender, str(error))

    def _answer(self, sender: socket.socket, message: PutMessage) -> None:
        num_senders = self._senders[sender]
        if num_senders is None:
            self._introduce(sender, message)
        elif isinstance(message, Enter):
            self._entering.ask(sender, num_senders, message, lambda reply: self._reply(sender, reply))
        elif isinstance(message, Put):
            self._grants.landed(message.number, sender, message.note, message.num_bytes)
        elif isinstance(message, FinishPuts):
            sender.send(encode(FinishedPuts(message.number, self._grants.finished(message.number, sender))))
        else:
            raise TransferError("its sender left" if isinstance(message, Bye) else "its sender makes no sense")

    def _introduce(self, sender: socket.socket, message: PutMessage) -> None:
        if not isinstance(message, Introduce) or not 1 <= message.num_senders <= MAX_SENDERS:
            raise TransferError("its sender does not say who it is")
        if not secrets.compare_digest(message.incarnation, self._incarnation):
            self._reply(sender, Rejected("another window is there now"))
            return
        self._senders[sender] = message.num_senders
        socket.send_fds(sender, [encode(Introduced(b""))], [self._memory.fileno(), self._marks.fileno()])

    def _reply(self, sender: socket.socket, reply: PutMessage) -> None:
        """A sender that does not take it is found gone when it is heard next."""
        with contextlib.suppress(OSError):
            sender.send(encode(reply))

    def _drop(self, sender: socket.socket, reason: str) -> None:
        del self._senders[sender]
        self._entering.forget(sender)
        self._selector.unregister(sender)
        self._grants.lost(sender, reason)
        sender.close()


class _Marks:
    """Which grant each place is for, in memory that senders see. Thread-safe."""

    def __init__(self) -> None:
        self._file = Memfd.make(8 * MAX_GRANTS)
        self._words = self._file.memory.cast("Q")
        self._places: dict[int, int] = {}
        self._free = list(range(MAX_GRANTS))
        self._lock = threading.Lock()

    def fileno(self) -> int:
        return self._file.fileno()

    def set(self, number: int) -> None:
        with self._lock:
            place = self._places[number] = self._free.pop()
            self._words[place] = number + 1  # nought is no grant's

    def clear(self, number: int) -> bool:
        """Whether nobody writes for it any more; its place is free then."""
        with self._lock:
            place = self._places.get(number)
            if place is None:
                return True
            self._words[place] = 0
            if not self._file.lock(place, shared=False):
                return False
            self._file.unlock(place)
            del self._places[number]
            self._free.append(place)
            return True

    def place_of(self, number: int) -> int | None:
        with self._lock:
            return self._places.get(number)

    def close(self) -> None:
        self._words.release()
        self._file.close()


class SharedMemoryPeer:
    """See `Peer`. Raises TransferError if the window is not on this machine, is another user's, or is gone."""

    def __init__(self, address: str, *, num_senders: int = 1, timeout_s: float = 10.0):
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._entries: dict[int, Entry] = {}
        self._socket = _socket()
        self._files: list[Memfd] = []
        try:
            self._files = self._connect(address, num_senders)
        except (OSError, ValueError) as error:
            self._shut()
            raise TransferError(f"the window {address} is not reached: {error}") from None
        except BaseException:
            self._shut()
            raise
        self._memory = self._files[0].memory
        self._marks = self._files[1].memory.cast("Q")

    def put(self, number: int, key: bytes, pieces: Sequence[PutPiece], note: bytes) -> None:
        flat = as_bytes(pieces, note)
        with self._lock:
            self._check_window()
            entry = self._entries.get(number) or self._enter(number, key)
            entry.check(number, key, lengths(flat))
            self._write(number, entry, flat)
            self._send(Put(number, note, sum(len(data) for _, data in flat)))

    def finish(self, number: int) -> None:
        with self._lock:
            self._check_window()
            if self._entries.pop(number, None) is None:
                raise TransferError(f"nothing was put into grant {number} from here")
            self._send(FinishPuts(number))
            answer = self._receive()
            if not isinstance(answer, FinishedPuts) or answer.reason:
                raise TransferError(f"grant {number} is over: {getattr(answer, 'reason', answer)}")

    def close(self) -> None:
        with self._lock:
            if self._files:
                self._socket.settimeout(0)
                with contextlib.suppress(OSError):
                    self._socket.send(encode(Bye()))
                self._marks.release()
            self._shut()

    def _connect(self, address: str, num_senders: int) -> list[Memfd]:
        self._socket.settimeout(self._timeout_s)
        self._socket.connect(_socket_name(address))
        if _user_of(self._socket) != os.geteuid():
            raise TransferError(f"the window {address} is another user's")
        self._socket.send(encode(Introduce(bytes.fromhex(address.rpartition("/")[2]), num_senders)))
        data, fds, _, _ = socket.recv_fds(self._socket, MAX_MESSAGE_BYTES, 2, socket.MSG_CMSG_CLOEXEC)
        if len(fds) != 2:
            for fd in fds:
                os.close(fd)
            answer = decode(data) if data else None
            raise TransferError(answer.reason if isinstance(answer, Rejected) else f"the window {address} is gone")
        return _take_all(fds)

    def _enter(self, number: int, key: bytes) -> Entry:
        self._send(Enter(number, key, self._timeout_s))
        entry = read_entry(key, self._receive)
        self._entries[number] = entry
        return entry

    def _write(self, number: int, entry: Entry, pieces: Sequence[PutPiece]) -> None:
        marks = self._files[1]
        locked = marks.lock(entry.mark, shared=True)
        try:
            if not locked or self._marks[entry.mark] != number + 1:
                del self._entries[number]
                raise TransferError(f"grant {number} is over")
            if failpoints.armed is not None:
                failpoints.hit("transfer.put_begun")
            copy(self._memory, pieces)
        finally:
            if locked:
                marks.unlock(entry.mark)

    def _check_window(self) -> None:
        if not self._files:
            raise TransferError("the way to the window is closed")
        self._socket.settimeout(0)
        try:
            if not self._socket.recv(1, socket.MSG_PEEK):
                raise TransferError("the window is gone")
            raise TransferError("the window says what it was not asked for")
        except BlockingIOError:
            self._socket.settimeout(self._timeout_s)
        except OSError as error:
            raise TransferError(f"the window is gone: {error}") from None

    def _send(self, message: PutMessage) -> None:
        try:
            self._socket.send(encode(message))
        except OSError as error:
            raise TransferError(f"the window is gone: {error}") from None

    def _receive(self) -> PutMessage:
        """Waits as long as the window lets a sender wait for a grant, and a little longer."""
        self._socket.settimeout(self._timeout_s + REPLY_S)
        try:
            data = self._socket.recv(MAX_MESSAGE_BYTES)
        except OSError as error:
            raise TransferError(f"the window does not answer: {error}") from None
        if not data:
            raise TransferError("the window is gone")
        return decode(data)

    def _shut(self) -> None:
        self._socket.close()
        for file in self._files:
            file.close()
        self._files = []


def _take_all(fds: Sequence[int]) -> list[Memfd]:
    taken: list[Memfd] = []
    try:
        for fd in fds:
            taken.append(Memfd.take(fd))
    except BaseException:
        for file in taken:
            file.close()
        for fd in fds[len(taken) + 1 :]:
            os.close(fd)
        raise
    return taken


def _socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def _socket_name(address: str) -> bytes:
    """Of Linux's abstract ones, which lie in no folder and end with their socket. Raises TransferError if the address
    is of another machine or user."""
    kind, _, rest = address.partition("://")
    place, _, incarnation = rest.rpartition("/")
    if kind != "shm" or place != machine_id():
        raise TransferError(f"{address} is not on this machine, or another user's")
    return b"\0xllm-window-" + incarnation.encode()


def _user_of(other: socket.socket) -> int:
    data = other.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(data)[1])
