"""`Loader` (host memory to device) and `Stager` (disk or shared store to host memory): KV blocks on their way up.

A load goes layer by layer: the device blocks are findable at once, and a step that reads them before they are complete
waits for each layer by the load's ticket. Staging checks every block; a broken one is a miss, and is dropped from the
disk's index with all its descendants.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from xllm.errors import DeviceError
from xllm.kv import failpoints
from xllm.kv.block_pool import BlockPool
from xllm.kv.lower_tiers import LowerTiers
from xllm.kv.moves import LOAD, NO_TICKET, MoveDone, OpenMoves
from xllm.kv.prefix_index import NO_BLOCK, PrefixIndex
from xllm.kv.tier_index import NO_SLOT, TierIndex

CHUNK_BLOCKS = 32  # of one read from disk or the store: as `demotion.MAX_CHUNK_BLOCKS`, and for the same reasons


@dataclass(frozen=True, slots=True, eq=False)
class BlockLoad:
    """A load that is not complete. path: the device blocks that it holds, of which the last, `new`, are being loaded.
    host_path: the host slots of the same blocks, held too."""

    ticket: int
    path: np.ndarray
    new: np.ndarray
    host_path: np.ndarray


class Loader:
    """Copies host blocks to device blocks. `ticket_of` int64 [num_blocks]: the open load that a block waits for."""

    def __init__(self, index: PrefixIndex, pool: BlockPool, host: TierIndex, moves: OpenMoves):
        self._index, self._pool, self._host, self._moves = index, pool, host, moves
        self.ticket_of = np.full(pool.num_blocks, NO_TICKET, dtype=np.int64)
        self.num_loaded = 0
        self._open: dict[int, BlockLoad] = {}  # by ticket
        self._passing: dict[int, np.ndarray] = {}  # by ticket: the blocks of loads from slots that keep nothing
        self._last_ticket = NO_TICKET

    @property
    def num_open(self) -> int:
        return len(self._open) + len(self._passing)

    @property
    def open_loads(self) -> list[BlockLoad]:
        return list(self._open.values())

    def is_open(self, ticket: int) -> bool:
        return ticket in self._open or ticket in self._passing

    def load(self, resident: np.ndarray, host_path: np.ndarray, priority: int) -> np.ndarray:
        """Begin to copy the rest of a path to the device; returns the device blocks of the whole path (int32), findable
        at once.

        resident: the device blocks that begin the path. host_path: the host slots of the whole path. The blocks needed
        must be available. The load holds the path until it is complete; a caller that needs it longer holds it itself
        (`BlockPool.share`).
        """
        slots = host_path[len(resident) :]
        self._pool.share(resident)
        self._host.hold(host_path)
        digests = [self._host.digest_of(slot) for slot in slots.tolist()]
        new, ticket = self._begin(int(resident[-1]) if len(resident) else NO_BLOCK, digests)
        load = BlockLoad(ticket, np.concatenate((resident, new)).astype(np.int32), new, host_path)
        self._open[ticket] = load
        if failpoints.armed is not None:
            failpoints.hit("tier.load_begun")
        self._moves.submit(LOAD, priority, slots, new, functools.partial(self._finish, load), ticket=ticket)
        return load.path

    def load_through(self, parent: int, digests: Sequence[bytes], slots: np.ndarray, priority: int,
                     on_loaded: Callable[[], None]) -> np.ndarray:
        """Begin to copy blocks to the device from host slots that are not in the host's index; returns the new device
        blocks, findable at once and held by the caller. parent: the device block before the first one, or NO_BLOCK.
        on_loaded: called when the slots are free."""
        new, ticket = self._begin(parent, digests)
        self._passing[ticket] = new
        finish = functools.partial(self._passed, ticket, on_loaded)
        self._moves.submit(LOAD, priority, slots, new, finish, ticket=ticket)
        return new

    def _passed(self, ticket: int, on_loaded: Callable[[], None], done: MoveDone) -> None:
        if done.error is not None:
            raise DeviceError(f"KV could not be loaded to the device: {done.error.message}")
        self.ticket_of[self._passing.pop(ticket)] = NO_TICKET
        on_loaded()

    def _begin(self, parent: int, digests: Sequence[bytes]) -> tuple[np.ndarray, int]:
        """Take device blocks for these contents and make them findable behind `parent`; returns (blocks, the ticket by
        which readers wait for them)."""
        new = self._pool.allocate(len(digests))
        parents = np.concatenate(([parent], new[:-1])).astype(np.int32)
        self._index.insert_many(digests, new, parents)
        self._pool.admit(new, digests, parents)
        ticket = self._last_ticket = self._last_ticket + 1
        self.ticket_of[new] = ticket
        return new, ticket

    def _finish(self, load: BlockLoad, done: MoveDone) -> None:
        """Take in the end of a load: release what it held. Raises DeviceError if the copy failed."""
        if done.error is not None:
            raise DeviceError(f"KV could not be loaded to the device: {done.error.message}")
        del self._open[load.ticket]
        self.ticket_of[load.new] = NO_TICKET
        self.num_loaded += len(load.new)
        self._host.let_go(load.host_path)
        self._pool.release(load.path, fence=-1)
        if failpoints.armed is not None:
            failpoints.hit("tier.loaded")

    def open_tickets(self, block_ids: np.ndarray) -> tuple[int, ...]:
        """The tickets of incomplete loads into these blocks; a step that reads the blocks must wait for them."""
        return tuple(int(ticket) for ticket in np.unique(self.ticket_of[block_ids]) if ticket != NO_TICKET)


class Stage:
    """One path on its way to host memory: its first `done` blocks are there, `num_read` of them read from disk by this
    stage and `num_fetched` from the shared store. disk_path: the slots of its first blocks, those that disk has.
    Written by the `Stager` only."""

    __slots__ = ("digests", "disk_path", "done", "host_slots", "is_done", "num_fetched", "num_read", "priority")

    def __init__(self, disk_path: np.ndarray, digests: list[bytes], known: np.ndarray, priority: int):
        self.disk_path = disk_path
        self.digests = digests
        self.host_slots = np.concatenate((known, np.full(len(digests) - len(known), NO_SLOT))).astype(np.int32)
        self.done = len(known)
        self.num_read = self.num_fetched = 0
        self.priority = priority
        self.is_done = False


class Stager:
    """Reads paths from below into host slots, a chunk at a time, root first."""

    def __init__(self, host: TierIndex, lower: LowerTiers, on_staged: Callable[[np.ndarray, np.ndarray], None]):
        """on_staged(host slots, disk slots): called when these slots hold the same contents."""
        self._host, self._lower, self._on_staged = host, lower, on_staged
        self._staging: dict[bytes, Stage] = {}  # by the digest of their last block
        self.num_staged = 0
        self.num_broken = 0

    @property
    def num_open(self) -> int:
        return len(self._staging)

    def find(self, last_digest: bytes) -> Stage | None:
        """The open stage of the path that ends in this digest, or None."""
        return self._staging.get(last_digest)

    def stage(self, digests: list[bytes], disk_path: np.ndarray, known: np.ndarray, priority: int) -> Stage:
        """Begin a stage, which holds both paths until it is done. digests: of the whole path; disk_path: the disk slots
        of its first blocks, the store has the others; known: the host slots that begin it. It is done at once if host
        memory has no slot for more."""
        stage = Stage(disk_path, digests, known, priority)
        self._staging[digests[-1]] = stage
        self._lower.hold(disk_path)
        self._host.hold(known)
        self._next(stage)
        return stage

    def _next(self, stage: Stage) -> None:
        """Skip blocks that have reached host memory meanwhile, then submit the next read, or end the stage."""
        while stage.done < len(stage.digests):
            slot = self._host.find(stage.digests[stage.done])
            if slot == NO_SLOT:
                break
            stage.host_slots[stage.done] = slot
            self._host.hold(stage.host_slots[stage.done : stage.done + 1])
            stage.done += 1
        first = stage.done
        last = self._lower.chunk_end(first, min(first + CHUNK_BLOCKS, len(stage.digests)), stage.disk_path)
        slots = self._host.reserve(last - first)
        if not len(slots):
            self._end(stage)
            return
        self._lower.read(first, stage.digests[first : first + len(slots)], stage.disk_path, slots, stage.priority,
                         functools.partial(self._finish, stage, first, slots))

    def _finish(self, stage: Stage, first: int, slots: np.ndarray, done: MoveDone) -> None:
        """Take in a read: publish the good blocks in host memory, and drop the first bad one from its tier."""
        if done.error is not None:  # a bug: errors of disk and store are reported as bad blocks
            raise DeviceError(f"KV could not be read into host memory: {done.error.message}")
        num_good = done.num_done
        broken = num_good < len(slots)
        if broken:
            place = first + num_good
            self.num_broken += self._lower.drop(place, stage.digests[place], stage.disk_path)
        self._host.abandon(slots[num_good:])
        digests = stage.digests[first : first + num_good]
        parent = int(stage.host_slots[first - 1]) if first else NO_SLOT
        good = self._host.publish(slots[:num_good], digests, parent)
        stage.host_slots[first : first + num_good] = good
        stage.done = first + num_good
        if first < len(stage.disk_path):
            self._on_staged(good, stage.disk_path[first : stage.done])
            stage.num_read += num_good
        else:
            stage.num_fetched += num_good
        self.num_staged += num_good
        if failpoints.armed is not None:
            failpoints.hit("tier.staged")
        if broken:
            self._end(stage)
        else:
            self._next(stage)

    def _end(self, stage: Stage) -> None:
        del self._staging[stage.digests[-1]]
        stage.is_done = True
        path = stage.host_slots[: stage.done]
        self._host.let_go(path)
        self._host.use(path)
        self._lower.let_go(stage.disk_path)
