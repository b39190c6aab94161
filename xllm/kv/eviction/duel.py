"""`Duel`: LRU or LRU-K, whichever would have hit more of late.

LRU-K wins where a cache is small for its traffic and loses where it is large. Two shadows of the tier's size see every
request and count what they would have hit; the real victims are chosen in the order of the shadow that leads. After
set dueling: M. Qureshi et al., Adaptive insertion policies for high performance caching, ISCA 2007.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from xllm.kv.eviction.lru_k import KOrder, PlaceUses
from xllm.kv.eviction.ring import Ring, Stamps
from xllm.kv.eviction.shadow import Order, Shadow

# After that many capacities of used blocks a hit counts 1 / e. Chosen on the traces of docs/performance.md (multi-turn
# caching); other values tried there were at most 0.52 points of hit rate behind the better of LRU and LRU-2.
WINDOW = 16.0
NAMES = ("lru", "lru-k")
# The index in NAMES of the leader before the first request: LRU-K, because what it keeps LRU can use as well, while
# what LRU has evicted is gone.
FIRST = 1


class RecencyOrder(Ring):
    """A ring under the interface of `KOrder`."""

    def push(self, ids: np.ndarray, marks: np.ndarray, kth_uses: np.ndarray | None = None) -> None:
        super().push(ids, marks)


class Duel:
    """An `EvictionPolicy` that keeps both real orders up to date all the time, so that a change of the leader costs
    nothing."""

    def __init__(self, num_places: int, k: int = 2, history: float = 10.0, window: float = WINDOW):
        self._stamps = Stamps(num_places)
        self._orders: tuple[Order, Order] = (RecencyOrder(num_places, self._stamps), KOrder(num_places, self._stamps))
        self._uses = PlaceUses(num_places, k, history)
        num_contents = self._uses.history.num_contents
        of_contents = (Stamps(num_contents), Stamps(num_contents))
        self._shadows = (Shadow(num_places, of_contents[0], RecencyOrder(num_places, of_contents[0])),
                         Shadow(num_places, of_contents[1], KOrder(num_places, of_contents[1])))
        self._decay_blocks = window * num_places
        self._lead = 0.0  # of LRU-K: recent hits more than LRU
        self._spread = 0.0  # the sum of the squares of what `_lead` is the sum of
        self._leader = FIRST
        self.num_switches = 0

    def __len__(self) -> int:
        return self._stamps.count

    @property
    def leader(self) -> str:
        """Whose order the victims are chosen in now."""
        return NAMES[self._leader]

    def admit(self, ids: Sequence[int] | np.ndarray, digests: Sequence[bytes],
              parents: Sequence[int] | np.ndarray) -> None:
        self._uses.admit(ids, digests)

    def use(self, ids: np.ndarray) -> None:
        if not len(ids):
            return
        self._settle()
        path, new = self._uses.use(ids)
        kth_uses = self._uses.history.kth_use(path)
        hits = []
        for shadow in self._shadows:
            shadow.forget(new)
            hits.append(shadow.use(path, kth_uses))
        self._count(hits[1] - hits[0], len(ids))

    def _count(self, lead: int, num_blocks: int) -> None:
        """Take in one request. A change needs a lead that is larger than what pure chance gives on average: were each
        request's difference as likely to have the other sign, their sum would have this standard deviation."""
        kept = math.exp(-num_blocks / self._decay_blocks)
        self._lead = self._lead * kept + lead
        self._spread = self._spread * kept + lead * lead
        leader = int(self._lead > 0.0)
        if leader != self._leader and self._lead * self._lead > self._spread:
            self._leader = leader
            self.num_switches += 1

    def retire(self, ids: np.ndarray) -> None:
        self._settle()
        stamps, kth_uses = self._stamps.issue(ids), self._uses.kth_use[ids]
        for order in self._orders:
            order.push(ids, stamps, kth_uses)

    def revive(self, ids: np.ndarray) -> None:
        self._stamps.clear(ids)

    def victims(self, num_places: int) -> np.ndarray:
        return self._orders[self._leader].pop(num_places)

    def forget(self, ids: np.ndarray) -> None:
        self._settle()
        self._stamps.clear(ids)

    def _settle(self) -> None:
        if not self._uses.is_settled:
            self._uses.settle()
