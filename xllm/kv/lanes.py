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
PACED = (SAVE, WRITE)  # nobody waits for these
URGENT = 0  # priority of moves that somebody does wait for; larger ones may be paced
MAX_PAUSE_S = 0.02  # of a paced lane, so that it is soon back when steps end or something urgent comes


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


class Pace:
    """When a lane may begin its next job."""

    def __init__(self, max_bytes_per_s: float, busy_share: float):
        """max_bytes_per_s: 0 for no limit. busy_share: of the time, for polite jobs."""
        self._max_bytes_per_s, self._busy_share = max_bytes_per_s, busy_share
        self._any_s = self._polite_s = 0.0

    def ran(self, began_s: float, ended_s: float, num_bytes: int) -> None:
        """A job ran."""
        self._any_s = began_s + num_bytes / self._max_bytes_per_s if self._max_bytes_per_s else 0.0
        self._polite_s = began_s + min(MAX_PAUSE_S, (ended_s - began_s) / self._busy_share)

    def next_s(self, is_polite: bool) -> float:
        """The earliest time for a job; polite: nobody waits for it, and steps run."""
        return max(self._any_s, self._polite_s) if is_polite else self._any_s


class ThreadLanes:
    """One thread for each lane.

    max_bytes_per_s: by lane name; a lane that is not listed runs as fast as it can. busy_share: how much of the time
    a lane in `PACED` may work while steps run (`foreground`); 1: no limit. Where copies take the cores that compute,
    a smaller share keeps them from stalling the steps.
    """

    def __init__(self, max_bytes_per_s: dict[str, float] | None = None, busy_share: float = 1.0):
        self.foreground = False
        self._busy_share = busy_share
        self.stats = {name: LaneStats() for name in LANES}
        self._limits = max_bytes_per_s or {}
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

    def submit(self, job: Job) -> None:
        assert not self._stopping.is_set(), "the lanes are closed"
        if not self._threads:
            self._start()
        self.stats[job.lane].queued += 1
        self._queues[job.lane].put((job.priority, next(self._order), time.monotonic(), job))

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
        pace = Pace(self._limits.get(name, 0.0), self._busy_share)
        while True:
            _, _, submitted_s, job = self._queues[name].get()
            if job is None or self._stopping.is_set():
                return
            is_polite = self.foreground and name in PACED and job.priority > URGENT
            self._stopping.wait(max(0.0, pace.next_s(is_polite) - time.monotonic()))
            began, error = time.monotonic(), None
            try:
                job.run()
            except BaseException as raised:  # the owner decides what it means
                error = raised
            now = time.monotonic()
            pace.ran(began, now, job.num_bytes)
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
