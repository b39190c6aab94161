"""`LRU`: least recently retired first."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from xllm.kv.eviction.ring import Ring, Stamps


class LRU:
    """Leaf first by itself: parents are retired behind their children."""

    def __init__(self, num_places: int):
        self._stamps = Stamps(num_places)
        self._ring = Ring(num_places, self._stamps)

    def __len__(self) -> int:
        return self._stamps.count

    def admit(self, ids: Sequence[int] | np.ndarray, digests: Sequence[bytes],
              parents: Sequence[int] | np.ndarray) -> None:
        pass

    def use(self, ids: np.ndarray) -> None:
        pass

    def retire(self, ids: np.ndarray) -> None:
        self._ring.push(ids, self._stamps.issue(ids))

    def revive(self, ids: np.ndarray) -> None:
        self._stamps.clear(ids)

    def victims(self, num_places: int) -> np.ndarray:
        return self._ring.pop(num_places)

    def forget(self, ids: np.ndarray) -> None:
        self._stamps.clear(ids)
