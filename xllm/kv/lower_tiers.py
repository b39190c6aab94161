"""`LowerTiers`: disk and the shared store, from which a path is read: disk has its first blocks, the store the rest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from xllm.kv.moves import FETCH, READ, Finish, OpenMoves
from xllm.kv.store_tier import StoreTier
from xllm.kv.tier_index import TierIndex


class LowerTiers:
    """Reads paths of which `disk_path` (int32) are the disk's slots and whose other blocks the store has. Belongs to
    the KV manager's thread."""

    def __init__(self, host: TierIndex, disk: TierIndex | None, store: StoreTier | None, moves: OpenMoves):
        self._host, self._disk, self._store, self._moves = host, disk, store, moves

    def digests(self, host_path: np.ndarray, disk_path: np.ndarray, stored: Sequence[bytes]) -> list[bytes]:
        """Of a whole path: of which host memory or disk, whichever has more, has the beginning, and the store the
        rest."""
        tier, path = self._host, host_path
        if len(disk_path) > len(host_path):
            assert self._disk is not None
            tier, path = self._disk, disk_path
        return [*(tier.digest_of(slot) for slot in path.tolist()), *stored]

    def hold(self, disk_path: np.ndarray) -> None:
        """Protect the disk's part of a path. Nothing protects the store's: what is deleted there is a miss."""
        if self._disk is not None:
            self._disk.hold(disk_path)

    def let_go(self, disk_path: np.ndarray) -> None:
        if self._disk is not None:
            self._disk.let_go(disk_path)

    def use(self, disk_path: np.ndarray) -> None:
        """Count one use of the disk's part."""
        if self._disk is not None:
            self._disk.use(disk_path)

    def chunk_end(self, first: int, last: int, disk_path: np.ndarray) -> int:
        """How far the blocks from `first` to at most `last` come from one tier."""
        return min(last, len(disk_path)) if first < len(disk_path) else last

    def read(self, first: int, digests: Sequence[bytes], disk_path: np.ndarray, slots: np.ndarray, priority: int,
             finish: Finish) -> None:
        """Submit the read of a path's blocks from number `first` on, all in one tier, into host slots."""
        on_disk = first < len(disk_path)
        sources = disk_path[first : first + len(slots)] if on_disk else slots.copy()
        self._moves.submit(READ if on_disk else FETCH, priority, sources, slots, finish, digests=tuple(digests))

    def drop(self, place: int, digest: bytes, disk_path: np.ndarray) -> int:
        """Take note that block number `place` of a path is not good; returns how many blocks were lost by it."""
        if place < len(disk_path):
            assert self._disk is not None
            return self._disk.drop(int(disk_path[place]))
        assert self._store is not None
        self._store.drop(digest)
        return 1
