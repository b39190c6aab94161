"""`ProcessLink`: workers in processes of their own, one a rank. `rank.py` is the other end.

A command is encoded once, and the same bytes go to every rank. A rank that ends, falls silent, or stays behind the
others fails the engine, which says which rank it was.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import time
from pathlib import Path

import zmq

from xllm import env
from xllm.child_end import ChildEnd
from xllm.child_process import run_module, socket_folder
from xllm.errors import WorkerError
from xllm.worker.gather import Gatherer, compare_begun
from xllm.worker.last_word import last_word
from xllm.worker.link import WorkerLink
from xllm.worker.message_codec import decode, encode
from xllm.worker.messages import Done, Failed, Loaded, StopWorker, WorkerCommand, WorkerReport, WorkerStats

RANK_MODULE = "xllm.worker.rank"
HEARTBEAT_S = 0.5  # between a rank's signs of life. Chosen: a dozen of them fit into SILENT_S
# A rank that, once loaded, sends nothing for that long is taken for stopped. Chosen: twelve heartbeats (`rank.py`), so
# that a busy machine is not mistaken for a stopped process.
SILENT_S = 6.0
# A rank that has not done what another had done that long ago, be it to begin or to finish a step, or to come to an
# exchange, is stuck. Chosen: a little more than `SILENT_S`, so that a stopped process is reported as stopped, and less
# than `parallel/seat.py:EXCHANGE_S`, so that the reason is not the exchange of another rank.
LATE_S = 7.0
# The same for what no request waits for, and may take longer on one rank: loading, adapters, moves to host memory and
# disk. Chosen: longer than one tensor of a model takes to be read from a slow disk.
LATE_PATIENT_S = 60.0
# Between two looks at the processes. Chosen: far below the limits above, and rare enough to cost nothing.
CHECK_S = 0.2
# From the first sign of a rank's death at another, which lost its connection, to where the system says it. Chosen: far
# longer than that takes, and short for whoever waits for the reason.
DEATH_S = 0.2
KILL_S = 2.0  # for the system to end a process that was killed; then it is left behind
# For the ranks to end in order, before they are killed. Chosen: less than `client/process.py:SHUTDOWN_TIMEOUT_S`, after
# which this process is killed itself, and could not kill a rank that is stopped.
CLOSE_S = 3.0


def start_rank(folder: Path, rank: int, num_ranks: int, store: str = "") -> subprocess.Popen[bytes]:
    """Start a rank's process; it connects to the sockets in `folder`, meets the other ranks at `store` (as `open_group`
    has it; "": in the folder), and ends when its stdin is closed."""
    # start_new_session: a Ctrl-C in the terminal is for the engine, which ends its workers in order
    return subprocess.Popen([sys.executable, *run_module(RANK_MODULE), str(folder), str(rank), str(num_ranks),
                             *([store] if store else [])],
                            stdin=subprocess.PIPE, stdout=2, start_new_session=True, env=env.for_child())


class _Rank:
    """The process of one rank. heard_s: when it last sent something, on the monotonic clock."""

    def __init__(self, rank: int, num_ranks: int, folder: Path, context: zmq.Context[zmq.Socket[bytes]],
                 store: str):
        self.number = rank
        self.heard_s: float | None = None  # None: it is not loaded yet, and may be silent
        self.commands = context.socket(zmq.PUSH)
        self.commands.set_hwm(0)
        self.commands.setsockopt(zmq.LINGER, 0)
        self.commands.bind(f"ipc://{folder / f'rank-{rank}'}")
        self.process = start_rank(folder, rank, num_ranks, store)
        self.end = ChildEnd(self.process)

    def forget(self) -> None:
        """Reap the process, which has ended or was killed; waits at most `KILL_S`."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(KILL_S)
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.commands.close(linger=0)


