"""`Running`: the sequences that own a row and compute, in the order in which they are served."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator

import numpy as np

from xllm.errors import IntegrityError
from xllm.kv.manager import KVManager
from xllm.scheduler.policy import Key
from xllm.scheduler.row_table import RowTable
from xllm.sequence import SequenceState, Status


class Running:
    """Keeps the order of service, and releases blocks and row of a sequence that leaves it. Owned by the scheduler.

    A sequence leaves in two steps: `leave` releases its blocks at once, `release` frees its row when no step in flight
    uses the row any longer.
    """

    def __init__(self, key: Callable[[SequenceState], Key], rows: RowTable, kv: KVManager, clock: Callable[[], float]):
        self._key, self._table, self._kv, self.clock = key, rows, kv, clock
        self._entries: list[tuple[Key, int]] = []  # (key, row), sorted
        self._rows: np.ndarray | None = None  # those rows; None: make it anew
        self._released: list[int] = []
        self.num_changes = 0  # sequences that entered or left since the start

    def __len__(self) -> int:
        return len(self._entries)

    def rows(self) -> np.ndarray:
        """The rows in order: int64, valid until a sequence enters or leaves, not to be written to."""
        if self._rows is None:
            self._rows = np.array([row for _, row in self._entries], dtype=np.int64)
        return self._rows

    def last_first(self) -> Iterator[int]:
        """The rows, the one that is served last first. Invalid after the next `enter` or `leave`."""
        return (row for _, row in reversed(self._entries))

    def enter(self, seq: SequenceState) -> None:
        """Add a sequence, which has its row, to the order of service."""
        bisect.insort(self._entries, (self._key(seq), seq.row))
        self._changed()

    def leave(self, seq: SequenceState, *, commit: bool = True, used: bool = True, swap: bool = False,
              ended_well: bool = False) -> None:
        """Take a sequence out of the order and release its blocks. commit: make those that are full findable first.
        used: count this as a use of them (not for a preempted sequence). swap: have them copied to host memory, for a
        preempted sequence. ended_well: the request ended normally, and its conversation may go on."""
        at = bisect.bisect_left(self._entries, (self._key(seq), seq.row))
        assert self._entries[at][1] == seq.row
        del self._entries[at]
        self._changed()
        if commit:
            self.commit(seq.row)
        if ended_well:
            self._kv.turn_ended(seq.session_key, seq.row, self.clock)
        self._kv.leave(seq.row, int(self._table.last_step[seq.row]), used=used, swap=swap)

    def _changed(self) -> None:
        self._rows = None
        self.num_changes += 1

    def commit(self, row: int) -> None:
        """Make the row's full blocks findable, if prefix caching is on. KV beyond the last known token, which there is
        if a stop token was among accepted drafts, is left out."""
        if self._kv.enable_prefix_caching:
            num_tokens = int(min(self._table.computed[row], self._table.known[row]))
            self._kv.commit(row, self._table.token_ids[row], num_tokens, int(self._table.last_step[row]))

    def release(self, row: int) -> None:
        """Free the row, and note it for the next plan. Its owner has left, and no step in flight uses it."""
        seq = self._table.seqs[row]
        assert seq is not None
        seq.row = -1
        self._table.leave(row)
        self._released.append(row)

    def take_released(self) -> tuple[int, ...]:
        """The rows released since the last call."""
        released, self._released = tuple(self._released), []
        return released

    def check_integrity(self) -> None:
        """Raise IntegrityError if the order, the rows and their owners disagree."""
        table = self._table
        if self._entries != sorted(self._entries):
            raise IntegrityError("the service order is not sorted")
        for _, row in self._entries:
            seq = table.seqs[row]
            if seq is None or seq.status is not Status.RUNNING or seq.row != row:
                raise IntegrityError(f"row {row} is served but its owner does not run")
            if not table.computed[row] < table.known[row] <= table.upper[row] <= table.limit[row]:
                raise IntegrityError(f"row {row}: counters out of order")
            if not table.computed[row] <= table.cursor[row] < table.upper[row]:
                raise IntegrityError(f"row {row}: cursor out of order")
            if self._kv.num_blocks_R[row] * self._kv.block_size < table.cursor[row]:
                raise IntegrityError(f"row {row}: tokens planned beyond its blocks")
