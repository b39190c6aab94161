"""`Prefetcher`: brings a conversation's blocks back to the device while its user types.

When a turn ends, its last block is remembered, under the session id if the client gave one. When the next turn comes
(same session, or a prompt that contains that very block), the gap between the two teaches how long people think. A
quarter of the way through the gap that is expected, what has left the device meanwhile is brought back.

A prefetch is right if the turn comes while it is fresh, else wrong. Blocks of prefetches that nobody has used yet
are bounded by a share of the device, and the share shrinks with the share of wrong ones.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from statistics import median
from typing import Protocol

MAX_CONVERSATIONS = 65_536
MAX_SHARE = 0.125  # of the device's blocks in prefetches that nobody has used yet, if all of them prove right
MIN_ACCURACY = 0.05  # so that it may learn better again
ACCURACY_WEIGHT = 0.05
LEAD_SHARE = 0.25  # of the expected gap
FRESH_GAPS = 4.0  # expected gaps after which a prefetch counts as wrong
NUM_GAPS = 256  # the latest of all conversations, for those without a history
RETRY_S = 0.02  # while a path is on its way from disk
MAX_RETRIES = 500  # a disk that fails is not asked for ever


class Fetcher(Protocol):
    """What the prefetcher asks of the tiers."""

    num_device_blocks: int

    def fetch(self, tail: bytes, max_blocks: int) -> tuple[int, bool]:
        """Bring the path that ends in `tail` to the device, at low priority. (blocks under way to the device,
        whether to ask again because a part is still on its way from disk)."""
        ...


@dataclass(slots=True)
class IdleConversation:
    """One conversation between two turns. Times are seconds of the owner's clock."""

    session_id: str | None
    tail: bytes
    ended_s: float
    gap_s: float | None = None  # a running mean of its own gaps
    fetched_blocks: int = 0  # by a prefetch that nobody has used yet
    fresh_until_s: float = field(default=0.0)
    num_retries: int = 0


class Prefetcher:
    """Owned by the KV manager's thread."""

    def __init__(self, fetcher: Fetcher):
        self._fetcher = fetcher
        self._by_tail: OrderedDict[bytes, IdleConversation] = OrderedDict()
        self._by_session: dict[str, IdleConversation] = {}
        self._due: list[tuple[float, int, IdleConversation]] = []
        self._order = itertools.count()
        self._gaps: deque[float] = deque(maxlen=NUM_GAPS)
        self._accuracy = 1.0
        self._unused_blocks = 0
        self.num_right = 0  # blocks that were prefetched and used, and those that were not
        self.num_wrong = 0
        self.num_refused = 0  # prefetches given up because of the bound

    def turn_began(self, session_id: str | None, digests: list[bytes], now_s: float) -> None:
        """A request gets in; `digests`: of its findable blocks, root first."""
        known = self._by_session.get(session_id) if session_id is not None else None
        if known is None and self._by_tail:
            known = next((self._by_tail[d] for d in reversed(digests) if d in self._by_tail), None)
        if known is None:
            return
        gap_s = max(0.0, now_s - known.ended_s)
        known.gap_s = gap_s if known.gap_s is None else 0.5 * (known.gap_s + gap_s)
        self._gaps.append(gap_s)
        self._settle(known, used=known.tail in digests)

    def turn_ended(self, session_id: str | None, tail: bytes, before: list[bytes], now_s: float) -> None:
        """A request ended well. `before`: digests of its findable blocks, by which an earlier turn is recognised."""
        known = self._by_session.get(session_id) if session_id is not None else None
        if known is None:
            known = next((self._by_tail[d] for d in reversed(before) if d in self._by_tail), None)
        if known is None:
            known = IdleConversation(session_id, tail, now_s)
        self._forget(known)
        if tail in self._by_tail:  # another one ended in the very same words: one prefetch serves both
            self._forget(self._by_tail[tail])
        known.tail, known.ended_s, known.num_retries = tail, now_s, 0
        self._by_tail[tail] = known
        if session_id is not None:
            known.session_id = session_id
            self._by_session[session_id] = known
        while len(self._by_tail) > MAX_CONVERSATIONS:
            self._forget(next(iter(self._by_tail.values())))
        expected_s = self._expected_gap_s(known)
        if expected_s is not None:
            heapq.heappush(self._due, (now_s + LEAD_SHARE * expected_s, next(self._order), known))

    def _expected_gap_s(self, conversation: IdleConversation) -> float | None:
        if conversation.gap_s is not None:
            return conversation.gap_s
        return median(self._gaps) if self._gaps else None

    def _forget(self, conversation: IdleConversation) -> None:
        """Neither its tail nor its session is expected any more."""
        self._settle(conversation, used=False)
        if self._by_tail.get(conversation.tail) is conversation:
            del self._by_tail[conversation.tail]
        if conversation.session_id is not None:
            self._by_session.pop(conversation.session_id, None)

    def _settle(self, conversation: IdleConversation, *, used: bool) -> None:
        """Count what became of its prefetch."""
        blocks, conversation.fetched_blocks = conversation.fetched_blocks, 0
        if not blocks:
            return
        self._unused_blocks -= blocks
        self._accuracy += ACCURACY_WEIGHT * (used - self._accuracy)
        if used:
            self.num_right += blocks
        else:
            self.num_wrong += blocks

    def next_s(self, now_s: float) -> float | None:
        """How soon `step` is worth calling; None: nothing is expected."""
        return max(0.0, self._due[0][0] - now_s) if self._due else None

    @property
    def max_unused_blocks(self) -> int:
        """The bound on prefetched blocks that nobody has used yet."""
        return int(MAX_SHARE * max(MIN_ACCURACY, self._accuracy) * self._fetcher.num_device_blocks)

    def step(self, now_s: float) -> None:
        """Begin what is due, and give up what has become stale."""
        while self._due and self._due[0][0] <= now_s:
            due_s, _, conversation = heapq.heappop(self._due)
            if self._by_tail.get(conversation.tail) is not conversation or conversation.ended_s > due_s:
                continue  # the next turn has come already
            if conversation.fetched_blocks:
                if now_s >= conversation.fresh_until_s:
                    self._settle(conversation, used=False)
                continue
            self._fetch(conversation, now_s)

    def _fetch(self, conversation: IdleConversation, now_s: float) -> None:
        room = self.max_unused_blocks - self._unused_blocks
        num_blocks, again = self._fetcher.fetch(conversation.tail, room)
        if num_blocks:
            conversation.fetched_blocks = num_blocks
            self._unused_blocks += num_blocks
            expected_s = self._expected_gap_s(conversation) or 0.0
            conversation.fresh_until_s = now_s + FRESH_GAPS * max(expected_s, 1.0)
            heapq.heappush(self._due, (conversation.fresh_until_s, next(self._order), conversation))
        elif again and conversation.num_retries < MAX_RETRIES:
            conversation.num_retries += 1
            heapq.heappush(self._due, (now_s + RETRY_S, next(self._order), conversation))
        elif room <= 0:
            self.num_refused += 1