class ProcessLink(WorkerLink):
    """Starts the processes of `num_ranks` ranks; they end with this one, however it ends.

    here: those of them that are started, if some are on other machines. store: where they meet, "" on one machine.
    """

    def __init__(self, num_ranks: int, *, depth: int, here: range | None = None, store: str = ""):
        super().__init__()
        self.depth = depth
        self._checked_s = 0.0
        self._closed = False
        self._folder = socket_folder("xllm-ranks-", "rank-9999")
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._reports = self._context.socket(zmq.PULL)
        self._reports.set_hwm(0)
        self._reports.bind(f"ipc://{self._folder / 'reports'}")
        self._ranks: list[_Rank] = []
        try:
            for rank in range(num_ranks) if here is None else here:
                self._ranks.append(_Rank(rank, num_ranks, self._folder, self._context, store))
        except BaseException:
            self.close()
            raise
        self._gatherer = Gatherer(num_ranks)
        self._stats = WorkerStats()

    @property
    def pids(self) -> list[int]:
        """The ranks' processes."""
        return [rank.process.pid for rank in self._ranks]

    def send(self, command: WorkerCommand) -> None:
        if self.has_ended:
            raise WorkerError("the workers have ended")
        self._gatherer.note_sent(command)
        self._send_frame(encode(command))

    def _send_frame(self, frame: bytes) -> None:
        for rank in self._ranks:
            self._send_to(rank, frame)

    def _send_to(self, rank: _Rank, frame: bytes) -> None:
        """Send to one rank. A socket takes everything at once, but only with a peer: before the rank has connected, and
        once it has gone, this waits and checks the ranks."""
        while True:
            try:
                rank.commands.send(frame, zmq.NOBLOCK, copy=False)
                return
            except zmq.Again:
                if self._closed:  # it is to end, and has
                    return
                self._check_ranks()
                rank.commands.poll(int(CHECK_S * 1000), zmq.POLLOUT)

    def stats(self) -> WorkerStats:
        return self._stats

    def idle_s(self) -> float | None:
        return 1.0

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if not self.has_ended:
            with contextlib.suppress(Exception):  # it was to end anyway
                self._end_in_order()
        self._end_ranks()
        self._context.destroy(linger=0)

    def _end_in_order(self) -> None:
        self.send(StopWorker())
        until_s = time.monotonic() + CLOSE_S
        while not self._pop(Done) and time.monotonic() < until_s:
            if any(rank.process.poll() for rank in self._ranks):  # killed, or failed: it will not answer
                return
            self._take(CHECK_S)
        for rank in self._ranks:
            with contextlib.suppress(subprocess.TimeoutExpired):
                rank.process.wait(max(0.0, until_s - time.monotonic()))

    def _next(self, timeout_s: float | None) -> WorkerReport | None:
        until_s = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            if time.monotonic() - self._checked_s > CHECK_S:
                self._check_ranks()
            wait_s = CHECK_S if until_s is None else max(0.0, min(CHECK_S, until_s - time.monotonic()))
            if self._poll(int(wait_s * 1000)):
                report = self._receive()
                if isinstance(report, Failed):
                    self._look_for_the_cause()
                    self._end_ranks()
                if report is not None:
                    return report
            elif until_s is not None and time.monotonic() >= until_s:
                return None

    def _poll(self, timeout_ms: int) -> bool:
        """Whether there is something for `_receive`, waiting for it."""
        return bool(self._reports.poll(timeout_ms))

    def _receive(self) -> WorkerReport | None:
        try:
            origin, frame = self._reports.recv_multipart()
            number, report = origin[0], decode(frame)
            rank = self._ranks[number]
        except (ValueError, IndexError) as error:
            raise self._failed(f"what a worker sent cannot be read: {error}") from error
        if isinstance(report, Loaded) or rank.heard_s is not None:
            rank.heard_s = time.monotonic()
        return self._take_in(number, report)

    def _take_in(self, number: int, report: WorkerReport) -> WorkerReport | None:
        """Note what a rank reports; returns what the engine is to get now, see `Gatherer.add`."""
        if isinstance(report, WorkerStats):
            self._gatherer.note_exchange(number, report.exchange_s)
            if number == 0:
                self._stats = report
            return None
        try:
            return self._gatherer.add(number, report)
        except WorkerError as error:
            raise self._failed(str(error)) from None

    def _check_ranks(self) -> None:
        """Raise WorkerError for a rank that has ended, is silent, or is stuck behind the others."""
        now, late = time.monotonic(), self._gatherer.late_ranks(LATE_S, LATE_PATIENT_S)
        since_s, self._checked_s = self._checked_s, now
        for rank in self._ranks:
            code = rank.process.poll()
            if code is not None and not (self._closed or self.has_ended):
                self._compare_the_last_words()
                raise self._failed(f"worker rank {rank.number} {rank.end.reason(code)}")
            rank.end.look()
            # Not if it was this process that did not listen.
            if rank.heard_s is not None and now - rank.heard_s > SILENT_S and now - since_s < SILENT_S / 2:
                raise self._failed(f"worker rank {rank.number} has said nothing for {now - rank.heard_s:.0f} s")
        if late is not None:
            what, missing, late_s = late
            raise self._failed(f"worker rank {_listed(missing)} has not {what}, {late_s:.0f} s after the others")
        if (found := self._gatherer.absent_ranks(LATE_S)) is not None:
            absent, waited_s = found
            raise self._failed(f"worker rank {_listed(absent)} has not come to an exchange of the ranks, in which "
                               f"others have waited for {waited_s:.0f} s")

    def _compare_the_last_words(self) -> None:
        """Raise WorkerError if ranks have said that they do different things: an exchange of theirs may have ended one,
        and not the one that was wrong."""
        while self._poll(0):
            self._receive()
        words = {rank.number: word for rank in self._ranks if (word := last_word(self._folder, rank.number))}
        newest = max((word.step for word in words.values()), default=0)
        try:
            if words:
                compare_begun({number: word for number, word in words.items() if word.step == newest})
        except WorkerError as error:
            raise self._failed(str(error)) from None

    def _look_for_the_cause(self) -> None:
        """A rank that shares a model with one that has died fails as well, and may say so before the death is seen:
        raise WorkerError for the one that died."""
        until_s = time.monotonic() + DEATH_S
        while len(self._ranks) > 1 and time.monotonic() < until_s:
            self._check_ranks()
            time.sleep(DEATH_S / 10)

    def _failed(self, reason: str) -> WorkerError:
        self._end_ranks()
        return WorkerError(reason)

    def _end_ranks(self) -> None:
        """Kill the ranks: nothing that they still do is of use."""
        if not self.has_ended:
            self.has_ended = True
            for rank in self._ranks:
                if rank.process.poll() is None:
                    rank.process.kill()
            for rank in self._ranks:
                rank.forget()
            shutil.rmtree(self._folder, ignore_errors=True)


def _listed(ranks: set[int]) -> str:
    return ", ".join(map(str, sorted(ranks)))
