"""Chooses how many threads the CPU computes with: fewer while other processes keep the cores busy, more when they
leave.

Threads that wait for each other at every operator are as slow as the one that the system holds back, so that beside one
busy neighbour two threads are slower than one. What is held back is seen in Linux's `schedstat`: how long each thread
was ready to run and had no core. Priorities and affinities stay as they are. Results do not depend on how many compute.
"""

from __future__ import annotations

import ctypes
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

logger = logging.getLogger("xllm.backends.cpu")

TASKS, CORES = Path("/proc/self/task"), Path("/proc/stat")
# Chosen, all of them; what they give beside a busy neighbour is in docs/performance.md (`xllm bench neighbours`).
MOST_LOST = 0.15  # of the busiest thread's time; a web server beside its engine stays below that
WINDOW_S, TRIAL_S = 0.05, 0.02  # several time slices of 3 ms; a trial that fails should be short
COMPUTES = 0.25  # of the busiest thread's time; other threads of the process are busy less than that
IDLE = 0.7  # of a core: a neighbour has left
# Until one more thread is tried. Beside two neighbours a trial that fails costs as much as six steps: without an idle
# core in sight it is worth that seldom, with one at once.
IDLE_WAIT_S, FIRST_WAIT_S, LONGEST_WAIT_S = 0.1, 1.0, 8.0


@dataclass(frozen=True, slots=True)
class Seen:
    """What happened in a window of `wall_s`. busy_s: how long the busiest thread ran or was ready to run. held_s: how
    long the threads that compute were ready to run and had no core, added up. idle_cores: how many of the cores that
    this process may use were idle, on average; 0 if that is not known."""

    wall_s: float
    busy_s: float
    held_s: float
    idle_cores: float = 0.0


@dataclass(frozen=True, slots=True)
class Pace:
    """num_threads: now. wait_s: until one more is tried. backoff_s: the next such wait. is_trial: one more than before
    was just allowed, to see whether there is a core for it."""

    num_threads: int
    wait_s: float = 0.0
    backoff_s: float = FIRST_WAIT_S
    is_trial: bool = False


def next_pace(pace: Pace, seen: Seen, max_threads: int) -> Pace:
    """The number of threads for the next window.

    Where more than MOST_LOST of the time was lost, as many threads go as are held back on average, at least one. One
    more is tried after a wait, which doubles when the trial fails and shrinks with the time that all threads run; an
    idle core makes it the shortest.
    """
    if seen.busy_s <= 0:
        return pace
    lost = seen.held_s / seen.busy_s
    if lost > MOST_LOST:
        backoff_s = min(2 * pace.backoff_s, LONGEST_WAIT_S) if pace.is_trial else pace.backoff_s
        fewer = max(1, pace.num_threads - max(1, round(lost)))
        return Pace(fewer, backoff_s, backoff_s)
    if pace.num_threads >= max_threads:
        return Pace(max_threads, 0.0, max(FIRST_WAIT_S, pace.backoff_s - seen.wall_s))
    wait_s = min(pace.wait_s, IDLE_WAIT_S) if seen.idle_cores >= IDLE else pace.wait_s
    wait_s -= seen.wall_s
    if wait_s > 0:
        return replace(pace, wait_s=wait_s, is_trial=False)
    return Pace(pace.num_threads + 1, 0.0, pace.backoff_s, is_trial=True)


