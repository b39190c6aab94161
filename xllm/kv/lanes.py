"""`Lane`: worker threads that move KV bytes one way, the most urgent first, within a bandwidth.

Bookkeeping stays with the thread that owns the KV manager: a worker only runs `Job.run`, and what
follows from it (`Job.finish`) is called by the owner from `Lanes.poll`. No lock is held across a copy.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections import deque
from typing import Protocol

from xllm.errors import DeviceError

RATE_WEIGHT = 0.2  # of the newest job in a lane's running bandwidth
SAVE, LOAD, WRITE, READ = "save", "load", "write", "read"  # device -> host, host -> device, host -> disk, disk -> host
LANES = (SAVE, LOAD, WRITE, READ)
PATIENT = (SAVE, WRITE)  # nobody waits for these, unless their priority says so
URGENT = 0  # priority of moves that somebody waits for; lower goes first


class Job(Protocol):
    """A move. `num_bytes`: its size. Lower `priority` goes first."""

    lane: str
    num_bytes: int
    priority: int

    def run(self) -> None:
        """Move the bytes; in a worker thread, so it touches no bookkeeping. May raise."""
        ...

    def finish(self, error: BaseException | None) -> None:
        """It has run (or raised `error`); in the owner's thread."""
        ...


class LaneStats:
    """Totals of one lane since the start; `bytes_per_s` is a running mean of how fast jobs ran."""

    __slots__ = ("busy_s", "bytes_per_s", "num_bytes", "num_jobs", "queued", "wait_s")

    def __init__(self) -> None:
        self.num_jobs = 0
        self.num_bytes = 0
        self.busy_s = 0.0  # running
        self.wait_s = 0.0  # from submit to the end
        self.queued = 0  # submitted and not finished
        self.bytes_per_s = 0.0

    def count(self, num_bytes: int, busy_s: float, wait_s: float) -> None:
        self.num_jobs += 1
        self.num_bytes += num_bytes
        self.busy_s += busy_s
        self.wait_s += wait_s
        self.queued -= 1
        rate = num_bytes / max(busy_s, 1e-9)
        self.bytes_per_s += (rate - self.bytes_per_s) * (RATE_WEIGHT if self.bytes_per_s else 1.0)


_Done = tuple[Job, BaseException | None, float, float]
_Entry = tuple[int, int, float, Job]  # (priority, order of submission, when, what)


class Lanes(Protocol):
    """All lanes of one engine. Every method belongs to the owner's thread."""

    stats: dict[str, LaneStats]
    foreground: bool  # steps are running: what nobody waits for goes slowly

    def submit(self, job: Job) -> None: ...

    def poll(self) -> int:
        """Finish the jobs that have run; returns how many."""
        ...

    def wait(self, timeout_s: float) -> bool:
        """Sleep until a job has run or the time is over; whether `poll` has something to do."""
        ...

    @property
    def num_open(self) -> int:
        """Jobs submitted and not finished."""
        ...

    def close(self) -> None:
        """Let the running jobs end, drop the queued ones, stop the threads."""
        ...


