"""`Lifter`: copies KV blocks from disk or a shared store to the device when a path is too long for host memory.

The counterpart of `Passage`, which does the same on the way down: the blocks go, a chunk at a time, through host slots
that are free again as soon as their contents are on the device.
"""

from __future__ import annotations

import functools

import numpy as np

from xllm.errors import DeviceError
from xllm.kv.block_pool import BlockPool
from xllm.kv.lower_tiers import LowerTiers
from xllm.kv.moves import MoveDone, OpenMoves
from xllm.kv.prefix_index import NO_BLOCK, PrefixIndex
from xllm.kv.promotion import CHUNK_BLOCKS, Loader
from xllm.kv.tier_index import NO_SLOT, TierIndex


class Lift:
    """One path on its way up. path: the device blocks (int32, root first) that hold its beginning or are being loaded;
    the lift holds them until `is_done`. num_read, num_fetched: how many of them it has read from disk and from the
    store. disk_path: the disk slots of the path's first blocks. Written by the `Lifter` only."""

    __slots__ = ("digests", "disk_path", "host_slots", "is_done", "num_fetched", "num_read", "path", "priority")

    def __init__(self, disk_path: np.ndarray, digests: list[bytes], path: np.ndarray, priority: int):
        self.disk_path, self.digests, self.path, self.priority = disk_path, digests, path, priority
        self.host_slots = np.zeros(0, dtype=np.int32)  # in use by the chunk under way
        self.num_read = self.num_fetched = 0
        self.is_done = False


class Lifter:
    """Runs any number of lifts at once. Every method belongs to the KV manager's thread."""

    def __init__(self, index: PrefixIndex, pool: BlockPool, host: TierIndex, lower: LowerTiers, loader: Loader,
                 moves: OpenMoves, slot_of_block: np.ndarray):
        """slot_of_block: int32 [num_blocks], the host slot that holds the same contents; written here."""
        self._slot_of_block = slot_of_block
        self._index, self._pool, self._host, self._lower = index, pool, host, lower
        self._loader, self._moves = loader, moves
        self._open: list[Lift] = []
        self.num_lifted = 0  # blocks

    @property
    def open_lifts(self) -> list[Lift]:
        return list(self._open)

    def lift(self, resident: np.ndarray, digests: list[bytes], disk_path: np.ndarray, priority: int) -> Lift:
        """Begin a lift. resident: the device blocks that begin the path; digests: of the whole path; disk_path: the
        disk slots of its first blocks, the store has the others. The lift is done at once where no block can be
        read."""
        lift = Lift(disk_path, digests, resident.astype(np.int32), priority)
        self._pool.share(lift.path)
        self._lower.hold(disk_path)
        self._open.append(lift)
        self._next(lift)
        return lift

    def pump(self) -> None:
        """Continue the lifts that found no host slot. Called whenever a move has ended."""
        for lift in self.open_lifts:
            if not len(lift.host_slots) and not lift.is_done:
                self._next(lift)

    def _next(self, lift: Lift) -> None:
        """Skip blocks that have reached the device meanwhile, then submit the next read, or end the lift."""
        while len(lift.path) < len(lift.digests):
            block = self._index.find(lift.digests[len(lift.path)])
            if block == NO_BLOCK:
                break
            self._extend(lift, np.array([block], dtype=np.int32), share=True)
        first = len(lift.path)
        last = self._lower.chunk_end(first, min(first + CHUNK_BLOCKS, len(lift.digests)), lift.disk_path)
        count = min(last - first, self._pool.num_available)
        slots = self._host.reserve(count)
        if not len(slots):
            if not count or not len(self._moves):
                self._end(lift)
            return
        lift.host_slots = slots
        self._lower.read(first, lift.digests[first : first + len(slots)], lift.disk_path, slots, lift.priority,
                         functools.partial(self._read, lift, first))

    def _read(self, lift: Lift, first: int, done: MoveDone) -> None:
        """Take in a read: load the good blocks on to the device, and drop the first bad one from its tier."""
        if done.error is not None:  # a bug: errors of disk and store are reported as bad blocks
            raise DeviceError(f"KV could not be read into host memory: {done.error.message}")
        digests, slots = lift.digests[first : first + done.num_done], lift.host_slots
        if done.num_done < len(slots):
            place = first + done.num_done
            self._lower.drop(place, lift.digests[place], lift.disk_path)
        found = next((i for i, digest in enumerate(digests) if self._index.find(digest) != NO_BLOCK), len(digests))
        num = min(found, self._pool.num_available)
        self._host.abandon(slots[num:])
        lift.host_slots = slots[:num]
        if not num:
            if found < len(digests):
                self._next(lift)
            else:
                self._end(lift)
            return
        parent = int(lift.path[-1]) if len(lift.path) else NO_BLOCK
        new = self._loader.load_through(parent, digests[:num], slots[:num], lift.priority,
                                        functools.partial(self._loaded, lift))
        self._extend(lift, new, share=False)
        self._slot_of_block[new] = NO_SLOT
        if first < len(lift.disk_path):
            lift.num_read += num
        else:
            lift.num_fetched += num
        self.num_lifted += num

    def _loaded(self, lift: Lift) -> None:
        self._host.abandon(lift.host_slots)
        lift.host_slots = lift.host_slots[:0]
        self._next(lift)

    def _extend(self, lift: Lift, blocks: np.ndarray, *, share: bool) -> None:
        if share:
            self._pool.share(blocks)
        lift.path = np.concatenate((lift.path, blocks))

    def _end(self, lift: Lift) -> None:
        self._open.remove(lift)
        lift.is_done = True
        self._lower.let_go(lift.disk_path)
        self._lower.use(lift.disk_path)
        self._pool.release(lift.path, fence=-1)
