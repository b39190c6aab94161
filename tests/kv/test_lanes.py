"""`OpenMoves` over `ThreadLanes`, with real threads. Order is made by gates, not by sleeping."""

import queue
import threading
import time

import numpy as np
import pytest

from xllm.cost.online import OnlineCost
from xllm.errors import DiskError
from xllm.kv import moves
from xllm.kv.lanes import ThreadLanes
from xllm.kv.moves import ASSUMED_BYTES_PER_S, LANES, LOAD, READ, SAVE, URGENT, WRITE, MoveError, OpenMoves

LONG_S = 20.0  # a test that waits so long has failed
BLOCK_BYTES = 1000


class Job:
    """A move and what performing it does: waits at `gate` if it has one, then notes its name. `finished` is what its
    submitter was told, and in which thread."""

    def __init__(self, lane=SAVE, *, name="", priority=0, num_blocks=1, gate=None, error=None, ran=None):
        self.lane, self.name, self.priority, self.num_blocks = lane, name, priority, num_blocks
        self._gate, self._error = gate, error
        self._ran = [] if ran is None else ran
        self.begun = threading.Event()
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
        return self.num_blocks

    def finish(self, done):
        assert done.num_done == (0 if done.error else self.num_blocks)
        self.finished.append((done.error, threading.current_thread()))


class Performer:
    """Runs the jobs, by the numbers of their moves."""

    def __init__(self):
        self.jobs, self.begun, self.num_closed = {}, [], 0

    def begin(self, move):
        self.begun.append((move.number, threading.current_thread()))

    def run(self, move):
        assert move.num_bytes == self.jobs[move.number].num_blocks * BLOCK_BYTES
        return self.jobs[move.number].run()

    def close(self):
        self.num_closed += 1


class LocalMoves(ThreadLanes):
    """A `MoveLink` to lanes in this process."""

    def __init__(self, performer, max_bytes_per_s, *, rides):
        self._done = queue.SimpleQueue()
        super().__init__(performer, self._done.put, max_bytes_per_s, rides=rides)

    def receive(self, timeout_s):
        found = []
        try:
            found.append(self._done.get(timeout=timeout_s) if timeout_s > 0.0 else self._done.get_nowait())
            while True:
                found.append(self._done.get_nowait())
        except queue.Empty:
            return found


class Lanes(OpenMoves):
    """`OpenMoves` over `ThreadLanes`."""

    def __init__(self, max_bytes_per_s=None, *, rides=False):
        self.performer = Performer()
        self.threads = LocalMoves(self.performer, max_bytes_per_s, rides=rides)
        super().__init__(self.threads, BLOCK_BYTES, OnlineCost())

    def give(self, job):
        jobs = self.performer.jobs
        jobs[len(jobs) + 1] = job
        blocks = np.arange(job.num_blocks, dtype=np.int32)
        self.submit(job.lane, job.priority, blocks, blocks, job.finish)


@pytest.fixture
def lanes():
    made = Lanes()
    yield made
    made.close()
    assert not any(thread.name.startswith("xllm-kv") for thread in threading.enumerate())


def poll_all(lanes):
    deadline_s = time.monotonic() + LONG_S
    while len(lanes):
        assert lanes.wait(max(0.0, deadline_s - time.monotonic())), "a job never ran"
        lanes.poll()


def test_threads_start_with_the_first_job_and_each_lane_has_its_own(lanes):
    assert not any(thread.name.startswith("xllm-kv") for thread in threading.enumerate())
    jobs = [Job(lane) for lane in LANES]
    for job in jobs:
        lanes.give(job)
    poll_all(lanes)
    assert [job.thread for job in jobs] == [f"xllm-kv-{lane}" for lane in LANES]


def test_the_most_urgent_goes_first_and_equals_in_order(lanes):
    gate, ran = threading.Event(), []
    first = Job(name="first", gate=gate, priority=5, ran=ran)
    lanes.give(first)
    assert first.begun.wait(LONG_S)
    for name, priority in [("c1", 2), ("a1", -1), ("b", 1), ("c2", 2), ("a2", -1), ("d", 2**40)]:
        lanes.give(Job(name=name, priority=priority, ran=ran))
    gate.set()
    poll_all(lanes)
    assert ran == ["first", "a1", "a2", "b", "c1", "c2", "d"]


def test_a_busy_lane_does_not_hold_up_another(lanes):
    gate = threading.Event()
    slow, quick = Job(WRITE, gate=gate), Job(LOAD)
    lanes.give(slow)
    assert slow.begun.wait(LONG_S)
    lanes.give(quick)
    assert lanes.wait(LONG_S)
    assert lanes.poll() == 1 and quick.finished and not slow.finished
    gate.set()
    poll_all(lanes)
    assert slow.finished


