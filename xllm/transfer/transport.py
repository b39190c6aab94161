"""`TransferWindow` and `TransferPeer`, the two ends of a transport: memory of one process, and another process that
writes into it.

The owner of the window grants ranges of its memory to whoever shows a key. A peer writes pieces into them and says
what they are in a note. The rule that everything rests on: once a grant has ended (`Ended`), nothing is written into
its ranges any more, whatever becomes of the peer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True, slots=True)
class Arrived:
    """Bytes are in memory, and were checked where the way to it is not memory itself. note: the peer's."""

    number: int
    note: bytes
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Ended:
    """The grant is over. reason: "" if its peers have finished, or it was revoked; else what went wrong."""

    number: int
    reason: str


TransferEvent = Arrived | Ended


class TransferWindow(Protocol):
    """Memory that peers write into. memory: uint8. addresses: ways to it, the best first, each with this window's
    incarnation in it: a peer of an earlier one is refused."""

    memory: np.ndarray
    addresses: tuple[str, ...]

    def grant(self, number: int, key: bytes, ranges: Sequence[tuple[int, int]], lease_s: float) -> None:
        """Let whoever shows the key write into these (offset, length) ranges, for so long at most. number: new in the
        window's life. Any thread."""
        ...

    def take(self, timeout_s: float) -> list[TransferEvent]:
        """What has happened since the last call, waiting up to `timeout_s` for the first. One thread."""
        ...

    def revoke(self, number: int) -> None:
        """End a grant: `Ended` follows once nobody can write there any more. Unknown numbers are ignored. Any
        thread."""
        ...

    def close(self) -> None:
        """End all connections and threads. The memory stays as long as somebody uses it. Idempotent."""
        ...


class TransferPeer(Protocol):
    """Writes into one window. One thread uses it. Every method waits for a bounded time and raises TransferError where
    the window refuses, is gone, or does not answer; the peer can only be closed then."""

    def put(self, number: int, key: bytes, pieces: Sequence[tuple[int, memoryview]], note: bytes) -> None:
        """Write pieces, each at its offset of the window's memory, then have the note delivered. When it returns, the
        sources may be used again; whether the window took everything only `finish` tells."""
        ...

    def finish(self, number: int, num_peers: int = 1) -> None:
        """Say that no more comes from here for a grant, and wait until all of it was taken. num_peers: how many finish
        the grant in all; it ends with the last."""
        ...

    def close(self) -> None:
        """End the connection. Idempotent."""
        ...
