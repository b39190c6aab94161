"""`EvictionPolicy`: the interface of the policies that decide what a tier evicts first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class EvictionPolicy(Protocol):
    """Orders the evictable places 0 .. num_places - 1 of one tier: device blocks, or slots of host memory or disk.

    A place's life: `admit`, then `retire` and `revive` in turn, until `victims` names it or the owner `forget`s it.
    Ids are int32 arrays without repeats. A use is one request's, however many of its blocks it touches. Policies
    copy what they keep of the arrays that they are given. Not thread-safe: the tier's owner calls.

    The owner holds a place only together with its ancestors, and retires them tail first; so a retired place has only
    retired children. In return `victims` is leaf first: no place whose child remains, and a child before its parent.
    """

    def admit(self, ids: Sequence[int] | np.ndarray, digests: Sequence[bytes],
              parents: Sequence[int] | np.ndarray) -> None:
        """Note that contents (16-byte digests) have entered the tier at these places, parents before their children.

        parents: the place of each one's parent, or -1. The places are not evictable until they are retired.
        """
        ...

    def use(self, ids: np.ndarray) -> None:
        """Count one use of these resident contents by one request, root first, hits and its own new ones alike.

        The order of what is evictable already does not change: a place gets its new position when it is retired again.
        """
        ...

    def retire(self, ids: np.ndarray) -> None:
        """Make these places evictable, because nothing holds them any more. Tail first."""
        ...

    def revive(self, ids: np.ndarray) -> None:
        """Make these places not evictable until they are retired again: they are held. Ignores those that are not
        evictable already."""
        ...

    def victims(self, num_places: int) -> np.ndarray:
        """Choose the evictable places to empty first and forget them; returns int32, fewer than `num_places` if there
        are not as many."""
        ...

    def forget(self, ids: np.ndarray) -> None:
        """Drop these places from the order: the owner has emptied them itself, with all their descendants."""
        ...

    def __len__(self) -> int:
        """How many places are evictable."""
        ...
