"""What senders and windows say to each other, as msgpack by msgspec."""

from __future__ import annotations

from typing import Annotated

import msgspec

from xllm.errors import TransferError

MAX_NOTE_BYTES = 65_536  # of one put; chosen: many times what names a layer's blocks
MAX_PIECES = 65_536  # of one put; chosen: 256 MiB of 4 KiB each
MAX_SENDERS = 4096  # into one grant; chosen: more ranks than an instance has


_Place = Annotated[int, msgspec.Meta(ge=0, le=2**61)]  # in bytes; two of them add up in 64 bits


class Introduce(msgspec.Struct, frozen=True, tag=True):
    """The first of a connection: whom the sender means, and how many senders it is one of."""

    incarnation: bytes
    num_senders: int


class Introduced(msgspec.Struct, frozen=True, tag=True):
    """session: what the sender says with everything from now on."""

    session: bytes


class Enter(msgspec.Struct, frozen=True, tag=True):
    """The sender wants to put into a grant; it may wait so long for the window to know it."""

    number: int
    key: bytes
    wait_s: float
    session: bytes = b""


class Entered(msgspec.Struct, frozen=True, tag=True):
    """ranges: where it may; `more` of them follow in another one. mark: the grant's place among shared marks."""

    number: int
    ranges: list[tuple[int, int]]
    more: bool
    mark: int = 0


class Put(msgspec.Struct, frozen=True, tag=True):
    """Over shared memory: the bytes are there. Else: they come over the other socket, one piece after the other; crc is
    the CRC-32 of all of them, None if it is not to be checked."""

    number: int
    note: bytes
    num_bytes: int
    pieces: list[tuple[_Place, _Place]] = []
    crc: int | None = None
    session: bytes = b""


class FinishPuts(msgspec.Struct, frozen=True, tag=True):
    number: int
    session: bytes = b""


class FinishedPuts(msgspec.Struct, frozen=True, tag=True):
    """reason: why the grant ended before; empty if it did not."""

    number: int
    reason: str


class Bye(msgspec.Struct, frozen=True, tag=True):
    """The sender leaves; answered by the same."""

    session: bytes = b""


class Ceased(msgspec.Struct, frozen=True, tag=True):
    """Said once, unasked: a put came for a grant that has ended, for this reason."""

    number: int
    reason: str


class Rejected(msgspec.Struct, frozen=True, tag=True):
    reason: str


PutMessage = Introduce | Introduced | Enter | Entered | Put | FinishPuts | FinishedPuts | Bye | Ceased | Rejected
_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(PutMessage)


def encode(message: PutMessage) -> bytes:
    return _ENCODER.encode(message)


def decode(data: bytes) -> PutMessage:
    """Raises TransferError for what is no message."""
    try:
        return _DECODER.decode(data)
    except msgspec.DecodeError as error:
        raise TransferError(f"not a message of a transfer: {error}") from None
