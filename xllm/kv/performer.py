"""`MovePerformer`: performs moves: copies KV blocks between device, host memory, disk and a shared store."""

from __future__ import annotations

import logging

from xllm.errors import DiskError
from xllm.kv import failpoints
from xllm.kv.disk import DiskStore
from xllm.kv.mover import Mover
from xllm.kv.moves import FETCH, LOAD, PUT, READ, SAVE, WRITE, Move, SharedFacts, StoredBlocks, TierFacts
from xllm.kv.shared_store import SharedStore
from xllm.kv.shared_writer import BlockToStore
from xllm.kv.tickets import TicketBoard

# How old the list of what is in the shared store may be when blocks are added: chosen, as the engine's own is.
LISTED_S = 1.0

_log = logging.getLogger(__name__)


class MovePerformer:
    """Owns the mover, the disk store (None: no disk) and the shared store (None: none); the runner waits for loads at
    `board`.

    `begin` is called in the thread that receives the moves, in their order; `run` in a lane's thread, one at a time
    in each lane.
    """

    def __init__(self, mover: Mover, store: DiskStore | None, board: TicketBoard, shared: SharedStore | None = None):
        self.board = board
        self._mover, self._store, self._shared = mover, store, shared

    def facts(self) -> TierFacts:
        """The sizes of the tiers and the blocks found on disk. Reads the disk's headers; raises DiskError."""
        mover, store, shared = self._mover, self._store, self._shared
        num_slots, stored = 0, StoredBlocks()
        if store is not None:
            found = store.scan()
            num_slots, stored = store.num_slots, StoredBlocks(found.slots, found.digests, found.parents)
        facts = None if shared is None else SharedFacts(str(shared.folder), shared.fingerprint, shared.num_own_blocks)
        return TierFacts(mover.num_host_slots, mover.payload_bytes, num_slots, stored, facts)

    @property
    def missed_total(self) -> dict[str, dict[str, int]]:
        """Totals of reads that found no good block, by tier ("disk", "store") and reason (`disk.MISS_KINDS`,
        `shared_store.MISS_KINDS`)."""
        stores = {"disk": self._store, "store": self._shared}
        return {tier: dict(store.counters.misses) for tier, store in stores.items() if store is not None}

    def begin(self, move: Move) -> None:
        """Open the ticket of a load, so that a step may wait for it."""
        if move.lane == LOAD:
            self.board.open(move.ticket, self._mover.num_layers)

    def run(self, move: Move) -> int:
        """Copy the blocks of a move; returns how many of them, from the first on, are good. A read or a fetch stops at
        the first bad block; the other lanes raise what the mover, the disk or the store raises."""
        if move.lane == LOAD:
            self._load(move)
        elif move.lane == SAVE:
            self._save(move)
        elif move.lane == WRITE:
            self._write(move)
        elif move.lane == PUT:
            self._put(move)
        else:
            return self._read(move) if move.lane == READ else self._fetch(move)
        return len(move.targets)

    def _save(self, move: Move) -> None:
        if failpoints.armed is not None:
            failpoints.hit("tier.save_before")
        self._mover.save(move.sources, move.targets)
        if failpoints.armed is not None:
            failpoints.hit("tier.saved")

    def _load(self, move: Move) -> None:
        ticket = self.board[move.ticket]
        try:
            for layer in range(self._mover.num_layers):
                self._mover.load_layer(move.sources, move.targets, layer)
                ticket.advance()
                if failpoints.armed is not None:
                    failpoints.hit("tier.loaded_layer")
        except BaseException as error:
            ticket.fail(error)
            raise
        self.board.close(ticket)

    def _write(self, move: Move) -> None:
        store, payload = self._store, self._mover.payload
        assert store is not None
        if failpoints.armed is not None:
            failpoints.hit("tier.write_before")
        places = zip(move.sources.tolist(), move.targets.tolist(), move.digests, move.parents, strict=True)
        for source, target, digest, parent in places:
            store.write(target, digest, parent, payload(source))
        if failpoints.armed is not None:
            failpoints.hit("tier.written")

    def _read(self, move: Move) -> int:
        store, payload = self._store, self._mover.payload
        assert store is not None
        places = zip(move.sources.tolist(), move.targets.tolist(), move.digests, strict=True)
        for num_good, (source, target, digest) in enumerate(places):
            try:
                good = store.read(source, digest, payload(target))
            except OSError:  # the store has counted it
                good = False
            if not good:
                return num_good
            if failpoints.armed is not None:
                failpoints.hit("tier.read")
        return len(move.targets)

    def _put(self, move: Move) -> None:
        shared, payload = self._shared, self._mover.payload
        assert shared is not None
        shared.refresh(LISTED_S)
        places = zip(move.sources.tolist(), move.digests, move.parents, strict=True)
        shared.write([BlockToStore(digest, parent, payload(source)) for source, digest, parent in places])

    def _fetch(self, move: Move) -> int:
        shared, payload = self._shared, self._mover.payload
        assert shared is not None and move.lane == FETCH
        try:
            if not all(map(shared.can_read, move.digests)):  # the engine has heard of them sooner
                shared.refresh()
        except DiskError:  # it finds what it knows of
            pass
        for num_good, (target, digest) in enumerate(zip(move.targets.tolist(), move.digests, strict=True)):
            if not shared.read(digest, payload(target)):
                return num_good
        return len(move.targets)

    def close(self) -> None:
        """Sync the disk and release its folder. No move is running, and none will come. Logs a failed sync."""
        if self._shared is not None:
            self._shared.close()
        if self._store is not None:
            try:
                self._store.close()
            except DiskError as error:
                _log.error("the disk tier of the KV cache could not be synced at the end: %s", error)
