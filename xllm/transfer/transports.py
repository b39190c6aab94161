"""Opens windows, and connects peers to them in the best way that both have."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from xllm.errors import TransferError
from xllm.transfer.in_process import PREFIX, LocalPeer, LocalWindow
from xllm.transfer.socket_peer import SharedPeer, TcpPeer
from xllm.transfer.socket_window import SocketWindow
from xllm.transfer.transport import TransferPeer, TransferWindow
from xllm.transfer.wire import WindowAddress, here, read_address

LOCAL = "local"
PEERS: dict[str, Callable[[WindowAddress], TransferPeer]] = {"shm": SharedPeer, "tcp": TcpPeer}


def open_window(ways: Sequence[str], num_bytes: int, *, host: str = "127.0.0.1") -> TransferWindow:
    """Memory that is reached in these ways. Raises ConfigError where it cannot be."""
    if tuple(ways) == (LOCAL,):
        return LocalWindow(num_bytes)
    return SocketWindow(ways, num_bytes, host=host)


def connect(addresses: Sequence[str]) -> TransferPeer:
    """A peer of the window with these addresses, by the first way that works from here. Raises TransferError, with what
    was wrong with each."""
    wrong = []
    for text in addresses:
        try:
            if text.startswith(PREFIX):
                return LocalPeer(text)
            address = read_address(text)
            if address.way == "shm" and (not here() or address.machine != here()):
                wrong.append("its memory is on another machine, or another user's")
            elif address.way not in PEERS:
                wrong.append(f"nothing here goes the way {address.way!r}")
            else:
                return PEERS[address.way](address)
        except TransferError as error:
            wrong.append(str(error))
    raise TransferError("; ".join(wrong) or "it has no address")
