"""`Grants`: which peers may write where in a window, and when a grant is over. No sockets; one lock around it."""

from __future__ import annotations

import hmac
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

from xllm.transfer.transport import Arrived, Ended, TransferEvent

MAX_ENDED = 4096  # grants whose end is remembered for peers that finish late. Chosen: minutes of a busy instance


class WriteGrant:
    """writers: peers that asked and have not finished. busy: puts that are being received. reason: why it is at its
    end; None: it is not. num_finished: peers that have finished."""

    __slots__ = ("busy", "deadline_s", "key", "num_finished", "number", "ranges", "reason", "writers")

    def __init__(self, number: int, key: bytes, ranges: Sequence[tuple[int, int]], deadline_s: float):
        self.number, self.key, self.ranges, self.deadline_s = number, key, sorted(ranges), deadline_s
        self.writers: set[bytes] = set()
        self.busy = self.num_finished = 0
        self.reason: str | None = None

    def has(self, pieces: Sequence[tuple[int, int]]) -> bool:
        """Whether all these (offset, length) pieces lie within the ranges."""
        return all(within(self.ranges, offset, length) for offset, length in pieces)


def within(ranges: Sequence[tuple[int, int]], offset: int, length: int) -> bool:
    """Whether one of these (offset, length) ranges holds the piece."""
    return length >= 0 and any(first <= offset and offset + length <= first + size for first, size in ranges)


class Grants:
    """on_revoke(peer, number, reason): called when a peer that may be writing must stop; it says when it has
    (`release`). tell: called with each event, in order. shares(peer): whether that peer writes into the memory itself,
    so that a put cannot be refused here."""

    def __init__(self, tell: Callable[[TransferEvent], None], on_revoke: Callable[[bytes, int, str], None],
                 shares: Callable[[bytes], bool]):
        self._tell, self._on_revoke, self._shares = tell, on_revoke, shares
        self._lock = threading.RLock()
        self._open: dict[int, WriteGrant] = {}
        self._ended: OrderedDict[int, str] = OrderedDict()

    def add(self, number: int, key: bytes, ranges: Sequence[tuple[int, int]], lease_s: float) -> None:
        """Open a grant."""
        with self._lock:
            assert number not in self._open and number not in self._ended, "a number is used twice"
            self._open[number] = WriteGrant(number, key, ranges, time.monotonic() + lease_s)

    def ask(self, peer: bytes, number: int, key: bytes) -> list[tuple[int, int]] | str | None:
        """Let a peer write: returns the ranges, or why it may not, or None while there is no such grant."""
        with self._lock:
            grant = self._open.get(number)
            if grant is None:
                return self._ended.get(number, None) and f"the grant is over: {self._ended[number]}"
            if not hmac.compare_digest(grant.key, key):
                return "the key is wrong"
            if grant.reason is not None:
                return f"the grant is at its end: {grant.reason}"
            grant.writers.add(peer)
            return grant.ranges

    def begin_put(self, peer: bytes, number: int, pieces: Sequence[tuple[int, int]]) -> str | None:
        """A put is about to be received; returns why it is refused, or None. `end_put` follows then."""
        with self._lock:
            grant = self._open.get(number)
            if grant is None or grant.reason is not None:
                return "the grant is over"
            if peer not in grant.writers:
                return "it was not asked for"
            if not grant.has(pieces):
                return "it is outside the ranges that were granted"
            grant.busy += 1
            return None

    def end_put(self, number: int, note: bytes, num_bytes: int, fault: str | None) -> None:
        """The put was received, or not: `fault`, which ends the grant."""
        with self._lock:
            grant = self._open[number]
            grant.busy -= 1
            if fault is None:
                self._tell(Arrived(number, note, num_bytes))
            else:
                self._close(grant, fault)
            self._settle(grant)

    def wrote(self, peer: bytes, number: int, note: bytes, num_bytes: int) -> None:
        """A peer that shares the memory has written."""
        with self._lock:
            grant = self._open.get(number)
            if grant is not None and peer in grant.writers:
                self._tell(Arrived(number, note, num_bytes))

    def finish(self, peer: bytes, number: int, num_peers: int) -> str:
        """A peer has finished; returns why not all of it was taken, or ""."""
        with self._lock:
            grant = self._open.get(number)
            if grant is None:
                return self._ended.get(number, "there is no such grant")
            grant.writers.discard(peer)
            grant.num_finished += 1
            if grant.num_finished >= num_peers:
                self._close(grant, "")
            reason = grant.reason or ""
            self._settle(grant)
            return reason

    def release(self, peer: bytes, number: int) -> None:
        """A peer writes there no more."""
        with self._lock:
            if (grant := self._open.get(number)) is not None:
                grant.writers.discard(peer)
                self._settle(grant)

    def lose(self, peer: bytes) -> None:
        """A peer is gone."""
        with self._lock:
            for grant in list(self._open.values()):
                if peer in grant.writers:
                    grant.writers.discard(peer)
                    self._close(grant, "the sender is gone")
                    self._settle(grant)

    def revoke(self, number: int, reason: str = "") -> None:
        """End a grant as soon as nobody can write there any more."""
        with self._lock:
            if (grant := self._open.get(number)) is not None:
                self._close(grant, reason)
                self._settle(grant)

    def expire(self, now_s: float) -> None:
        """RevokeGrant the grants whose lease is over."""
        with self._lock:
            for grant in list(self._open.values()):
                if grant.deadline_s <= now_s and grant.reason is None:
                    self.revoke(grant.number, "the lease is over")

    def _close(self, grant: WriteGrant, reason: str) -> None:
        if grant.reason is None:
            grant.reason = reason
            for peer in grant.writers:
                self._on_revoke(peer, grant.number, reason)

    def _settle(self, grant: WriteGrant) -> None:
        """End a grant that is at its end, once no put is being received and nobody shares the memory who may write."""
        if grant.reason is None or grant.busy or any(map(self._shares, grant.writers)):
            return
        del self._open[grant.number]
        self._ended[grant.number] = grant.reason
        if len(self._ended) > MAX_ENDED:
            self._ended.popitem(last=False)
        self._tell(Ended(grant.number, grant.reason))
