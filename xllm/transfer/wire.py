"""What the two ends of a connection say to each other, and how an address of a window is written."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from xllm.errors import TransferError

PROTOCOL = 1  # raised when either end would misread what the other one says


class WindowAddress(msgspec.Struct, frozen=True):
    """way: shm or tcp. control: where messages go, for ZeroMQ. bulk: HOST:PORT of a TCP socket, or the abstract name
    of a Unix socket. life: a random number of this life of the window. curve: its public key. machine: `here`."""

    way: str
    control: str
    bulk: str
    life: str
    curve: bytes
    machine: str
    protocol: int = PROTOCOL

    def text(self) -> str:
        """As it travels in an offer."""
        return msgspec.json.encode(self).decode()


def read_address(text: str) -> WindowAddress:
    """The address again. Raises TransferError."""
    try:
        found = msgspec.json.decode(text, type=WindowAddress)
    except msgspec.DecodeError as error:
        raise TransferError(f"no address of a window: {error}") from None
    if found.protocol != PROTOCOL:
        raise TransferError(f"the window speaks protocol {found.protocol}, this speaks {PROTOCOL}")
    return found


def here() -> str:
    """This boot of this machine, and this user: where it is the same, memory can be shared."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
    return f"{boot}:{os.getuid()}"


class PeerHello(msgspec.Struct, tag="hello"):
    """A peer is there, over this way."""

    life: str
    way: str


class PeerWelcome(msgspec.Struct, tag="welcome"):
    """token: what the peer sends first over its other connection."""

    token: bytes
    num_bytes: int


class AskGrant(msgspec.Struct, tag="ask"):
    """A peer wants to write into a grant."""

    number: int
    key: bytes


class GrantedRanges(msgspec.Struct, tag="granted"):
    """It may, into these ranges."""

    number: int
    ranges: list[tuple[int, int]]


class Put(msgspec.Struct, tag="put"):
    """Bytes were written (shm), or are on their way (tcp), in this order. crc: of all of them; tcp alone has one."""

    number: int
    pieces: list[tuple[int, int]]
    note: bytes
    crc: int = 0


class FinishGrant(msgspec.Struct, tag="finish"):
    """No more comes from this peer; num_peers finish the grant in all."""

    number: int
    num_peers: int


class Finished(msgspec.Struct, tag="finished"):
    """Everything was taken, or else why not."""

    number: int
    reason: str


class RevokeGrant(msgspec.Struct, tag="revoke"):
    """The peer must not write into the grant any more; `Released` answers."""

    number: int
    reason: str


class Released(msgspec.Struct, tag="released"):
    """The peer does not write there any more."""

    number: int


class PeerRefused(msgspec.Struct, tag="refused"):
    """Why the connection is at its end."""

    reason: str


_UP = msgspec.msgpack.Decoder(PeerHello | AskGrant | Put | FinishGrant | Released)
_DOWN = msgspec.msgpack.Decoder(PeerWelcome | GrantedRanges | Finished | RevokeGrant | PeerRefused)
encode = msgspec.msgpack.Encoder().encode


def read_up(frame: bytes) -> PeerHello | AskGrant | Put | FinishGrant | Released:
    """A message of a peer. Raises msgspec.DecodeError."""
    return _UP.decode(frame)


def read_down(frame: bytes) -> PeerWelcome | GrantedRanges | Finished | RevokeGrant | PeerRefused:
    """A message of a window. Raises msgspec.DecodeError."""
    return _DOWN.decode(frame)