class ThreadLanes:
    """One thread for each lane.

    max_bytes_per_s: by lane name; a lane that is not listed runs as fast as it can. rides: while steps run
    (`foreground`), moves in `PATIENT` that nobody waits for are not given to the lanes' threads but run by the thread
    that computes, between two steps (`ride`). Where copies take the very cores that compute, a second thread costs
    the steps far more than the copy does: all workers of an operator wait for the one that was interrupted.
    """

    def __init__(self, max_bytes_per_s: dict[str, float] | None = None, *, rides: bool = False):
        self.stats = {name: LaneStats() for name in LANES}
        self._rides = rides
        self._foreground = False
        self._riding: deque[_Entry] = deque()
        self._limits = max_bytes_per_s or {}
        self._allowed_s = dict.fromkeys(LANES, 0.0)  # when a lane may begin its next job
        self._done: queue.SimpleQueue[_Done] = queue.SimpleQueue()
        self._ready: deque[_Done] = deque()  # taken from _done by `wait`
        self._queues: dict[str, queue.PriorityQueue] = {name: queue.PriorityQueue() for name in LANES}
        self._order = itertools.count()
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []

    def _start(self) -> None:
        """At the first job, so that an engine without moves has no threads."""
        for name in LANES:
            thread = threading.Thread(target=self._work, args=(name,), name=f"xllm-kv-{name}", daemon=True)
            thread.start()
            self._threads.append(thread)

    @property
    def num_open(self) -> int:
        return sum(stats.queued for stats in self.stats.values())

    @property
    def foreground(self) -> bool:
        return self._foreground

    @foreground.setter
    def foreground(self, steps_run: bool) -> None:
        self._foreground = steps_run
        while not steps_run and self._riding:
            try:
                entry = self._riding.popleft()
            except IndexError:  # the computing thread was faster
                return
            self._queues[entry[3].lane].put(entry)

    def submit(self, job: Job) -> None:
        assert not self._stopping.is_set(), "the lanes are closed"
        if not self._threads:
            self._start()
        self.stats[job.lane].queued += 1
        entry = (job.priority, next(self._order), time.monotonic(), job)
        if self._rides and self._foreground and job.lane in PATIENT and job.priority > URGENT:
            self._riding.append(entry)
        else:
            self._queues[job.lane].put(entry)

    @property
    def num_riding(self) -> int:
        """Moves that wait for `ride`."""
        return len(self._riding)

    def ride(self, budget_s: float) -> None:
        """Run moves for about that long, at least one. Called by the thread that computes, between two steps."""
        until_s = time.monotonic() + budget_s
        while True:
            try:
                entry = self._riding.popleft()
            except IndexError:
                return
            if time.monotonic() < self._allowed_s[entry[3].lane]:
                self._riding.appendleft(entry)
                return
            self._run(entry)
            if time.monotonic() >= until_s:
                return

    def poll(self) -> int:
        count = 0
        while True:
            if self._ready:
                done = self._ready.popleft()
            else:
                try:
                    done = self._done.get_nowait()
                except queue.Empty:
                    return count
            job, error, busy_s, wait_s = done
            self.stats[job.lane].count(job.num_bytes, busy_s, wait_s)
            job.finish(error)
            count += 1

    def wait(self, timeout_s: float) -> bool:
        if not self._ready:
            try:
                self._ready.append(self._done.get(timeout=timeout_s))
            except queue.Empty:
                return False
        return True

    def close(self) -> None:
        self._stopping.set()
        for name, thread in zip(LANES, self._threads):
            self._queues[name].put((-(2**62), next(self._order), 0.0, None))
            thread.join()
        self._threads.clear()

    def _work(self, name: str) -> None:
        while True:
            entry = self._queues[name].get()
            if entry[3] is None or self._stopping.is_set():
                return
            self._stopping.wait(max(0.0, self._allowed_s[name] - time.monotonic()))
            self._run(entry)

    def _run(self, entry: _Entry) -> None:
        _, _, submitted_s, job = entry
        began, error = time.monotonic(), None
        try:
            job.run()
        except BaseException as raised:  # the owner decides what it means
            error = raised
        now, limit = time.monotonic(), self._limits.get(job.lane, 0.0)
        self._allowed_s[job.lane] = began + job.num_bytes / limit if limit else 0.0
        self._done.put((job, error, now - began, now - submitted_s))


class Ticket:
    """How far a load has come: layer l may be read once `wait(l)` returns. A worker writes it, the runner reads."""

    __slots__ = ("_condition", "_error", "_layers_done", "num_layers", "ticket_id")

    def __init__(self, ticket_id: int, num_layers: int):
        self.ticket_id = ticket_id
        self.num_layers = num_layers
        self._layers_done = 0
        self._error: BaseException | None = None
        self._condition = threading.Condition()

    @property
    def layers_done(self) -> int:
        return self._layers_done

    def advance(self) -> None:
        """One more layer has arrived."""
        with self._condition:
            self._layers_done += 1
            self._condition.notify_all()

    def fail(self, error: BaseException) -> None:
        """The rest will not come."""
        with self._condition:
            self._error = error
            self._condition.notify_all()

    def wait(self, layer: int) -> None:
        """Block until layer `layer` (from 0) has arrived. Raises DeviceError if it never will."""
        if self._layers_done <= layer:
            with self._condition:
                self._condition.wait_for(lambda: self._layers_done > layer or self._error is not None)
        if self._layers_done <= layer:
            raise DeviceError("KV could not be copied to the device") from self._error


class TicketBoard:
    """The tickets of loads that have not ended, by number: the owner's thread opens and closes them, the runner waits.

    A number that is not listed belongs to a load that is complete.
    """

    def __init__(self) -> None:
        self._tickets: dict[int, Ticket] = {}
        self._next_id = 1

    def open(self, num_layers: int) -> Ticket:
        ticket = self._tickets[self._next_id] = Ticket(self._next_id, num_layers)
        self._next_id += 1
        return ticket

    def close(self, ticket: Ticket) -> None:
        del self._tickets[ticket.ticket_id]

    def __contains__(self, ticket_id: int) -> bool:
        return ticket_id in self._tickets

    def tickets(self, ticket_ids: tuple[int, ...]) -> list[Ticket]:
        """Those of the numbers that are still open."""
        found = (self._tickets.get(ticket_id) for ticket_id in ticket_ids)
        return [ticket for ticket in found if ticket is not None]
