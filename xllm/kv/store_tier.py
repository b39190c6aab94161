"""`StoreTier`: the shared store as a tier below host memory: what it has, and the copies of host blocks on their way
there.

It has no slots: its blocks are found by digest, others add and delete them, and a block that is listed may be gone when
it is read. That is a miss, as everything is that goes wrong with the store: it may be away, full or hang, and nothing
waits for it longer than a request waits for any stored block.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from xllm.errors import DeviceError
from xllm.kv.block import ROOT
from xllm.kv.demotion import MAX_CHUNK_BLOCKS, NORMAL
from xllm.kv.moves import FETCH, PUT, MoveDone, OpenMoves
from xllm.kv.tier_index import TierIndex

# Of the host slots, how many blocks may be held for copies to the store. Chosen: what hangs with it is half of host
# memory at most.
MAX_HELD_SHARE = 0.5
PUT_BYTES = 4 << 20  # of one copy. Chosen: no step waits for it, and two opens of a file cost little beside so much
# Between attempts to write to a store that refused. Chosen: a file system that is full or away seldom is so for less.
RETRY_S = 30.0
# Without the end of any read, while reads are open: the store counts as away. Chosen: far longer than a chunk takes,
# and shorter than what a request waits (`scheduler/kv_waits.py:MAX_WAIT_S`), so that few requests wait in vain.
STUCK_S = 3.0


class StoreView(Protocol):
    """Which blocks the store has; implemented by `SharedFollower`, and by tests."""

    @property
    def trouble(self) -> str | None:
        """Why what is known may not be so any more."""
        ...

    def has(self, digest: bytes) -> bool: ...

    def __len__(self) -> int: ...

    def note(self, digests: Iterable[bytes]) -> None:
        """These blocks were added."""
        ...

    def forget(self, digest: bytes) -> None:
        """This block is not there, or not good."""
        ...

    def close(self) -> None: ...


@dataclass(slots=True, eq=False)
class Offer:
    """A path of host slots, held until those of `lacking` (indexes into it) are in the store."""

    slots: np.ndarray
    digests: list[bytes]
    lacking: list[int]
    num_submitted: int = 0
    num_ended: int = 0


class StoreTier:
    """Belongs to the KV manager's thread."""

    def __init__(self, view: StoreView, host: TierIndex, moves: OpenMoves, say: Callable[[str], None],
                 num_own_blocks: int):
        """say: called with a sentence when the store fails, and when it is back. num_own_blocks: how many blocks this
        engine may add; 0: it only reads."""
        self._view, self._host, self._moves, self._say = view, host, moves, say
        self.num_own_blocks = num_own_blocks
        self._queue: deque[Offer] = deque()
        self._coming: set[bytes] = set()  # blocks of offers
        self._num_held = self._in_flight = 0
        self._chunk = max(1, min(MAX_CHUNK_BLOCKS, PUT_BYTES // moves.payload_bytes))
        self._trouble: str | None = None  # with reading
        self._write_error: str | None = None
        self._retry_s = 0.0  # when to write again, after an error
        self._was_reading, self._num_fetched = False, 0  # at the last poll: reads are open, and so many have ended
        self._progress_s = 0.0  # when a read last ended or began
        self._now_s = 0.0
        self.num_written = self.num_cut = 0  # blocks that went there, and that did not

    def __len__(self) -> int:
        """How many blocks are known to be there; 0 while the store is away."""
        return 0 if self._trouble is not None else len(self._view)

    @property
    def is_up(self) -> bool:
        return self._trouble is None and self._write_error is None

    @property
    def is_idle(self) -> bool:
        """Whether no block is on its way there."""
        return not self._queue

    # --- finding

    def has(self, digest: bytes) -> bool:
        """Whether the store has a block and can be read; it may be gone when it is."""
        return self._trouble is None and self._view.has(digest)

    def drop(self, digest: bytes) -> None:
        """Take note that a block was not there when it was read."""
        self._view.forget(digest)

    # --- filling

    def offer(self, slots: np.ndarray) -> None:
        """Queue those blocks of a path of host slots (root first) that the store lacks to be copied there."""
        if not self.num_own_blocks:
            return
        digests = [self._host.digest_of(slot) for slot in slots.tolist()]
        lacking = [i for i, digest in enumerate(digests) if not self._view.has(digest) and digest not in self._coming]
        room = int(MAX_HELD_SHARE * self._host.num_slots) - self._num_held if self._writes else 0
        taken = [i for i in lacking if i < room]
        self.num_cut += len(lacking) - len(taken)
        if not taken:
            return
        offer = Offer(slots[: taken[-1] + 1], digests, taken)
        self._host.hold(offer.slots)
        self._num_held += len(offer.slots)
        self._coming.update(digests[i] for i in taken)
        self._queue.append(offer)
        self.pump()

    @property
    def _writes(self) -> bool:
        return self._trouble is None and self._now_s >= self._retry_s

    def pump(self) -> None:
        """Submit copies until two are in flight."""
        for offer in list(self._queue):
            while self._in_flight < 2 and offer.num_submitted < len(offer.lacking):
                self._submit(offer)

    def _submit(self, offer: Offer) -> None:
        first = offer.num_submitted
        chosen = offer.lacking[first : first + self._chunk]
        digests = tuple(offer.digests[i] for i in chosen)
        parents = tuple(offer.digests[i - 1] if i else ROOT for i in chosen)
        slots = offer.slots[chosen]
        offer.num_submitted += len(chosen)
        self._in_flight += 1
        self._moves.submit(PUT, NORMAL, slots, slots.copy(), functools.partial(self._written, offer, digests),
                           digests=digests, parents=parents)

    def _written(self, offer: Offer, digests: tuple[bytes, ...], done: MoveDone) -> None:
        """Take in the end of a copy. Where the store has refused it, the rest of the path is given up."""
        self._in_flight -= 1
        offer.num_ended += len(digests)
        if done.error is None:
            self._view.note(digests)
            self.num_written += len(digests)
            self._wrote()
        elif done.error.kind == "store":
            self.num_cut += len(digests)
            self._refused(done.error.message)
            self._give_up(offer)
        else:
            raise DeviceError(f"KV could not be written to the shared store: {done.error.message}")
        self._coming.difference_update(digests)
        if offer.num_ended == len(offer.lacking):
            self._end(offer)
        self.pump()

    def _give_up(self, offer: Offer) -> None:
        rest = offer.lacking[offer.num_submitted :]
        self._coming.difference_update(offer.digests[i] for i in rest)
        self.num_cut += len(rest)
        del offer.lacking[offer.num_submitted :]

    def _end(self, offer: Offer) -> None:
        self._queue.remove(offer)
        self._num_held -= len(offer.slots)
        self._host.let_go(offer.slots)

    # --- trouble

    def _wrote(self) -> None:
        if self._write_error is not None and self._now_s >= self._retry_s:
            self._write_error = None
            self._say("the shared KV store takes blocks again")

    def _refused(self, message: str) -> None:
        self._retry_s = self._now_s + RETRY_S
        if self._write_error is None:
            self._write_error = message
            self._say(f"the shared KV store takes no blocks; serving goes on without adding to it: {message}")

    def poll(self, now_s: float) -> None:
        """Look at how the store does. now_s: by the owner's clock."""
        self._now_s = now_s
        lane = self._moves.stats[FETCH]
        if not (lane.queued and self._was_reading) or lane.num_moves != self._num_fetched:
            self._progress_s = now_s
        self._was_reading, self._num_fetched = lane.queued > 0, lane.num_moves
        is_stuck = now_s - self._progress_s > STUCK_S
        trouble = f"a read takes longer than {STUCK_S:.0f} s" if is_stuck else self._view.trouble
        if (trouble is None) != (self._trouble is None):
            self._say("the shared KV store is back" if trouble is None else
                      f"the shared KV store is away; serving goes on without it: {trouble}")
        self._trouble = trouble

    def close(self) -> None:
        """Stop following the store."""
        self._view.close()
