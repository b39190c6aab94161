"""`Passage`: copies the rest of a path to disk when host memory has room for its beginning only.

A sequence may be longer than host memory. Its beginning is saved as every path is and stays in host memory; the rest
goes, a chunk at a time, through host slots that are free again as soon as their contents are on disk.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from xllm.kv import failpoints
from xllm.kv.demotion import CHUNK_BYTES, MAX_CHUNK_BLOCKS, MAX_QUEUED_PATHS, Path
from xllm.kv.moves import SAVE, WRITE, MoveDone, MoveError, OpenMoves
from xllm.kv.origins import DeviceOrigin
from xllm.kv.tier_index import NO_SLOT, TierIndex


@dataclass(slots=True)
class Rest:
    """The blocks of `path` after its first `done`, which are still to be written to disk. slots: the disk slots of the
    first `done` blocks, held there; None before the passage has begun it. host_slots: those that the chunk under way
    uses."""

    path: Path
    done: int
    slots: np.ndarray | None = None
    host_slots: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int32))


class Passage:
    """Copies device blocks to disk, one path at a time, one chunk at a time. Belongs to the KV manager's thread."""

    def __init__(self, origin: DeviceOrigin, host: TierIndex, disk: TierIndex, moves: OpenMoves,
                 on_error: Callable[[MoveError], None], is_writing: Callable[[], bool]):
        """is_writing: whether paths are still being written from host memory to disk; the beginning of a rest may be
        among them. on_error: called with the reason when a copy fails."""
        self._origin, self._host, self._disk, self._moves = origin, host, disk, moves
        self._on_error, self._is_writing = on_error, is_writing
        self._queue: deque[Rest] = deque()
        self._active: Rest | None = None
        self._chunk = max(1, min(MAX_CHUNK_BLOCKS, CHUNK_BYTES // moves.payload_bytes))
        self.num_written = 0
        self.num_cut = 0  # blocks that did not get there
        self._disabled = False

    @property
    def is_idle(self) -> bool:
        return self._active is None and not self._queue

    @property
    def open_rests(self) -> list[Rest]:
        return [*self._queue, *([] if self._active is None else [self._active])]

    def add(self, path: Path, done: int) -> None:
        """Queue the blocks after the first `done` of a path; those first ones are on disk or on their way there."""
        rest = Rest(path, done)
        if self._disabled or len(self._queue) >= MAX_QUEUED_PATHS:
            self._end(rest)
            return
        self._queue.append(rest)
        self.pump()

    def disable(self) -> None:
        """Stop writing for good, because the disk has failed: drop all queued rests, refuse new ones."""
        self._disabled = True
        while self._queue:
            self._end(self._queue.popleft())

    def pump(self) -> None:
        """Begin or continue the rest at the head of the queue, until it must wait. Called whenever a move has ended."""
        while True:
            if self._active is None and (not self._queue or not self._begin(self._queue[0])):
                return
            rest = self._active
            if rest is None:
                continue  # it was refused
            if len(rest.host_slots):
                return  # a chunk is under way
            if not self._submit(rest):
                return

    def _begin(self, rest: Rest) -> bool:
        """Make a rest the active one and hold its beginning on disk, or drop it if that was lost. Returns False if the
        beginning is still being written."""
        disk, digests = self._disk, rest.path.digests
        known = 0
        while known < len(digests) and disk.find(digests[known]) != NO_SLOT:
            known += 1
        if known < rest.done and self._is_writing():
            return False
        self._queue.popleft()
        if known < rest.done:
            self._end(rest)
            return True
        rest.slots = np.array([disk.find(digest) for digest in digests[:known]], dtype=np.int32)
        rest.done = known
        disk.hold(rest.slots)
        self._active = rest
        return True

    def _submit(self, rest: Rest) -> bool:
        """Submit the next chunk, or end the rest. Returns False if it waits for a host slot that a move under way may
        free."""
        first = rest.done
        last = min(first + self._chunk, len(rest.path.items))
        items, digests = rest.path.items[first:last], rest.path.digests[first:last]
        num = 0 if self._disabled else self._origin.take(items, digests)
        slots = self._host.reserve(num)
        self._origin.give_back(items[len(slots) : num])
        is_coming = num < len(items) and self._origin.is_coming(int(items[num]), digests[num])
        if not len(slots):
            if (num or is_coming) and not self._disabled and len(self._moves):
                return False
            self._active = None
            self._end(rest)
            return True
        rest.host_slots = slots
        items = items[: len(slots)]
        self._moves.submit(SAVE, rest.path.priority, items, slots, functools.partial(self._saved, rest, items))
        return True

    def _saved(self, rest: Rest, items: np.ndarray, done: MoveDone) -> None:
        """Take in the end of a save: write the chunk on to disk, or end the rest if that cannot be."""
        self._origin.give_back(items)
        slots = np.zeros(0, dtype=np.int32)
        if done.error is not None:
            self._on_error(done.error)
        else:
            slots = self._disk.reserve(len(items))
        if not len(slots):  # the disk is full
            self._finish(rest)
            return
        first = rest.done
        last = first + len(slots)
        names = rest.path.names(first, last)
        written = functools.partial(self._written, rest, slots, names[0], full=len(slots) == len(items))
        self._moves.submit(WRITE, rest.path.priority, rest.host_slots[: len(slots)], slots, written,
                           digests=names[0], parents=names[1])

    def _written(self, rest: Rest, slots: np.ndarray, digests: tuple[bytes, ...], done: MoveDone, *,
                 full: bool) -> None:
        """Take in the end of a write: publish the chunk, then go on with the next or end the rest."""
        assert rest.slots is not None
        if done.error is not None:
            self._disk.abandon(slots)
            self._on_error(done.error)
            self._finish(rest)
            return
        num = len(slots)
        slots = self._disk.publish(slots, digests, int(rest.slots[-1]) if rest.done else NO_SLOT)
        rest.slots = np.concatenate((rest.slots, slots))
        rest.done += len(slots)
        self.num_written += len(slots)
        if failpoints.armed is not None:
            failpoints.hit("tier.published")
        if not full or len(slots) < num or rest.done == len(rest.path.items):
            self._finish(rest)
            return
        self._host.abandon(rest.host_slots)
        rest.host_slots = np.zeros(0, dtype=np.int32)
        self.pump()

    def _finish(self, rest: Rest) -> None:
        """End the active rest and begin the next one."""
        self._host.abandon(rest.host_slots)
        self._active = None
        self._end(rest)
        self.pump()

    def _end(self, rest: Rest) -> None:
        if rest.slots is not None:
            self._disk.let_go(rest.slots)
            self._disk.use(rest.slots)
        self.num_cut += len(rest.path.items) - rest.done
        self._origin.end_lease(rest.path)
