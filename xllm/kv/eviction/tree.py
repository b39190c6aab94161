"""`LeafFirst`: keeps a parent back until its last child has gone, for policies whose order does not do it by itself."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np

QUEUED, PARKED, READY = range(3)
NO_PLACE = -1


class Line:
    """A queue of places in which those forgotten meanwhile are skipped."""

    def __init__(self, num_places: int):
        self._entries: deque[tuple[int, int]] = deque()
        self._ticket_of = [0] * num_places  # of the live entry; 0: none
        self._next_ticket = 1
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def push(self, place: int) -> None:
        """To the end. It must not be in the line."""
        assert not self._ticket_of[place]
        self._ticket_of[place] = self._next_ticket
        self._entries.append((place, self._next_ticket))
        self._next_ticket += 1
        self._count += 1

    def pop(self) -> int:
        """Take out the first. The line must not be empty."""
        while True:
            place, ticket = self._entries.popleft()
            if self._ticket_of[place] == ticket:
                self.discard(place)
                return place

    def discard(self, place: int) -> None:
        """Take it out, if it is in."""
        self._count -= self._ticket_of[place] != 0
        self._ticket_of[place] = 0
        if len(self._entries) > 2 * self._count + 64:
            self._entries = deque(entry for entry in self._entries if self._ticket_of[entry[0]] == entry[1])


class LeafFirst:
    """The base of such policies. A subclass chooses candidates in its own order, held ones and parents included.

    A candidate that cannot go yet is parked, out of the subclass's order. It is next as soon as it can go (when its
    last child has gone, or it is retired), unless the subclass takes it back in `_retired`. O(1) per place.
    """

    def __init__(self, num_places: int):
        self._parent = [NO_PLACE] * num_places
        self._num_children = [0] * num_places
        self._evictable = bytearray(num_places)
        self._where = bytearray(num_places)
        self._resident = bytearray(num_places)
        self._ready: deque[int] = deque()
        self._count = 0
        self.num_looked_at = 0  # candidates: what the work of `victims` is proportional to

    def __len__(self) -> int:
        return self._count

    def admit(self, ids: Sequence[int] | np.ndarray, digests: Sequence[bytes],
              parents: Sequence[int] | np.ndarray) -> None:
        for place, digest, parent in zip(_ints(ids), digests, _ints(parents)):
            assert not self._resident[place]
            self._resident[place] = 1
            self._where[place] = QUEUED
            self._parent[place] = parent
            if parent != NO_PLACE:
                self._num_children[parent] += 1
            self._admitted(place, digest)

    def use(self, ids: np.ndarray) -> None:
        for place in ids.tolist():
            self._used(place)

    def retire(self, ids: np.ndarray) -> None:
        for place in ids.tolist():
            if not self._evictable[place]:
                self._evictable[place] = 1
                self._count += 1
            self._retired(place)
            self._free_if_last(place)

    def revive(self, ids: np.ndarray) -> None:
        for place in ids.tolist():
            if self._evictable[place]:
                self._evictable[place] = 0
                self._count -= 1
                self._revived(place)

    def victims(self, num_places: int) -> np.ndarray:
        chosen: list[int] = []
        while len(chosen) < num_places and self._count:
            self.num_looked_at += 1
            if self._ready:
                place = self._ready.popleft()
                if not self._resident[place] or self._where[place] != READY:
                    continue  # forgotten or taken back meanwhile
            else:
                place = self._candidate()
            if not self._evictable[place] or self._num_children[place]:
                self._where[place] = PARKED
                continue
            chosen.append(place)
            self._remove(place)
            self._evicted(place)
        return np.array(chosen, dtype=np.int32)

    def forget(self, ids: np.ndarray) -> None:
        self.revive(ids)
        for place in ids.tolist():
            if self._resident[place]:
                self._remove(place)
                self._forgotten(place)

    def _remove(self, place: int) -> None:
        self._count -= self._evictable[place]
        self._evictable[place] = self._resident[place] = 0
        parent = self._parent[place]
        if parent != NO_PLACE:
            self._num_children[parent] -= 1
            self._free_if_last(parent)

    def _free_if_last(self, place: int) -> None:
        if self._where[place] == PARKED and self._evictable[place] and not self._num_children[place]:
            self._where[place] = READY
            self._ready.append(place)

    # --- what a subclass says

    def _admitted(self, place: int, digest: bytes) -> None:
        """A new content; not evictable."""

    def _used(self, place: int) -> None:
        """A request used it."""

    def _retired(self, place: int) -> None:
        """It is evictable now. A parked one may be taken back: set `_where` to QUEUED."""

    def _revived(self, place: int) -> None:
        """It is evictable no more."""

    def _evicted(self, place: int) -> None:
        """It was the next candidate and has gone."""

    def _forgotten(self, place: int) -> None:
        """The owner has emptied it; it may still stand in the order."""

    def _candidate(self) -> int:
        """Take the next one out of the order. Asked only while some place is evictable."""
        raise NotImplementedError


def _ints(ids: Sequence[int] | np.ndarray) -> Iterator[int]:
    return iter(ids.tolist() if isinstance(ids, np.ndarray) else ids)
