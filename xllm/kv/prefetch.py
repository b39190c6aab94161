"""`Prefetcher`: brings a conversation's blocks back to the device while its user types.

When a turn ends, its last block is remembered, under the session id if the client gave one. When the next turn comes
(same session, or a prompt that contains that block), the gap between the two updates the expected gap. A quarter of the
expected gap after a turn's end, the blocks that were evicted from the device meanwhile are loaded again.

A prefetch is right if the next turn comes while it is fresh, else wrong. Prefetched blocks that no request has used yet
are bounded by a share of the device, which shrinks as prefetches prove wrong.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from statistics import median
from typing import Protocol

# Chosen, not measured, all of them; each says what it trades.
MAX_CONVERSATIONS = 65_536  # remembered at a time: memory against conversations that are not recognised
# Of the device's blocks in prefetches that no request has used yet, while all of them prove right: with more of them
# more blocks are ready in time, and more cached prefixes are evicted for guesses.
MAX_SHARE = 0.125
MIN_ACCURACY = 0.05  # a floor, so that a few prefetches go on and the accuracy can rise again
ACCURACY_WEIGHT = 0.05  # of the newest prefetch in the running accuracy: about the last twenty decide
LEAD_SHARE = 0.25  # of the expected gap: an early prefetch is seldom too late, and holds blocks longer
FRESH_GAPS = 4.0  # expected gaps after which a prefetch counts as wrong: patience against blocks held in vain
NUM_GAPS = 256  # the latest gaps of all conversations, whose median serves those without a history
RETRY_S = 0.02  # between tries while a path is on its way from disk, which takes milliseconds
MAX_RETRIES = 500  # ten seconds of them: a disk that fails is not asked for ever


class Fetcher(Protocol):
    """What the prefetcher asks of the tiers."""

    num_device_blocks: int

    def fetch(self, tail: bytes, max_blocks: int) -> tuple[int, bool]:
        """Begin to load the path that ends in `tail`, at low priority, if that takes at most `max_blocks` blocks.
        Returns (blocks under way to the device, whether to call again because a part is still coming from disk)."""
        ...


@dataclass(slots=True)
class IdleConversation:
    """One conversation between two turns. Times are seconds of the owner's clock."""

    session_id: str | None
    tail: bytes
    ended_s: float
    gap_s: float | None = None  # a running mean of its own gaps
    fetched_blocks: int = 0  # by a prefetch that no request has used yet
    fresh_until_s: float = field(default=0.0)
    num_retries: int = 0


class Prefetcher:
    """Remembers conversations between their turns and prefetches their blocks. Belongs to the KV manager's thread."""

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
        """Recognise the conversation of a request that is being admitted, take in its gap, and count its prefetch as
        right or wrong. digests: of the request's findable blocks, root first."""
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
        """Remember a conversation whose request has ended normally, and schedule its prefetch. tail: the digest of its
        last block. before: digests of its findable blocks, by which its earlier turn is recognised."""
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
        """Forget a conversation: an unused prefetch of it counts as wrong."""
        self._settle(conversation, used=False)
        if self._by_tail.get(conversation.tail) is conversation:
            del self._by_tail[conversation.tail]
        if conversation.session_id is not None:
            self._by_session.pop(conversation.session_id, None)

    def _settle(self, conversation: IdleConversation, *, used: bool) -> None:
        """Count its prefetch as right (`used`) or wrong, if there was one, and update the accuracy."""
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
        """In how many seconds `step` has something to do; None: nothing is scheduled."""
        return max(0.0, self._due[0][0] - now_s) if self._due else None

    @property
    def max_unused_blocks(self) -> int:
        """The bound on prefetched blocks that no request has used yet."""
        return int(MAX_SHARE * max(MIN_ACCURACY, self._accuracy) * self._fetcher.num_device_blocks)

    def step(self, now_s: float) -> None:
        """Begin the prefetches that are due, and count those that are not fresh any more as wrong."""
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
