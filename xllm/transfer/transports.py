"""`open_window` and `connect`: one memory reachable by several transports, and the best way to it from here."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from xllm.errors import ConfigError, TransferError
from xllm.transfer.grants import Grants
from xllm.transfer.in_process import InProcessDoor, InProcessPeer
from xllm.transfer.memfd import Memfd
from xllm.transfer.shared_memory import SharedMemoryDoor, SharedMemoryPeer
from xllm.transfer.tcp import TcpDoor
from xllm.transfer.tcp_peer import TcpPeer
from xllm.transfer.transport import Arrived, Ended, Peer

NAMES = ("memory", "shm", "tcp")  # the best first; an address begins with its transport's name

AnyDoor = InProcessDoor | SharedMemoryDoor | TcpDoor
_PEERS: dict[str, Callable[..., Peer]] = {"memory": InProcessPeer, "shm": SharedMemoryPeer, "tcp": TcpPeer}


class SharedWindow:
    """A `Window` over one memory with a door for each transport."""

    def __init__(self, names: Sequence[str], num_bytes: int, host: str, checksums: bool | None):
        self._file = Memfd.make(num_bytes)
        self.memory = self._file.memory[:num_bytes]
        self._grants = Grants(num_bytes)
        self._doors: list[AnyDoor] = []
        try:
            for name in sorted(names, key=NAMES.index):
                self._doors.append(self._open(name, host, checksums))
                self._grants.add_door(self._doors[-1])
        except BaseException:
            self.close()
            raise
        self.addresses = tuple(door.address for door in self._doors)

    def _open(self, name: str, host: str, checksums: bool | None) -> AnyDoor:
        if name == "shm":
            return SharedMemoryDoor(self._grants, self._file)
        if name == "tcp":
            return TcpDoor(self._grants, self.memory, host, checksums=checksums)
        return InProcessDoor(self._grants, self.memory)

    def grant(self, number: int, key: bytes, ranges: Sequence[tuple[int, int]], lease_s: float) -> None:
        self._grants.grant(number, key, ranges, lease_s)

    def take(self, timeout_s: float) -> list[Arrived | Ended]:
        return self._grants.take(timeout_s)

    def revoke(self, number: int) -> None:
        self._grants.revoke(number)

    def close(self) -> None:
        self._grants.close()
        while self._doors:
            self._doors.pop().close()
        self._file.close()


def open_window(names: Sequence[str], num_bytes: int, *, host: str = "127.0.0.1",
                checksums: bool | None = None) -> SharedWindow:
    """A window of num_bytes of new memory, zeros, that may be reached by these transports (NAMES). host: where TCP
    listens, an address of this machine that senders can reach; ports are the system's choice. checksums: of TCP; None:
    yes. Raises ConfigError for another name or host, OSError where the system refuses."""
    unknown = [name for name in names if name not in NAMES]
    if unknown or not names:
        raise ConfigError(f"a window's transports are some of {', '.join(NAMES)}, got {', '.join(names) or 'none'}")
    return SharedWindow(names, num_bytes, host, checksums)


def connect(addresses: Sequence[str], *, num_senders: int = 1, timeout_s: float = 10.0) -> Peer:
    """The way to a window by the first of its addresses that can be reached from here. num_senders: how many peers put
    into the same grants, this one counted: a grant is finished when all have finished it. timeout_s: the most that a
    call of the peer waits for the window at a time. Raises TransferError, with what was tried."""
    failures = []
    for address in addresses:
        kind = address.partition("://")[0]
        if kind not in _PEERS:
            failures.append(f"{address}: no transport of that name here")
            continue
        try:
            return _PEERS[kind](address, num_senders=num_senders, timeout_s=timeout_s)
        except TransferError as error:
            failures.append(str(error))
    raise TransferError(f"no way to the window: {'; '.join(failures) or 'it has no address'}")
