"""`ThreadLanes`, `Ticket` and `TicketBoard` with real threads. Order is made by gates, not by sleeping."""

import threading
import time

import pytest

from xllm.errors import DeviceError
from xllm.kv.lanes import (
    LANES,
    LOAD,
    READ,
    SAVE,
    URGENT,
    WRITE,
    LaneStats,
    ThreadLanes,
    Ticket,
    TicketBoard,
)

LONG_S = 20.0  # a test that waits so long has failed


class Job:
    """Waits at `gate` if it has one, then notes its name. `finished` is what `finish` was told, and by whom."""

    def __init__(self, lane=SAVE, *, name="", priority=0, num_bytes=1, gate=None, error=None, ran=None, begun=None):
        self.lane, self.name, self.priority, self.num_bytes = lane, name, priority, num_bytes
        self._gate, self._error = gate, error
        self._ran = [] if ran is None else ran
        self.begun = begun or threading.Event()
        self.thread = None
        self.began_s = 0.0
        self.finished = []

    def run(self):
        self.thread, self.began_s = threading.current_thread().name, time.monotonic()
        self.begun.set()
        if self._gate is not None:
            assert self._gate.wait(LONG_S)
        self._ran.append(self.name)
        if self._error is not None:
            raise self._error

    def finish(self, error):
        self.finished.append((error, threading.current_thread()))


@pytest.fixture
def lanes():
    made = ThreadLanes()
    yield made
    made.close()
    assert not any(thread.name.startswith("xllm-kv") for thread in threading.enumerate())


def poll_all(lanes):
    deadline_s = time.monotonic() + LONG_S
    while lanes.num_open:
        assert lanes.wait(max(0.0, deadline_s - time.monotonic())), "a job never ran"
        lanes.poll()


def test_threads_start_with_the_first_job_and_each_lane_has_its_own(lanes):
    assert not any(thread.name.startswith("xllm-kv") for thread in threading.enumerate())
    jobs = [Job(lane) for lane in LANES]
    for job in jobs:
        lanes.submit(job)
    poll_all(lanes)
    assert [job.thread for job in jobs] == [f"xllm-kv-{lane}" for lane in LANES]


def test_the_most_urgent_goes_first_and_equals_in_order(lanes):
    gate, ran = threading.Event(), []
    first = Job(name="first", gate=gate, priority=5, ran=ran)
    lanes.submit(first)
    assert first.begun.wait(LONG_S)
    for name, priority in [("c1", 2), ("a1", -1), ("b", 1), ("c2", 2), ("a2", -1), ("d", 2**40)]:
        lanes.submit(Job(name=name, priority=priority, ran=ran))
    gate.set()
    poll_all(lanes)
    assert ran == ["first", "a1", "a2", "b", "c1", "c2", "d"]


def test_a_busy_lane_does_not_hold_up_another(lanes):
    gate = threading.Event()
    slow, quick = Job(WRITE, gate=gate), Job(LOAD)
    lanes.submit(slow)
    assert slow.begun.wait(LONG_S)
    lanes.submit(quick)
    assert lanes.wait(LONG_S)
    assert lanes.poll() == 1 and quick.finished and not slow.finished
    gate.set()
    poll_all(lanes)
    assert slow.finished


def test_nothing_is_locked_while_a_job_runs(lanes):
    """The owner submits, polls and counts, also on the same lane, while a copy is under way."""
    gate = threading.Event()
    job = Job(gate=gate)
    lanes.submit(job)
    assert job.begun.wait(LONG_S)
    began_s = time.monotonic()
    for _ in range(100):
        lanes.submit(Job())
        assert lanes.poll() == 0
    assert lanes.num_open == 101
    assert not lanes.wait(0.0)
    assert time.monotonic() - began_s < LONG_S / 2
    gate.set()
    poll_all(lanes)


def test_finish_is_called_once_by_the_owner_and_only_from_poll(lanes):
    job = Job()
    lanes.submit(job)
    assert lanes.wait(LONG_S) and lanes.wait(0.0), "still there for the poll"
    assert not job.finished
    assert lanes.poll() == 1
    assert job.finished == [(None, threading.current_thread())]
    assert lanes.poll() == 0 and not lanes.wait(0.0)


