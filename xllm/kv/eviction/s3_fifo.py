"""`S3FIFO`: a small queue that contents must prove themselves in, a main queue, and a queue of ghosts.

J. Yang et al.: FIFO queues are all you need for cache eviction, SOSP 2023.
"""

from __future__ import annotations

from collections import OrderedDict

from xllm.kv.eviction.tree import PARKED, QUEUED, LeafFirst, Line

SMALL_SHARE = 0.1  # of the places; the paper's
MAX_FREQUENCY = 3  # what a counter of two bits holds; the paper's
SMALL, MAIN = 0, 1  # the class of a place: its queue's index in `_lines`


class S3FIFO(LeafFirst):
    """The small queue has a tenth of the places. Ghosts: as many as the main queue has places.

    A content's own first request does not count. One that was held when its turn came is used again: it goes on in the
    main queue when it is retired.
    """

    def __init__(self, num_places: int):
        super().__init__(num_places)
        self._small_size = max(1, int(SMALL_SHARE * num_places))
        self._num_ghosts = max(1, num_places - self._small_size)
        self._lines = (Line(num_places), Line(num_places))
        self._class = bytearray(num_places)
        self._frequency = bytearray(num_places)
        self._was_used = bytearray(num_places)
        self._digest: list[bytes] = [b""] * num_places
        self._ghosts: OrderedDict[bytes, None] = OrderedDict()

    def _admitted(self, place: int, digest: bytes) -> None:
        self._digest[place] = digest
        self._frequency[place] = self._was_used[place] = 0
        self._push(place, MAIN if digest in self._ghosts else SMALL)
        self._ghosts.pop(digest, None)

    def _push(self, place: int, which: int) -> None:
        self._class[place] = which
        self._lines[which].push(place)

    def _used(self, place: int) -> None:
        if self._was_used[place] and self._frequency[place] < MAX_FREQUENCY:
            self._frequency[place] += 1
        self._was_used[place] = 1

    def _retired(self, place: int) -> None:
        if self._where[place] == PARKED:
            self._where[place] = QUEUED
            self._push(place, MAIN)

    def _evicted(self, place: int) -> None:
        if self._class[place] == SMALL:
            self._ghosts[self._digest[place]] = None
            if len(self._ghosts) > self._num_ghosts:
                self._ghosts.popitem(last=False)

    def _forgotten(self, place: int) -> None:
        for line in self._lines:
            line.discard(place)

    def _candidate(self) -> int:
        small, main = self._lines
        while True:
            if small and (len(small) >= self._small_size or not main):
                place = small.pop()
                if self._frequency[place] <= 1:
                    return place
            else:
                place = main.pop()
                if not self._frequency[place]:
                    return place
                self._frequency[place] -= 1
            self._push(place, MAIN)
