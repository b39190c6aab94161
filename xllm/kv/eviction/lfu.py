"""`LFU`: the least often used first, among equals the least recently retired."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np


class LFU:
    """Counts uses from a content's admission on; what is evicted is forgotten.

    Leaf first by itself: a parent was used at least as often as its child, and is retired behind it. The frequencies
    that occur are in a heap, and there are few of them: O(1) per place in practice.
    """

    def __init__(self, num_places: int):
        self._num_uses = [0] * num_places
        self._listed_at = [-1] * num_places  # under which frequency; -1: not evictable
        self._places_of: dict[int, dict[int, None]] = {}
        self._frequencies: list[int] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def admit(self, ids: Sequence[int] | np.ndarray, digests: Sequence[bytes],
              parents: Sequence[int] | np.ndarray) -> None:
        for place in ids:
            self._num_uses[place] = 0

    def use(self, ids: np.ndarray) -> None:
        for place in ids.tolist():
            self._num_uses[place] += 1

    def retire(self, ids: np.ndarray) -> None:
        self.revive(ids)
        for place in ids.tolist():
            frequency = self._num_uses[place]
            if frequency not in self._places_of:
                self._places_of[frequency] = {}
                heapq.heappush(self._frequencies, frequency)
            self._places_of[frequency][place] = None
            self._listed_at[place] = frequency
        self._count += len(ids)

    def revive(self, ids: np.ndarray) -> None:
        for place in ids.tolist():
            frequency = self._listed_at[place]
            if frequency >= 0:
                del self._places_of[frequency][place]
                self._listed_at[place] = -1
                self._count -= 1

    def victims(self, num_places: int) -> np.ndarray:
        chosen: list[int] = []
        wanted = min(num_places, self._count)
        while len(chosen) < wanted:
            places = self._places_of[self._frequencies[0]]
            if not places:
                del self._places_of[heapq.heappop(self._frequencies)]
                continue
            place = next(iter(places))
            del places[place]
            self._listed_at[place] = -1
            chosen.append(place)
        self._count -= len(chosen)
        return np.array(chosen, dtype=np.int32)

    def forget(self, ids: np.ndarray) -> None:
        self.revive(ids)
