"""`LRUK`: evicts first the content whose K-th last use is the longest ago.

E. O'Neil, P. O'Neil, G. Weikum: The LRU-K page replacement algorithm for database disk buffering, SIGMOD 1993.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from xllm.kv.eviction.history import History, content_keys
from xllm.kv.eviction.ring import Ring, Stamps
from xllm.kv.eviction.run_heap import RunHeap


class KOrder:
    """Ids with fewer than K known uses first, in the order of the pushes; then by the time of the K-th last use."""

    def __init__(self, max_listed: int, stamps: Stamps):
        self._young = Ring(max_listed, stamps)
        self._old = RunHeap(max_listed, stamps)

    def push(self, ids: np.ndarray, marks: np.ndarray, kth_uses: np.ndarray) -> None:
        """Append; `marks` are the stamps issued for them, `kth_uses` int64 with 0 for fewer than K uses."""
        is_old = kth_uses > 0
        num_old = int(np.count_nonzero(is_old))
        if num_old == 0:
            self._young.push(ids, marks)
        elif num_old == len(ids):
            self._old.push(ids, marks, kth_uses)
        else:
            self._young.push(ids[~is_old], marks[~is_old])
            self._old.push(ids[is_old], marks[is_old], kth_uses[is_old])

    def pop(self, num_ids: int) -> np.ndarray:
        """As `Ring.pop`."""
        ids = self._young.pop(num_ids)
        return ids if len(ids) == num_ids else np.concatenate((ids, self._old.pop(num_ids - len(ids))))

    def live(self) -> np.ndarray:
        """A copy of the live ids, first to go first: int32."""
        return np.concatenate((self._young.live(), self._old.live()))

    @property
    def num_moved(self) -> int:
        return self._young.num_moved + self._old.num_moved


class PlaceUses:
    """The K-th last use of what lies at each place, with a `History` behind it.

    Along a path the K-th last uses never rise from parent to child, and while a content stays they never fall: where
    the history has forgotten an ancestor's uses, those of its descendants stand in. So the order stays leaf first.
    """

    def __init__(self, num_places: int, k: int, history: float):
        self.history = History(int((1 + history) * num_places), k)
        self.kth_use = np.zeros(num_places, dtype=np.int64)
        self.now = 0  # requests so far
        self._keys = np.zeros(num_places, dtype=np.uint64)
        self._admitted: list[tuple[Sequence[int] | np.ndarray, Sequence[bytes]]] = []  # not yet in the arrays

    def admit(self, ids: Sequence[int] | np.ndarray, digests: Sequence[bytes]) -> None:
        """Note new contents. Deferred: a decode step brings many calls of one block each."""
        self._admitted.append((ids, digests))

    def settle(self) -> None:
        """Enter what `admit` noted into the arrays. Must be called before these places are used or looked up."""
        admitted, self._admitted = self._admitted, []
        ids = np.concatenate([np.asarray(ids, dtype=np.int32) for ids, _ in admitted])
        if len(ids):
            self._keys[ids] = content_keys([digest for _, digests in admitted for digest in digests])
            self.kth_use[ids] = 0

    @property
    def is_settled(self) -> bool:
        return not self._admitted

    def use(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Count one use of these places by one request, root first; returns what `History.touch` does."""
        self.now += 1
        content_ids, new = self.history.touch(self._keys[ids], self.now)
        kth = self.kth_use[ids]
        kth[: len(content_ids)] = np.maximum(kth[: len(content_ids)], self.history.kth_use(content_ids))
        self.kth_use[ids] = np.maximum.accumulate(kth[::-1])[::-1]
        return content_ids, new


class LRUK:
    """LRU-K over places. K = 1 is LRU by the last use.

    history: of how many evicted contents the uses are remembered, as a multiple of the places. They count again with
    the first use after a content has come back.
    """

    def __init__(self, num_places: int, k: int = 2, history: float = 10.0):
        self._stamps = Stamps(num_places)
        self._order = KOrder(num_places, self._stamps)
        self._uses = PlaceUses(num_places, k, history)

    def __len__(self) -> int:
        return self._stamps.count

    def admit(self, ids: Sequence[int] | np.ndarray, digests: Sequence[bytes],
              parents: Sequence[int] | np.ndarray) -> None:
        self._uses.admit(ids, digests)

    def use(self, ids: np.ndarray) -> None:
        if len(ids):
            self._settle()
            self._uses.use(ids)

    def retire(self, ids: np.ndarray) -> None:
        self._settle()
        self._order.push(ids, self._stamps.issue(ids), self._uses.kth_use[ids])

    def revive(self, ids: np.ndarray) -> None:
        self._stamps.clear(ids)

    def victims(self, num_places: int) -> np.ndarray:
        return self._order.pop(num_places)

    def forget(self, ids: np.ndarray) -> None:
        self._settle()
        self._stamps.clear(ids)

    def _settle(self) -> None:
        if not self._uses.is_settled:
            self._uses.settle()
