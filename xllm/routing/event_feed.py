"""`EventFeed`: keeps a `GlobalIndex` true to what one instance says, whatever is lost, repeated or late on the way.

A batch is applied if its number follows the last one. One that is older is a repetition, unless it was written later:
then the instance has been started anew, and counts from the beginning (vLLM; ours never goes back). Any other number is
a gap: the instance is asked for a replay from the batch that is missing. What comes back either goes on from there, or
stands for all that there is. A replay of ours that has a gap itself has lost a batch on its way: then all is asked for,
which is one batch. Without somebody to ask, a gap costs all that is known of the instance: a block may be missing from
the index, but it must not be in there when it has gone.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import msgspec
import numpy as np

from xllm.kv.event_wire import (
    INCARNATION_SHIFT,
    AllBlocksCleared,
    BlockStored,
    EventBatch,
    KVEvent,
    decode,
    number_of,
    tier_of,
)
from xllm.routing.global_index import GlobalIndex, TierChange, checked_keys

_NO_KEYS = np.zeros(0, dtype=np.uint64)


class Reader(Protocol):
    """What an instance's events mean in our keys."""

    num_unread: int  # blocks that have no key here
    replays_all: bool  # a replay has no gap: where the first missing batch is not kept, one batch clears and stores all

    def read(self, event: KVEvent) -> Iterable[TierChange]:
        """The change that an event is; never called with `AllBlocksCleared`."""
        ...

    def clear(self) -> None:
        """The instance has no blocks any more."""
        ...


class OwnReader:
    """Of an instance of ours, whose hashes are our keys."""

    replays_all = True

    def __init__(self) -> None:
        self.num_unread = 0

    def read(self, event: KVEvent) -> Iterable[TierChange]:
        """See `Reader.read`."""
        assert not isinstance(event, AllBlocksCleared)
        tier = tier_of(event.medium)
        if tier is None:
            self.num_unread += len(event.block_hashes)
            return ()
        keys = checked_keys(np.array([number_of(block) for block in event.block_hashes], dtype=np.uint64))
        return (change_of(event, tier, keys),)

    def clear(self) -> None:
        """See `Reader.clear`."""


def change_of(event: KVEvent, tier: int, keys: np.ndarray) -> TierChange:
    """The change that a BlockStored or BlockRemoved of blocks with these keys is."""
    return TierChange(tier, keys) if isinstance(event, BlockStored) else TierChange(tier, _NO_KEYS, keys)


class EventFeed:
    """can_replay: whether there is somebody to ask; then the owner does so while `is_behind`: it sends `start`, gives
    `take_replayed` what comes back and calls `end_replay` behind it. Not thread-safe."""

    def __init__(self, index: GlobalIndex, name: str, reader: Reader, *, can_replay: bool = True):
        self._index, self._name, self._reader, self._can_replay = index, name, reader, can_replay
        self._last: int | None = None  # the number of the last batch that was applied
        self._last_ts = 0.0
        self.is_behind = can_replay
        self.block_size: int | None = None  # tokens of the block that was stored last
        self._is_torn = False  # the replay that comes has lost a batch
        self.num_batches = self.num_gaps = self.num_repeated = self.num_broken = 0
        index.forget(name)

    @property
    def start(self) -> int:
        """The first batch that is missing."""
        return 0 if self._last is None else self._last + 1

    def take(self, number: int, payload: bytes) -> None:
        """A batch as it was published."""
        if (batch := self._decoded(payload)) is None:
            self._miss()
        elif self._last is None:
            if self._can_replay:
                self.is_behind = True
            else:
                self._apply(number, batch)
        elif number == self._last + 1:
            self._apply(number, batch)
        elif self._is_repeated(number, batch):
            self.num_repeated += 1
        else:
            if number <= self._last and self._is_of_last_start(number):
                self._forget()  # it counts from the beginning
            self._miss()
            if not self._can_replay:
                self._apply(number, batch)

    def take_replayed(self, number: int, payload: bytes) -> None:
        """A batch of a replay."""
        if self._is_torn:
            return
        batch, is_next = self._decoded(payload), self._last is not None and number == self._last + 1
        if batch is not None and self._last is not None and not is_next and self._is_repeated(number, batch):
            self.num_repeated += 1
        elif self._reader.replays_all and (batch is None or not (is_next or _clears(batch))):
            self._tear()
        elif batch is not None:  # of vLLM's, one that is torn is asked for again, once the gap is seen
            if self._last is not None and not is_next:
                self._forget()  # what is between has been dropped there, or is in this one
            self._apply(number, batch)

    def end_replay(self) -> None:
        """All that there was to a replay has come."""
        self.is_behind, self._is_torn = self._is_torn, False

    def ask_again(self) -> None:
        """Nothing has come for a while, or a replay was cut off: the last batch may have been lost."""
        self.is_behind = self._can_replay

    def _is_repeated(self, number: int, batch: EventBatch) -> bool:
        assert self._last is not None
        return number <= self._last and batch.ts <= self._last_ts and self._is_of_last_start(number)

    def _is_of_last_start(self, number: int) -> bool:
        """Whether the instance has not been started anew between the last batch and this one. vLLM's numbers do not
        say; then it looks as if it had not."""
        assert self._last is not None
        return number >> INCARNATION_SHIFT == self._last >> INCARNATION_SHIFT

    def _decoded(self, payload: bytes) -> EventBatch | None:
        try:
            return decode(payload)
        except msgspec.DecodeError:
            self.num_broken += 1
            return None

    def _miss(self) -> None:
        """A batch is missing."""
        self.num_gaps += 1
        if self._can_replay:
            self.is_behind = True
        else:
            self._forget()

    def _tear(self) -> None:
        """A batch of a replay is missing: with the next one, all is asked for."""
        self.num_gaps += 1
        self._is_torn = self._last is not None  # if that was for all, silence asks again
        self._forget()

    def _forget(self) -> None:
        self._index.forget(self._name)
        self._reader.clear()
        self._last = None

    def _apply(self, number: int, batch: EventBatch) -> None:
        for event in batch.events:
            if isinstance(event, AllBlocksCleared):
                self._index.forget(self._name)
                self._reader.clear()
            else:
                self._index.change(self._name, self._reader.read(event))
                if isinstance(event, BlockStored) and event.group_idx in (None, 0):
                    self.block_size = event.block_size
        self._last, self._last_ts = number, batch.ts
        self.num_batches += 1


def _clears(batch: EventBatch) -> bool:
    """Whether it stands for all that there is."""
    return bool(batch.events) and isinstance(batch.events[0], AllBlocksCleared)
