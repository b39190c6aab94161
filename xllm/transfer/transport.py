"""`Window` and `Peer`: memory of one process that others write into. What every transport promises.

The receiver opens a window and grants numbered ranges of its memory, each grant with a secret key and a lease. A sender
connects to an address of the window, shows the key, and puts pieces with a note. Both sides are told of everything that
goes wrong: the sender by TransferError, the receiver by `Ended`. After `Ended` nothing is written into the ranges of
that grant any more, whatever the sender does, so that they may be used for something else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Arrived:
    """A put is complete: num_bytes bytes are in memory and, where the transport has checksums, checked."""

    number: int
    note: bytes
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Ended:
    """A grant is over, and nothing is written into its ranges any more. reason: empty if its senders finished it."""

    number: int
    reason: str


class Window(Protocol):
    """The receiver's side. Thread-safe but for `take`, which one thread calls.

    memory: the window's bytes (format B, writable). addresses: of this window, the best way first; they hold its
    incarnation, which is random, so that a successor at the same host and port is not taken for it.
    """

    @property
    def memory(self) -> memoryview: ...

    @property
    def addresses(self) -> tuple[str, ...]: ...

    def grant(self, number: int, key: bytes, ranges: Sequence[tuple[int, int]], lease_s: float) -> None:
        """From now on senders that show `key` may write these (offset, length) ranges, for lease_s seconds at most.
        number: never used before in this window. Raises ValueError for ranges outside the memory, a short key, a number
        that is in use, too many grants."""

    def take(self, timeout_s: float) -> list[Arrived | Ended]:
        """What has happened, in the order in which it did for each sender; waits up to timeout_s for the first. Grants
        end here, so a window is to be asked regularly. Empty once the window is closed."""

    def revoke(self, number: int) -> None:
        """End a grant; `Ended` follows, with a reason. Nothing happens for one that is over."""

    def close(self) -> None:
        """End everything, and return once nobody writes. May be called twice. Views of `memory` stay readable."""


class Peer(Protocol):
    """The sender's side of one connection to a window. Thread-safe: puts wait for each other."""

    def put(self, number: int, key: bytes, pieces: Sequence[tuple[int, memoryview]], note: bytes) -> None:
        """Write each piece at its offset of the window's memory, then deliver `note`. Returns once the source may be
        reused; that all has arrived is known after `finish`. A grant that the window does not know yet is waited for.
        Raises TransferError; what was written until then is not announced."""

    def finish(self, number: int) -> None:
        """No more comes from here for this grant. Returns once all its puts have arrived. Raises TransferError, also
        for a grant that nothing was put into."""

    def close(self) -> None:
        """Grants that are not finished end at the window. May be called twice."""
