"""`Shadow`: counts what a cache would have hit under some order, without holding any content."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from xllm.kv.eviction.ring import Stamps


class Order(Protocol):
    """An order over stamped ids: `KOrder`, or `RecencyOrder`."""

    def push(self, ids: np.ndarray, marks: np.ndarray, kth_uses: np.ndarray) -> None: ...

    def pop(self, num_ids: int) -> np.ndarray: ...


class Shadow:
    """A cache of `num_places` contents that is never held: each request's path enters it whole. Metadata only.

    stamps: over content ids; order: over the same stamps.
    """

    def __init__(self, num_places: int, stamps: Stamps, order: Order):
        self._num_places = num_places
        self._stamps = stamps
        self._order = order

    def forget(self, content_ids: np.ndarray) -> None:
        """Drop these ids from the shadow: they stand for other contents from now on."""
        self._stamps.clear(content_ids)

    def use(self, path: np.ndarray, kth_uses: np.ndarray) -> int:
        """Look up and then cache the contents that one request uses, root first; returns how many were found.

        A block is found only with all its ancestors. What does not fit is cut off at the end.
        """
        path, kth_uses = path[: self._num_places], kth_uses[: self._num_places]
        listed = self._stamps.of[path] != 0
        num_hits = len(path) if listed.all() else int(listed.argmin())
        self._stamps.clear(path)
        excess = self._stamps.count + len(path) - self._num_places
        if excess > 0:
            self._order.pop(excess)
        tail_first = path[::-1]
        self._order.push(tail_first, self._stamps.issue(tail_first), kth_uses[::-1])
        return num_hits