def test_nothing_is_locked_while_a_job_runs(lanes):
    """The owner submits, polls and counts, also on the same lane, while a copy is under way."""
    gate = threading.Event()
    job = Job(gate=gate)
    lanes.give(job)
    assert job.begun.wait(LONG_S)
    began_s = time.monotonic()
    for _ in range(100):
        lanes.give(Job())
        assert lanes.poll() == 0
    assert len(lanes) == 101
    assert not lanes.wait(0.0)
    assert time.monotonic() - began_s < LONG_S / 2
    gate.set()
    poll_all(lanes)


def test_finish_is_called_once_by_the_owner_and_only_from_poll(lanes):
    job = Job()
    lanes.give(job)
    assert lanes.wait(LONG_S) and lanes.wait(0.0), "still there for the poll"
    assert not job.finished
    assert lanes.poll() == 1
    assert job.finished == [(None, threading.current_thread())]
    assert lanes.poll() == 0 and not lanes.wait(0.0)


@pytest.mark.parametrize("error", [OSError(28, "full"), ValueError("bug"), SystemExit(3), KeyboardInterrupt()],
                         ids=lambda error: type(error).__name__)
def test_errors_reach_finish_and_the_lane_lives_on(lanes, error):
    job, after = Job(error=error), Job()
    lanes.give(job)
    lanes.give(after)
    poll_all(lanes)
    told = MoveError("device", f"{type(error).__name__}: {error}")
    assert job.finished == [(told, threading.current_thread())]
    assert after.finished[0][0] is None


@pytest.mark.parametrize("lane", LANES)
def test_what_the_disk_refuses_is_told_apart(lanes, lane):
    job = Job(lane, error=DiskError(28, "full"))
    lanes.give(job)
    poll_all(lanes)
    if lane in (READ, WRITE, *moves.STORE_LANES):
        kind = "disk" if lane in (READ, WRITE) else "store"
        assert job.finished[0][0] == MoveError(kind, "[Errno 28] full")
    else:
        assert job.finished[0][0] == MoveError("device", "DiskError: [Errno 28] full")


def test_what_finish_raises_reaches_the_owner(lanes):
    class Bad(Job):
        def finish(self, done):
            raise ValueError(done.error.message)

    after = Job()
    lanes.give(Bad(error=OSError("bug")))
    assert lanes.wait(LONG_S)
    with pytest.raises(ValueError, match="bug"):
        lanes.poll()
    lanes.give(after)
    poll_all(lanes)
    assert after.finished


def test_jobs_may_submit_more_when_they_finish(lanes):
    class Chain(Job):
        def __init__(self, left):
            super().__init__()
            self.left = left

        def finish(self, done):
            if self.left:
                lanes.give(Chain(self.left - 1))

    lanes.give(Chain(5))
    poll_all(lanes)
    assert lanes.stats[SAVE].num_moves == 6


def test_totals_count_bytes_jobs_and_what_is_open(lanes):
    gate = threading.Event()
    for _ in range(3):
        lanes.give(Job(READ, gate=gate))
    assert lanes.stats[READ].queued == len(lanes) == 3
    gate.set()
    poll_all(lanes)
    stats = lanes.stats[READ]
    assert (stats.num_moves, stats.num_bytes, stats.queued) == (3, 3000, 0)
    assert 0.0 < stats.busy_s <= stats.wait_s
    assert lanes.seconds(READ, 1) > 0.0
    assert lanes.stats[SAVE].num_moves == 0


def test_how_long_a_lane_takes_is_assumed_before_its_first_move_and_learnt_then(lanes):
    assert lanes.seconds(SAVE, 3) == 3 * BLOCK_BYTES / ASSUMED_BYTES_PER_S
    lanes.cost.note_move(SAVE, BLOCK_BYTES, 1.0)
    assert lanes.seconds(SAVE, 1) == pytest.approx(1.0, rel=0.01)
    assert lanes.seconds(LOAD, 3) == 3 * BLOCK_BYTES / ASSUMED_BYTES_PER_S


# --- bandwidth


def test_a_lane_keeps_to_its_bandwidth_over_all_its_jobs():
    """Job i may not begin before the bytes of those ahead of it have had their time. A slow machine only helps."""
    rate, num_blocks = 1e6, 20
    lanes = Lanes({WRITE: rate})
    jobs = [Job(WRITE, num_blocks=num_blocks) for _ in range(6)]
    free = [Job(READ, num_blocks=10**6) for _ in range(3)]
    submitted_s = time.monotonic()
    for job in jobs + free:
        lanes.give(job)
    poll_all(lanes)
    lanes.close()
    for i, job in enumerate(jobs):
        assert job.began_s - submitted_s >= 0.999 * i * num_blocks * BLOCK_BYTES / rate
    assert free[-1].began_s - free[0].began_s < LONG_S, "no limit on the other lane: a gigabyte takes no second each"


