"""`Protected`: keeps the hot part of a tier (L1) from eviction while anything else (L2) can be evicted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from xllm.kv.eviction.eviction_policy import EvictionPolicy
from xllm.kv.eviction.ring import Ring, Stamps

HOT_USES = 2  # uses from which a content is hot: the least that tells a shared prefix from one that came once


class Protected:
    """Contents used at least twice since they were admitted retire into L1, the others into L2.

    l1_share of the places may be evictable in L1, in the order of their retirement; what is beyond that falls into L2,
    whose order is the policy's. Metadata only: nothing moves. Leaf first as long as the policy is: a parent has at
    least its child's uses, so it is in L1 where its child is, and behind it.
    """

    def __init__(self, num_places: int, policy: EvictionPolicy, l1_share: float):
        self._policy = policy
        self._num_uses = np.zeros(num_places, dtype=np.int32)
        self._stamps = Stamps(num_places)
        self._ring = Ring(num_places, self._stamps)
        self._max_l1 = int(l1_share * num_places)

    def __len__(self) -> int:
        return self._stamps.count + len(self._policy)

    def num_hot(self, ids: np.ndarray) -> int:
        """How many of these are evictable and protected."""
        return int(np.count_nonzero(self._stamps.of[ids]))

    def admit(self, ids: Sequence[int] | np.ndarray, digests: Sequence[bytes],
              parents: Sequence[int] | np.ndarray) -> None:
        self._num_uses[ids] = 0
        self._policy.admit(ids, digests, parents)

    def use(self, ids: np.ndarray) -> None:
        self._num_uses[ids] += 1
        self._policy.use(ids)

    def retire(self, ids: np.ndarray) -> None:
        hot = self._num_uses[ids] >= HOT_USES
        self._policy.retire(ids[~hot])
        hot_ids = ids[hot]
        self._ring.push(hot_ids, self._stamps.issue(hot_ids))
        excess = self._stamps.count - self._max_l1
        if excess > 0:
            self._policy.retire(self._ring.pop(excess))

    def revive(self, ids: np.ndarray) -> None:
        self._stamps.clear(ids)
        self._policy.revive(ids)

    def victims(self, num_places: int) -> np.ndarray:
        ids = self._policy.victims(num_places)
        if len(ids) < num_places:
            hot_ids = self._ring.pop(num_places - len(ids))
            self._policy.forget(hot_ids)
            ids = np.concatenate((ids, hot_ids))
        return ids

    def forget(self, ids: np.ndarray) -> None:
        self._stamps.clear(ids)
        self._policy.forget(ids)
