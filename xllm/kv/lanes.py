"""`ThreadLanes`: threads that perform moves, one for each lane, the most urgent first, within a limit of bandwidth."""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from xllm.kv.moves import LANES, PATIENT, STORE_LANES, URGENT, Move, MoveDone, MoveError, error_of

_log = logging.getLogger(__name__)


class Performer(Protocol):
    """The part of `MovePerformer` that the lanes call."""

    def begin(self, move: Move) -> None: ...

    def run(self, move: Move) -> int: ...

    def close(self) -> None: ...


_Entry = tuple[int, int, float, Move]  # (priority, order of arrival, when, what)
_STOP_PRIORITY = -(2**62)  # before every move
# That the end waits for a move of the shared store. Chosen: far longer than one takes; the store may be a file server
# that is away, and its thread is then left behind.
STORE_CLOSE_S = 2.0


class ThreadLanes:
    """One thread for each lane, started with the first move; those of the shared store with their first.

    `send`, `set_foreground` and `close` are called by one thread. report: called with each move that has ended, in the
    thread that ran it. max_bytes_per_s: by lane name; a lane that is not listed runs as fast as it can. rides: while
    steps run, moves in `PATIENT` that no request waits for are not given to the lanes' threads; the computing thread
    runs them between two steps (`ride`). Where copies take the cores that compute, a second thread costs the steps far
    more than the copy does: all workers of an operator wait for the one that was interrupted (docs/performance.md).
    """

    def __init__(self, performer: Performer, report: Callable[[MoveDone], None],
                 max_bytes_per_s: dict[str, float] | None = None, *, rides: bool = False):
        self._performer, self._report = performer, report
        self._rides = rides
        self._foreground = False
        self._riding: deque[_Entry] = deque()
        self._limits = max_bytes_per_s or {}
        self._allowed_s = dict.fromkeys(LANES, 0.0)  # when a lane may begin its next move
        self._queues: dict[str, queue.PriorityQueue] = {name: queue.PriorityQueue() for name in LANES}
        self._order = itertools.count()
        self._stopping = threading.Event()
        self._threads: dict[str, threading.Thread] = {}

    def _start(self, lane: str) -> None:
        """Start the threads: at the first move, so that an engine without moves has none."""
        for name in (lane,) if lane in STORE_LANES else (name for name in LANES if name not in STORE_LANES):
            thread = threading.Thread(target=self._work, args=(name,), name=f"xllm-kv-{name}", daemon=True)
            thread.start()
            self._threads[name] = thread

    @property
    def foreground(self) -> bool:
        """Whether steps are running."""
        return self._foreground

    def set_foreground(self, steps_run: bool) -> None:
        """Say whether steps are running. When they end, the lanes' threads take over the moves that wait for `ride`."""
        self._foreground = steps_run
        while not steps_run and self._riding:
            try:
                entry = self._riding.popleft()
            except IndexError:  # the computing thread was faster
                return
            self._queues[entry[3].lane].put(entry)

    def send(self, move: Move) -> None:
        """Queue a move. The ticket of a load is open when this returns."""
        assert not self._stopping.is_set(), "the lanes are closed"
        if move.lane not in self._threads:
            self._start(move.lane)
        self._performer.begin(move)
        entry = (move.priority, next(self._order), time.monotonic(), move)
        if self._rides and self._foreground and move.lane in PATIENT and move.priority > URGENT:
            self._riding.append(entry)
        else:
            self._queues[move.lane].put(entry)

    @property
    def num_riding(self) -> int:
        """Moves that wait for `ride`."""
        return len(self._riding)

    def ride(self, budget_s: float) -> None:
        """Run waiting moves for about `budget_s` seconds, at least one if any is due. Called by the computing thread,
        between two steps."""
        until_s = time.monotonic() + budget_s
        while True:
            try:
                entry = self._riding.popleft()
            except IndexError:
                return
            if time.monotonic() < self._allowed_s[entry[3].lane]:
                self._riding.appendleft(entry)
                if not self._foreground:  # the steps ended meanwhile: it would wait for the next one
                    self.set_foreground(False)
                return
            self._run(entry)
            if time.monotonic() >= until_s:
                return

    def close(self) -> None:
        """Let the running moves end, drop the queued ones, stop the threads, and close the performer."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        for name, thread in self._threads.items():
            self._queues[name].put((_STOP_PRIORITY, next(self._order), 0.0, None))
            thread.join(STORE_CLOSE_S if name in STORE_LANES else None)
        self._threads.clear()
        self._performer.close()

    def _work(self, name: str) -> None:
        while True:
            entry = self._queues[name].get()
            if entry[3] is None or self._stopping.is_set():
                return
            self._stopping.wait(max(0.0, self._allowed_s[name] - time.monotonic()))
            self._run(entry)

    def _run(self, entry: _Entry) -> None:
        _, _, arrived_s, move = entry
        began_s, num_done, error = time.monotonic(), 0, None
        try:
            num_done = self._performer.run(move)
        except BaseException as raised:  # the engine decides what it means
            error = _told(move, raised)
        now_s, limit = time.monotonic(), self._limits.get(move.lane, 0.0)
        self._allowed_s[move.lane] = began_s + move.num_bytes / limit if limit else 0.0
        self._report(MoveDone(move.number, num_done, now_s - began_s, now_s - arrived_s, error))


def _told(move: Move, raised: BaseException) -> MoveError:
    """The error as data. Logs the traceback, unless the disk or the store raised it."""
    error = error_of(move.lane, raised)
    if error.kind == "device":
        _log.error("a move of KV blocks failed (%s)", move.lane, exc_info=raised)
    return error
