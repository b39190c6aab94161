"""`Lifter`: copies KV blocks from disk to the device when a path is too long for host memory.

The counterpart of `Passage`, which does the same on the way down: the blocks go, a chunk at a time, through host slots
that are free again as soon as their contents are on the device.
"""

from __future__ import annotations

import functools

import numpy as np

from xllm.errors import DeviceError
from xllm.kv.block_pool import BlockPool
from xllm.kv.moves import READ, MoveDone, OpenMoves
from xllm.kv.prefix_index import NO_BLOCK, PrefixIndex
from xllm.kv.promotion import CHUNK_BLOCKS, Loader
from xllm.kv.tier_index import NO_SLOT, TierIndex


class Lift:
    """One path on its way up. path: the device blocks (int32, root first) that hold its beginning or are being loaded;
    the lift holds them until `is_done`. num_read: how many of them it has read. Written by the `Lifter` only."""

    __slots__ = ("digests", "disk_path", "host_slots", "is_done", "num_read", "path", "priority")

    def __init__(self, disk_path: np.ndarray, digests: list[bytes], path: np.ndarray, priority: int):
        self.disk_path, self.digests, self.path, self.priority = disk_path, digests, path, priority
        self.host_slots = np.zeros(0, dtype=np.int32)  # in use by the chunk under way
        self.num_read = 0
        self.is_done = False


class Lifter:
    """Runs any number of lifts at once. Every method belongs to the KV manager's thread."""

    def __init__(self, index: PrefixIndex, pool: BlockPool, host: TierIndex, disk: TierIndex, loader: Loader,
                 moves: OpenMoves, slot_of_block: np.ndarray):
        """slot_of_block: int32 [num_blocks], the host slot that holds the same contents; written here."""
        self._slot_of_block = slot_of_block
        self._index, self._pool, self._host, self._disk = index, pool, host, disk
        self._loader, self._moves = loader, moves
        self._open: list[Lift] = []
        self.num_lifted = 0  # blocks

    @property
    def open_lifts(self) -> list[Lift]:
        return list(self._open)

    def lift(self, resident: np.ndarray, disk_path: np.ndarray, priority: int) -> Lift:
        """Begin a lift. resident: the device blocks that begin the path; disk_path: the disk slots of the whole path.
        The lift is done at once where no block can be read."""
        digests = [self._disk.digest_of(slot) for slot in disk_path.tolist()]
        lift = Lift(disk_path, digests, resident.astype(np.int32), priority)
        self._pool.share(lift.path)
        self._disk.hold(disk_path)
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
        count = min(CHUNK_BLOCKS, len(lift.digests) - first, self._pool.num_available)
        slots = self._host.reserve(count)
        if not len(slots):
            if not count or not len(self._moves):
                self._end(lift)
            return
        lift.host_slots = slots
        part = slice(first, first + len(slots))
        self._moves.submit(READ, lift.priority, lift.disk_path[part], slots, functools.partial(self._read, lift, first),
                           digests=tuple(lift.digests[part]))

    def _read(self, lift: Lift, first: int, done: MoveDone) -> None:
        """Take in a read: load the good blocks on to the device, and drop the first bad one from the disk's index."""
        if done.error is not None:  # a bug: errors of the disk are reported as bad blocks
            raise DeviceError(f"KV could not be read into host memory: {done.error.message}")
        digests, slots = lift.digests[first : first + done.num_done], lift.host_slots
        if done.num_done < len(slots):
            self._disk.drop(int(lift.disk_path[first + done.num_done]))
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
        lift.num_read += num
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
        self._disk.let_go(lift.disk_path)
        self._disk.use(lift.disk_path)
        self._pool.release(lift.path, fence=-1)
