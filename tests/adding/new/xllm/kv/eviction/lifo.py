"""`LIFO`: last in, first out."""

from __future__ import annotations

from xllm.kv.eviction.tree import LeafFirst


class LIFO(LeafFirst):
    """By the order of admission, the newest first: what came first stays, as long as there is anything newer."""

    def __init__(self, num_places: int):
        super().__init__(num_places)
        self._order: dict[int, None] = {}

    def _admitted(self, place: int, digest: bytes) -> None:
        self._order[place] = None

    def _forgotten(self, place: int) -> None:
        self._order.pop(place, None)

    def _candidate(self) -> int:
        return self._order.popitem()[0]