@pytest.mark.parametrize(("lane", "priority", "foreground", "rides"), [
    (SAVE, URGENT + 1, True, True), (WRITE, URGENT + 1, True, True), (WRITE, URGENT + 1, False, False),
    (WRITE, URGENT, True, False), (LOAD, URGENT + 1, True, False), (READ, URGENT + 1, True, False),
])
def test_only_what_nobody_waits_for_rides_and_only_while_steps_run(lane, priority, foreground, rides):
    lanes, ran = Lanes(rides=True), []
    lanes.foreground = foreground
    job = Job(lane, priority=priority, ran=ran)
    lanes.give(job)
    assert lanes.threads.num_riding == rides
    if rides:
        time.sleep(0.02)
        assert not ran, "no lane's thread took it"
        lanes.threads.ride(0.0)
    poll_all(lanes)
    lanes.close()
    assert len(ran) == 1


def test_a_ride_is_one_job_at_least_and_ends_with_its_budget():
    lanes, ran = Lanes(rides=True), []
    lanes.foreground = True
    for number in range(4):
        lanes.give(Job(SAVE, priority=1, name=str(number), ran=ran))
    lanes.threads.ride(0.0)
    assert ran == ["0"]
    lanes.threads.ride(LONG_S)
    assert ran == ["0", "1", "2", "3"]
    lanes.threads.ride(LONG_S)
    poll_all(lanes)
    lanes.close()


def test_a_ride_keeps_the_bandwidth():
    lanes, ran = Lanes({SAVE: 1.0}, rides=True), []
    lanes.foreground = True
    for number in range(2):
        lanes.give(Job(SAVE, priority=1, name=str(number), num_blocks=1000, ran=ran))
    lanes.threads.ride(LONG_S)
    lanes.threads.ride(LONG_S)
    assert ran == ["0"] and lanes.threads.num_riding == 1
    lanes.close()


def test_when_the_steps_end_the_threads_take_over():
    lanes, ran = Lanes(rides=True), []
    lanes.foreground = True
    for number in range(3):
        lanes.give(Job(WRITE, priority=1, name=str(number), ran=ran))
    assert not ran
    lanes.foreground = False
    poll_all(lanes)
    lanes.close()
    assert ran == ["0", "1", "2"]


# --- the end


def test_close_lets_the_running_job_end_and_drops_the_rest():
    lanes, gate, ran = Lanes(), threading.Event(), []
    running = Job(name="running", gate=gate, ran=ran)
    lanes.give(running)
    assert running.begun.wait(LONG_S)
    queued = [Job(name="queued", priority=-9, ran=ran) for _ in range(5)]
    for job in queued:
        lanes.give(job)
    closer = threading.Thread(target=lanes.close)
    closer.start()
    assert lanes.threads._stopping.wait(LONG_S)
    gate.set()
    closer.join(LONG_S)
    assert not closer.is_alive()
    assert ran == ["running"]
    assert not any(job.finished for job in queued)
    with pytest.raises(AssertionError, match="closed"):
        lanes.give(Job())


def test_close_does_not_wait_for_the_bandwidth():
    lanes = Lanes({SAVE: 1.0})
    first = Job(num_blocks=4)
    lanes.give(first)
    assert lanes.wait(LONG_S)
    lanes.give(Job(num_blocks=4))
    began_s = time.monotonic()
    lanes.close()
    assert time.monotonic() - began_s < LONG_S


def test_close_without_a_job_and_twice():
    lanes = Lanes()
    lanes.close()
    lanes.close()
    assert not lanes.wait(0.0) and lanes.poll() == 0
    assert lanes.performer.num_closed == 1


def test_the_performer_is_closed_when_nothing_runs_any_more():
    lanes, gate = Lanes(), threading.Event()
    job = Job(WRITE, gate=gate)
    lanes.give(job)
    assert job.begun.wait(LONG_S)
    closer = threading.Thread(target=lanes.close)
    closer.start()
    assert lanes.threads._stopping.wait(LONG_S)
    assert lanes.performer.num_closed == 0
    gate.set()
    closer.join(LONG_S)
    assert lanes.performer.num_closed == 1


def test_a_move_is_begun_by_whoever_sends_it_and_in_order(lanes):
    """So that a step that is submitted next finds the ticket of a load open."""
    for number in range(3):
        lanes.give(Job(LOAD, priority=-number))
        assert lanes.performer.begun == [(n + 1, threading.current_thread()) for n in range(number + 1)]
    poll_all(lanes)


def test_the_link_hears_of_the_foreground_only_when_it_changes():
    heard = []
    lanes = Lanes()
    lanes.threads.set_foreground = heard.append
    for steps_run in (False, True, True, False, False, True):
        lanes.foreground = steps_run
        assert lanes.foreground == steps_run
    assert heard == [True, False, True]
