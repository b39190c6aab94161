"""`EvictionPolicy`: the interface of everything that decides what goes first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class EvictionPolicy(Protocol):
    """Orders the evictable places 0 .. num_places - 1 of one tier: device blocks, or slots of host memory or disk.

    A place's life: `admit`, then `retire` and `revive` in turn, until `victims` names it or the owner `forget`s it.
    Ids are int32 arrays without repeats. A use is one request's, however many of its blocks it touches. Policies
    copy what they keep of the arrays that they are given. Not thread-safe: the tier's owner calls.

    Whoever holds a place holds its ancestors too, and lets them go tail first; so a retired place has only retired
    children. In return `victims` is leaf first: no place whose child remains, and a child before its parent.
    """

    def admit(self, ids: Sequence[int] | np.ndarray, digests: Sequence[bytes],
              parents: Sequence[int] | np.ndarray) -> None:
        """Contents (16-byte digests) have entered the tier at these places, parents before their children.

        parents: the place of each one's parent, or -1. Nobody may evict them until they are retired.
        """
        ...

    def use(self, ids: np.ndarray) -> None:
        """One request used these resident contents, root first, hits and its own new ones alike.

        It moves nothing that is evictable already: such places come to where they belong when they are retired anew.
        """
        ...

    def retire(self, ids: np.ndarray) -> None:
        """Nobody holds these any more, tail first: they may be evicted."""
        ...

    def revive(self, ids: np.ndarray) -> None:
        """These are held again: not evictable until they are retired anew. Those that are not evictable are ignored."""
        ...

    def victims(self, num_places: int) -> np.ndarray:
        """Remove and return the evictable places to empty first: int32 (fewer if there are not as many)."""
        ...

    def forget(self, ids: np.ndarray) -> None:
        """The owner has emptied these places himself, with everything below them."""
        ...

    def __len__(self) -> int:
        """How many places are evictable."""
        ...
