"""`ARC`: contents used once and contents used more often, in shares that adapt.

N. Megiddo, D. Modha: ARC: a self-tuning, low overhead replacement cache, FAST 2003.
"""

from __future__ import annotations

from collections import OrderedDict

from xllm.kv.eviction.tree import QUEUED, LeafFirst

ONCE, OFTEN = 0, 1  # the class of a place: whether it is in T1 or in T2


class ARC(LeafFirst):
    """T1 holds what was used once, T2 the rest; of what was evicted from them, B1 and B2 keep the digests.

    A content that comes back from B1 says that T1 is too small, from B2 that T2 is. Room is made before a content is
    admitted, so that a tie between T1 and its target always goes to T1's side.
    """

    def __init__(self, num_places: int):
        super().__init__(num_places)
        self._num_places = num_places
        self._target = 0.0  # of T1's size
        self._class = bytearray(num_places)
        self._was_used = bytearray(num_places)
        self._digest: list[bytes] = [b""] * num_places
        self._sizes = [0, 0]  # of T1 and T2, those that are held included
        self._evictable_of: tuple[OrderedDict[int, None], OrderedDict[int, None]] = (OrderedDict(), OrderedDict())
        self._ghosts: tuple[OrderedDict[bytes, None], OrderedDict[bytes, None]] = (OrderedDict(), OrderedDict())

    def _admitted(self, place: int, digest: bytes) -> None:
        b1, b2 = self._ghosts
        came_back = digest in b1 or digest in b2
        if digest in b1:
            self._target = min(float(self._num_places), self._target + max(1.0, len(b2) / len(b1)))
            del b1[digest]
        elif digest in b2:
            self._target = max(0.0, self._target - max(1.0, len(b1) / len(b2)))
            del b2[digest]
        self._digest[place] = digest
        self._class[place] = OFTEN if came_back else ONCE
        self._sizes[self._class[place]] += 1
        self._was_used[place] = 0
        self._trim_ghosts()

    def _trim_ghosts(self) -> None:
        b1, b2 = self._ghosts
        while b1 and self._sizes[ONCE] + len(b1) > self._num_places:
            b1.popitem(last=False)
        while b2 and sum(self._sizes) + len(b1) + len(b2) > 2 * self._num_places:
            b2.popitem(last=False)

    def _used(self, place: int) -> None:
        if self._was_used[place] and self._class[place] == ONCE:
            self._evictable_of[ONCE].pop(place, None)
            self._class[place] = OFTEN
            self._sizes[ONCE] -= 1
            self._sizes[OFTEN] += 1
            if self._evictable[place]:
                self._evictable_of[OFTEN][place] = None
        self._was_used[place] = 1

    def _retired(self, place: int) -> None:
        self._where[place] = QUEUED
        listed = self._evictable_of[self._class[place]]
        listed[place] = None
        listed.move_to_end(place)

    def _revived(self, place: int) -> None:
        self._evictable_of[self._class[place]].pop(place, None)

    def _evicted(self, place: int) -> None:
        which = self._class[place]
        self._sizes[which] -= 1
        self._ghosts[which][self._digest[place]] = None
        self._trim_ghosts()

    def _forgotten(self, place: int) -> None:
        self._sizes[self._class[place]] -= 1

    def _candidate(self) -> int:
        t1, t2 = self._evictable_of
        source = t1 if t1 and (self._sizes[ONCE] > self._target or not t2) else t2
        return source.popitem(last=False)[0]
