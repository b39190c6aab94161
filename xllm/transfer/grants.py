"""`Grants`: a window's bookkeeping, whatever the transports are: who may write where, and what has happened."""

from __future__ import annotations

import hmac
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from xllm.errors import TransferError
from xllm.transfer.ranges import Ranges
from xllm.transfer.transport import Arrived, Ended

MAX_GRANTS = 4096  # open at a time; chosen: as many requests as an instance can expect, and a page of locks
MAX_OVER = 4096  # ended grants whose reasons are remembered for senders that come late; chosen
MIN_KEY_BYTES = 16  # 128 bits, which nobody guesses
CLOSING_S = 0.001  # how often it is asked whether a sender has left a grant that ends; chosen: a put is as short
CLOSE_WAIT_S = 5.0  # for senders that are in the middle of a put when the window closes; chosen


class Entrance(Protocol):
    """One way in. Called with the lock of `Grants` held, so it must not call back."""

    def open(self, number: int) -> None:
        """A grant begins."""

    def bar(self, number: int) -> bool:
        """Let nobody begin to write for this grant; whether nobody is writing any more. Called until it says so."""


@dataclass(slots=True)
class OpenGrant:
    """reason: why it ends; None while it is open. senders: those that showed the key and have not finished."""

    number: int
    key: bytes
    ranges: Ranges
    deadline_s: float
    senders: set[object] = field(default_factory=set)
    num_senders: int = 0
    num_finished: int = 0
    num_writers: int = 0
    reason: str | None = None


