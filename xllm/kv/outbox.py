"""`Outbox`: sends KV blocks of the device to other instances: the engine's side of the lane `PUBLISH`."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from xllm.errors import DeviceError
from xllm.kv.block_pool import BlockPool
from xllm.kv.moves import NO_TICKET, PUBLISH, URGENT, MoveDone, OpenMoves
from xllm.kv_offer import KVOffer

OnSent = Callable[[str | None], None]  # with what went wrong, or None


class Outbox:
    """Pins the blocks of each move until they have been read. Belongs to the thread that owns the KV manager."""

    def __init__(self, pool: BlockPool, moves: OpenMoves):
        self._pool, self._moves = pool, moves
        self._last_ticket = NO_TICKET
        self.num_sent = 0  # blocks, since the start
        self.num_failed = 0  # blocks whose move failed

    def new_ticket(self) -> int:
        """For the step that fills blocks which are to be sent: its plan names it, and the moves of those blocks wait
        for each of its layers."""
        self._last_ticket += 1
        return self._last_ticket

    def send(self, block_ids: np.ndarray, first: int, offer: KVOffer, on_sent: OnSent, *, ticket: int = NO_TICKET,
             is_last: bool) -> None:
        """Send blocks first, first + 1, ... of a path, int32, to where `offer` says. The step that advances `ticket` is
        planned after this; NO_TICKET: the blocks are complete. on_sent: called once they are there, or cannot be sent.
        is_last: no more blocks follow for this offer."""
        self._pool.pin(block_ids)
        places = np.arange(first, first + len(block_ids), dtype=np.int32)
        self._moves.submit(PUBLISH, URGENT, block_ids, places, functools.partial(self._finish, block_ids, on_sent),
                           ticket=ticket, offer=offer, is_last=is_last)

    def _finish(self, block_ids: np.ndarray, on_sent: OnSent, done: MoveDone) -> None:
        self._pool.unpin(block_ids)
        if done.error is None:
            self.num_sent += len(block_ids)
            on_sent(None)
        elif done.error.kind == "peer":
            self.num_failed += len(block_ids)
            on_sent(done.error.message)
        else:
            raise DeviceError(f"KV could not be sent to another instance: {done.error.message}")