@pytest.mark.parametrize("error", [OSError(28, "full"), ValueError("bug"), SystemExit(3), KeyboardInterrupt()],
                         ids=lambda error: type(error).__name__)
def test_errors_reach_finish_and_the_lane_lives_on(lanes, error):
    job, after = Job(error=error), Job()
    lanes.submit(job)
    lanes.submit(after)
    poll_all(lanes)
    assert job.finished == [(error, threading.current_thread())]
    assert after.finished[0][0] is None


def test_what_finish_raises_reaches_the_owner(lanes):
    class Bad(Job):
        def finish(self, error):
            raise error

    after = Job()
    lanes.submit(Bad(error=ValueError("bug")))
    assert lanes.wait(LONG_S)
    with pytest.raises(ValueError, match="bug"):
        lanes.poll()
    lanes.submit(after)
    poll_all(lanes)
    assert after.finished


def test_jobs_may_submit_more_when_they_finish(lanes):
    class Chain(Job):
        def __init__(self, left):
            super().__init__()
            self.left = left

        def finish(self, error):
            if self.left:
                lanes.submit(Chain(self.left - 1))

    lanes.submit(Chain(5))
    poll_all(lanes)
    assert lanes.stats[SAVE].num_jobs == 6


def test_totals_count_bytes_jobs_and_what_is_open(lanes):
    gate = threading.Event()
    for _ in range(3):
        lanes.submit(Job(READ, num_bytes=1000, gate=gate))
    assert lanes.stats[READ].queued == lanes.num_open == 3
    gate.set()
    poll_all(lanes)
    stats = lanes.stats[READ]
    assert (stats.num_jobs, stats.num_bytes, stats.queued) == (3, 3000, 0)
    assert 0.0 < stats.busy_s <= stats.wait_s
    assert stats.bytes_per_s > 0
    assert lanes.stats[SAVE].num_jobs == 0


def test_the_rate_is_a_running_mean_that_begins_with_the_first_job():
    stats = LaneStats()
    stats.count(1000, 1.0, 1.0)
    assert stats.bytes_per_s == 1000
    stats.count(2000, 1.0, 1.0)
    assert stats.bytes_per_s == pytest.approx(1200)


# --- bandwidth


def test_a_lane_keeps_to_its_bandwidth_over_all_its_jobs():
    """Job i may not begin before the bytes of those ahead of it have had their time. A slow machine only helps."""
    rate, num_bytes = 1e6, 20_000
    lanes = ThreadLanes({WRITE: rate})
    jobs = [Job(WRITE, num_bytes=num_bytes) for _ in range(6)]
    free = [Job(READ, num_bytes=10**9) for _ in range(3)]
    submitted_s = time.monotonic()
    for job in jobs + free:
        lanes.submit(job)
    poll_all(lanes)
    lanes.close()
    for i, job in enumerate(jobs):
        assert job.began_s - submitted_s >= 0.999 * i * num_bytes / rate
    assert free[-1].began_s - free[0].began_s < LONG_S, "no limit on the other lane: a gigabyte takes no second each"


@pytest.mark.parametrize(("lane", "priority", "foreground", "rides"), [
    (SAVE, URGENT + 1, True, True), (WRITE, URGENT + 1, True, True), (WRITE, URGENT + 1, False, False),
    (WRITE, URGENT, True, False), (LOAD, URGENT + 1, True, False), (READ, URGENT + 1, True, False),
])
def test_only_what_nobody_waits_for_rides_and_only_while_steps_run(lane, priority, foreground, rides):
    lanes, ran = ThreadLanes(rides=True), []
    lanes.foreground = foreground
    job = Job(lane, priority=priority, ran=ran)
    lanes.submit(job)
    assert lanes.num_riding == rides
    if rides:
        time.sleep(0.02)
        assert not ran, "no lane's thread took it"
        lanes.ride(0.0)
    poll_all(lanes)
    lanes.close()
    assert len(ran) == 1


def test_a_ride_is_one_job_at_least_and_ends_with_its_budget():
    lanes, ran = ThreadLanes(rides=True), []
    lanes.foreground = True
    for number in range(4):
        lanes.submit(Job(SAVE, priority=1, name=str(number), ran=ran))
    lanes.ride(0.0)
    assert ran == ["0"]
    lanes.ride(LONG_S)
    assert ran == ["0", "1", "2", "3"]
    lanes.ride(LONG_S)
    poll_all(lanes)
    lanes.close()


