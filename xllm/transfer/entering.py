"""`Entering`: senders that ask to put into a grant, which may not be known yet; `Entry`: what they are answered."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from xllm.errors import TransferError
from xllm.transfer.grants import Grants
from xllm.transfer.put_wire import Enter, Entered, PutMessage, Rejected
from xllm.transfer.ranges import Ranges

MAX_WAIT_S = 60.0  # that a sender may wait for a grant; chosen: longer than any request waits to be sent on
MAX_WAITING = 4096  # senders' questions at a time; chosen, as many as grants
RANGES_AT_ONCE = 4096  # in one message, of 18 bytes each at most: below the 212,992 that a Unix socket takes by default

Reply = Callable[[PutMessage], None]


@dataclass(frozen=True, slots=True)
class Entry:
    """The sender's copy of a grant. mark: see `Entered`."""

    key: bytes
    ranges: Ranges
    mark: int

    def check(self, number: int, key: bytes, pieces: Sequence[tuple[int, int]]) -> None:
        """Raises TransferError for another key, or the first piece outside."""
        if key != self.key:
            raise TransferError(f"grant {number} has another key")
        outside = self.ranges.first_outside(pieces)
        if outside is not None:
            raise TransferError(f"grant {number} does not allow {outside[1]} bytes at {outside[0]}")


def read_entry(key: bytes, receive: Callable[[], PutMessage]) -> Entry:
    """From what answers an `Enter`. Raises TransferError if it is refused."""
    ranges: list[tuple[int, int]] = []
    while True:
        message = receive()
        if isinstance(message, Rejected):
            raise TransferError(message.reason)
        if not isinstance(message, Entered):
            raise TransferError(f"the window answers with {type(message).__name__}")
        ranges += message.ranges
        if not message.more:
            return Entry(key, Ranges(ranges), message.mark)


class Entering:
    """The window's side, of one door, in its thread. mark_of: the grant's mark, None if it has none (any more)."""

    def __init__(self, grants: Grants, mark_of: Callable[[int], int | None]):
        self._grants = grants
        self._mark_of = mark_of
        self._waiting: list[tuple[float, object, int, Enter, Reply]] = []

    def ask(self, sender: object, num_senders: int, message: Enter, reply: Reply) -> None:
        """Answered now, or by a `retry`."""
        if len(self._waiting) >= MAX_WAITING:
            reply(Rejected("too many senders wait for grants"))
            return
        wait_s = message.wait_s if 0.0 <= message.wait_s <= MAX_WAIT_S else MAX_WAIT_S  # also for what is no number
        deadline_s = time.monotonic() + wait_s
        self._waiting.append((deadline_s, sender, num_senders, message, reply))
        self.retry()

    def retry(self) -> None:
        """After a grant, and when `next_s` is over."""
        waiting, self._waiting = self._waiting, []
        for question in waiting:
            if not self._answer(*question):
                self._waiting.append(question)

    def forget(self, sender: object) -> None:
        self._waiting = [question for question in self._waiting if question[1] is not sender]

    def next_s(self, most_s: float) -> float:
        """How long nobody's wait is over, `most_s` at most."""
        now_s = time.monotonic()
        return max(0.0, min([most_s, *(question[0] - now_s for question in self._waiting)]))

    def _answer(self, deadline_s: float, sender: object, num_senders: int, message: Enter, reply: Reply) -> bool:
        try:
            grant = self._grants.enter(message.number, message.key, sender, num_senders)
        except TransferError as error:
            reply(Rejected(str(error)))
            return True
        if grant is None:
            late = time.monotonic() >= deadline_s
            if late:
                reply(Rejected(f"grant {message.number} is not known at the window"))
            return late
        mark = self._mark_of(message.number)
        if mark is None:
            reply(Rejected(f"grant {message.number} is over"))
            return True
        pairs = grant.ranges.as_pairs()
        for first in range(0, max(1, len(pairs)), RANGES_AT_ONCE):
            reply(Entered(message.number, pairs[first : first + RANGES_AT_ONCE],
                          first + RANGES_AT_ONCE < len(pairs), mark))  # fmt: skip
        return True
