"""`LeafFirst`: evicts no place before its last child, for policies whose own order does not ensure that."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np

QUEUED, PARKED, READY = range(3)
NO_PLACE = -1  # stands for the parent of a root; no place has that number


class Line:
    """A first-in, first-out queue of places. `discard` is O(1): the entry stays and is skipped by `pop`."""

    def __init__(self, num_places: int):
        self._entries: deque[tuple[int, int]] = deque()
        self._ticket_of = [0] * num_places  # of the live entry; 0: none
        self._next_ticket = 1
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def push(self, place: int) -> None:
        """Append a place, which must not be in the line."""
        assert not self._ticket_of[place]
        self._ticket_of[place] = self._next_ticket
        self._entries.append((place, self._next_ticket))
        self._next_ticket += 1
        self._count += 1

    def pop(self) -> int:
        """Remove and return the first place. The line must not be empty."""
        while True:
            place, ticket = self._entries.popleft()
            if self._ticket_of[place] == ticket:
                self.discard(place)
                return place

    def discard(self, place: int) -> None:
        """Remove the place, if it is in the line."""
        self._count -= self._ticket_of[place] != 0
        self._ticket_of[place] = 0
        if len(self._entries) > 2 * self._count + 64:
            self._entries = deque(entry for entry in self._entries if self._ticket_of[entry[0]] == entry[1])


class LeafFirst:
    """Base class of such policies: implements `EvictionPolicy` over a subclass's order of candidates (`_candidate`),
    which may name held places and parents too.

    A candidate that is held or has children is parked, out of the subclass's order. It is evicted next as soon as it
    can be (its last child is evicted, or it is retired), unless the subclass takes it back in `_retired`. O(1) per
    place.
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
        """See `EvictionPolicy.victims`. Takes candidates until enough of them can go; the others are parked."""
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
        """Called when a content has entered at `place`; it is not evictable yet."""

    def _used(self, place: int) -> None:
        """Called when a request used the place's content."""

    def _retired(self, place: int) -> None:
        """Called when the place became evictable. To take a parked one back into the order, set `_where` to QUEUED."""

    def _revived(self, place: int) -> None:
        """Called when the place is held again: not evictable any more."""

    def _evicted(self, place: int) -> None:
        """Called when the place, which was the next candidate, has been evicted."""

    def _forgotten(self, place: int) -> None:
        """Called when the owner has emptied the place; the order may still contain it."""

    def _candidate(self) -> int:
        """Remove and return the next place of the order. Called only while some place is evictable."""
        raise NotImplementedError


def _ints(ids: Sequence[int] | np.ndarray) -> Iterator[int]:
    return iter(ids.tolist() if isinstance(ids, np.ndarray) else ids)
