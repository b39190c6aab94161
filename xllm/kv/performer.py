"""`MovePerformer`: performs moves: copies KV blocks between device, host memory and disk."""

from __future__ import annotations

import logging

from xllm.errors import DiskError
from xllm.kv import failpoints
from xllm.kv.disk import DiskStore
from xllm.kv.mover import Mover
from xllm.kv.moves import LOAD, SAVE, WRITE, Move, StoredBlocks, TierFacts
from xllm.kv.tickets import TicketBoard

_log = logging.getLogger(__name__)


class MovePerformer:
    """Owns the mover and the disk store (None: no disk); the runner waits for loads at `board`.

    `begin` is called in the thread that receives the moves, in their order; `run` in a lane's thread, one at a time
    in each lane.
    """

    def __init__(self, mover: Mover, store: DiskStore | None, board: TicketBoard):
        self.board = board
        self._mover, self._store = mover, store

    def facts(self) -> TierFacts:
        """The sizes of the tiers and the blocks found on disk. Reads the disk's headers; raises DiskError."""
        mover, store = self._mover, self._store
        if store is None:
            return TierFacts(mover.num_host_slots, mover.payload_bytes)
        found = store.scan()
        return TierFacts(mover.num_host_slots, mover.payload_bytes, store.num_slots,
                         StoredBlocks(found.slots, found.digests, found.parents))

    @property
    def missed_total(self) -> dict[str, int]:
        """Totals of reads that found no good block on disk, by reason (`disk.MISS_KINDS`)."""
        return {} if self._store is None else dict(self._store.counters.misses)

    def begin(self, move: Move) -> None:
        """Open the ticket of a load, so that a step may wait for it."""
        if move.lane == LOAD:
            self.board.open(move.ticket, self._mover.num_layers)

    def run(self, move: Move) -> int:
        """Copy the blocks of a move; returns how many of them, from the first on, are good. A read stops at the first
        bad block; the other lanes raise what the mover or the disk raises."""
        if move.lane == LOAD:
            self._load(move)
        elif move.lane == SAVE:
            self._save(move)
        elif move.lane == WRITE:
            self._write(move)
        else:
            return self._read(move)
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

    def close(self) -> None:
        """Sync the disk and release its folder. No move is running, and none will come. Logs a failed sync."""
        if self._store is not None:
            try:
                self._store.close()
            except DiskError as error:
                _log.error("the disk tier of the KV cache could not be synced at the end: %s", error)