class Grants:
    """Thread-safe. A sender is any object that stands for one connection."""

    def __init__(self, num_bytes: int):
        self._num_bytes = num_bytes
        self._doors: list[Entrance] = []
        self._grants: dict[int, OpenGrant] = {}
        self._over: dict[int, str] = {}
        self._events: list[Arrived | Ended] = []
        self._changed = threading.Condition()
        self._closed = False

    def add_door(self, door: Entrance) -> None:
        """Before the first grant."""
        self._doors.append(door)

    # --- the receiver

    def grant(self, number: int, key: bytes, ranges: Sequence[tuple[int, int]], lease_s: float) -> None:
        """See `Window.grant`."""
        if len(key) < MIN_KEY_BYTES:
            raise ValueError(f"a grant's key has at least {MIN_KEY_BYTES} bytes, got {len(key)}")
        for offset, length in ranges:
            if offset < 0 or length < 0 or offset + length > self._num_bytes:
                raise ValueError(f"grant {number}: {length} bytes at {offset} are not within the window's "
                                 f"{self._num_bytes}")  # fmt: skip
        with self._changed:
            if self._closed or number in self._grants or number in self._over or not 0 <= number < 2**63:
                raise ValueError(f"grant {number} is in use, over or negative, or the window is closed")
            if len(self._grants) >= MAX_GRANTS:
                raise ValueError(f"{MAX_GRANTS} grants are open, which is the most")
            self._grants[number] = OpenGrant(number, key, Ranges(ranges), time.monotonic() + lease_s)
            for door in self._doors:
                door.open(number)
            self._changed.notify_all()

    def take(self, timeout_s: float) -> list[Arrived | Ended]:
        """See `Window.take`."""
        deadline_s = time.monotonic() + timeout_s
        with self._changed:
            while True:
                self._settle()
                left_s = deadline_s - time.monotonic()
                if self._events or self._closed or left_s <= 0:
                    taken, self._events = self._events, []
                    return taken
                self._changed.wait(min(left_s, self._next_s()))

    def revoke(self, number: int) -> None:
        self.fail(number, "it was revoked")

    def close(self) -> None:
        """Ends all grants; waits up to CLOSE_WAIT_S for senders that are in the middle of a put."""
        deadline_s = time.monotonic() + CLOSE_WAIT_S
        with self._changed:
            for grant in self._grants.values():
                grant.reason = grant.reason or "the window was closed"
            self._settle()
            while self._grants and time.monotonic() < deadline_s:
                self._changed.wait(CLOSING_S)
                self._settle()
            self._closed = True
            self._doors = []
            self._changed.notify_all()

    def _settle(self) -> None:
        now_s = time.monotonic()
        for grant in list(self._grants.values()):
            if grant.reason is None and now_s >= grant.deadline_s:
                grant.reason = "its lease is over"
            if grant.reason is not None and all(door.bar(grant.number) for door in self._doors) and (
                    grant.num_writers == 0):  # fmt: skip
                del self._grants[grant.number]
                self._remember(grant.number, grant.reason)
                self._events.append(Ended(grant.number, grant.reason))

    def _remember(self, number: int, reason: str) -> None:
        self._over[number] = reason or "it was finished"
        if len(self._over) > MAX_OVER:
            del self._over[next(iter(self._over))]

    def _next_s(self) -> float:
        """How long nothing can end by itself."""
        if any(grant.reason is not None for grant in self._grants.values()):
            return CLOSING_S
        first_s = min((grant.deadline_s for grant in self._grants.values()), default=float("inf"))
        return max(CLOSING_S, min(first_s - time.monotonic(), threading.TIMEOUT_MAX))

    # --- the doors

    def enter(self, number: int, key: bytes, sender: object, num_senders: int) -> OpenGrant | None:
        """Let a sender in; None if the grant is not known (yet). num_senders: how many the sender says there are.
        Raises TransferError if it may not put."""
        with self._changed:
            grant = self._grants.get(number)
            if grant is None and number not in self._over and not self._closed:
                return None
            reason = "the window is closed" if grant is None else grant.reason
            if grant is None or reason is not None:
                raise TransferError(f"grant {number} is over: {self._over.get(number, reason)}")
            if not hmac.compare_digest(grant.key, key):
                raise TransferError(f"grant {number} has another key")
            if grant.num_senders not in (0, num_senders):
                raise TransferError(f"grant {number} has {grant.num_senders} senders, and this one says {num_senders}")
            grant.num_senders = num_senders
            grant.senders.add(sender)
            return grant

    def first_outside(self, number: int, sender: object, pieces: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
        """The first piece that this sender may not write; None where the grant is over, when none is written."""
        with self._changed:
            grant = self._grants.get(number)
            if grant is None or grant.reason is not None:
                return None
            allowed = grant.ranges if sender in grant.senders else Ranges([])
            return allowed.first_outside(pieces)

    def reason_of(self, number: int) -> str | None:
        """Why it ends or ended; None while it is open."""
        with self._changed:
            grant = self._grants.get(number)
            return grant.reason if grant is not None else self._over.get(number, "it is not known")

    def begin(self, number: int, sender: object) -> bool:
        """Whether this sender's bytes may be written now; if so, `done` must follow soon: `Ended` waits for it."""
        with self._changed:
            grant = self._grants.get(number)
            if grant is None or grant.reason is not None or sender not in grant.senders:
                return False
            grant.num_writers += 1
            return True

    def done(self, number: int) -> None:
        with self._changed:
            self._grants[number].num_writers -= 1
            self._changed.notify_all()

    def landed(self, number: int, sender: object, note: bytes, num_bytes: int) -> None:
        """All bytes of a put are in memory. Not announced if the grant is ending."""
        with self._changed:
            grant = self._grants.get(number)
            if grant is not None and grant.reason is None and sender in grant.senders:
                self._events.append(Arrived(number, note, num_bytes))
                self._changed.notify_all()

    def finished(self, number: int, sender: object) -> str:
        """The sender puts no more. The grant ends with the last of its senders. Returns why it ended before, or ""."""
        with self._changed:
            grant = self._grants.get(number)
            if grant is None or grant.reason or sender not in grant.senders:
                return (grant and grant.reason) or self._over.get(number, "it is not known")
            grant.senders.remove(sender)
            grant.num_finished += 1
            if grant.num_finished == grant.num_senders:
                grant.reason = ""
            self._changed.notify_all()
            return ""

    def fail(self, number: int, reason: str) -> None:
        """The grant ends for this reason, if it has no other yet."""
        with self._changed:
            grant = self._grants.get(number)
            if grant is not None and grant.reason is None:
                grant.reason = reason
                self._changed.notify_all()

    def lost(self, sender: object, reason: str) -> None:
        """The sender is gone: what it has not finished ends."""
        with self._changed:
            for grant in self._grants.values():
                if sender in grant.senders:
                    grant.senders.remove(sender)
                    grant.reason = grant.reason if grant.reason is not None else reason
            self._changed.notify_all()
