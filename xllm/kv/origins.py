"""`DeviceOrigin` and `HostOrigin`: the two tiers that a `Demoter` copies KV blocks from."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from xllm.kv.block_pool import BlockPool
from xllm.kv.demotion import Path
from xllm.kv.moves import NO_TICKET, SAVE, WRITE
from xllm.kv.prefix_index import PrefixIndex
from xllm.kv.tier_index import TierIndex


class DeviceOrigin:
    """The device's blocks, on their way to host memory: pinned while a copy is in flight."""

    lane = SAVE

    def __init__(self, index: PrefixIndex, pool: BlockPool, slot_of_block: np.ndarray,
                 ticket_of: np.ndarray, on_saved: Callable[[Path], bool]):
        """ticket_of: int64 [num_blocks], the load that a block waits for, or NO_TICKET. slot_of_block: int32
        [num_blocks], the host slot that holds the same contents; written here.
        on_saved(path): called when the path's first `done` blocks are in host memory and no more will be saved there.
        Returns whether it has passed the path on to be copied to disk; the lease is then ended there."""
        self._index, self._pool, self._slot_of_block, self._on_saved = index, pool, slot_of_block, on_saved
        self._ticket_of = ticket_of

    def take(self, items: np.ndarray, digests: Sequence[bytes]) -> int:
        num = 0
        for block, digest in zip(items.tolist(), digests):
            if self._index.find(digest) != block or self._ticket_of[block] != NO_TICKET:
                break
            num += 1
        self._pool.pin(items[:num])
        return num

    def is_coming(self, item: int, digest: bytes) -> bool:
        return self._index.find(digest) == item and bool(self._ticket_of[item] != NO_TICKET)

    def give_back(self, items: np.ndarray) -> None:
        self._pool.unpin(items)

    def written(self, items: np.ndarray, digests: Sequence[bytes], slots: np.ndarray) -> None:
        for block, digest, slot in zip(items.tolist(), digests, slots.tolist()):
            if self._index.find(digest) == block:
                self._slot_of_block[block] = slot

    def ended(self, path: Path) -> bool:
        goes_on = self._on_saved(path)
        if not goes_on:
            self.end_lease(path)
        return goes_on

    def end_lease(self, path: Path) -> None:
        """End the path's lease, if it has one."""
        if path.lease is not None:
            self._pool.end_lease(path.lease)


class HostOrigin:
    """Host slots, on their way to disk: the whole path is held until it ends."""

    lane = WRITE

    def __init__(self, host: TierIndex, disk_of_slot: np.ndarray):
        """disk_of_slot: int32 [num_host_slots], the disk slot that holds the same contents; written here."""
        self._host, self._disk_of_slot = host, disk_of_slot

    def take(self, items: np.ndarray, digests: Sequence[bytes]) -> int:
        return len(items)

    def is_coming(self, item: int, digest: bytes) -> bool:
        return False

    def give_back(self, items: np.ndarray) -> None:
        pass

    def written(self, items: np.ndarray, digests: Sequence[bytes], slots: np.ndarray) -> None:
        self._disk_of_slot[items] = slots

    def ended(self, path: Path) -> bool:
        self._host.let_go(path.items)
        return False