class RunDelays:
    """Reads the threads' times from `tasks`, a folder as /proc/self/task, the cores' from `cores`, as /proc/stat."""

    def __init__(self, tasks: Path = TASKS, cores: Path = CORES):
        self._tasks, self._cores = tasks, cores
        self._began_s = time.perf_counter()
        self._last = self._read()
        self._idle_before = self._idle_s()

    @property
    def is_known(self) -> bool:
        """Whether the system has these numbers."""
        return bool(self._last)

    def take(self) -> Seen:
        """What happened since the last call."""
        last, now_s, began_s = self._last, time.perf_counter(), self._began_s
        self._last, self._began_s = self._read(), now_s
        times: list[tuple[int, int]] = []
        for task, (ran, held) in self._last.items():
            ran_before, held_before = last.get(task, (0, 0))
            times.append((ran - ran_before + held - held_before, held - held_before))
        busy = max((busy for busy, _ in times), default=0)
        held = sum(held for own, held in times if own >= COMPUTES * busy)
        idle_before, self._idle_before = self._idle_before, self._idle_s()
        idle_cores = (self._idle_before - idle_before) / max(now_s - began_s, 1e-9)
        return Seen(now_s - began_s, busy / 1e9, held / 1e9, idle_cores)

    def _idle_s(self) -> float:
        """Of the cores that this process may use, added up: since the machine started."""
        try:
            allowed = {f"cpu{core}".encode() for core in os.sched_getaffinity(0)}
            ticks = [int(fields[4]) for line in self._cores.read_bytes().splitlines()
                     if (fields := line.split(maxsplit=5))[:1] and fields[0] in allowed]
            return sum(ticks) / os.sysconf("SC_CLK_TCK")
        except (OSError, ValueError, IndexError, AttributeError):  # a system without it
            return 0.0

    def _read(self) -> dict[str, tuple[int, int]]:
        """Nanoseconds by thread: those it ran, and those it was ready to run without a core."""
        found: dict[str, tuple[int, int]] = {}
        try:
            for task in os.listdir(self._tasks):
                try:
                    with open(f"{self._tasks}/{task}/schedstat", "rb") as file:
                        ran, held, _ = file.read().split()
                except FileNotFoundError:  # it has ended
                    continue
                found[task] = int(ran), int(held)
        except (OSError, ValueError):  # a system without it
            return {}
        return found


def set_torch_threads(number: int) -> None:
    """torch's number of threads, of the calling thread alone.

    After torch.set_num_threads a thread that is not ours was seen to run for 8 ms beside the next step, perhaps of
    another pool of torch's: where torch computes with GNU OpenMP, that is told directly.
    """
    try:
        openmp = ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    except (OSError, AttributeError):  # another OpenMP, or a system without such names
        torch.set_num_threads(number)
        return
    openmp.omp_set_num_threads(number)
    if torch.get_num_threads() != number:  # torch has a copy of another name
        torch.set_num_threads(number)


class ThreadControl:
    """Sets how many threads operators compute with. The computing thread calls `step`, which calls `apply` with the
    number when it changes, and at first. delays: None if the number is to stay.

    lowered_total: how often there was not a core for every thread.
    """

    def __init__(self, max_threads: int, apply: Callable[[int], None], delays: RunDelays | None):
        self.max_threads = max_threads
        self.lowered_total = 0
        self._apply = apply
        self._delays = delays
        self._pace = Pace(max_threads)
        self._next_s: float | None = None  # before the first step
        if max_threads > 1 and delays is not None and not delays.is_known:
            logger.info("how long threads wait for a core is not known here: their number stays %d", max_threads)

    @property
    def num_threads(self) -> int:
        return self._pace.num_threads

    def step(self) -> None:
        """Called before each step: changes the number of threads if it should, at most once in a window."""
        if self._next_s is None:
            self._apply(self.max_threads)
        if self.max_threads == 1 or self._delays is None or not self._delays.is_known:
            self._next_s = 0.0
            return
        now_s = time.perf_counter()
        if self._next_s is None:  # what the loading saw does not count
            self._delays.take()
            self._next_s = now_s + WINDOW_S
        if now_s < self._next_s:
            return
        before, self._pace = self._pace, next_pace(self._pace, self._delays.take(), self.max_threads)
        self._next_s = now_s + (TRIAL_S if self._pace.is_trial else WINDOW_S)
        if self._pace.num_threads == before.num_threads:
            return
        self._apply(self._pace.num_threads)
        if self._pace.num_threads < before.num_threads and not before.is_trial:
            self._note(before.num_threads)

    def _note(self, before: int) -> None:
        self.lowered_total += 1
        log = logger.warning if self.lowered_total == 1 else logger.debug
        log("other processes keep the cores busy: computing with %d thread(s) instead of %d, and with more when they "
            "leave", self._pace.num_threads, before)
