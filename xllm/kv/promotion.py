"""`Loader` (host memory to device) and `Stager` (disk to host memory): KV blocks on their way up.

A load goes layer by layer: the device blocks are findable at once, and whoever uses them before they are complete
waits for each layer by the load's ticket. Staging from disk checks every block; a broken one is a miss, and is
forgotten with all that follows it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from xllm.kv import failpoints
from xllm.kv.block_pool import BlockPool
from xllm.kv.lanes import LOAD, READ, Lanes, Ticket, TicketBoard
from xllm.kv.mover import Mover
from xllm.kv.prefix_index import NO_BLOCK, PrefixIndex
from xllm.kv.tier_index import NO_SLOT, TierIndex

NO_TICKET = 0
CHUNK_BLOCKS = 32


class DiskReader(Protocol):
    """What `Stager` asks of the disk store."""

    def read(self, slot: int, digest: bytes, out: memoryview) -> bool: ...


class Loader:
    """Copies host blocks to device blocks. `ticket_of` int64 [num_blocks]: the open load that a block waits for."""

    def __init__(self, index: PrefixIndex, pool: BlockPool, host: TierIndex, mover: Mover, lanes: Lanes,
                 board: TicketBoard):
        self._index, self._pool, self._host = index, pool, host
        self._mover, self._lanes, self._board = mover, lanes, board
        self.ticket_of = np.full(pool.num_blocks, NO_TICKET, dtype=np.int64)
        self.num_loaded = 0
        self._open: dict[int, np.ndarray] = {}  # the path that each open load holds

    @property
    def num_open(self) -> int:
        return len(self._open)

    @property
    def open_paths(self) -> list[np.ndarray]:
        """The device blocks that open loads hold."""
        return list(self._open.values())

    def load(self, resident: np.ndarray, host_path: np.ndarray, priority: int) -> np.ndarray:
        """Bring the rest of a path to the device; returns the device blocks of the whole path, which are findable now.

        resident: the device blocks that begin the path. host_path: the slots of the whole path. The blocks needed
        must be available. The load holds the path until it is complete; a caller who needs it longer shares it.
        """
        slots = host_path[len(resident) :]
        self._pool.share(resident)
        new = self._pool.allocate(len(slots))
        self._host.hold(host_path)
        digests = [self._host.digest_of(slot) for slot in slots.tolist()]
        parents = np.concatenate((resident[-1:] if len(resident) else [NO_BLOCK], new[:-1])).astype(np.int32)
        self._index.insert_many(digests, new, parents)
        self._pool.admit(new, digests, parents)
        ticket = self._board.open(self._mover.num_layers)
        self.ticket_of[new] = ticket.ticket_id
        path = np.concatenate((resident, new)).astype(np.int32)
        self._open[ticket.ticket_id] = path
        if failpoints.armed is not None:
            failpoints.hit("tier.load_begun")
        self._lanes.submit(_LoadJob(self, ticket, path, new, slots, host_path, priority))
        return path

    def finish(self, job: _LoadJob, error: BaseException | None) -> None:
        """All layers have arrived, or the device has failed."""
        if error is not None:
            raise error
        self._board.close(job.ticket)
        del self._open[job.ticket.ticket_id]
        self.ticket_of[job.new] = NO_TICKET
        self.num_loaded += len(job.new)
        self._host.let_go(job.host_path)
        self._pool.release(job.path, fence=-1)
        if failpoints.armed is not None:
            failpoints.hit("tier.loaded")

    def open_tickets(self, block_ids: np.ndarray) -> tuple[int, ...]:
        """The loads that whoever reads these blocks must wait for."""
        waiting = np.unique(self.ticket_of[block_ids])
        return tuple(int(t) for t in waiting if t != NO_TICKET and t in self._board)


class _LoadJob:
    lane = LOAD

    def __init__(self, loader: Loader, ticket: Ticket, path: np.ndarray, new: np.ndarray, slots: np.ndarray,
                 host_path: np.ndarray, priority: int):
        self._loader, self.ticket, self.path, self.new = loader, ticket, path, new
        self._slots, self.host_path, self.priority = slots, host_path, priority
        self.num_bytes = len(slots) * loader._mover.payload_bytes

    def run(self) -> None:
        mover = self._loader._mover
        try:
            for layer in range(mover.num_layers):
                mover.load_layer(self._slots, self.new, layer)
                self.ticket.advance()
                if failpoints.armed is not None:
                    failpoints.hit("tier.loaded_layer")
        except BaseException as error:
            self.ticket.fail(error)
            raise

    def finish(self, error: BaseException | None) -> None:
        self._loader.finish(self, error)


class Stage:
    """One path on its way from disk to host memory: `done` blocks from the root on are there, `num_read` of them by
    this stage. Written by the `Stager` only."""

    __slots__ = ("digests", "disk_path", "done", "host_slots", "is_done", "num_read", "priority")

    def __init__(self, disk_path: np.ndarray, digests: list[bytes], known: np.ndarray, priority: int):
        self.disk_path = disk_path
        self.digests = digests
        self.host_slots = np.concatenate((known, np.full(len(disk_path) - len(known), NO_SLOT))).astype(np.int32)
        self.done = len(known)
        self.num_read = 0
        self.priority = priority
        self.is_done = False


class Stager:
    """Reads paths from disk into host slots, a chunk at a time, root first."""

    def __init__(self, host: TierIndex, disk: TierIndex, store: DiskReader, mover: Mover, lanes: Lanes,
                 on_staged: Callable[[np.ndarray, np.ndarray], None]):
        """on_staged(host slots, disk slots): these hold the same contents now."""
        self._host, self._disk, self._store = host, disk, store
        self._mover, self._lanes, self._on_staged = mover, lanes, on_staged
        self._staging: dict[bytes, Stage] = {}  # by the digest of their last block
        self.num_staged = 0
        self.num_broken = 0

    @property
    def num_open(self) -> int:
        return len(self._staging)

    def find(self, last_digest: bytes) -> Stage | None:
        """The open stage of this path."""
        return self._staging.get(last_digest)

    def stage(self, disk_path: np.ndarray, known: np.ndarray, priority: int) -> Stage:
        """Begin. disk_path: the slots of the whole path on disk; known: the host slots that begin it."""
        digests = [self._disk.digest_of(slot) for slot in disk_path.tolist()]
        stage = Stage(disk_path, digests, known, priority)
        self._staging[digests[-1]] = stage
        self._disk.hold(disk_path)
        self._host.hold(known)
        self._next(stage)
        return stage

    def _next(self, stage: Stage) -> None:
        """Skip what others have brought meanwhile, then read the next chunk."""
        while stage.done < len(stage.digests):
            slot = self._host.find(stage.digests[stage.done])
            if slot == NO_SLOT:
                break
            stage.host_slots[stage.done] = slot
            self._host.hold(stage.host_slots[stage.done : stage.done + 1])
            stage.done += 1
        first = stage.done
        last = min(first + CHUNK_BLOCKS, len(stage.digests))
        slots = self._host.reserve(last - first)
        if not len(slots):
            self._end(stage)
            return
        self._lanes.submit(_ReadJob(self, stage, first, slots))

    def read(self, stage: Stage, first: int, slots: np.ndarray) -> int:
        """In a worker thread: returns how many blocks from the start are good. One that the disk cannot read is not."""
        for i, slot in enumerate(slots.tolist()):
            place = first + i
            try:
                good = self._store.read(int(stage.disk_path[place]), stage.digests[place], self._mover.payload(slot))
            except OSError:  # the store has counted it
                good = False
            if not good:
                return i
            if failpoints.armed is not None:
                failpoints.hit("tier.read")
        return len(slots)

    def finish(self, stage: Stage, first: int, slots: np.ndarray, num_good: int) -> None:
        """A chunk has been read: the block behind the good ones, if there is one, is broken."""
        broken = num_good < len(slots)
        if broken:
            self.num_broken += self._disk.drop(int(stage.disk_path[first + num_good]))
        self._host.abandon(slots[num_good:])
        digests = stage.digests[first : first + num_good]
        parent = int(stage.host_slots[first - 1]) if first else NO_SLOT
        good = self._host.publish(slots[:num_good], digests, parent)
        stage.host_slots[first : first + num_good] = good
        self._on_staged(good, stage.disk_path[first : first + num_good])
        stage.done = first + num_good
        stage.num_read += num_good
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
        self._disk.let_go(stage.disk_path)


class _ReadJob:
    lane = READ

    def __init__(self, stager: Stager, stage: Stage, first: int, slots: np.ndarray):
        self._stager, self._stage, self._first, self._slots = stager, stage, first, slots
        self._num_good = 0
        self.priority = stage.priority
        self.num_bytes = len(slots) * stager._mover.payload_bytes

    def run(self) -> None:
        self._num_good = self._stager.read(self._stage, self._first, self._slots)

    def finish(self, error: BaseException | None) -> None:
        if error is not None:
            raise error  # a bug: what the disk does is not one
        self._stager.finish(self._stage, self._first, self._slots, self._num_good)
