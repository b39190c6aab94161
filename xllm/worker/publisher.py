"""`Publisher`: sends KV blocks of this rank to other instances, layer by layer as a step computes them."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from xllm.errors import TransferError
from xllm.kv.moves import NO_TICKET, Move, MoveDone, MoveError, error_of
from xllm.kv.tickets import Ticket, TicketBoard
from xllm.kv_offer import KVOffer, RankWindow
from xllm.runner.kv_reader import KVReader
from xllm.transfer.way import Way

# While a window is not tried again that was not reached; what is to go there fails at once. Chosen: as long as a peer
# waits for its window, so that many moves that wait for one that is gone take as long as one, and free their blocks.
AWAY_S = 10.0
# Behind the last move to a window, for the thread and the connection to be kept. Chosen: far more than between two
# requests of a busy cluster. An instance that starts again has another window: nothing goes to the old one any more.
IDLE_S = 60.0
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Sending:
    """One move on its way. ticket: None: its blocks are complete."""

    move: Move
    offer: KVOffer
    ticket: Ticket | None
    arrived_s: float
    error: MoveError | None = None


class Destination(threading.Thread):
    """Sends to one other instance. Moves of one step go together: a layer of each, then the next layer."""

    def __init__(self, reader: KVReader, windows: tuple[RankWindow, ...], report: Callable[[MoveDone], None]):
        super().__init__(name="xllm-kv-publish", daemon=True)
        self._reader, self._windows, self._report = reader, windows, report
        self._ways: list[Way] | None = None
        self._queue: queue.SimpleQueue[_Sending | None] = queue.SimpleQueue()
        self._next: _Sending | None = None  # taken from the queue, of a later step
        self._away, self._away_until_s = "", 0.0  # why the window was not reached
        self._num_added = self._num_told = 0  # each written by one thread: that which adds, and this one
        self._told_s = time.monotonic()
        self.start()

    def add(self, sending: _Sending) -> None:
        """Send this after all that was added before it."""
        self._num_added += 1
        self._queue.put(sending)

    def is_idle(self, now_s: float) -> bool:
        """Whether nothing has been sent for `IDLE_S`, as told to the thread that adds."""
        return self._num_told == self._num_added and now_s - self._told_s > IDLE_S

    def end(self) -> None:
        """End after what is being sent; what waits is dropped."""
        self._queue.put(None)

    def run(self) -> None:
        """Send group after group until told to stop."""
        while (first := self._next or self._queue.get()) is not None:
            self._next = None
            group = self._group(first)
            self._send(group)
            for sending in group:
                self._tell(sending)
        for way in self._ways or ():
            way.close()

    def _group(self, first: _Sending) -> list[_Sending]:
        """`first` and what follows it of the same step: all of it is here before the step begins."""
        group = [first]
        if first.ticket is not None:
            first.ticket.wait_any()
        while first.ticket is not None and not self._queue.empty():
            self._next = self._queue.get()
            if self._next is None or self._next.ticket is not first.ticket:
                if self._next is None:
                    self._queue.put(None)
                break
            group.append(self._next)
            self._next = None
        return group

    def _send(self, group: list[_Sending]) -> None:
        for layer in range(self._reader.num_layers):
            for sending in group:
                if sending.error is None and len(sending.move.sources):
                    self._try(sending, self._send_layer, layer)
        for sending in group:
            if sending.move.is_last or sending.error is not None:
                self._try(sending, self._finish)

    def _try(self, sending: _Sending, act: Callable[..., None], *arguments: int) -> None:
        try:
            act(sending, *arguments)
        except Exception as error:
            if not isinstance(error, TransferError):
                _log.exception("KV blocks could not be sent")
            sending.error = sending.error or error_of(sending.move.lane, error)
            for way in self._ways or ():  # in whichever state they are
                way.close()

    def _send_layer(self, sending: _Sending, layer: int) -> None:
        move, offer = sending.move, sending.offer
        if sending.ticket is not None:
            sending.ticket.wait(layer)
        ways = self._reached()
        if ways:
            layer_BX = self._reader.read(move.sources, layer, ways[0].layout)
            for way in ways:
                way.put(offer, int(move.targets[0]), layer, layer_BX)

    def _finish(self, sending: _Sending) -> None:
        for way in self._reached():
            way.finish(sending.offer)

    def _reached(self) -> list[Way]:
        """The ways that have a share, connected. Raises TransferError, at once if it was raised lately."""
        if time.monotonic() < self._away_until_s:
            raise TransferError(self._away)
        ways = [way for way in self._connected() if way.relay.shares]
        try:
            for way in ways:
                way.connect()
        except TransferError as error:
            self._away, self._away_until_s = str(error), time.monotonic() + AWAY_S
            raise
        return ways

    def _connected(self) -> list[Way]:
        if self._ways is None:
            layout = self._reader.layout_like(self._windows[0].layout)
            self._ways = [Way(layout, window) for window in self._windows]
        return self._ways

    def _tell(self, sending: _Sending) -> None:
        now_s, move = time.monotonic(), sending.move
        num_done = 0 if sending.error is not None else len(move.sources)
        self._report(MoveDone(move.number, num_done, now_s - sending.arrived_s, now_s - sending.arrived_s,
                              sending.error))
        self._told_s, self._num_told = now_s, self._num_told + 1


class Publisher:
    """`begin` and `close` are called by the thread that receives the moves, in their order. board: tickets of steps
    that fill blocks; the runner advances them."""

    def __init__(self, reader: KVReader, board: TicketBoard, report: Callable[[MoveDone], None]):
        self._reader, self._board, self._report = reader, board, report
        self._destinations: dict[tuple[tuple[str, ...], ...], Destination] = {}  # by their addresses
        self._ending: list[Destination] = []

    def begin(self, move: Move) -> None:
        """Send the blocks of a move once they are computed. The step that computes them comes later."""
        assert move.offer is not None
        windows = move.offer.windows
        name, ticket = tuple(window.addresses for window in windows), None
        if move.ticket != NO_TICKET:
            if move.ticket not in self._board:
                self._board.open(move.ticket, self._reader.num_layers)
            ticket = self._board[move.ticket]
        if name not in self._destinations:
            self._end_idle()
            self._destinations[name] = Destination(self._reader, windows, self._report)
        self._destinations[name].add(_Sending(move, move.offer, ticket, time.monotonic()))

    def _end_idle(self) -> None:
        """Keep no thread for windows to which nothing goes any more."""
        now_s = time.monotonic()
        for name in [name for name, one in self._destinations.items() if one.is_idle(now_s)]:
            self._ending.append(self._destinations.pop(name))
            self._ending[-1].end()
        self._ending = [one for one in self._ending if one.is_alive()]

    def close(self) -> None:
        """Let what is being sent end. No step is computed any more."""
        self._board.fail_all(TransferError("the worker ends"))
        for destination in self._destinations.values():
            destination.end()
        for destination in (*self._destinations.values(), *self._ending):
            destination.join()
        self._destinations.clear()
        self._ending.clear()
