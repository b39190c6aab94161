"""`FIFO`: first in, first out."""

from __future__ import annotations

from xllm.kv.eviction.tree import LeafFirst, Line


class FIFO(LeafFirst):
    """By the order of admission, whatever is used meanwhile."""

    def __init__(self, num_places: int):
        super().__init__(num_places)
        self._line = Line(num_places)

    def _admitted(self, place: int, digest: bytes) -> None:
        self._line.push(place)

    def _forgotten(self, place: int) -> None:
        self._line.discard(place)

    def _candidate(self) -> int:
        return self._line.pop()
