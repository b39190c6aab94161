"""`Departures`: requests whose KV is sent to another instance, where they go on once all of it is there.

Blocks are sent in the step that fills them, each layer as soon as it is computed. Meanwhile the request runs here as
any other: its first token is not delayed, and if the blocks cannot be sent it stays. Owned by the scheduler.
"""

from __future__ import annotations

import functools
import logging

import numpy as np

from xllm.kv.manager import KVManager
from xllm.kv.moves import NO_TICKET
from xllm.kv.outbox import Outbox
from xllm.kv_offer import KVOffer
from xllm.scheduler.row_table import RowTable
from xllm.sequence import SequenceState, Status

_log = logging.getLogger(__name__)


class Departure:
    """How far the KV of one request has got. num_tokens: of the request when this began; what comes after them is
    computed anew at the other instance. next_block, last_block: of its blocks, counted in those of this instance, the
    first that is not sent yet, and the one behind the last that will be. num_open: moves that have not ended."""

    __slots__ = ("last_block", "next_block", "num_open", "num_tokens", "offer")

    def __init__(self, offer: KVOffer, block_size: int, num_tokens: int):
        self.offer, self.num_tokens = offer, num_tokens
        self.last_block = num_tokens // block_size
        self.next_block = min(offer.first_block * offer.block_size // block_size, self.last_block)
        self.num_open = 0

    @property
    def is_sent(self) -> bool:
        """Whether everything is there."""
        return self.next_block == self.last_block and not self.num_open


class Departures:
    """outbox: None: nothing can be sent. num_left: requests that went on elsewhere; num_kept: those that stayed since
    their KV could not be sent."""

    def __init__(self, kv: KVManager, rows: RowTable):
        self.outbox: Outbox | None = None
        self._kv, self._rows = kv, rows
        self._open: dict[SequenceState, Departure] = {}
        self._kept: list[str] = []  # not told of yet
        self.num_left = self.num_kept = 0

    def __len__(self) -> int:
        return len(self._open)

    def begin(self, seq: SequenceState, offer: KVOffer) -> None:
        """Send the KV of a request to where `offer` says, from the next step on that computes it. Does nothing if it is
        leaving already."""
        assert self.outbox is not None
        if seq in self._open:
            return
        num_tokens = int(self._rows.known[seq.row]) if seq.status is Status.RUNNING else len(seq.token_ids)
        departure = self._open[seq] = Departure(offer, self._kv.block_size, num_tokens)
        if departure.is_sent:  # it has no full block that is missing there
            self._send(seq, departure, np.zeros(0, dtype=np.int32), NO_TICKET)

    def publish(self, step: int) -> int:
        """Begin to send the blocks that step `step`, just planned, fills; returns the ticket that its plan must name,
        or NO_TICKET. Called before the plan is submitted."""
        ticket = NO_TICKET
        for seq, departure in self._open.items():
            if seq.status is not Status.RUNNING or self._rows.last_step[seq.row] != step:
                continue
            block_ids = self._filled(seq.row, departure)
            if len(block_ids):
                assert self.outbox is not None
                ticket = ticket or self.outbox.new_ticket()
                self._send(seq, departure, block_ids, ticket)
        return ticket

    def _filled(self, row: int, departure: Departure) -> np.ndarray:
        """The row's blocks that are to be sent and will be full after the step. Drafts may be refused: they fill
        none."""
        table = self._rows
        num_full = int(min(table.cursor[row], table.known[row])) // self._kv.block_size
        return self._kv.blocks_of(row)[departure.next_block : min(num_full, departure.last_block)]

    def _send(self, seq: SequenceState, departure: Departure, block_ids: np.ndarray, ticket: int) -> None:
        assert self.outbox is not None
        first, departure.next_block = departure.next_block, departure.next_block + len(block_ids)
        departure.num_open += 1
        self.outbox.send(block_ids, first, departure.offer, functools.partial(self._sent, seq, departure),
                         ticket=ticket, is_last=departure.next_block == departure.last_block)

    def _sent(self, seq: SequenceState, departure: Departure, error: str | None) -> None:
        departure.num_open -= 1
        if error is not None and self._open.get(seq) is departure:
            del self._open[seq]
            self.num_kept += 1
            self._kept.append(seq.request_id)
            _log.warning("%s stays here: its KV could not be sent (%s)", seq.request_id, error)

    def take_kept(self) -> list[str]:
        """The ids of requests that were to leave and stay, since the last call."""
        kept, self._kept = self._kept, []
        return kept

    def take_sent(self) -> list[SequenceState]:
        """The running requests that go on elsewhere now: all their KV is there, and a token has come of them. They are
        tracked no longer."""
        sent = [seq for seq, departure in self._open.items()
                if departure.is_sent and seq.status is Status.RUNNING
                and self._rows.known[seq.row] > departure.num_tokens]
        for seq in sent:
            del self._open[seq]
        self.num_left += len(sent)
        return sent

    def forget(self, seq: SequenceState) -> None:
        """A request has ended here. What is on its way goes on; nothing more of it is sent."""
        departure = self._open.pop(seq, None)
        if departure is not None and departure.next_block < departure.last_block:
            assert self.outbox is not None
            self.outbox.send(np.zeros(0, dtype=np.int32), departure.next_block, departure.offer, lambda error: None,
                             is_last=True)