def test_a_ride_keeps_the_bandwidth():
    lanes, ran = ThreadLanes({SAVE: 1.0}, rides=True), []
    lanes.foreground = True
    for number in range(2):
        lanes.submit(Job(SAVE, priority=1, name=str(number), num_bytes=10**6, ran=ran))
    lanes.ride(LONG_S)
    lanes.ride(LONG_S)
    assert ran == ["0"] and lanes.num_riding == 1
    lanes.close()


def test_when_the_steps_end_the_threads_take_over():
    lanes, ran = ThreadLanes(rides=True), []
    lanes.foreground = True
    for number in range(3):
        lanes.submit(Job(WRITE, priority=1, name=str(number), ran=ran))
    assert not ran
    lanes.foreground = False
    poll_all(lanes)
    lanes.close()
    assert ran == ["0", "1", "2"]


# --- the end


def test_close_lets_the_running_job_end_and_drops_the_rest():
    lanes, gate, ran = ThreadLanes(), threading.Event(), []
    running = Job(name="running", gate=gate, ran=ran)
    lanes.submit(running)
    assert running.begun.wait(LONG_S)
    queued = [Job(name="queued", priority=-9, ran=ran) for _ in range(5)]
    for job in queued:
        lanes.submit(job)
    closer = threading.Thread(target=lanes.close)
    closer.start()
    assert lanes._stopping.wait(LONG_S)
    gate.set()
    closer.join(LONG_S)
    assert not closer.is_alive()
    assert ran == ["running"]
    assert not any(job.finished for job in queued)
    with pytest.raises(AssertionError, match="closed"):
        lanes.submit(Job())


def test_close_does_not_wait_for_the_bandwidth():
    lanes = ThreadLanes({SAVE: 1.0})
    first = Job(num_bytes=3600)
    lanes.submit(first)
    assert lanes.wait(LONG_S)
    lanes.submit(Job(num_bytes=3600))
    began_s = time.monotonic()
    lanes.close()
    assert time.monotonic() - began_s < LONG_S


def test_close_without_a_job_and_twice():
    lanes = ThreadLanes()
    lanes.close()
    lanes.close()
    assert not lanes.wait(0.0) and lanes.poll() == 0


# --- tickets


def in_thread(function, *arguments):
    """Runs in a thread; returns (thread, what it returned or raised)."""
    outcome = []

    def body():
        try:
            outcome.append(function(*arguments))
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    return thread, outcome


def test_a_layer_may_be_read_once_it_has_come():
    ticket = Ticket(1, 3)
    order = []
    waiters = [in_thread(lambda layer: (ticket.wait(layer), order.append(layer)), layer) for layer in (2, 0, 1)]
    for layer in range(3):
        ticket.advance()
        deadline_s = time.monotonic() + LONG_S
        while len(order) <= layer:
            assert time.monotonic() < deadline_s
            time.sleep(0.001)
        assert order == list(range(layer + 1)), "nobody before his layer"
    for thread, outcome in waiters:
        thread.join(LONG_S)
        assert not isinstance(outcome[0], Exception)
    ticket.wait(2)


def test_a_failed_load_ends_every_wait_for_what_has_not_come():
    ticket, cause = Ticket(1, 3), ValueError("lost")
    waiting = [in_thread(ticket.wait, layer) for layer in (1, 2)]
    ticket.advance()
    ticket.fail(cause)
    for thread, outcome in waiting:
        thread.join(LONG_S)
        assert isinstance(outcome[0], DeviceError) and outcome[0].__cause__ is cause
    ticket.wait(0)
    with pytest.raises(DeviceError):
        ticket.wait(1)


def test_the_board_lists_the_loads_that_are_open():
    board = TicketBoard()
    first, second = board.open(1), board.open(1)
    assert first.ticket_id != second.ticket_id and first.ticket_id > 0
    board.close(first)
    assert first.ticket_id not in board and second.ticket_id in board
    assert board.tickets((first.ticket_id, second.ticket_id, 99)) == [second]
    assert board.open(1).ticket_id not in (first.ticket_id, second.ticket_id)
